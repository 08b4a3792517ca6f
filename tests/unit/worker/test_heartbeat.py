"""Heartbeats: seen while they come, missed when they stop, harmless if they cannot be written."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

from vnp_lib.worker.heartbeat import HeartbeatWatch, send_heartbeats


def test_silence_is_counted_from_the_last_change(tmp_path: Path) -> None:
    now = [0.0]
    path = tmp_path / "heartbeat"
    watch = HeartbeatWatch(path, clock=lambda: now[0])
    silences = []
    for time_s, content in ((3.0, None), (5.0, b"a"), (7.0, None), (9.0, b"b"), (10.0, None)):
        now[0] = time_s
        if content is not None:
            path.write_bytes(content)
        silences.append(watch.silent_for_s())
    assert silences == [3.0, 0.0, 2.0, 0.0, 1.0]


def test_a_suspended_watch_has_not_watched(tmp_path: Path) -> None:
    """A laptop was closed for an hour, which says nothing about the other machine."""
    now = [0.0]
    watch = HeartbeatWatch(tmp_path / "heartbeat", clock=lambda: now[0])
    silences = []
    for now[0] in (2.0, 3602.0, 3604.0, 3606.0):
        silences.append(watch.silent_for_s())
    assert silences == [2.0, 12.0, 14.0, 16.0]


def test_heartbeats_continue_while_the_event_loop_is_busy(tmp_path: Path) -> None:
    """As while the markers of very many checkpoints are read."""
    path = tmp_path / "heartbeat"

    async def work() -> set[bytes]:
        async with send_heartbeats(path, interval_s=0.001):
            seen: set[bytes] = set()
            while len(seen) < 3:
                time.sleep(0.001)
                seen |= {path.read_bytes()} if path.exists() else set()
        return seen

    assert len(asyncio.run(work())) == 3


def test_a_watch_counts_from_its_reset(tmp_path: Path) -> None:
    now = [0.0]
    watch = HeartbeatWatch(tmp_path / "heartbeat", clock=lambda: now[0])
    now[0] = 100.0
    watch.reset()
    now[0] = 101.0
    assert watch.silent_for_s() == 1.0


def test_heartbeats_end_with_the_block(tmp_path: Path) -> None:
    path = tmp_path / "heartbeat"

    async def work() -> set[bytes]:
        seen = set()
        async with send_heartbeats(path, interval_s=0.001):
            while len(seen) < 3:
                await asyncio.sleep(0.001)
                seen |= {path.read_bytes()} if path.exists() else set()
        return seen

    assert len(asyncio.run(work())) == 3
    last = path.read_bytes()
    asyncio.run(asyncio.sleep(0.02))
    assert path.read_bytes() == last


def test_a_disk_error_does_not_interrupt_the_work(tmp_path: Path) -> None:
    async def work() -> str:
        async with send_heartbeats(tmp_path / "missing" / "heartbeat", interval_s=0.001):
            await asyncio.sleep(0.01)
            return "done"

    assert asyncio.run(work()) == "done"
