"""Signs of life across machines: a small file that one keeps changing and another watches. No clock is compared."""

from __future__ import annotations

import threading
import time
import uuid
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path

from vnp_lib.storage import write_file
from vnp_lib.worker.liveness import Silence

_LOOK_EVERY_S = 10.0  # or oftener
_MOST_LAST_WRITE_S = 1.0


@asynccontextmanager
async def send_heartbeats(path: Path, *, interval_s: float) -> AsyncIterator[None]:
    """Change the file every so often while the block runs. A disk that refuses does not harm the block.

    In a thread: what keeps the event loop busy for minutes, as a look at very many checkpoints, is not the machine's end.
    """
    is_over = threading.Event()
    thread = threading.Thread(target=_beat, args=(path, interval_s, is_over), daemon=True)
    thread.start()
    try:
        yield
    finally:
        is_over.set()
        thread.join(_MOST_LAST_WRITE_S)


class HeartbeatWatch:
    """Says for how long a file has not changed, by this machine's clock, from when it was first looked at.

    Time in which nobody looked, since this machine or process stood still, counts for no more than one look.
    """

    def __init__(self, path: Path, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._path = path
        self._silence = Silence(look_every_s=_LOOK_EVERY_S, clock=clock)
        self.reset()

    def reset(self) -> None:
        """Start counting anew, as when nobody is expected to be alive."""
        self._content = self._read()
        self._silence.end()

    def silent_for_s(self) -> float:
        """Look, and say for how long nothing has changed."""
        if self._read() != self._content:
            self.reset()
        return self._silence.look()

    def _read(self) -> bytes | None:
        try:
            return self._path.read_bytes()
        except OSError:
            return None


def _beat(path: Path, interval_s: float, is_over: threading.Event) -> None:
    while not is_over.is_set():
        with suppress(OSError):
            write_file(path, uuid.uuid4().bytes, replace=True)
        is_over.wait(interval_s)
