"""Pool the states of tokens into the rows of a batch."""

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
    """Reduce the results of a network to the rows of a layout, float32.

    Args:
        computed: `representations`, {layer: states, (T, D)}, and if the layout has them `logits`,
            (T, 33), and `contacts`, one (L, L) for each sequence.
        cu_seqlens: Sequence boundaries in tokens, int32, (B + 1,).
        layout: The outputs in a row.
        shares: Weight of each token in a mean, float32 (T,); None weights the residues of a
            sequence equally.

    Returns:
        (B, W) if all rows have the same width; otherwise the rows end to end, (V,).
    """
    outputs = [_output(each, computed, cu_seqlens, shares) for each in layout.outputs]
    if layout.is_fixed:
        return torch.cat([output for output in outputs if isinstance(output, Tensor)], dim=1)
    by_sequence = zip(*outputs, strict=True)
    return torch.cat([piece.flatten() for row in by_sequence for piece in row])


def mean_pool(hidden: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Average the residue states of each sequence, excluding BOS and EOS.

    Args:
        hidden: States, (T, D), T = cu_seqlens[-1].
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
    """Compute an output of each sequence, float32: (B, D), or B tensors if it is per residue."""
    if output.kind == OutputKind.CONTACTS:
        contacts: Sequence[Tensor] = computed["contacts"]
        return contacts
    if output.kind == OutputKind.LOGITS:
        return _residues(computed["logits"], cu_seqlens)
    hidden: Tensor = computed["representations"][output.layer]
    match output.kind:
        case OutputKind.MEAN:
            if shares is None:
                return mean_pool(hidden, cu_seqlens)
            return _reduced(hidden.float() * shares.unsqueeze(-1), "sum", cu_seqlens)[1::3]
        case OutputKind.BOS:
            return hidden[cu_seqlens[:-1]].float()
        case OutputKind.MAX:
            return _reduced(hidden.float(), "max", cu_seqlens)[1::3]
        case OutputKind.STD:
            # In two passes: the difference of two large numbers, as in a formula of one pass, would
            # lose precision.
            hidden = hidden.float()
            means = _reduced(hidden, "mean", cu_seqlens)
            lengths = _bos_residues_eos(cu_seqlens)
            centred = hidden - means.repeat_interleave(lengths, dim=0, output_size=len(hidden))
            return _reduced(centred.square_(), "mean", cu_seqlens)[1::3].sqrt()
        case _:
            return _residues(hidden, cu_seqlens)


def _residues(of_tokens: Tensor, cu_seqlens: Tensor) -> list[Tensor]:
    seqlens = cu_seqlens.diff().tolist()
    return [tokens[1:-1] for tokens in of_tokens.float().split_with_sizes(seqlens)]


def _reduced(hidden: Tensor, reduction: str, cu_seqlens: Tensor) -> Tensor:
    """Reduce BOS, residues and EOS of each sequence separately, (3 * B, D)."""
    return torch.segment_reduce(
        hidden, reduction, lengths=_bos_residues_eos(cu_seqlens), axis=0, unsafe=True
    )


def _bos_residues_eos(cu_seqlens: Tensor) -> Tensor:
    num_residues = cu_seqlens.diff() - NUM_SPECIAL_TOKENS
    one = torch.ones_like(num_residues)
    return torch.stack((one, num_residues, one), dim=1).flatten()
