"""Pack sequences, in a given order, into batches of at most a token budget."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

# Each sequence is preceded by BOS and followed by EOS.
NUM_SPECIAL_TOKENS = 2


def pack(token_lengths: NDArray[np.integer[Any]], token_budget: int) -> NDArray[np.int64]:
    """Divide sequences into contiguous batches of at most `token_budget` tokens, each filled first.

    A sequence longer than the budget forms a batch of its own.

    Args:
        token_lengths: Tokens per sequence, BOS and EOS included, (N,), in the order of computation.
        token_budget: Maximum number of tokens per batch.

    Returns:
        Boundaries, int64, (B + 1,): batch `b` is `[boundaries[b], boundaries[b + 1])`; the first is
        0, the last N. Lengths 5 3 4 with a budget of 8 give 0 2 3; no sequences give 0.

    Raises:
        ValueError: A budget or a length below 1.
    """
    if token_budget < 1:
        raise ValueError(f"token_budget is {token_budget}; it must be at least 1")
    if token_lengths.size and token_lengths.min() < 1:
        raise ValueError(
            f"token_lengths holds {token_lengths.min()}; a sequence has at least 1 token"
        )
    # One binary search per batch instead of a loop over what may be millions of sequences.
    ends = np.cumsum(token_lengths, dtype=np.int64)
    boundaries = [0]
    while (start := boundaries[-1]) < ends.size:
        tokens_before = ends[start - 1] if start else 0
        stop = int(np.searchsorted(ends, tokens_before + token_budget, side="right"))
        boundaries.append(max(stop, start + 1))
    return np.array(boundaries, dtype=np.int64)


def split_batches(
    ordinals: NDArray[np.int64], token_lengths: NDArray[np.integer[Any]], token_budget: int
) -> list[NDArray[np.int64]]:
    """Return the ordinals of each batch of `pack`. Both arrays are (N,), in the same order."""
    boundaries = pack(token_lengths, token_budget)
    return np.split(ordinals, boundaries[1:-1]) if ordinals.size else []


def packed_tokens(token_lengths: NDArray[np.integer[Any]], token_budget: int) -> NDArray[np.int64]:
    """Return the tokens per batch of `pack`, (B,). Lengths 5 3 4 with a budget of 8 give 8 4."""
    starts = pack(token_lengths, token_budget)[:-1]
    # `reduceat` raises on an empty array.
    if not starts.size:
        return np.empty(0, dtype=np.int64)
    return np.add.reduceat(token_lengths, starts, dtype=np.int64)
