"""Means over long sequences: over windows, or over the first residues as in VirNucPro.

Each token has a share that is known before the pass: the row of a sequence is the sum of its states
multiplied by their shares. The row of a sequence that is divided is the sum of its windows' rows.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vnp_lib.model.tokens import PackedBatch
from vnp_lib.plan import NUM_SPECIAL_TOKENS, VIRNUCPRO_RESIDUES, Windows


class LongMean(ABC):
    """A way to compute the mean of a long sequence."""

    @abstractmethod
    def divide(self, batch: PackedBatch) -> PackedBatch:
        """Return the batch to compute instead, with shares; itself if none of it is long."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MeanOfTheFirst(LongMean):
    """Computes the mean over the first residues of an entire sequence: 1,024 in VirNucPro."""

    residues: int = VIRNUCPRO_RESIDUES

    def divide(self, batch: PackedBatch) -> PackedBatch:
        lengths = batch.lengths
        if not (lengths > self.residues).any():
            return batch
        shares = [
            np.where(np.arange(length) < self.residues, 1 / min(length, self.residues), 0)
            for length in lengths.tolist()
        ]
        return replace(batch, shares=_with_bos_and_eos(shares))


@dataclass(frozen=True, slots=True, kw_only=True)
class MeanOverWindows(LongMean):
    """Divides a long sequence into windows, each with BOS and EOS, and averages their residues.

    The state of a residue is the mean of its states in all windows that contain it, and the row is
    the mean over the residues. Thus a residue in n windows of a sequence of L residues has the
    share 1 / (n L) in each. A sequence of one window has the same row as without windows.
    """

    windows: Windows

    def divide(self, batch: PackedBatch) -> PackedBatch:
        lengths = batch.lengths
        if not (lengths > self.windows.length).any():
            return batch
        starts = [self.windows.starts(length) for length in lengths.tolist()]
        windows_of_each = np.array(list(map(len, starts)))
        boundaries = batch.cu_seqlens.tolist()
        pieces: list[Tensor] = []
        shares: list[NDArray[np.float64]] = []
        for (begin, end), length, own in zip(
            pairwise(boundaries), lengths.tolist(), starts, strict=True
        ):
            tokens = batch.input_ids[begin:end]
            spans = [(start, min(start + self.windows.length, length)) for start in own]
            num_windows = np.zeros(length, dtype=np.int64)
            for start, stop in spans:
                num_windows[start:stop] += 1
            share = 1 / (num_windows * length)
            for start, stop in spans:
                pieces += [tokens[:1], tokens[1 + start : 1 + stop], tokens[-1:]]
                shares.append(share[start:stop])
        windows = PackedBatch.from_mapping(
            {
                "input_ids": torch.cat(pieces),
                "cu_seqlens": np.cumsum(
                    [0, *(share.size + NUM_SPECIAL_TOKENS for share in shares)]
                ),
                "sequence_ids": np.repeat(
                    np.array(batch.sequence_ids, dtype=object), windows_of_each
                ).tolist(),
                "ordinals": np.repeat(batch.ordinals, windows_of_each),
            },
            batch_idx=batch.batch_idx,
            first_ordinal=0,
        )
        return replace(windows, shares=_with_bos_and_eos(shares))


def long_mean_of(policy: str) -> LongMean | None:
    """Parse a plan's `long_policy`: `window:1022:255`; None for a mean over all residues."""
    if windows := Windows.of_policy(policy):
        return MeanOverWindows(windows=windows)
    return MeanOfTheFirst() if policy == "virnucpro" else None


def join_windows(rows: Tensor, ordinals: NDArray[np.int64]) -> Tensor:
    """Sum up rows of neighbours with the same ordinal: of windows, (W, D), to sequences, (B, D)."""
    is_first = np.diff(ordinals, prepend=ordinals[:1] - 1) != 0
    if is_first.all():
        return rows
    sequences = torch.from_numpy(np.cumsum(is_first) - 1)
    return rows.new_zeros(int(is_first.sum()), rows.shape[1]).index_add_(0, sequences, rows)


def _with_bos_and_eos(shares: list[NDArray[np.float64]]) -> Tensor:
    """Return the shares of all tokens from those of residues: BOS and EOS have none."""
    nothing = np.zeros(1)
    return torch.from_numpy(
        np.concatenate([part for share in shares for part in (nothing, share, nothing)])
    ).float()
