"""Heartbeats between machines: a small file that one machine rewrites and another one watches."""

from __future__ import annotations

import threading
import time
import uuid
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path

from vnp_lib.storage import write_file
from vnp_lib.worker.liveness import SilenceTimer

_POLL_S = 10.0  # at most
_MAX_LAST_WRITE_S = 1.0


@asynccontextmanager
async def send_heartbeats(path: Path, *, interval_s: float) -> AsyncIterator[None]:
    """Rewrite the file every `interval_s` while the block runs; ignore errors of the disk.

    A thread does it: what keeps the event loop busy for minutes, such as reading very many
    checkpoints, does not mean that the machine is gone.
    """
    is_over = threading.Event()

    def write_until_over() -> None:
        while not is_over.is_set():
            with suppress(OSError):
                write_file(path, uuid.uuid4().bytes, replace=True)
            is_over.wait(interval_s)

    thread = threading.Thread(target=write_until_over, daemon=True)
    thread.start()
    try:
        yield
    finally:
        is_over.set()
        thread.join(_MAX_LAST_WRITE_S)


class HeartbeatWatch:
    """Measures for how long a file has not changed, from when it was first read.

    Only the clock of this machine counts: it is not compared with that of the other one. Time in
    which nobody called, because this machine or process was suspended, counts as one poll.
    """

    def __init__(self, path: Path, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._path = path
        self._silence = SilenceTimer(poll_s=_POLL_S, clock=clock)
        self.reset()

    def reset(self) -> None:
        """Count from now, as while no heartbeat is expected."""
        self._content = self._read()
        self._silence.restart()

    def silent_for_s(self) -> float:
        """Read the file, and return for how many seconds nothing has changed."""
        if self._read() != self._content:
            self.reset()
        return self._silence.check()

    def _read(self) -> bytes | None:
        try:
            return self._path.read_bytes()
        except OSError:
            return None
