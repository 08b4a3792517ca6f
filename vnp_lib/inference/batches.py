"""Form batches: order sequences, pack them by the token budget, read and tokenise them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from vnp_lib.plan import NUM_SPECIAL_TOKENS, RunPlan, longest_first, split_batches

# torch takes seconds to import, and a worker process that waits for its shard does without.
if TYPE_CHECKING:
    from vnp_lib.model import PackedBatch

Fetch: TypeAlias = Callable[[NDArray[np.int64]], tuple[Sequence[str], Sequence[str]]]

# Rows of the plan that are read before their pages are released: each brings up to four blocks of
# 64 KiB into memory.
_ROWS_BEFORE_RELEASE = 4096


def divide_into_batches(
    lengths: NDArray[np.int64], token_budget: int, representatives: NDArray[np.int64] | None = None
) -> list[NDArray[np.int64]]:
    """Divide sequences in memory into batches, the longest first, as a plan divides those of a run.

    The longest come first so that a lack of memory shows at once.

    Args:
        lengths: Residues of each sequence, (N,).
        token_budget: Largest number of tokens in a batch.
        representatives: The first identical sequence of each, (N,), of which only that one is in a
            batch; by default all sequences differ.

    Returns:
        The positions of the sequences of each batch.
    """
    if representatives is None:
        representatives = np.arange(lengths.size)
    order = longest_first(lengths, representatives)
    return split_batches(order, lengths[order] + NUM_SPECIAL_TOKENS, token_budget)


def pack_batches(
    batches: Iterable[tuple[int, NDArray[np.int64]]], fetch: Fetch
) -> Iterator[PackedBatch]:
    """Tokenise batches one by one.

    Args:
        batches: The number of each batch, and the ordinals of its sequences.
        fetch: Returns the ids and the sequences of some ordinals.
    """
    from vnp_lib.model import pack_batch

    for batch_idx, ordinals in batches:
        ids, sequences = fetch(ordinals)
        yield pack_batch(sequences, sequence_ids=ids, ordinals=ordinals, batch_idx=batch_idx)


def read_batches(
    plan: RunPlan, batches: Sequence[tuple[int, NDArray[Any]]]
) -> Iterator[PackedBatch]:
    """Read and tokenise batches of a plan, which are numbered.

    The pages of the mapped plan are released after every few thousand rows.
    """
    num_read = 0

    def fetch(ordinals: NDArray[np.int64]) -> tuple[list[str], list[str]]:
        nonlocal num_read
        texts = plan.fetch(ordinals)
        num_read += ordinals.size
        if num_read >= _ROWS_BEFORE_RELEASE:
            plan.release_pages()
            num_read = 0
        return texts

    return pack_batches(batches, fetch)
