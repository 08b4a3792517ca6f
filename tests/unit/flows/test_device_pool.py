"""Who has which device, and what becomes of a broken one."""

from __future__ import annotations

import asyncio

from flows.device_pool import DevicePool


def test_a_device_has_one_shard_at_a_time_and_goes_to_the_next_that_waits():
    async def work() -> list[str]:
        pool, told = DevicePool(["cpu", "cpu"]), []

        async def shard(rank: int) -> None:
            async with pool.one(rank) as device:
                told.append(f"{rank} takes {device.index}")
                await asyncio.sleep(0.01 if rank == 0 else 0.02)
                told.append(f"{rank} leaves")

        await asyncio.gather(*(shard(rank) for rank in range(3)))
        return told

    told = asyncio.run(work())
    assert told[:4] == ["0 takes 0", "1 takes 1", "0 leaves", "2 takes 0"]


def test_a_broken_device_is_lent_no_more_and_the_last_one_is_kept():
    async def work() -> tuple[list[int], bool, bool, bool]:
        pool = DevicePool(["0", "1"])
        async with pool.one(0):
            pass
        was_set_aside = pool.set_aside(0)
        lent = []
        for rank in (0, 1, 0):
            async with pool.one(rank) as device:
                lent.append(device.index)
        return lent, was_set_aside, pool.set_aside(0), pool.left_broken(0)

    lent, was_set_aside, is_last_set_aside, left_broken = asyncio.run(work())
    assert was_set_aside
    assert lent == [1, 1, 1]
    assert not is_last_set_aside
    assert not left_broken


def test_a_device_that_two_shards_had_is_set_aside_once():
    async def work() -> tuple[bool, bool, bool]:
        pool = DevicePool(["0", "1", "2"])
        async with pool.one(0):
            pass
        async with pool.one(5), pool.one(6), pool.one(7):
            return pool.set_aside(0), pool.set_aside(7), pool.left_broken(7)

    assert asyncio.run(work()) == (True, False, True)
