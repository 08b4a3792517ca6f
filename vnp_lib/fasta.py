"""Reading FASTA files, chunk by chunk, in the records' own words; and finding their lines."""

from __future__ import annotations

import io
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import dnaio

from vnp_lib.failures import FastaError
from vnp_lib.records import RawChunk
from vnp_lib.source import open_source

_CHUNK_LETTERS = 16 * 1024**2


def read_fasta(path: Path, *, chunk_size: int = 8192) -> Iterator[RawChunk]:
    """Read every record of a file, in order; lines that begin with `#` are comments.

    A chunk has `chunk_size` records, or fewer where they are long: about 16 million letters are enough, but a record is never
    divided.

    Raises:
        FastaError: As `open_source`; or the file is no FASTA, or not UTF-8.
    """
    sequences: list[str] = []

    def put_down(header: str, sequence: str, _qualities: None) -> str:
        sequences.append(sequence)  # an object per record would keep the garbage collector busy
        return header

    with open_source(path) as file, dnaio.FastaReader(file, sequence_class=put_down) as reader:
        try:
            records = iter(reader)
            while headers := _take(records, sequences, chunk_size):
                yield RawChunk(headers=headers, sequences=sequences)
                sequences = []
        except (dnaio.FileFormatError, UnicodeDecodeError) as error:
            raise FastaError(_what_is_wrong(path)) from error


def header_lines(path: Path) -> Iterator[int]:
    """The line number, from 1, of each record's header, in order. Raises as `open_source`."""
    return (number for number, line in _numbered_lines(path) if line.lstrip().startswith(">"))


def _take(records: Iterator[str], sequences: list[str], chunk_size: int) -> list[str]:
    """Headers of the next chunk, while their sequences are put down. Twice as many at a time, so that looking costs nothing."""
    headers: list[str] = []
    num_letters = num_before = 0
    while len(headers) < chunk_size and num_letters < _CHUNK_LETTERS:
        headers += islice(records, min(chunk_size - len(headers), max(1, len(headers))))
        if len(headers) == num_before:
            break
        num_letters += sum(map(len, sequences[num_before:]))
        num_before = len(headers)
    return headers


def _numbered_lines(path: Path) -> Iterator[tuple[int, str]]:
    with open_source(path) as file, io.TextIOWrapper(file, encoding="utf-8", errors="replace") as text:
        yield from enumerate(text, start=1)


def _what_is_wrong(path: Path) -> str:
    """Say why a file cannot be read as FASTA text at all."""
    start = next((line.strip() for _, line in _numbered_lines(path) if line.strip()), "")
    if not start.startswith(">"):
        return f"{path}: this is not FASTA but {_kind_of_file(start)}; its first line must start with '>'"
    number = next(number for number, line in _numbered_lines(path) if "\ufffd" in line)
    return (
        f"{path}, line {number}: this is not UTF-8 text; convert it first, for example with `iconv -f latin1 -t utf8`"
    )


def _kind_of_file(start: str) -> str:
    if not start[:80].isprintable() or "\ufffd" in start[:80]:
        return "a binary file"
    if start.startswith("@"):
        return "FASTQ, by its looks"
    if start.startswith(("LOCUS", "ID  ")):
        return "a GenBank, EMBL or UniProt flat file, by its looks"
    return f"text that starts with {start[:40]!r}"
