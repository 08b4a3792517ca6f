"""What people see of a run in the Prefect UI."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from uuid import UUID

from prefect.artifacts import acreate_progress_artifact, aupdate_progress_artifact

logger = logging.getLogger(__name__)

_PATIENCE_S = 2.0


class ShardArtifact:
    """The progress artifact of a shard, touched at most every `interval_s`. Its troubles never harm the shard."""

    def __init__(self, rank: int, *, interval_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._key = f"shard-{rank:03d}"
        self._interval_s = interval_s
        self._clock = clock
        self._next_at = clock()
        self._id: UUID | None = None

    async def show(self, percent: float, description: str, *, now: bool = False) -> None:
        """Show how far the shard is, unless that was done just before and `now` is not set."""
        if not now and self._clock() < self._next_at:
            return
        self._next_at = self._clock() + self._interval_s
        try:
            async with asyncio.timeout(_PATIENCE_S):
                await self._send(percent, description)
        except Exception as error:
            logger.debug("%s: progress not shown: %r", self._key, error)

    async def _send(self, percent: float, description: str) -> None:
        if self._id is None:
            self._id = await acreate_progress_artifact(percent, key=self._key, description=description)
        else:
            await aupdate_progress_artifact(self._id, percent, description=description)
