"""The devices of a run, and who has which."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """One of a run's devices."""

    index: int  # its place among them: two may be "cpu"
    name: str  # "cpu", or a GPU's number


class DevicePool:
    """Lends each device to one shard at a time, in the order in which they ask. One that is broken is lent no more."""

    def __init__(self, names: Sequence[str]) -> None:
        self._free: asyncio.Queue[Device] = asyncio.Queue()
        for index, name in enumerate(names):
            self._free.put_nowait(Device(index=index, name=name))
        self._healthy = set(range(len(names)))
        self._last_of: dict[int, Device] = {}  # the device that a shard had last

    @asynccontextmanager
    async def one(self, rank: int) -> AsyncIterator[Device]:
        """Wait for a free device and hold it for a block."""
        while (device := await self._free.get()).index not in self._healthy:
            pass
        self._last_of[rank] = device
        try:
            yield device
        finally:
            self._free.put_nowait(device)

    def left_broken(self, rank: int) -> bool:
        """Whether the device that a shard had last has been set aside, so that the next one takes its place."""
        return rank in self._last_of and self._last_of[rank].index not in self._healthy

    def set_aside(self, rank: int) -> bool:
        """Lend the device that a shard had last to nobody any more. False for the last healthy one, which is kept."""
        index = self._last_of[rank].index
        if len(self._healthy) == 1 or index not in self._healthy:
            return False
        self._healthy.remove(index)
        return True
