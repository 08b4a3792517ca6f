"""Standard input, kept as a file in the run directory: what is read again finds it there, and so does a resume."""

from __future__ import annotations

import logging
import os
import select
import stat
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from vnp_lib.errors import ConfigError, FingerprintMismatchError
from vnp_lib.storage import durable_file, make_directory
from vnp_lib.streams import best_effort

_BLOCK_BYTES = 2**20
_SAID_AFTER_S = 5.0  # without a byte
_FIRST_BYTE_S = 10.0  # for how long a resume, which can do without, waits for it
_NEXT_BYTE_S = 60.0  # the same, once some have come

_logger = logging.getLogger(__name__)


def require_piped_stdin(stream: BinaryIO, path: Path, *, is_kept: bool = True) -> None:
    """Raise ConfigError where nothing is piped to `stream`, and nothing that was `is_kept` in `path`."""
    if not (is_kept and path.exists()) and not _is_piped(stream):
        raise ConfigError(
            "--fasta -: nothing is piped to standard input; pipe FASTA to it, as in `zcat x.fasta.gz | ... --fasta -`, "
            "or give a file"
        )


def save_stdin(stream: BinaryIO, path: Path) -> bool:
    """Keep what can be read from `stream` in `path`, durably, and say whether that was done now.

    Where something is kept already, nothing need be piped; what is, is compared with it. A pipe that nobody writes to is then
    waited for no longer than some seconds; in a new run for ever, which is said.

    Raises:
        ConfigError: Nothing is piped or kept, or it cannot be written.
        FingerprintMismatchError: Another input is kept.
    """
    require_piped_stdin(stream, path)
    if path.exists():
        if _is_piped(stream):
            _require_same(stream, path)
        return False
    _logger.info("standard input is read, and kept in %s", path)
    try:
        make_directory(path.parent)
        with durable_file(path) as file:
            for block in _blocks(stream):
                file.write(block)
    except OSError as error:
        raise ConfigError(
            f"standard input cannot be kept in {path}: {error.strerror or error}"
        ) from error
    return True


def _is_piped(stream: BinaryIO) -> bool:
    """Whether it is a pipe or a file: not a terminal, not /dev/null, not closed."""
    try:
        return not stat.S_ISCHR(os.fstat(stream.fileno()).st_mode)
    except (OSError, ValueError):
        return False


def _require_same(stream: BinaryIO, path: Path) -> None:
    with path.open("rb") as kept:
        try:
            for block in _blocks(stream, first_within_s=_FIRST_BYTE_S, next_within_s=_NEXT_BYTE_S):
                if block != kept.read(len(block)):
                    raise _another_input(path)
        except TimeoutError:
            _say(
                f"standard input is not waited for any longer: the run goes on with what is kept in {path}"
            )
            return
        if kept.tell() and kept.read(1):
            raise _another_input(path)


def _another_input(path: Path) -> FingerprintMismatchError:
    return FingerprintMismatchError(
        f"--fasta -: another input is piped than the one that this run was begun with, which is kept in {path}; pipe "
        f"that one or nothing (`< /dev/null`), choose another output directory, or --force-restart, which moves what "
        f"is there aside"
    )


def _blocks(
    stream: BinaryIO, *, first_within_s: float = float("inf"), next_within_s: float = float("inf")
) -> Iterator[bytes]:
    """Yield what is piped, to its end. TimeoutError where no byte comes in time."""
    within_s = first_within_s
    while True:
        _wait_for_byte(stream, within_s)
        if not (block := os.read(stream.fileno(), _BLOCK_BYTES)):
            return
        yield block
        within_s = next_within_s


def _wait_for_byte(stream: BinaryIO, within_s: float) -> None:
    """Wait until there is a byte, or the end. After some seconds, say that it is waited for."""
    poll = select.poll()
    poll.register(stream, select.POLLIN)
    said_after_s = min(_SAID_AFTER_S, within_s)
    if poll.poll(said_after_s * 1000):
        return
    _say("--fasta -: waiting for FASTA on standard input")
    left_ms = None if within_s == float("inf") else (within_s - said_after_s) * 1000
    if not poll.poll(left_ms):
        raise TimeoutError


def _say(text: str) -> None:
    print(text, file=best_effort(sys.stderr, patience_s=1.0))
