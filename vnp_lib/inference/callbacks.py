"""What hears of the loop on a device while it works."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vnp_lib.errors import NumericalInstabilityError
from vnp_lib.formatting import listed

if TYPE_CHECKING:  # torch takes seconds to import
    from vnp_lib.model import PackedBatch

_MAX_SHOWN = 10


class Callbacks:
    """What the loop tells, and asks. As it stands, it wants nothing and forgives nothing."""

    def should_stop(self) -> bool:
        """Asked after every batch."""
        return False

    def on_batch(self, batch: PackedBatch) -> None:
        """A batch goes into the model: should the process die of it, that was the last word."""

    def on_saving(self) -> None:
        """The loop is over, for whatever reason: what is in no checkpoint yet is being written."""

    def on_checkpoint(self, number: int, rows: int, seconds: float) -> None:
        """A checkpoint is durable, after `seconds` of writing. Called from the writer's thread."""

    def on_not_finite(self, batch: PackedBatch) -> None:
        """Sequences have no finite row, also when each is computed alone. The loop goes on without them."""
        ids = listed(batch.sequence_ids, _MAX_SHOWN)
        raise NumericalInstabilityError(
            f"numerical instability: {batch.num_sequences} not finite in batch {batch.batch_idx}: {ids}"
        )
