"""Signs of life across machines: a small file that one keeps changing and another watches. No clock is compared."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path

from vnp_lib.files import write_file


@asynccontextmanager
async def beating(path: Path, *, interval_s: float) -> AsyncIterator[None]:
    """Change the file every so often while the block runs. A disk that refuses does not harm the block."""
    task = asyncio.create_task(_beat(path, interval_s))
    try:
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


class HeartbeatWatch:
    """Says for how long a file has not changed, by this machine's clock, from when it was first looked at."""

    def __init__(self, path: Path, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._path = path
        self._clock = clock
        self.reset()

    def reset(self) -> None:
        """Start counting anew, as when nobody is expected to be alive."""
        self._content = self._read()
        self._since_s = self._clock()

    def silent_for_s(self) -> float:
        """Look, and say for how long nothing has changed."""
        if self._read() != self._content:
            self.reset()
        return self._clock() - self._since_s

    def _read(self) -> bytes | None:
        try:
            return self._path.read_bytes()
        except OSError:
            return None


async def _beat(path: Path, interval_s: float) -> None:
    while True:
        with suppress(OSError):
            write_file(path, uuid.uuid4().bytes, replace=True)
        await asyncio.sleep(interval_s)
