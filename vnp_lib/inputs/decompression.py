"""Decompress gz, bz2, xz and zst data of one or several parts as one stream."""

from __future__ import annotations

import bz2
import io
import logging
import lzma
import re
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any, BinaryIO

from backports import zstd
from isal import igzip_lib

BLOCK_BYTES = 256 * 1024

# A few compressed bytes may expand without limit, so that output is limited too.
_MAX_OUTPUT_BYTES = 1024**2

# Errors of decompressors share no base class; isal's stub declares its class as an instance.
DAMAGE: tuple[type[Exception], ...] = (
    EOFError,
    zlib.error,
    lzma.LZMAError,
    igzip_lib.IsalError,  # type: ignore[assignment, unused-ignore]
    zstd.ZstdError,
    zipfile.BadZipFile,
)

_logger = logging.getLogger(__name__)
# Files are read more than once.
_warn_once = cache(_logger.warning)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Format:
    """A kind of compressed data."""

    suffix: str
    magic: bytes  # with which each of its parts begins
    start: re.Pattern[bytes]  # the same in full, to distinguish a part from other bytes
    decompressor: Callable[[], Any]


_FORMATS = (
    _Format(
        suffix=".gz",
        magic=b"\x1f\x8b\x08",
        start=re.compile(rb"\x1f\x8b\x08"),
        decompressor=lambda: igzip_lib.IgzipDecompressor(flag=igzip_lib.DECOMP_GZIP),
    ),
    _Format(
        suffix=".bz2",
        magic=b"BZh",
        start=re.compile(rb"BZh[1-9](?:1AY&SY|\x17rE8P\x90)"),
        decompressor=bz2.BZ2Decompressor,
    ),
    _Format(
        suffix=".xz",
        magic=b"\xfd7zXZ\0",
        start=re.compile(rb"\xfd7zXZ\0"),
        decompressor=lzma.LZMADecompressor,
    ),
    _Format(
        suffix=".zst",
        magic=b"\x28\xb5\x2f\xfd",
        # The second is a frame without content, as in the output of pzstd and in seekable files.
        start=re.compile(rb"\x28\xb5\x2f\xfd|[\x50-\x5f]\x2a\x4d\x18"),
        decompressor=zstd.ZstdDecompressor,
    ),
)
_LONGEST_START = 10  # bytes
_TEXT = re.compile(rb"(?:\xef\xbb\xbf|\s)*[>@;]")  # FASTA or FASTQ
COMPRESSIONS = tuple(each.suffix for each in _FORMATS)


class BlockStream(io.RawIOBase):
    """Reads an iterator of blocks as a stream."""

    def __init__(self, blocks: Iterable[bytes]) -> None:
        self._blocks = iter(blocks)
        self._rest = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._rest:
            block = next(self._blocks, None)
            if block is None:
                return 0
            self._rest = memoryview(block)
        size = min(len(buffer), len(self._rest))
        buffer[:size] = self._rest[:size]
        self._rest = self._rest[size:]
        return size


def buffered(blocks: Iterable[bytes]) -> io.BufferedReader:
    """Return a file that reads an iterator of blocks."""
    return io.BufferedReader(BlockStream(blocks), buffer_size=BLOCK_BYTES)


def is_compressed(start: bytes) -> bool:
    return any(each.start.match(start) for each in _FORMATS)


def decompressed(file: BinaryIO, name: str) -> Iterator[bytes]:
    """Decompress a file whose first bytes are those of a compressed one, block by block.

    Bytes after the end of the compressed data, such as the padding of tapes, are ignored with a
    warning.

    Raises:
        EOFError, zlib.error and others of `DAMAGE`: It is cut short or damaged.
    """
    data = file.read(BLOCK_BYTES)
    kind = next(each for each in _FORMATS if each.start.match(data))
    while data:
        part = kind.decompressor()
        while not part.eof:
            if part.needs_input and not data:
                raise EOFError("it ends before the compressed data do")
            yield part.decompress(data, _MAX_OUTPUT_BYTES)
            data = file.read(BLOCK_BYTES) if part.needs_input and not part.eof else b""
        data = part.unused_data
        if len(data) < _LONGEST_START:
            data += file.read(BLOCK_BYTES)
        if data and not kind.start.match(data):
            _require_no_records(data, file, kind)
            _warn_once(f"{name}: bytes follow the end of the compressed data, and are ignored")
            return


def _require_no_records(data: bytes, file: BinaryIO, kind: _Format) -> None:
    """Raise EOFError if bytes after compressed data may hold records: another part, or text."""
    if _TEXT.match(data):
        raise EOFError("text that is not compressed follows the compressed data")
    num_different = sum(ours != theirs for ours, theirs in zip(data, kind.magic, strict=False))
    # One byte of the beginning may be damaged, unless too few bytes are left to recognise it.
    if num_different <= (len(data) >= len(kind.magic)):
        raise EOFError("the beginning of one of its parts is damaged")
    while data:
        if any(each.start.search(data) for each in _FORMATS):
            raise EOFError("there are other bytes between its parts")
        more = file.read(BLOCK_BYTES)
        data = data[-_LONGEST_START:] + more if more else b""
