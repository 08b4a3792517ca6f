"""The events by which a worker process reports to its parent: JSON objects, one a line, on what was standard output."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import select
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any

Event = dict[str, Any]

_LONGEST_LINE_BYTES = 16 * 1024  # of an event; texts in a longer one are cut
_LONGEST_TEXT = 500
_MOST_ITEMS = 20
_LONGEST_UNREAD_BYTES = 2**20  # of a line that is no event of ours
_LONGEST_STRAY_BYTES = 1000  # of such a line, in the log
_POLL_MS = 500


class EventStream:
    """Writes events on a copy of standard output. What else is printed there goes to standard error from then on.

    Several threads may send: each line is whole. A parent that has gone, or that does not read while the worker is to stop,
    gets no more events: saving comes first.
    """

    def __init__(self, *, is_stopping: Callable[[], bool] = lambda: False) -> None:
        self._descriptor = os.dup(1)
        os.dup2(2, 1)
        os.set_blocking(self._descriptor, False)
        self._is_stopping = is_stopping
        self._is_broken = False
        self._lock = threading.Lock()

    def send(self, event: str, **fields: object) -> None:
        """Write one line."""
        line = encode_event({"event": event, **fields})
        with self._lock:
            if not self._is_broken:
                self._is_broken = not self._write(line)

    def _write(self, line: bytes) -> bool:
        """Write a line, and say whether all of it was: after half a line, none that follows could be read."""
        left = memoryview(line)
        poll = select.poll()
        poll.register(self._descriptor, select.POLLOUT)
        while left:
            try:
                left = left[os.write(self._descriptor, left) :]
            except BlockingIOError:
                if self._is_stopping() and not poll.poll(_POLL_MS):
                    return False
                poll.poll(_POLL_MS)
            except OSError:
                return False
        return True


def encode_event(event: Event) -> bytes:
    """Return an event as a line of at most 16 KiB: where it is longer, texts and lists are cut."""
    line = json.dumps(event).encode() + b"\n"
    return (
        line if len(line) <= _LONGEST_LINE_BYTES else json.dumps(_shortened(event)).encode() + b"\n"
    )


def _shortened(value: object) -> object:
    match value:
        case str():
            return value if len(value) <= _LONGEST_TEXT else value[:_LONGEST_TEXT] + "..."
        case dict():
            return {key: _shortened(each) for key, each in value.items()}
        case list() | tuple():
            return [_shortened(each) for each in value[:_MOST_ITEMS]]
        case _:
            return value


class EventReader:
    """Reads a worker's events. A line that is none, whatever wrote it, is given as an event `log`."""

    def __init__(self, stream: asyncio.StreamReader) -> None:
        self._stream = stream
        self._unread = bytearray()
        self._is_skipping = False
        self.is_at_end = False

    async def next(self, *, within_s: float) -> Event | None:
        """Return the next event; None where none has come in time, or where the stream is at its end.

        Half a line at the end, as a killed writer leaves it, is no event.
        """
        with suppress(TimeoutError):
            async with asyncio.timeout(
                within_s
            ):  # what has been read when it strikes stays in the buffers
                while True:
                    if (line := self._take_line()) is not None:
                        return _decode(line)
                    if not (block := await self._stream.read(2**16)):
                        self.is_at_end = True
                        return None
                    self._unread += block
        return None

    def _take_line(self) -> bytes | None:
        """Take a whole line out of what was read. Of one that has no end within 1 MiB, the rest is skipped."""
        end = self._unread.find(b"\n")
        if end < 0 and len(self._unread) <= _LONGEST_UNREAD_BYTES:
            return None
        line = bytes(self._unread[: end if end >= 0 else _LONGEST_UNREAD_BYTES])
        del self._unread[: end + 1 if end >= 0 else len(self._unread)]
        was_skipping, self._is_skipping = self._is_skipping, end < 0
        return self._take_line() if was_skipping else line


def _decode(line: bytes) -> Event:
    with suppress(ValueError, RecursionError):
        event = json.loads(line)
        if isinstance(event, dict) and isinstance(event.get("event"), str):
            return event
    stray = line[:_LONGEST_STRAY_BYTES].decode(errors="replace")
    return {"event": "log", "level": logging.INFO, "message": f"the worker process wrote: {stray}"}
