"""Devices are lent to one shard at a time, and broken ones are excluded."""

from __future__ import annotations

import asyncio

from flows.device_pool import DevicePool


def test_a_device_has_one_shard_at_a_time():
    """The next shard that waits gets it."""

    async def work() -> list[str]:
        pool, log = DevicePool(["cpu", "cpu"]), []

        async def shard(rank: int) -> None:
            async with pool.acquire(rank) as device:
                log.append(f"{rank} takes {device.index}")
                await asyncio.sleep(0.01 if rank == 0 else 0.02)
                log.append(f"{rank} releases")

        await asyncio.gather(*(shard(rank) for rank in range(3)))
        return log

    log = asyncio.run(work())
    assert log[:4] == ["0 takes 0", "1 takes 1", "0 releases", "2 takes 0"]


def test_an_excluded_device_is_not_lent_again():
    """The last one stays."""

    async def work() -> tuple[list[int], bool, bool, bool]:
        pool = DevicePool(["0", "1"])
        async with pool.acquire(0):
            pass
        was_excluded = pool.exclude(0)
        lent = []
        for rank in (0, 1, 0):
            async with pool.acquire(rank) as device:
                lent.append(device.index)
        return lent, was_excluded, pool.exclude(0), pool.must_move(0)

    lent, was_excluded, is_last_excluded, must_move = asyncio.run(work())
    assert was_excluded
    assert lent == [1, 1, 1]
    assert not is_last_excluded
    assert not must_move


def test_a_device_is_excluded_once():
    """Here two shards had it."""

    async def work() -> tuple[bool, bool, bool]:
        pool = DevicePool(["0", "1", "2"])
        async with pool.acquire(0):
            pass
        async with pool.acquire(5), pool.acquire(6), pool.acquire(7):
            return pool.exclude(0), pool.exclude(7), pool.must_move(7)

    assert asyncio.run(work()) == (True, False, True)
