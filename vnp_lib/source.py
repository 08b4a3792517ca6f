"""Files that somebody gave us: opened whatever their compression, watched for change, their failures told in a sentence."""

from __future__ import annotations

import lzma
import os
import stat
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from backports.zstd import ZstdError
from isal.igzip_lib import IsalError
from xopen import xopen

from vnp_lib.failures import FastaError

COMPRESSIONS = (".gz", ".bz2", ".xz", ".zst")

# Decompressors share no base class; isal's stub takes its class for an instance.
_DAMAGE: tuple[type[Exception], ...] = (EOFError, zlib.error, lzma.LZMAError, IsalError, ZstdError)  # type: ignore[assignment]


@contextmanager
def open_source(path: Path) -> Iterator[BinaryIO]:
    """Open a file for reading, plain or gz, bz2, xz or zst, told apart by their content.

    Raises:
        FastaError: It is missing, no file, unreadable or damaged.
    """
    with _failures_told(path):
        _require_readable_twice(path)
        with xopen(path, "rb", threads=0) as file:
            yield file


@contextmanager
def unchanging(path: Path) -> Iterator[None]:
    """Raise FastaError where a file is changed within the block: that counts for more than what was found at fault in it."""
    with _failures_told(path):
        before = path.stat()
        try:
            yield
        except FastaError:
            _require_unchanged(path, before)
            raise
        _require_unchanged(path, before)


def suffix_of(path: Path) -> str:
    """The suffix before that of a compression, in lower case: `.csv` of `x.CSV.gz`."""
    name = path.with_suffix("") if path.suffix.lower() in COMPRESSIONS else path
    return name.suffix.lower()


@contextmanager
def _failures_told(path: Path) -> Iterator[None]:
    try:
        yield
    except _DAMAGE as error:
        raise FastaError(f"{path}: the compressed file is cut short or damaged ({error}); copy it again") from error
    except FileNotFoundError as error:
        raise FastaError(f"{path}: there is no such file") from error
    except IsADirectoryError as error:
        raise FastaError(f"{path}: this is a directory; give the files in it") from error
    except OSError as error:
        raise FastaError(f"{path}: the file cannot be read ({error.strerror or error})") from error


def _require_readable_twice(path: Path) -> None:
    mode = path.stat().st_mode
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
        raise FastaError(
            f"{path}: this is a pipe or a device, and input is read more than once; give a file, or pipe it to `--fasta -`"
        )


def _require_unchanged(path: Path, before: os.stat_result) -> None:
    after = path.stat()
    if (after.st_size, after.st_mtime_ns) != (before.st_size, before.st_mtime_ns):
        raise FastaError(
            f"{path}: the file was changed while it was read ({before.st_size:,} bytes at first, {after.st_size:,} at the "
            f"end); wait until it is complete, then start again"
        )
