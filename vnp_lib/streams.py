"""Standard streams whose writes never fail, so that progress output cannot end a run."""

from __future__ import annotations

import codecs
import io
import os
import select
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, TextIO, cast

# PIPE_BUF: a pipe that poll() reports as writable accepts this much without blocking.
_CHUNK_BYTES = 4096


class BestEffortStream:
    """A text stream over another one that drops what cannot be written, and keeps the first error.

    Characters that the encoding lacks are written as `\\xe9`. With `patience_s`, text is dropped if
    the reader accepts nothing for that long (a paused pager, a stopped `tee`); without it, a write
    waits.

    Text is written to the file descriptor directly, without Python's buffers. A buffer that cannot
    be flushed would fail again at every later write and at exit, even if a full disk had free space
    again.
    """

    def __init__(self, stream: TextIO, *, patience_s: float | None = None) -> None:
        self.error: OSError | ValueError | None = None
        self._stream = stream
        self._patience_s = patience_s
        self._was_writable = True
        self._fd: int | None = None
        # The streams of notebooks and pytest may have descriptors that lead elsewhere.
        if type(stream) is io.TextIOWrapper:
            with suppress(OSError, ValueError):
                self._fd = stream.fileno()
        self._encoder = codecs.getincrementalencoder(stream.encoding or "utf-8")("backslashreplace")
        with suppress(OSError, ValueError):
            stream.flush()

    def write(self, text: str) -> int:
        """Write as much as possible, and return the length of the whole text."""
        try:
            if self._fd is None:
                encoding = self._stream.encoding or "utf-8"
                self._stream.write(text.encode(encoding, "backslashreplace").decode(encoding))
            else:
                data = self._encoder.encode(text)
                while data and self._is_writable(self._fd):
                    # Another program may have made the descriptor non-blocking, and another writer
                    # may have filled the pipe since the poll.
                    with suppress(BlockingIOError):
                        data = data[os.write(self._fd, data[:_CHUNK_BYTES]) :]
        except (OSError, ValueError) as error:
            self.error = self.error or error
        return len(text)

    def _is_writable(self, fd: int) -> bool:
        """Wait for the reader; after one wait in vain, do not wait until it has read again."""
        poll = select.poll()
        poll.register(fd, select.POLLOUT)
        timeout_ms: float | None = None
        if self._patience_s is not None:
            timeout_ms = self._patience_s * 1000 if self._was_writable else 0
        self._was_writable = bool(poll.poll(timeout_ms))
        return self._was_writable

    def writelines(self, lines: list[str]) -> None:
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        """Flush the underlying stream, which may hold text that other code wrote to it."""
        try:
            self._stream.flush()
        except (OSError, ValueError) as error:
            self.error = self.error or error

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


class _NullStream(io.StringIO):
    """A replacement for a closed stream, which discards all text."""

    def write(self, text: str) -> int:
        return len(text)


def best_effort(
    stream: TextIO | BestEffortStream | None, *, patience_s: float | None = None
) -> TextIO:
    """Return a stream that never fails. The text for a closed stream, or None, is discarded."""
    if isinstance(stream, BestEffortStream):
        return cast(TextIO, stream)
    if stream is None or stream.closed:
        stream = _NullStream()
    return cast(TextIO, BestEffortStream(stream, patience_s=patience_s))


@contextmanager
def standard_streams(*, patience_s: float | None = None) -> Iterator[None]:
    """Make `sys.stdout` and `sys.stderr` best-effort streams for a block.

    Descriptors 0 to 2 that the shell has closed are opened on /dev/null first, permanently.
    Otherwise the next file to be opened would get such a number, and messages that a library writes
    to descriptor 2 would end up in a checkpoint.
    """
    for fd in (0, 1, 2):
        try:
            os.fstat(fd)
        except OSError:
            opened = os.open(os.devnull, os.O_RDWR)
            if opened != fd:
                os.dup2(opened, fd)
                os.close(opened)
            os.set_inheritable(fd, True)
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = (best_effort(stream, patience_s=patience_s) for stream in before)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before


def output_error() -> OSError | ValueError | None:
    """Return the first error of standard output in this block.

    A reader that has closed the pipe, such as `head`, is not an error: it has what it needs.
    """
    error = getattr(sys.stdout, "error", None)
    return None if isinstance(error, BrokenPipeError) else error
