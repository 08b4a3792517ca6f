"""Standard input, kept as a file in the run directory: what is read again finds it there, and so does a resume."""

from __future__ import annotations

import logging
import os
import shutil
import stat
from pathlib import Path
from typing import BinaryIO

from vnp_lib.failures import ConfigError, FingerprintMismatchError
from vnp_lib.files import digest_file, digest_stream, durable_file, make_directory

_logger = logging.getLogger(__name__)


def require_piped(stream: BinaryIO, path: Path, *, is_kept: bool = True) -> None:
    """Raise ConfigError where nothing is piped to `stream`, and nothing that was `is_kept` in `path`."""
    if not (is_kept and path.exists()) and not _is_piped(stream):
        raise ConfigError(
            "--fasta -: nothing is piped to standard input; pipe FASTA to it, as in `zcat x.fasta.gz | ... --fasta -`, "
            "or give a file"
        )


def keep(stream: BinaryIO, path: Path) -> bool:
    """Keep what can be read from `stream` in `path`, durably, and say whether that was done now.

    Where something is kept already, nothing need be piped; what is, is compared with it.

    Raises:
        ConfigError: Nothing is piped or kept, or it cannot be written.
        FingerprintMismatchError: Another input is kept.
    """
    require_piped(stream, path)
    if path.exists():
        if _is_piped(stream):
            _require_same(stream, path)
        return False
    _logger.info("standard input is read, and kept in %s", path)
    try:
        make_directory(path.parent)
        with durable_file(path) as file:
            shutil.copyfileobj(stream, file)
    except OSError as error:
        raise ConfigError(f"standard input cannot be kept in {path}: {error.strerror or error}") from error
    return True


def _is_piped(stream: BinaryIO) -> bool:
    """Whether it is a pipe or a file: not a terminal, not /dev/null, not closed."""
    try:
        return not stat.S_ISCHR(os.fstat(stream.fileno()).st_mode)
    except (OSError, ValueError):
        return False


def _require_same(stream: BinaryIO, path: Path) -> None:
    piped = digest_stream(stream)
    if piped.size_bytes and piped != digest_file(path):
        raise FingerprintMismatchError(
            f"--fasta -: another input is piped than the one that this run was begun with, which is kept in {path}; pipe "
            f"that one or nothing (`< /dev/null`), choose another output directory, or --force-restart, which moves what "
            f"is there aside"
        )
