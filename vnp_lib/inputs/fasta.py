"""Read FASTA and FASTQ files in chunks, and find the lines of their records."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import BinaryIO

import dnaio
import numpy as np

from vnp_lib.errors import FastaError
from vnp_lib.inputs.characters import INVISIBLE, WHITE_SPACE
from vnp_lib.inputs.file_kinds import is_fastq, kind_of
from vnp_lib.inputs.files import open_text, refuse_kind, start_of
from vnp_lib.inputs.records import RawChunk

_CHUNK_BYTES = 16 * 1024**2
_BLOCK_BYTES = 128 * 1024

_MARGIN = re.compile(f"[{WHITE_SPACE}{INVISIBLE}]*")

# Bytes that are not UTF-8, as the error handler `surrogateescape` decodes them.
_NOT_UTF8 = re.compile("[\udc80-\udcff]")

# First bytes of lines that are no comment and have no margin. A line feed is an empty line.
_PLAIN_STARTS = np.zeros(256, dtype=bool)
_PLAIN_STARTS[
    np.frombuffer(b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz*->\n", dtype=np.uint8)
] = True


def read_fasta(path: Path, *, chunk_size: int = 8192) -> Iterator[RawChunk]:
    """Read every record of a FASTA file, in order; lines that begin with `#` or `;` are comments.

    Lines end as on Unix, on Windows or on an old Macintosh. White space and invisible characters,
    such as a byte order mark, may precede the `>` of a header. A chunk has `chunk_size` records,
    or fewer if it reaches about 16 million characters. A record is never divided.

    Raises:
        FastaError: As `open_text`; or the file is not FASTA, or not UTF-8.
    """
    with open_text(path) as file:
        start = start_of(file)
        if is_fastq(start):
            raise FastaError(
                f"{path}: this is FASTQ, whose nucleotides are read with --translate six-frame "
                "only; give proteins as FASTA"
            )
        if kind := kind_of(start):
            refuse_kind(path, kind)
        try:
            yield from _chunks(file, chunk_size)
        except (_NoHeaderError, UnicodeDecodeError) as error:
            raise FastaError(_describe_fault(path)) from error


def read_fastq(path: Path, *, chunk_size: int = 8192) -> Iterator[RawChunk]:
    """Read every record of a FASTQ file, in order, without its qualities.

    Raises:
        FastaError: As `open_text`; or a record is not four lines of ASCII.
    """
    with open_text(path) as file:
        try:
            headers: list[str] = []
            sequences: list[str] = []
            for record in dnaio.FastqReader(file):
                headers.append(record.name)
                sequences.append(record.sequence)
                if len(headers) == chunk_size:
                    yield RawChunk(headers=headers, sequences=sequences)
                    headers, sequences = [], []
            if headers:
                yield RawChunk(headers=headers, sequences=sequences)
        except dnaio.FileFormatError as error:
            reason = " ".join(str(error).split())
            raise FastaError(
                f"{path}: this FASTQ cannot be read ({reason}); correct it or make it again"
            ) from error


def is_fastq_file(path: Path) -> bool:
    """Return whether a file is FASTQ, by its first bytes. Raise FastaError as `open_text`."""
    with open_text(path) as file:
        return is_fastq(start_of(file))


def header_lines(path: Path) -> Iterator[int]:
    """Yield the line number, from 1, of each record's header. Raise FastaError as `open_text`."""
    if is_fastq_file(path):
        return count(1, 4)
    return (
        number for number, line in _numbered_lines(path) if line.startswith(">", _margin_of(line))
    )


class _NoHeaderError(Exception):
    """There is text before the first header."""


def _chunks(file: BinaryIO, chunk_size: int) -> Iterator[RawChunk]:
    headers: list[str] = []
    # There is one sequence less than headers: pieces of the last one are still being read.
    sequences: list[str] = []
    pieces: list[str] = []
    num_bytes = 0
    for text in _plain_text(file):
        before, *records = f"\n{text}".split("\n>")
        if headers:
            pieces.append(before)
        elif _margin_of(before) < len(before):
            raise _NoHeaderError
        if records:
            if headers:
                sequences.append("".join(pieces).replace("\n", ""))
            # Ends of the headers. Lists of numbers and texts are cheaper than one object per
            # record, which the garbage collector would track.
            ends = [record.find("\n") for record in records]
            headers += [
                record[:end] if end >= 0 else record
                for record, end in zip(records, ends, strict=True)
            ]
            bodies = [
                record[end + 1 :] if end >= 0 else ""
                for record, end in zip(records, ends, strict=True)
            ]
            pieces = [bodies.pop()]
            sequences += [body.replace("\n", "") for body in bodies]
        num_bytes += len(text)
        if len(sequences) >= chunk_size or num_bytes >= _CHUNK_BYTES:
            is_full = num_bytes >= _CHUNK_BYTES
            num_complete = len(sequences) if is_full else len(sequences) // chunk_size * chunk_size
            yield from _divided(headers[:num_complete], sequences[:num_complete], chunk_size)
            headers, sequences = headers[num_complete:], sequences[num_complete:]
            num_bytes = 0
    if headers:
        sequences.append("".join(pieces).replace("\n", ""))
        yield from _divided(headers, sequences, chunk_size)


def _divided(headers: list[str], sequences: list[str], chunk_size: int) -> Iterator[RawChunk]:
    for start in range(0, len(headers), chunk_size):
        stop = start + chunk_size
        yield RawChunk(headers=headers[start:stop], sequences=sequences[start:stop])


def _plain_text(file: BinaryIO) -> Iterator[str]:
    """Yield the lines of a file without comments, and without margins before headers.

    Every line ends with a line feed, and no line is divided between two texts.
    """
    for lines in _line_blocks(file):
        if b"\r" in lines:
            lines = lines.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
        codes = np.frombuffer(lines, dtype=np.uint8)
        starts = np.flatnonzero(codes[:-1] == ord("\n")) + 1
        if (
            lines.isascii()
            and _PLAIN_STARTS[codes[:1]].all()
            and _PLAIN_STARTS[codes[starts]].all()
        ):
            yield lines.decode()
        else:
            plain: list[str] = []
            for line in filter(None, lines.decode().split("\n")):
                margin = _margin_of(line)
                if not line.startswith((">", "#", ";"), margin):
                    plain.append(f"{line}\n")
                elif line[margin] == ">":
                    # The margin moves behind the header, so that its characters are counted as
                    # removed.
                    plain.append(f"{line[margin:]}\n{line[:margin]}\n")
            yield "".join(plain)


def _line_blocks(file: BinaryIO) -> Iterator[bytes]:
    """Yield blocks of a file that end at line ends; the last is given a line feed."""
    pieces: list[bytes] = []
    while block := file.read(_BLOCK_BYTES):
        # A Windows line end that is divided between two blocks makes an empty line at worst.
        stop = max(block.rfind(b"\n"), block.rfind(b"\r")) + 1
        if not stop:
            pieces.append(block)
            continue
        yield b"".join([*pieces, block[:stop]])
        pieces = [block[stop:]]
    if any(pieces):
        yield b"".join([*pieces, b"\n"])


def _margin_of(line: str) -> int:
    """Return the number of white and invisible characters that a line begins with."""
    margin = _MARGIN.match(line)
    assert margin is not None
    return margin.end()


def _numbered_lines(path: Path) -> Iterator[tuple[int, str]]:
    with (
        open_text(path) as file,
        io.TextIOWrapper(file, encoding="utf-8", errors="surrogateescape") as text,
    ):
        yield from enumerate(text, start=1)


def _describe_fault(path: Path) -> str:
    """Return why a file cannot be read as FASTA text."""
    has_header = False
    for number, line in _numbered_lines(path):
        text = line[_margin_of(line) :]
        has_header = has_header or text.startswith(">")
        if not has_header and text and not text.startswith(("#", ";")):
            start = text.rstrip()[:80]
            found = (
                f"text that starts with {start[:40]!r}"
                if start.replace("\t", " ").isprintable()
                else "a binary file"
            )
            return f"{path}: this is not FASTA but {found}; its first line must start with '>'"
        if _NOT_UTF8.search(line):
            return (
                f"{path}, line {number}: this is not UTF-8 text; convert it first, for example "
                "with `iconv -f latin1 -t utf8`"
            )
    # The second pass has not found the fault of the first one.
    return (
        f"{path}: the file was changed while it was read; wait until it is complete, then start "
        "again"
    )
