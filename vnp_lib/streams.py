"""Standard output and error that take any text and never fail, so that what is only shown cannot end a run."""

from __future__ import annotations

import codecs
import io
import os
import select
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, TextIO, cast

_CHUNK_BYTES = 4096  # PIPE_BUF: a pipe that poll() calls writable takes as much without blocking
_STANDARD_FDS = (0, 1, 2)


class BestEffortStream:
    """A text stream over another one that drops what cannot be written, and remembers the first error.

    Letters that the encoding lacks are written as `\\xe9`. With `patience_s`, a reader that takes nothing for so long (a
    paused pager, a stopped `tee`) costs the text, and not the time of whoever writes; without it, writing waits.

    The text goes to the file descriptor at once, past Python's buffers: a buffer that cannot be emptied would fail again
    at every later write and once more at exit, and a full disk may have room again an hour later.
    """

    def __init__(self, stream: TextIO, *, patience_s: float | None = None) -> None:
        self.error: OSError | ValueError | None = None
        self._stream = stream
        self._patience_s = patience_s
        self._was_writable = True
        self._fd = _fd_of(stream)
        self._encoder = codecs.getincrementalencoder(stream.encoding or "utf-8")("backslashreplace")
        with suppress(OSError, ValueError):
            stream.flush()

    def write(self, text: str) -> int:
        """Write what can be written, and say that all was."""
        try:
            if self._fd is None:
                encoding = self._stream.encoding or "utf-8"
                self._stream.write(text.encode(encoding, "backslashreplace").decode(encoding))
            else:
                self._write_bytes(self._encoder.encode(text))
        except (OSError, ValueError) as error:
            self.error = self.error or error
        return len(text)

    def _write_bytes(self, data: bytes) -> None:
        assert self._fd is not None
        while data:
            if not self._is_writable():
                return
            with suppress(
                BlockingIOError
            ):  # somebody has made it non-blocking, and another writer was faster
                data = data[os.write(self._fd, data[:_CHUNK_BYTES]) :]

    def _is_writable(self) -> bool:
        """Wait for the reader as long as patience lasts; where it was used up before, do not wait again."""
        assert self._fd is not None
        poll = select.poll()
        poll.register(self._fd, select.POLLOUT)
        patience_ms = (
            None
            if self._patience_s is None
            else self._patience_s * 1000
            if self._was_writable
            else 0
        )
        self._was_writable = bool(poll.poll(patience_ms))
        return self._was_writable

    def writelines(self, lines: list[str]) -> None:
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        """Flush the stream below, which holds something only where others have written to it directly."""
        try:
            self._stream.flush()
        except (OSError, ValueError) as error:
            self.error = self.error or error

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def _fd_of(stream: TextIO) -> int | None:
    """The descriptor of a stream of Python's own; what a notebook or pytest has put in its place keeps its own ways."""
    if type(stream) is not io.TextIOWrapper:
        return None
    try:
        return stream.fileno()
    except (OSError, ValueError):
        return None


class _Nowhere(io.StringIO):
    """What a closed stream becomes."""

    def write(self, text: str) -> int:
        return len(text)


def best_effort(
    stream: TextIO | BestEffortStream | None, *, patience_s: float | None = None
) -> TextIO:
    """Give a stream that never fails; one that is closed (None) becomes one that nobody reads."""
    if isinstance(stream, BestEffortStream):
        return cast(TextIO, stream)
    if stream is None or stream.closed:
        stream = _Nowhere()
    return cast(TextIO, BestEffortStream(stream, patience_s=patience_s))


@contextmanager
def standard_streams(*, patience_s: float | None = None) -> Iterator[None]:
    """Make `sys.stdout` and `sys.stderr` best-effort streams for a block.

    Descriptors 0 to 2 that the shell has closed are opened on /dev/null first, for good: the next file that is opened would
    get the number, and what a library writes to descriptor 2 would land in a checkpoint.
    """
    _open_closed_descriptors()
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = (best_effort(stream, patience_s=patience_s) for stream in before)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before


def output_error() -> OSError | ValueError | None:
    """The first error of standard output in this block, a reader that has left excepted: it has what it wanted."""
    error = getattr(sys.stdout, "error", None)
    return None if isinstance(error, BrokenPipeError) else error


def _open_closed_descriptors() -> None:
    for fd in _STANDARD_FDS:
        try:
            os.fstat(fd)
        except OSError:
            opened = os.open(os.devnull, os.O_RDWR)
            if opened != fd:
                os.dup2(opened, fd)
                os.close(opened)
            os.set_inheritable(fd, True)
