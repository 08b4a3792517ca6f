"""Reading proteins: FASTA files, plain or compressed, checked and normalised chunk by chunk.

What the model cannot take is an error that names file, line and id. Four things are mended, the same way everywhere:
lower case is raised, white space is taken out, one `*` at the end (a stop codon) is dropped, and J, which fair-esm's
alphabet lacks, is read as X.
"""

from __future__ import annotations

import lzma
import zlib
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import dnaio
import numpy as np
from backports.zstd import ZstdError
from isal.igzip_lib import IsalError
from xopen import xopen

from vnp_lib.failures import FastaError

LETTERS = "ACDEFGHIKLMNPQRSTVWYBUXZO"

_NORMAL = bytes.maketrans(b"acdefghiklmnpqrstvwybuxzojJ", LETTERS.encode() + b"XX")
_WHITE_SPACE = b" \t\v\f"
_LOWER_CASE = b"abcdefghijklmnopqrstuvwxyz"
_NUCLEOTIDES = "ACGTUN"
_NUCLEOTIDE_SHARE = 0.95
_NUCLEOTIDE_SAMPLE = 1000  # records
# Decompressors share no base class; isal's stub takes its class for an instance.
_DAMAGE: tuple[type[Exception], ...] = (EOFError, zlib.error, lzma.LZMAError, IsalError, ZstdError)  # type: ignore[assignment]


@dataclass(frozen=True, slots=True, kw_only=True)
class SequenceChunk:
    """Consecutive records of one file, normalised; the lists run in parallel."""

    ids: list[str]  # the header up to the first white space
    descriptions: list[str]  # the rest of the header, or ""
    sequences: list[str]  # upper case, `LETTERS` only, never empty


@dataclass(frozen=True, slots=True, kw_only=True)
class LetterCounts:
    """Residues that stand for something unknown, or were mended."""

    unknown: int = 0  # X
    read_as_unknown: int = 0  # J, which becomes X
    lower_case: int = 0  # raised
    final_stops: int = 0  # `*` at the end of a sequence, dropped

    def __add__(self, other: LetterCounts) -> LetterCounts:
        return LetterCounts(
            unknown=self.unknown + other.unknown,
            read_as_unknown=self.read_as_unknown + other.read_as_unknown,
            lower_case=self.lower_case + other.lower_case,
            final_stops=self.final_stops + other.final_stops,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class SurveyedChunk:
    """Consecutive records of one file: those that can be used, and why the others cannot."""

    usable: SequenceChunk
    records: list[int]  # number in the file, from 0, of each that is usable
    faults: dict[int, str]  # what is wrong with the others, by their number
    letters: LetterCounts  # of all of them


def read_fasta(paths: Sequence[Path], *, chunk_size: int = 8192) -> Iterator[SequenceChunk]:
    """Read every record of every file, in order. A chunk never spans two files.

    Plain, gz, bz2, xz and zst files are told apart by their content; lines that begin with `#` are comments.
    Ids that occur twice are the plan's affair.

    Raises:
        FastaError: A file that is missing, unreadable, cut short, empty or no protein FASTA, or a record without id,
            without residues or with a letter that the model does not know.
    """
    for path in paths:
        yield from _read_file(path, chunk_size)


def survey_fasta(path: Path, *, chunk_size: int = 8192) -> Iterator[SurveyedChunk]:
    """Read every record of a file as `read_fasta` does, but go on after those that it would refuse.

    Raises:
        FastaError: It is not this or that record, but the file that cannot be used.
    """
    num_read = 0
    for headers, sequences in _read_records(path, chunk_size):
        chunk = _survey(headers, sequences, num_read)
        if num_read == 0 and chunk.records:
            _refuse_nucleotides(path, chunk.usable.sequences[:_NUCLEOTIDE_SAMPLE])
        yield chunk
        num_read += len(headers)
    if num_read == 0:
        raise _empty(path)


def normalise_records(ids: list[str], sequences: list[str]) -> SequenceChunk:
    """Check and normalise records that are in memory, as `read_fasta` does those of a file.

    Raises:
        FastaError: There is none, they look like nucleotides, or one has an id that is empty or holds white space, no
            residues, or a letter that the model does not know.
    """
    if not ids:
        raise FastaError("there is no sequence to embed; give at least one")
    sequences = ["".join(sequence.split()) for sequence in sequences]  # line ends too, as in a file
    chunk = _normalise(ids, sequences)
    if chunk is None or chunk.ids != ids:
        faults = map(_fault_in_memory, ids, sequences)
        index, fault = next((index, fault) for index, fault in enumerate(faults) if fault)
        raise FastaError(f"record {index}: {fault}")
    _refuse_nucleotides("these sequences", chunk.sequences[:_NUCLEOTIDE_SAMPLE])
    return chunk


def header_lines(path: Path, records: Collection[int]) -> dict[int, int]:
    """The line number, from 1, of each record's header; records count from 0."""
    headers = (number for number, line in _numbered_lines(path) if line.lstrip().startswith(">"))
    last = max(records, default=-1)
    return {record: number for record, number in enumerate(islice(headers, last + 1)) if record in records}


def _survey(headers: list[str], sequences: list[str], num_before: int) -> SurveyedChunk:
    faults: dict[int, str] = {}
    usable = _normalise(headers, sequences)
    if usable is None:
        found = enumerate(map(_fault_of, headers, sequences))
        faults = {index: fault for index, fault in found if fault is not None}
        kept = [index for index in range(len(headers)) if index not in faults]
        usable = _normalise([headers[index] for index in kept], [sequences[index] for index in kept])
    return SurveyedChunk(
        usable=usable or SequenceChunk(ids=[], descriptions=[], sequences=[]),
        records=[num_before + index for index in range(len(headers)) if index not in faults],
        faults={num_before + index: fault for index, fault in faults.items()},
        letters=_count_letters("\n".join(sequences)),
    )


def _count_letters(lines: str) -> LetterCounts:
    text = lines.encode().translate(None, delete=_WHITE_SPACE)
    return LetterCounts(
        unknown=text.count(b"X") + text.count(b"x"),
        read_as_unknown=text.count(b"J") + text.count(b"j"),
        lower_case=len(text) - len(text.translate(None, delete=_LOWER_CASE)),
        final_stops=(text + b"\n").count(b"*\n"),
    )


def _read_file(path: Path, chunk_size: int) -> Iterator[SequenceChunk]:
    num_read = 0
    for headers, sequences in _read_records(path, chunk_size):
        chunk = _normalise(headers, sequences)
        if chunk is None:
            raise _refusal(path, headers, sequences, num_read)
        if num_read == 0:
            _refuse_nucleotides(path, chunk.sequences[:_NUCLEOTIDE_SAMPLE])
        yield chunk
        num_read += len(headers)
    if num_read == 0:
        raise _empty(path)


def _empty(path: Path) -> FastaError:
    return FastaError(f"{path}: there is no sequence in it; give a FASTA file with at least one record")


def _read_records(path: Path, chunk_size: int) -> Iterator[tuple[list[str], list[str]]]:
    """Headers without ">" and sequences as they stand in the file, a chunk at a time."""
    try:
        sequences: list[str] = []

        def put_down(header: str, sequence: str, _qualities: None) -> str:
            sequences.append(sequence)  # an object per record would keep the garbage collector busy
            return header

        with xopen(path, "rb", threads=0) as file, dnaio.FastaReader(file, sequence_class=put_down) as reader:
            records = iter(reader)
            while headers := list(islice(records, chunk_size)):
                yield headers, sequences
                sequences = []
    except (dnaio.FileFormatError, UnicodeDecodeError) as error:
        raise FastaError(_what_is_wrong(path)) from error
    except _DAMAGE as error:
        raise FastaError(f"{path}: the compressed file is cut short or damaged ({error}); copy it again") from error
    except FileNotFoundError as error:
        raise FastaError(f"{path}: there is no such file") from error
    except IsADirectoryError as error:
        raise FastaError(f"{path}: this is a directory; give the FASTA files in it") from error
    except OSError as error:
        raise FastaError(f"{path}: the file cannot be read ({error.strerror or error})") from error


def _normalise(headers: list[str], sequences: list[str]) -> SequenceChunk | None:
    """Normalise and check a chunk in a few passes over its joined bytes; None where a record is at fault."""
    lines = "\n".join(sequences)
    if not _is_normal(lines.encode()):
        residues = _normal_bytes(lines)
        if not _is_normal(residues):
            return None
        sequences = residues.decode("ascii").split("\n")
    ids = [header.split(None, 1)[0] if header else "" for header in headers]
    if "" in sequences or "" in ids or not all(map(str.startswith, headers, ids)):
        return None
    descriptions = list(map(str.lstrip, map(str.removeprefix, headers, ids)))
    return SequenceChunk(ids=ids, descriptions=descriptions, sequences=sequences)


def _is_normal(lines: bytes) -> bool:
    """Whether there is nothing in it but `LETTERS`, which are A to Z without J, and line ends."""
    codes = np.frombuffer(lines, dtype=np.uint8)
    num_before_a = np.count_nonzero(codes < ord("A"))
    return bool(num_before_a == lines.count(b"\n") and codes.max(initial=0) <= ord("Z") and b"J" not in lines)


def _normal_bytes(lines: str) -> bytes:
    text = lines.encode().translate(_NORMAL, delete=_WHITE_SPACE)
    return (text + b"\n").replace(b"*\n", b"\n")[:-1] if b"*" in text else text


def _strange_bytes(text: bytes) -> bytes:
    return text.translate(None, delete=LETTERS.encode() + b"\n")


def _refuse_nucleotides(path: Path | str, sequences: list[str]) -> None:
    residues = "".join(sequences)
    share = sum(map(residues.count, _NUCLEOTIDES)) / len(residues)
    if share >= _NUCLEOTIDE_SHARE:
        raise FastaError(
            f"{path}: this looks like nucleotides ({share:.0%} of the letters in the first {len(sequences)} records "
            f"are A, C, G, T, U or N); ESM-2 takes proteins: translate it first, for example with `prodigal -a` "
            f"or `seqkit translate`"
        )


def _refusal(path: Path, headers: list[str], sequences: list[str], num_before: int) -> FastaError:
    """Find the first record at fault in a chunk that was not normalised, and its line in the file."""
    faults = map(_fault_of, headers, sequences)
    index, fault = next((index, fault) for index, fault in enumerate(faults) if fault)
    record = num_before + index
    return FastaError(f"{path}, line {header_lines(path, [record])[record]}: {fault}")


def _fault_of(header: str, sequence: str) -> str | None:
    if not header or header[0].isspace():
        return f"a record has no id (its header is {f'>{header}'!r}); write one right after the '>'"
    sequence_id = header.split(None, 1)[0]
    normal = _normal_bytes(sequence)
    if not normal:
        return f"sequence {sequence_id!r} has no residues; take the record out"
    residues = normal.decode() if _strange_bytes(normal) else ""
    for position, letter in enumerate(residues, start=1):
        if letter not in LETTERS:
            return f"sequence {sequence_id!r} has {letter!r} at position {position}; {_advice(letter)}"
    return None


def _fault_in_memory(sequence_id: str, sequence: str) -> str | None:
    if sequence_id and sequence_id.split() != [sequence_id]:
        return f"the id {sequence_id!r} has white space in it; replace that, for example by '_'"
    return _fault_of(sequence_id, sequence)


def _advice(letter: str) -> str:
    if letter == "*":
        return "a stop codon inside a protein: cut the sequence there, or write X"
    if letter in "-.":
        return "gaps belong to an alignment: take them out first, for example with `seqkit seq --remove-gaps`"
    return f"allowed are the letters {''.join(sorted(LETTERS + 'J'))}: write X for an unknown residue"


def _numbered_lines(path: Path) -> Iterator[tuple[int, str]]:
    with xopen(path, "rt", threads=0, encoding="utf-8", errors="replace") as file:
        yield from enumerate(file, start=1)


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
