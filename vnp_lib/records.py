"""Records of the input: as they stand in a file, and as the model takes them.

What cannot be taken is a fault that names the record and says what to do. Four things are mended, the same way everywhere:
lower case is raised, white space is taken out, one `*` at the end of a protein (a stop codon) is dropped, and J, which
fair-esm's alphabet lacks, is read as X.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from string import ascii_uppercase

import numpy as np

LETTERS = "ACDEFGHIKLMNPQRSTVWYBUXZO"

_WHITE_SPACE = b" \t\v\f\r"
_LOWER_CASE = b"abcdefghijklmnopqrstuvwxyz"
_NUCLEOTIDES = "ACGTUN"


@dataclass(frozen=True, slots=True, kw_only=True)
class RawChunk:
    """Consecutive records of one file, as they stand there; the lists run in parallel."""

    headers: list[str]  # without ">"
    sequences: list[str]  # without line ends


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SequenceChunk:
    """Consecutive records of one file, normalised; the lists run in parallel."""

    ids: list[str]  # the header up to the first white space
    descriptions: list[str]  # the rest of the header, or ""
    sequences: list[str]  # upper case, letters of the alphabet only, never empty


@dataclass(frozen=True, slots=True, kw_only=True)
class LetterCounts:
    """Letters that stand for something unknown, or were mended."""

    unknown: int = 0  # X
    read_as_unknown: int = 0  # J, which becomes X
    lower_case: int = 0  # raised
    final_stops: int = 0  # `*` at the end of a sequence, dropped
    mapped: int = 0  # whatever else the model does not know, made an X since that was asked for

    def __add__(self, other: LetterCounts) -> LetterCounts:
        return LetterCounts(
            **{each.name: getattr(self, each.name) + getattr(other, each.name) for each in fields(self)}
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """Why a record cannot be used as it is."""

    record: int  # its number in the file, from 0
    sequence_id: str  # "" if it has none
    reason: str  # a sentence that names the id and says what to do


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class CheckedChunk:
    """Consecutive records of one file: those that can be used, and why the others cannot."""

    usable: SequenceChunk
    records: Sequence[int]  # number in the file, from 0, of each that is usable
    faults: list[Fault]
    letters: LetterCounts  # of all of them


@dataclass(frozen=True, kw_only=True, eq=False)
class Alphabet:
    """The letters that sequences are made of, and what is made of others."""

    letters: str  # upper case
    unknown: str  # the letter for what is not known
    read_as_unknown: str = ""  # upper-case letters that are read as that one, unasked
    drops_final_stop: bool = False
    advice: Callable[[str], str]  # what to do about a letter that is none of these

    def is_normal(self, lines: bytes) -> bool:
        """Whether there is nothing in it but `letters` and line ends."""
        codes = np.frombuffer(lines, dtype=np.uint8)
        num_before_a = np.count_nonzero(codes < ord("A"))
        is_upper_case = num_before_a == lines.count(b"\n") and codes.max(initial=0) <= ord("Z")
        return bool(is_upper_case and not any(letter in lines for letter in self._other_letters))

    def normalise(self, lines: bytes) -> bytes:
        """Mend what is mended; it need not be normal then."""
        text = lines.translate(self._mended, delete=_WHITE_SPACE)
        return (text + b"\n").replace(b"*\n", b"\n")[:-1] if self.drops_final_stop and b"*" in text else text

    def map_unknown(self, lines: bytes) -> tuple[bytes, int]:
        """Put the unknown letter for every character that is not normal, and say for how many."""
        mapped, count = re.subn(f"[^{self.letters}\n]", self.unknown, lines.decode())
        return mapped.encode(), count

    def count(self, lines: bytes) -> LetterCounts:
        """Count what `normalise` would mend."""
        text = lines.translate(None, delete=_WHITE_SPACE)
        return LetterCounts(
            unknown=_count_in_any_case(text, self.unknown),
            read_as_unknown=sum(_count_in_any_case(text, letter) for letter in self.read_as_unknown),
            lower_case=len(text) - len(text.translate(None, delete=_LOWER_CASE)),
            final_stops=(text + b"\n").count(b"*\n") if self.drops_final_stop else 0,
        )

    @cached_property
    def _other_letters(self) -> list[bytes]:
        return [letter.encode() for letter in ascii_uppercase if letter not in self.letters]

    @cached_property
    def _mended(self) -> bytes:
        known, unknown = self.letters, self.read_as_unknown
        mended = known + self.unknown * 2 * len(unknown)
        return bytes.maketrans((known.lower() + unknown + unknown.lower()).encode(), mended.encode())


def _advice_on_proteins(letter: str) -> str:
    if letter == "*":
        return "a stop codon inside a protein: cut the sequence there, or write X"
    if letter in "-.":
        return "gaps belong to an alignment: take them out first, for example with `seqkit seq --remove-gaps`"
    return f"allowed are the letters {''.join(sorted(LETTERS + 'J'))}: write X for an unknown residue"


PROTEINS = Alphabet(
    letters=LETTERS, unknown="X", read_as_unknown="J", drops_final_stop=True, advice=_advice_on_proteins
)


def check(chunk: RawChunk, alphabet: Alphabet, *, first_record: int, maps_unknown: bool = False) -> CheckedChunk:
    """Normalise a chunk, in a few passes over its joined bytes, and say which of its records cannot be used.

    Args:
        chunk: What was read.
        alphabet: What its sequences are made of.
        first_record: The number in its file of the chunk's first record, from 0.
        maps_unknown: Take the alphabet's unknown letter for whatever is not in it.
    """
    lines = "\n".join(chunk.sequences).encode()
    if alphabet.is_normal(lines):
        sequences, letters = chunk.sequences, LetterCounts(unknown=lines.count(alphabet.unknown.encode()))
        usable = _whole(chunk.headers, sequences)
    else:
        lines, letters = _mend(lines, alphabet, maps_unknown=maps_unknown)
        sequences = lines.decode().split("\n")
        usable = _whole(chunk.headers, sequences) if alphabet.is_normal(lines) else None
    records = range(first_record, first_record + len(sequences))
    if usable is not None:
        return CheckedChunk(usable=usable, records=records, faults=[], letters=letters)
    faults = list(_faults(chunk.headers, sequences, alphabet, first_record))
    kept = sorted({*records} - {fault.record for fault in faults})
    usable = _whole(
        [chunk.headers[record - first_record] for record in kept], [sequences[record - first_record] for record in kept]
    )
    assert usable is not None
    return CheckedChunk(usable=usable, records=kept, faults=faults, letters=letters)


def _mend(lines: bytes, alphabet: Alphabet, *, maps_unknown: bool) -> tuple[bytes, LetterCounts]:
    letters = alphabet.count(lines)
    lines = alphabet.normalise(lines)
    if not maps_unknown:
        return lines, letters
    lines, num_mapped = alphabet.map_unknown(lines)
    return lines, letters + LetterCounts(mapped=num_mapped)


def nucleotide_share(sequences: Sequence[str]) -> float:
    """The share of A, C, G, T, U and N, in either case, in all of their letters; 0 where there are none."""
    residues = "".join(sequences).upper()
    return sum(map(residues.count, _NUCLEOTIDES)) / len(residues) if residues else 0.0


def _whole(headers: list[str], sequences: list[str]) -> SequenceChunk | None:
    """Take headers apart; None where a record has no id or no letters."""
    ids = [words[0] if (words := header.split(None, 1)) else "" for header in headers]
    if "" in sequences or "" in ids or not all(map(str.startswith, headers, ids)):
        return None
    descriptions = list(map(str.lstrip, map(str.removeprefix, headers, ids)))
    return SequenceChunk(ids=ids, descriptions=descriptions, sequences=sequences)


def _id_of(header: str) -> str:
    words = header.split(None, 1)
    return words[0] if words else ""


def _faults(headers: list[str], sequences: list[str], alphabet: Alphabet, first_record: int) -> Iterator[Fault]:
    for record, (header, sequence) in enumerate(zip(headers, sequences, strict=True), start=first_record):
        if reason := _reason(header, sequence, alphabet):
            yield Fault(record=record, sequence_id=_id_of(header), reason=reason)


def _reason(header: str, sequence: str, alphabet: Alphabet) -> str | None:
    sequence_id = _id_of(header)
    if not sequence_id or header[0].isspace():
        return f"a record has no id (its header is {f'>{header}'!r}); write one right after the '>'"
    if not sequence:
        return f"sequence {sequence_id!r} has no residues; take the record out"
    strange = sequence if not alphabet.is_normal(sequence.encode()) else ""
    for position, letter in enumerate(strange, start=1):
        if letter not in alphabet.letters:
            return f"sequence {sequence_id!r} has {letter!r} at position {position}; {alphabet.advice(letter)}"
    return None


def _count_in_any_case(text: bytes, letter: str) -> int:
    return text.count(letter.encode()) + text.count(letter.lower().encode())
