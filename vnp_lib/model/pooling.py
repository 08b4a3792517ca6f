"""Pooling: the rows of a batch, from what the network gives for its tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vnp_lib.plan import NUM_SPECIAL_TOKENS, Output, OutputKind, RowLayout


def rows_of(
    computed: Mapping[str, Any], cu_seqlens: Tensor, layout: RowLayout, shares: Tensor | None = None
) -> Tensor:
    """Reduce what the network has computed to the rows of `layout`, float32.

    Args:
        computed: `representations`, {layer: states, (T, D)}, and where the layout has them `logits`, (T, 33), and `contacts`,
            one (L, L) for each sequence.
        cu_seqlens: Sequence boundaries in tokens, int32, (B + 1,).
        shares: What each token counts for in a mean, float32 (T,); None: all residues of a sequence alike.

    Returns:
        (B, W) where all rows are equally wide; else the rows laid end to end, (V,).
    """
    outputs = [_output(each, computed, cu_seqlens, shares) for each in layout.outputs]
    if layout.is_fixed:
        return torch.cat([output for output in outputs if isinstance(output, Tensor)], dim=1)
    by_sequence = zip(*outputs, strict=True)
    return torch.cat([piece.flatten() for row in by_sequence for piece in row])


def mean_pool(hidden: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Average each sequence's residue states, leaving out BOS and EOS.

    Args:
        hidden: States, (T, D), with T = cu_seqlens[-1].
        cu_seqlens: Sequence boundaries in tokens, int32, (B + 1,), first 0.

    Returns:
        One vector per sequence, float32, (B, D).

    Matches the "mean" representation of fair-esm's scripts/extract.py.
    """
    return _reduced(hidden.float(), "mean", cu_seqlens)[1::3]


def split_rows(rows: Tensor, layout: RowLayout, lengths: NDArray[np.int64]) -> Sequence[Tensor]:
    """Return a view of each row, (W,), for sequences of `lengths` residues."""
    if layout.is_fixed:
        return rows.unbind()
    return rows.split_with_sizes(layout.widths(lengths).tolist())


def _output(
    output: Output, computed: Mapping[str, Any], cu_seqlens: Tensor, shares: Tensor | None
) -> Tensor | Sequence[Tensor]:
    """An output of each sequence, float32: (B, D), or B tensors where it is as long as its sequence."""
    if output.kind == OutputKind.CONTACTS:
        contacts: Sequence[Tensor] = computed["contacts"]
        return contacts
    if output.kind == OutputKind.LOGITS:
        return _residues(computed["logits"], cu_seqlens)
    hidden: Tensor = computed["representations"][output.layer]
    match output.kind:
        case OutputKind.MEAN:
            return (
                mean_pool(hidden, cu_seqlens)
                if shares is None
                else _shared(hidden, shares, cu_seqlens)
            )
        case OutputKind.BOS:
            return hidden[cu_seqlens[:-1]].float()
        case OutputKind.MAX:
            return _reduced(hidden.float(), "max", cu_seqlens)[1::3]
        case OutputKind.STD:
            return _std(hidden.float(), cu_seqlens)
        case _:
            return _residues(hidden, cu_seqlens)


def _residues(of_tokens: Tensor, cu_seqlens: Tensor) -> list[Tensor]:
    seqlens = cu_seqlens.diff().tolist()
    return [tokens[1:-1] for tokens in of_tokens.float().split_with_sizes(seqlens)]


def _shared(hidden: Tensor, shares: Tensor, cu_seqlens: Tensor) -> Tensor:
    """The sum of each sequence's residue states by their shares, (B, D)."""
    return _reduced(hidden.float() * shares.unsqueeze(-1), "sum", cu_seqlens)[1::3]


def _std(hidden: Tensor, cu_seqlens: Tensor) -> Tensor:
    """In two passes: the mean of the squares less the square of the mean would lose what is small beside the mean."""
    means = _reduced(hidden, "mean", cu_seqlens)
    centred = hidden - means.repeat_interleave(
        _bos_residues_eos(cu_seqlens), dim=0, output_size=len(hidden)
    )
    return _reduced(centred.square_(), "mean", cu_seqlens)[1::3].sqrt()


def _reduced(hidden: Tensor, reduction: str, cu_seqlens: Tensor) -> Tensor:
    """Reduce BOS, residues and EOS of each sequence by themselves, (3 * B, D)."""
    return torch.segment_reduce(
        hidden, reduction, lengths=_bos_residues_eos(cu_seqlens), axis=0, unsafe=True
    )


def _bos_residues_eos(cu_seqlens: Tensor) -> Tensor:
    num_residues = cu_seqlens.diff() - NUM_SPECIAL_TOKENS
    one = torch.ones_like(num_residues)
    return torch.stack((one, num_residues, one), dim=1).flatten()
