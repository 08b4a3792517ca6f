"""Callbacks invoked by the inference loop."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vnp_lib.errors import NumericalInstabilityError
from vnp_lib.formatting import listed

# torch takes seconds to import.
if TYPE_CHECKING:
    from vnp_lib.model import PackedBatch

_MAX_SHOWN = 10


class Callbacks:
    """Default callbacks: never stop early, raise on a non-finite embedding."""

    def should_stop(self) -> bool:
        """Return whether to stop; called after every batch."""
        return False

    def on_batch(self, batch: PackedBatch) -> None:
        """Note that a batch is about to be computed: it is the last call if the process crashes."""

    def on_saving(self) -> None:
        """Note that the loop has ended and that the last checkpoint is being written."""

    def on_checkpoint(self, number: int, rows: int, seconds: float) -> None:
        """Note that a checkpoint is durable, after `seconds`; called from the writer's thread."""

    def on_not_finite(self, batch: PackedBatch) -> None:
        """Handle sequences whose rows are not finite even if each is computed alone.

        If this returns, the loop continues without them.
        """
        ids = listed(batch.sequence_ids, _MAX_SHOWN)
        raise NumericalInstabilityError(
            f"numerical instability: {batch.num_sequences} not finite in batch {batch.batch_idx}: "
            f"{ids}"
        )
