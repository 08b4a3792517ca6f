"""Records of the input: as they stand in a file, and as the model takes them.

What cannot be taken is a fault that names the record and says what to do. What becomes of each character is the table in
`characters`: lower case is raised, white space and invisible characters are removed, one `*` at the end of a protein (a stop codon)
is dropped, and J, which fair-esm's alphabet lacks, is read as X, the same way everywhere.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property

from vnp_lib.inputs.characters import INVISIBLE, WHITE_SPACE, class_of, is_mapped

LETTERS = "ACDEFGHIKLMNPQRSTVWYBUXZO"

_WHITE_SPACE = b" \t\v\f\r"  # of ASCII; a line break is between two sequences
_INVISIBLE = b"\x1a"  # of ASCII
_LOWER_CASE = b"abcdefghijklmnopqrstuvwxyz"
_NUCLEOTIDES = b"ACGTUN"
_NO_LETTERS = bytes(set(range(128)) - {*b"ABCDEFGHIJKLMNOPQRSTUVWXYZ"})

_WHITE_SPACE_BEYOND_ASCII = re.compile(f"(?![\0-\x7f])[{WHITE_SPACE}]")
_INVISIBLE_BEYOND_ASCII = re.compile(f"(?![\0-\x7f])[{INVISIBLE}]")
_BEYOND_ASCII = re.compile("[^\0-\x7f]")
_MARGINS = re.compile(f"^[{WHITE_SPACE}{INVISIBLE}]+|[{WHITE_SPACE}{INVISIBLE}]+$")
# Two letters and a semicolon, as Biopython's reader has them: complete proteins, fragments, DNA, RNA and others.
_CODES = [
    "ALA",
    "ARG",
    "ASN",
    "ASP",
    "CYS",
    "GLN",
    "GLU",
    "GLY",
    "HIS",
    "ILE",
    "LEU",
    "LYS",
    "MET",
    "PHE",
    "PRO",
    "SER",
    "THR",
    "TRP",
    "TYR",
    "VAL",
    "SEC",
    "PYL",
    "ASX",
    "GLX",
    "XAA",
    "UNK",
    "TER",
]
_IN_CODES = re.compile(f"(?:{'|'.join(_CODES)}){{4,}}")
_NBRF_HEADER = re.compile(r"(?:P1|F1|D1|DL|DC|RL|RC|N1|N3|XX);\S")


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
class CharacterCounts:
    """Letters that stand for something unknown, or were mended."""

    unknown: int = 0  # X
    read_as_unknown: int = 0  # J, which becomes X
    lower_case: int = 0  # raised
    final_stops: int = 0  # `*` at the end of a sequence, dropped
    white_space: int = 0  # removed
    invisible: int = 0  # byte order marks, zero-width characters and the like, removed
    mapped: int = 0  # whatever else the model does not know, made an X since that was asked for

    def __add__(self, other: CharacterCounts) -> CharacterCounts:
        return CharacterCounts(
            **{
                each.name: getattr(self, each.name) + getattr(other, each.name)
                for each in fields(self)
            }
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """Why a record cannot be used as it is."""

    record: int  # its number in the file, from 0
    sequence_id: str  # "" if it has none
    reason: str  # a sentence that names the id and says what to do
    is_empty: bool = False  # it has no residues, and nothing else is wrong with it


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class CheckedChunk:
    """Consecutive records of one file: those that can be used, and why the others cannot."""

    usable: SequenceChunk
    records: Sequence[int]  # number in the file, from 0, of each that is usable
    faults: list[Fault]
    letters: CharacterCounts  # of all of them


@dataclass(frozen=True, kw_only=True, eq=False)
class Alphabet:
    """The letters that sequences are made of, and what is made of others."""

    letters: str  # upper case
    residue: str  # what they stand for
    unknown: str  # the letter for a residue that is not known
    read_as_unknown: str = ""  # upper-case letters that are read as that one, unasked
    drops_final_stop: bool = False
    advice: Mapping[str, str] = field(
        default_factory=dict
    )  # on single characters, before that of their class

    def is_normal(self, lines: bytes) -> bool:
        """Whether there is nothing in it but `letters` and line ends."""
        return not lines.translate(None, delete=self._normal)

    def normalise(self, text: str) -> tuple[bytes, CharacterCounts]:
        """Mend what is mended in lines, and count it; they need not be normal then."""
        num_white_space = num_invisible = 0
        if not text.isascii():
            text, num_white_space = _WHITE_SPACE_BEYOND_ASCII.subn("", text)
            text, num_invisible = _INVISIBLE_BEYOND_ASCII.subn("", text)
        lines = text.encode("utf-8", "surrogatepass")
        visible = lines.translate(None, delete=_INVISIBLE)
        joined = visible.translate(None, delete=_WHITE_SPACE)
        counts = CharacterCounts(
            unknown=_count_in_any_case(joined, self.unknown),
            read_as_unknown=sum(
                _count_in_any_case(joined, letter) for letter in self.read_as_unknown
            ),
            lower_case=len(joined) - len(joined.translate(None, delete=_LOWER_CASE)),
            final_stops=(joined + b"\n").count(b"*\n") if self.drops_final_stop else 0,
            white_space=num_white_space + len(visible) - len(joined),
            invisible=num_invisible + len(lines) - len(visible),
        )
        lines = joined.translate(self._mended)
        if counts.final_stops:
            lines = (lines + b"\n").replace(b"*\n", b"\n")[:-1]
        return lines, counts

    def map_unknown(self, lines: bytes) -> tuple[bytes, int]:
        """Put the unknown letter for each character that stands for a residue, and say for how many."""
        num_mapped = len(lines) - len(lines.translate(None, delete=self._mapped))
        lines = lines.translate(
            bytes.maketrans(self._mapped, self.unknown.encode() * len(self._mapped))
        )
        if lines.isascii():
            return lines, num_mapped
        characters = set(_BEYOND_ASCII.findall(text := lines.decode("utf-8", "surrogatepass")))
        for character in filter(is_mapped, characters):
            num_mapped += text.count(character)
            text = text.replace(character, self.unknown)
        return text.encode("utf-8", "surrogatepass"), num_mapped

    def advise(self, character: str) -> str:
        """Say what to do about a character that is none of its letters."""
        letters = "".join(sorted(self.letters + self.read_as_unknown))
        advice = self.advice.get(character) or class_of(character).advice
        return advice.format(letters=letters, unknown=self.unknown, residue=self.residue)

    @cached_property
    def _normal(self) -> bytes:
        return self.letters.encode() + b"\n"

    @cached_property
    def _mapped(self) -> bytes:
        """What of ASCII is read as unknown where that is asked for."""
        others = (chr(code) for code in range(128) if chr(code) not in self.letters + "\n")
        return "".join(filter(is_mapped, others)).encode()

    @cached_property
    def _mended(self) -> bytes:
        known, unknown = self.letters, self.read_as_unknown
        mended = known + self.unknown * 2 * len(unknown)
        return bytes.maketrans(
            (known.lower() + unknown + unknown.lower()).encode(), mended.encode()
        )


PROTEINS = Alphabet(
    letters=LETTERS, residue="residue", unknown="X", read_as_unknown="J", drops_final_stop=True
)


def check_records(
    chunk: RawChunk, alphabet: Alphabet, *, first_record: int, maps_unknown: bool = False
) -> CheckedChunk:
    """Normalise a chunk, in a few passes over its joined bytes, and say which of its records cannot be used.

    Args:
        chunk: What was read.
        alphabet: What its sequences are made of.
        first_record: The number in its file of the chunk's first record, from 0.
        maps_unknown: Take the alphabet's unknown letter for whatever is not in it.
    """
    text = "\n".join(chunk.sequences)
    if text.isascii() and alphabet.is_normal(lines := text.encode()):
        sequences, letters = (
            chunk.sequences,
            CharacterCounts(unknown=lines.count(alphabet.unknown.encode())),
        )
        usable = _whole(chunk.headers, sequences)
    else:
        lines, letters = alphabet.normalise(text)
        if maps_unknown:
            lines, num_mapped = alphabet.map_unknown(lines)
            letters += CharacterCounts(mapped=num_mapped)
        sequences = lines.decode("utf-8", "surrogatepass").split("\n")
        is_usable = alphabet.is_normal(lines) and not (
            (letters.lower_case or letters.white_space) and any(map(_is_in_codes, chunk.sequences))
        )
        usable = _whole(chunk.headers, sequences) if is_usable else None
    records = range(first_record, first_record + len(sequences))
    if usable is not None:
        return CheckedChunk(usable=usable, records=records, faults=[], letters=letters)
    faults = list(_faults(chunk, sequences, alphabet, first_record))
    kept = sorted({*records} - {fault.record for fault in faults})
    usable = _whole(
        [chunk.headers[record - first_record] for record in kept],
        [sequences[record - first_record] for record in kept],
    )
    assert usable is not None
    return CheckedChunk(usable=usable, records=kept, faults=faults, letters=letters)


def _is_in_codes(text: str) -> bool:
    """Whether it is written as `Met Lys Val Leu`: by its case or its spaces, since MET is three residues too."""
    letters = "".join(text.split()).upper()
    return (
        letters != text
        and _IN_CODES.fullmatch(letters) is not None
        and len({*re.findall("...", letters)}) >= 3
    )


def nucleotide_share(sequences: Sequence[str]) -> float:
    """The share of A, C, G, T, U and N, in either case, in all of their letters; 0 where there are none."""
    text = "".join(sequences).encode("ascii", "ignore").upper()
    letters = text.translate(None, delete=_NO_LETTERS)
    return 1 - len(letters.translate(None, delete=_NUCLEOTIDES)) / len(letters) if letters else 0.0


def _whole(headers: list[str], sequences: list[str]) -> SequenceChunk | None:
    """Take headers apart; None where a record has no letters, or an id that cannot be used."""
    if "" in sequences:
        return None
    joined = "".join(headers)
    if not joined.isascii() or _INVISIBLE.decode() in joined:
        headers = list(map(_without_margins, headers))
    ids = [words[0] if (words := header.split(None, 1)) else "" for header in headers]
    if "" in ids:
        return None
    if all(map(str.startswith, headers, ids)):
        rests = list(map(str.strip, map(str.removeprefix, headers, ids)))
    else:
        rests = [
            header.lstrip()[len(first) :].strip()
            for header, first in zip(headers, ids, strict=True)
        ]
    joined = "".join(ids)
    if not joined.isprintable() or not joined.isascii() or ";" in joined:
        ids = list(map(_without_margins, ids))
        if "" in ids or any(map(_reason_of_id, ids)):
            return None
    return SequenceChunk(ids=ids, descriptions=rests, sequences=sequences)


def _without_margins(text: str) -> str:
    """Take white space and invisible characters away at both ends."""
    return _MARGINS.sub("", text)


def _id_of(header: str) -> str:
    """The first word of a header, as fair-esm, Biopython, samtools and seqkit take it."""
    words = _without_margins(header).split(None, 1)
    return _without_margins(words[0]) if words else ""


def _faults(
    chunk: RawChunk, sequences: list[str], alphabet: Alphabet, first_record: int
) -> Iterator[Fault]:
    texts = zip(chunk.headers, chunk.sequences, sequences, strict=True)
    for record, (header, text, sequence) in enumerate(texts, start=first_record):
        sequence_id = _id_of(header)
        reason = (
            f"a record has no id (its header is {f'>{header}'!r}); write one after the '>'"
            if not sequence_id
            else ""
        )
        reason = reason or _reason_of_id(sequence_id)
        is_empty = not reason and not sequence
        if reason := reason or _reason(sequence_id, text, sequence, alphabet):
            yield Fault(record=record, sequence_id=sequence_id, reason=reason, is_empty=is_empty)


def _reason_of_id(sequence_id: str) -> str:
    """Say why an id cannot be used, or "": it becomes a key, a cell and the name of a file."""
    if _NBRF_HEADER.match(sequence_id):
        return (
            f"the header of {sequence_id!r} is one of NBRF/PIR format, whose second line is a title; convert the file to FASTA "
            f"first, for example with Biopython: SeqIO.convert('x.pir', 'pir', 'x.fasta', 'fasta')"
        )
    for character in sequence_id if not sequence_id.isprintable() else "":
        if unicodedata.category(character) in ("Cc", "Cs"):
            return f"the id {sequence_id!r} has the control character {character!r} in it; take that out"
    return ""


def _reason(sequence_id: str, text: str, sequence: str, alphabet: Alphabet) -> str:
    if not sequence:
        return f"sequence {sequence_id!r} has no residues; take the record out"
    strange = "" if sequence.isascii() and alphabet.is_normal(sequence.encode()) else sequence
    for position, letter in enumerate(strange, start=1):
        if letter not in alphabet.letters:
            return f"sequence {sequence_id!r} has {letter!r} at position {position}; {alphabet.advise(letter)}"
    if _is_in_codes(text):
        return f"sequence {sequence_id!r} is in three-letter codes ({sequence[:12]}...); write a letter for each residue"
    return ""


def _count_in_any_case(text: bytes, letter: str) -> int:
    return text.count(letter.encode()) + text.count(letter.lower().encode())
