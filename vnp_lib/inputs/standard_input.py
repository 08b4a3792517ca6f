"""Save standard input in the run directory, so that it can be re-read on resume."""

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
_NOTICE_AFTER_S = 5.0

# A resume needs no standard input, and waits this long for its first byte, and for each further
# one once some have come.
_FIRST_BYTE_S = 10.0
_NEXT_BYTE_S = 60.0

_logger = logging.getLogger(__name__)


def require_piped_stdin(stream: BinaryIO, path: Path, *, is_kept: bool = True) -> None:
    """Raise ConfigError if nothing is piped to `stream`, and no usable input is saved in `path`.

    Args:
        stream: Standard input.
        path: File that standard input is saved in.
        is_kept: False if the run does not use what is saved there.
    """
    if not (is_kept and path.exists()) and not _is_piped(stream):
        raise ConfigError(
            "--fasta -: nothing is piped to standard input; pipe FASTA to it, as in "
            "`zcat x.fasta.gz | ... --fasta -`, or give a file"
        )


def save_stdin(stream: BinaryIO, path: Path) -> bool:
    """Save `stream` durably in `path`, and return True unless it was saved before.

    If input is saved already, nothing needs to be piped; input that is piped is compared with it.
    A pipe without a writer is then waited for only some seconds, but in a new run forever, with a
    notice on standard error.

    Raises:
        ConfigError: Nothing is piped or saved, or it cannot be written.
        FingerprintMismatchError: Another input is saved.
    """
    require_piped_stdin(stream, path)
    if path.exists():
        if _is_piped(stream):
            _require_same(stream, path)
        return False
    _logger.info("reading standard input, which is saved in %s", path)
    try:
        make_directory(path.parent)
        with durable_file(path) as file:
            for block in _blocks(stream):
                file.write(block)
    except OSError as error:
        raise ConfigError(
            f"standard input cannot be saved in {path}: {error.strerror or error}"
        ) from error
    return True


def _is_piped(stream: BinaryIO) -> bool:
    """Return whether it is a pipe or a file: not a terminal, not /dev/null, not closed."""
    try:
        return not stat.S_ISCHR(os.fstat(stream.fileno()).st_mode)
    except (OSError, ValueError):
        return False


def _require_same(stream: BinaryIO, path: Path) -> None:
    """Raise FingerprintMismatchError if the piped input is not the saved one."""
    with path.open("rb") as kept:
        is_same = True
        try:
            for block in _blocks(stream, first_within_s=_FIRST_BYTE_S, next_within_s=_NEXT_BYTE_S):
                if block != kept.read(len(block)):
                    is_same = False
                    break
        except TimeoutError:
            _notify(
                "standard input is not waited for any longer: the run continues with the input "
                f"saved in {path}"
            )
            return
        # Nothing at all may be piped, but not a part of the input.
        if not is_same or (kept.tell() and kept.read(1)):
            raise FingerprintMismatchError(
                f"--fasta -: the piped input is not the one that this run was started with, which "
                f"is saved in {path}; pipe that one or nothing (`< /dev/null`), choose another "
                "output directory, or use --force-restart, which moves the old run away"
            )


def _blocks(
    stream: BinaryIO, *, first_within_s: float = float("inf"), next_within_s: float = float("inf")
) -> Iterator[bytes]:
    """Yield piped input, to its end; print a notice if it has to be waited for.

    Raises:
        TimeoutError: No byte comes in time.
    """
    poll = select.poll()
    poll.register(stream, select.POLLIN)
    within_s = first_within_s
    while True:
        notice_after_s = min(_NOTICE_AFTER_S, within_s)
        if not poll.poll(notice_after_s * 1000):
            _notify("--fasta -: waiting for FASTA on standard input")
            left_ms = None if within_s == float("inf") else (within_s - notice_after_s) * 1000
            if not poll.poll(left_ms):
                raise TimeoutError
        if not (block := os.read(stream.fileno(), _BLOCK_BYTES)):
            return
        yield block
        within_s = next_within_s


def _notify(text: str) -> None:
    print(text, file=best_effort(sys.stderr, patience_s=1.0))
