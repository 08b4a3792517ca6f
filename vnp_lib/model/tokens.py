"""The alphabet of ESM-2, and batches of sequences end to end without padding."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import compress, pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vnp_lib.plan import NUM_SPECIAL_TOKENS, pack

BOS = 0
PAD = 1
EOS = 2
UNK = 3
FIRST_RESIDUE = 4
RESIDUES = "LAGVSERTIDPKQNFYMHWCXBUZO.-"  # tokens 4, 5, 6, ...
MASK = 32
ALPHABET_SIZE = 33


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PackedBatch:
    """Sequences end to end, without padding."""

    batch_idx: int
    ordinals: NDArray[np.int64]  # (B,), positions in the input
    sequence_ids: tuple[str, ...]  # B, in packing order
    input_ids: Tensor  # int64 (T,), BOS and EOS around every sequence
    cu_seqlens: Tensor  # int32 (B + 1,), first 0, last T
    max_seqlen: int  # tokens, BOS and EOS included

    # The weight of each token in a mean, float32 (T,); None weights all residues equally.
    shares: Tensor | None = None

    # Whether the batch was padded in the loader.
    is_padded: bool = False

    @classmethod
    def from_mapping(
        cls, mapping: Mapping[str, Any], *, batch_idx: int, first_ordinal: int
    ) -> PackedBatch:
        """Convert a batch from the dictionary of a loader.

        Args:
            mapping: `input_ids` and `sequence_ids`. Packed `input_ids` need `cu_seqlens`; without
                it, each row of 2-D `input_ids` is one sequence, padded with `PAD` at the right.
                `ordinals` is optional.
            batch_idx: Number of the batch.
            first_ordinal: First of consecutive ordinals, if the mapping has none.

        Raises:
            ValueError: The numbers of ids, ordinals and sequences differ, or a sequence has no
                residue.
        """
        sequence_ids = tuple(mapping["sequence_ids"])
        input_ids, cu_seqlens = _pack_ids(
            torch.as_tensor(mapping["input_ids"]), mapping.get("cu_seqlens")
        )
        ordinals = mapping.get("ordinals")
        if ordinals is None:
            ordinals = range(first_ordinal, first_ordinal + len(sequence_ids))
        batch = _checked_batch(batch_idx, ordinals, sequence_ids, input_ids, cu_seqlens)
        return batch if mapping.get("cu_seqlens") is not None else replace(batch, is_padded=True)

    @property
    def num_sequences(self) -> int:
        return len(self.sequence_ids)

    @property
    def num_tokens(self) -> int:
        return self.input_ids.numel()

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Residues of each sequence, (B,). The batch has to be on the CPU."""
        return np.diff(self.cu_seqlens.numpy()).astype(np.int64) - NUM_SPECIAL_TOKENS

    def select(self, keep: NDArray[np.bool_]) -> PackedBatch:
        """Return the sequences for which `keep`, bool (B,), is True; at least one has to be."""
        seqlens = np.diff(self.cu_seqlens.numpy())
        is_kept = torch.from_numpy(np.repeat(keep, seqlens))
        selected = _checked_batch(
            self.batch_idx,
            self.ordinals[keep],
            tuple(compress(self.sequence_ids, keep)),
            self.input_ids[is_kept],
            _boundaries(seqlens[keep]),
        )
        shares = None if self.shares is None else self.shares[is_kept]
        return replace(selected, shares=shares, is_padded=self.is_padded)

    def split(self, token_budget: int) -> list[PackedBatch]:
        """Split into batches of at most `token_budget` tokens; a longer sequence is one alone."""
        boundaries = pack(np.diff(self.cu_seqlens.numpy()), token_budget)
        places = np.arange(self.num_sequences)
        return [
            self.select((start <= places) & (places < stop)) for start, stop in pairwise(boundaries)
        ]

    def pinned(self) -> PackedBatch:
        """Return a copy in page-locked memory. Copies from pageable memory are synchronous."""
        return self._with(Tensor.pin_memory)

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> PackedBatch:
        return self._with(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def _with(self, change: Callable[[Tensor], Tensor]) -> PackedBatch:
        return replace(
            self,
            input_ids=change(self.input_ids),
            cu_seqlens=change(self.cu_seqlens),
            shares=None if self.shares is None else change(self.shares),
        )


def pack_batch(
    sequences: Sequence[str],
    sequence_ids: Sequence[str],
    ordinals: Sequence[int] | NDArray[np.int64],
    batch_idx: int,
) -> PackedBatch:
    """Tokenise sequences: BOS, one token per residue, EOS.

    Characters that ESM-2 does not know become `UNK`, lower-case ones included: the input is
    normalised before.

    Raises:
        ValueError: The numbers of ids, ordinals and sequences differ, or a sequence has no residue.
    """
    seqlens = (
        np.fromiter(map(len, sequences), dtype=np.int64, count=len(sequences)) + NUM_SPECIAL_TOKENS
    )
    cu_seqlens = _boundaries(seqlens)
    is_residue = np.ones(cu_seqlens[-1], dtype=np.bool_)
    is_residue[cu_seqlens[:-1]] = is_residue[cu_seqlens[1:] - 1] = False

    # One byte per character, whatever the character.
    characters = "".join(sequences).encode("latin-1", errors="replace")
    input_ids = np.empty(cu_seqlens[-1], dtype=np.int64)
    input_ids[is_residue] = _TOKEN_OF_BYTE[np.frombuffer(characters, dtype=np.uint8)]
    input_ids[cu_seqlens[:-1]] = BOS
    input_ids[cu_seqlens[1:] - 1] = EOS
    return _checked_batch(
        batch_idx, ordinals, tuple(sequence_ids), torch.from_numpy(input_ids), cu_seqlens
    )


_TOKEN_OF_BYTE = np.full(256, UNK, dtype=np.int64)
_TOKEN_OF_BYTE[np.frombuffer(RESIDUES.encode(), dtype=np.uint8)] = np.arange(
    FIRST_RESIDUE, FIRST_RESIDUE + len(RESIDUES)
)


def _boundaries(seqlens: NDArray[np.integer[Any]]) -> NDArray[np.int64]:
    return np.concatenate([[0], np.cumsum(seqlens)])


def _pack_ids(input_ids: Tensor, cu_seqlens: Any) -> tuple[Tensor, NDArray[np.int64]]:
    if cu_seqlens is not None:
        return input_ids.flatten(), np.asarray(cu_seqlens, dtype=np.int64)
    if input_ids.ndim != 2:
        raise ValueError(
            f"input_ids has {input_ids.ndim} dimensions and no cu_seqlens; "
            "give it as (sequences, tokens), or give cu_seqlens"
        )
    num_pads = (input_ids == PAD).flip(1).cumprod(dim=1).sum(dim=1)
    seqlens = input_ids.shape[1] - num_pads
    is_token = torch.arange(input_ids.shape[1]) < seqlens[:, None]
    return input_ids[is_token], _boundaries(seqlens.numpy())


def _checked_batch(
    batch_idx: int,
    ordinals: Sequence[int] | NDArray[np.int64],
    sequence_ids: tuple[str, ...],
    input_ids: Tensor,
    cu_seqlens: NDArray[np.int64],
) -> PackedBatch:
    seqlens = np.diff(cu_seqlens)
    if not 0 < len(sequence_ids) == len(ordinals) == len(seqlens):
        raise ValueError(
            f"batch {batch_idx} has {len(sequence_ids)} ids, {len(ordinals)} ordinals and "
            f"{len(seqlens)} sequences; each sequence needs one of both"
        )
    if cu_seqlens[0] != 0 or cu_seqlens[-1] != input_ids.numel():
        raise ValueError(
            f"batch {batch_idx} has {input_ids.numel()} tokens, "
            f"but cu_seqlens goes from {cu_seqlens[0]} to {cu_seqlens[-1]}"
        )
    shortest = int(seqlens.argmin())
    if seqlens[shortest] <= NUM_SPECIAL_TOKENS:
        raise ValueError(
            f"sequence {sequence_ids[shortest]!r} of batch {batch_idx} has no residue: "
            f"{seqlens[shortest]} tokens, BOS and EOS included"
        )
    return PackedBatch(
        batch_idx=batch_idx,
        ordinals=np.asarray(ordinals, dtype=np.int64),
        sequence_ids=sequence_ids,
        input_ids=input_ids.to(torch.int64),
        cu_seqlens=torch.from_numpy(cu_seqlens.astype(np.int32)),
        max_seqlen=int(seqlens.max()),
    )
