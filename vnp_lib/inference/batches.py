"""Read the sequences of planned batches and pack them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from numpy.typing import NDArray

from vnp_lib.plan import RunPlan

if (
    TYPE_CHECKING
):  # torch takes seconds to import, and a child that waits for its shard does without
    from vnp_lib.model import PackedBatch

_MOST_REMEMBERED = (
    4096  # rows of the plan, each of which brings up to four blocks of 64 KiB into memory
)


def read_batches(
    plan: RunPlan, batches: Sequence[tuple[int, NDArray[Any]]]
) -> Iterator[PackedBatch]:
    """Read and tokenise batch after batch. Of the mapped plan, no more stays in memory than some thousand rows touch."""
    from vnp_lib.model import pack_batch

    num_remembered = 0
    for batch_idx, ordinals in batches:
        ids, sequences = plan.fetch(ordinals)
        num_remembered += ordinals.size
        if num_remembered >= _MOST_REMEMBERED:
            plan.release_pages()
            num_remembered = 0
        yield pack_batch(sequences, sequence_ids=ids, ordinals=ordinals, batch_idx=batch_idx)
