"""The devices of a run, lent to one shard at a time."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """One of a run's devices."""

    index: int  # among the devices of the run, of which several may be "cpu"
    name: str  # "cpu", or the number of a GPU


class DevicePool:
    """Lends each device to one shard at a time, in the order of the requests.

    A device that is broken can be excluded.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self._free: asyncio.Queue[Device] = asyncio.Queue()
        for index, name in enumerate(names):
            self._free.put_nowait(Device(index=index, name=name))
        self._healthy = set(range(len(names)))
        self._last_of: dict[int, Device] = {}  # by rank

    @asynccontextmanager
    async def acquire(self, rank: int) -> AsyncIterator[Device]:
        """Wait for a free device and hold it for a block."""
        while (device := await self._free.get()).index not in self._healthy:
            pass
        self._last_of[rank] = device
        try:
            yield device
        finally:
            self._free.put_nowait(device)

    def must_move(self, rank: int) -> bool:
        """Whether the last device of a shard has been excluded, so that another one takes over."""
        return rank in self._last_of and self._last_of[rank].index not in self._healthy

    def exclude(self, rank: int) -> bool:
        """Exclude the last device of a shard, and return whether it was done now.

        The last healthy device stays.
        """
        index = self._last_of[rank].index
        if len(self._healthy) == 1 or index not in self._healthy:
            return False
        self._healthy.remove(index)
        return True
