"""Records of the input, as they are in a file and as the model takes them."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property

from vnp_lib.inputs.characters import INVISIBLE, WHITE_SPACE, class_of, is_mapped

RESIDUES = "ACDEFGHIKLMNPQRSTVWYBUXZO"

# ASCII only. A line break is not white space here: it separates two sequences.
_WHITE_SPACE = b" \t\v\f\r"
_INVISIBLE = b"\x1a"
_LOWER_CASE = b"abcdefghijklmnopqrstuvwxyz"
_NUCLEOTIDES = b"ACGTUN"
_NOT_ALPHABETIC = bytes(set(range(128)) - {*b"ABCDEFGHIJKLMNOPQRSTUVWXYZ"})

_WHITE_SPACE_BEYOND_ASCII = re.compile(f"(?![\0-\x7f])[{WHITE_SPACE}]")
_INVISIBLE_BEYOND_ASCII = re.compile(f"(?![\0-\x7f])[{INVISIBLE}]")
_BEYOND_ASCII = re.compile("[^\0-\x7f]")
_MARGINS = re.compile(f"^[{WHITE_SPACE}{INVISIBLE}]+|[{WHITE_SPACE}{INVISIBLE}]+$")
_THREE_LETTER_CODES = [
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
_IN_CODES = re.compile(f"(?:{'|'.join(_THREE_LETTER_CODES)}){{4,}}")

# As Biopython's reader has them: complete proteins, fragments, DNA, RNA and others.
_NBRF_HEADER = re.compile(r"(?:P1|F1|D1|DL|DC|RL|RC|N1|N3|XX);\S")


@dataclass(frozen=True, slots=True, kw_only=True)
class RawChunk:
    """Consecutive records of one file, as they are there; the lists run in parallel."""

    headers: list[str]  # without ">"
    sequences: list[str]  # without line ends


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SequenceChunk:
    """Consecutive records of one file, normalised; the lists run in parallel."""

    ids: list[str]  # the header up to the first white space
    descriptions: list[str]  # the rest of the header, or ""
    sequences: list[str]  # upper case, characters of the alphabet only, never empty


@dataclass(frozen=True, slots=True, kw_only=True)
class CharacterCounts:
    """Counts of characters that stand for something unknown, or were normalised."""

    unknown: int = 0  # X
    read_as_unknown: int = 0  # J, which becomes X
    lower_case: int = 0  # raised
    final_stops: int = 0  # `*` at the end of a sequence, dropped
    white_space: int = 0  # removed
    invisible: int = 0  # byte order marks, zero-width characters and the like, removed
    mapped: int = 0  # other characters that the model does not know, mapped to X on request

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
    is_empty: bool = False  # it has no residues, and no other fault


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class CheckedChunk:
    """Consecutive records of one file: those that can be used, and the faults of the others."""

    usable: SequenceChunk
    records: Sequence[int]  # number in the file, from 0, of each usable record
    faults: list[Fault]
    letters: CharacterCounts  # of all of them


@dataclass(frozen=True, kw_only=True, eq=False)
class Alphabet:
    """The characters of sequences, and the normalisation of others."""

    characters: str  # upper case
    residue: str  # what each of them stands for
    unknown: str  # the character for an unknown residue
    read_as_unknown: str = ""  # upper-case characters that are always read as that one
    drops_final_stop: bool = False
    # What to do about single characters, instead of the advice of their class.
    advice: Mapping[str, str] = field(default_factory=dict)

    def is_normal(self, lines: bytes) -> bool:
        """Return whether text has only characters of the alphabet and line ends."""
        return not lines.translate(None, delete=self.characters.encode() + b"\n")

    def normalise(self, text: str) -> tuple[bytes, CharacterCounts]:
        """Normalise the characters that are always normalised, and count them.

        Other characters stay, so that the lines need not be normal afterwards.
        """
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
                _count_in_any_case(joined, character) for character in self.read_as_unknown
            ),
            lower_case=len(joined) - len(joined.translate(None, delete=_LOWER_CASE)),
            final_stops=(joined + b"\n").count(b"*\n") if self.drops_final_stop else 0,
            white_space=num_white_space + len(visible) - len(joined),
            invisible=num_invisible + len(lines) - len(visible),
        )
        lines = joined.translate(self._normalisation)
        if counts.final_stops:
            lines = (lines + b"\n").replace(b"*\n", b"\n")[:-1]
        return lines, counts

    def map_unknown(self, lines: bytes) -> tuple[bytes, int]:
        """Replace characters that may stand for residues by the unknown one, and count them."""
        num_mapped = len(lines) - len(lines.translate(None, delete=self._mapped))
        lines = lines.translate(
            bytes.maketrans(self._mapped, self.unknown.encode() * len(self._mapped))
        )
        if lines.isascii():
            return lines, num_mapped
        others = set(_BEYOND_ASCII.findall(text := lines.decode("utf-8", "surrogatepass")))
        for character in filter(is_mapped, others):
            num_mapped += text.count(character)
            text = text.replace(character, self.unknown)
        return text.encode("utf-8", "surrogatepass"), num_mapped

    def advise(self, character: str) -> str:
        """Say what to do about a character that is not in the alphabet."""
        allowed = "".join(sorted(self.characters + self.read_as_unknown))
        advice = self.advice.get(character) or class_of(character).advice
        return advice.format(allowed=allowed, unknown=self.unknown, residue=self.residue)

    @cached_property
    def _mapped(self) -> bytes:
        """The ASCII characters that `map_unknown` replaces."""
        others = (chr(code) for code in range(128) if chr(code) not in self.characters + "\n")
        return "".join(filter(is_mapped, others)).encode()

    @cached_property
    def _normalisation(self) -> bytes:
        """A table for `bytes.translate`, which raises case and reads some as unknown."""
        known, unknown = self.characters, self.read_as_unknown
        read_as = known + self.unknown * 2 * len(unknown)
        return bytes.maketrans(
            (known.lower() + unknown + unknown.lower()).encode(), read_as.encode()
        )


PROTEINS = Alphabet(
    characters=RESIDUES, residue="residue", unknown="X", read_as_unknown="J", drops_final_stop=True
)


def check_records(
    chunk: RawChunk, alphabet: Alphabet, *, first_record: int, maps_unknown: bool = False
) -> CheckedChunk:
    """Normalise a chunk and find the records that cannot be used.

    The table in `characters` says what is done with each character: lower case is raised, white
    space and invisible characters are removed, one `*` at the end of a protein (a stop codon) is
    dropped, and J, which fair-esm's alphabet lacks, is read as X.

    Args:
        chunk: Records of a file.
        alphabet: Alphabet of its sequences.
        first_record: Number in its file of the chunk's first record, from 0.
        maps_unknown: Read characters that may stand for a residue as the unknown one.
    """
    # A few passes over the joined text are much faster than passes over each sequence.
    text = "\n".join(chunk.sequences)
    if text.isascii() and alphabet.is_normal(lines := text.encode()):
        sequences = chunk.sequences
        counts = CharacterCounts(unknown=lines.count(alphabet.unknown.encode()))
        usable = _split_headers(chunk.headers, sequences)
    else:
        lines, counts = alphabet.normalise(text)
        if maps_unknown:
            lines, num_mapped = alphabet.map_unknown(lines)
            counts += CharacterCounts(mapped=num_mapped)
        sequences = lines.decode("utf-8", "surrogatepass").split("\n")
        is_usable = alphabet.is_normal(lines) and not (
            (counts.lower_case or counts.white_space) and any(map(_is_in_codes, chunk.sequences))
        )
        usable = _split_headers(chunk.headers, sequences) if is_usable else None
    records = range(first_record, first_record + len(sequences))
    if usable is not None:
        return CheckedChunk(usable=usable, records=records, faults=[], letters=counts)
    faults = list(_find_faults(chunk, sequences, alphabet, first_record))
    kept = sorted({*records} - {fault.record for fault in faults})
    usable = _split_headers(
        [chunk.headers[record - first_record] for record in kept],
        [sequences[record - first_record] for record in kept],
    )
    assert usable is not None
    return CheckedChunk(usable=usable, records=kept, faults=faults, letters=counts)


def _is_in_codes(text: str) -> bool:
    """Return whether a sequence is written in three-letter codes: `Met Lys Val Leu`.

    Its case or its spaces decide, since MET is three residues too.
    """
    joined = "".join(text.split()).upper()
    return (
        joined != text
        and _IN_CODES.fullmatch(joined) is not None
        and len({*re.findall("...", joined)}) >= 3
    )


def nucleotide_share(sequences: Sequence[str]) -> float:
    """Return the share of A, C, G, T, U and N, in either case, in alphabetic ASCII characters.

    Return 0 if there are no such characters.
    """
    text = "".join(sequences).encode("ascii", "ignore").upper()
    residues = text.translate(None, delete=_NOT_ALPHABETIC)
    if not residues:
        return 0.0
    return 1 - len(residues.translate(None, delete=_NUCLEOTIDES)) / len(residues)


def _split_headers(headers: list[str], sequences: list[str]) -> SequenceChunk | None:
    """Split headers into ids and descriptions; None if an id or a sequence cannot be used."""
    if "" in sequences:
        return None
    joined = "".join(headers)
    if not joined.isascii() or _INVISIBLE.decode() in joined:
        headers = list(map(_without_margins, headers))
    ids = [words[0] if (words := header.split(None, 1)) else "" for header in headers]
    if "" in ids:
        return None
    if all(map(str.startswith, headers, ids)):
        descriptions = list(map(str.strip, map(str.removeprefix, headers, ids)))
    else:
        descriptions = [
            header.lstrip()[len(first) :].strip()
            for header, first in zip(headers, ids, strict=True)
        ]
    joined = "".join(ids)
    if not joined.isprintable() or not joined.isascii() or ";" in joined:
        ids = list(map(_without_margins, ids))
        if "" in ids or any(map(_fault_of_id, ids)):
            return None
    return SequenceChunk(ids=ids, descriptions=descriptions, sequences=sequences)


def _without_margins(text: str) -> str:
    """Remove white space and invisible characters at both ends."""
    return _MARGINS.sub("", text)


def _find_faults(
    chunk: RawChunk, sequences: list[str], alphabet: Alphabet, first_record: int
) -> Iterator[Fault]:
    texts = zip(chunk.headers, chunk.sequences, sequences, strict=True)
    for record, (header, text, sequence) in enumerate(texts, start=first_record):
        # The id is the first word, as in fair-esm, Biopython, samtools and seqkit.
        words = _without_margins(header).split(None, 1)
        sequence_id = _without_margins(words[0]) if words else ""
        if sequence_id:
            reason = _fault_of_id(sequence_id)
        else:
            reason = f"a record has no id (its header is {f'>{header}'!r}); write one after the '>'"
        if is_empty := not reason and not sequence:
            reason = f"sequence {sequence_id!r} has no residues; remove the record"
        if not reason and not (sequence.isascii() and alphabet.is_normal(sequence.encode())):
            for position, character in enumerate(sequence, start=1):
                if character not in alphabet.characters:
                    reason = (
                        f"sequence {sequence_id!r} has {character!r} at position {position}; "
                        f"{alphabet.advise(character)}"
                    )
                    break
        if not reason and _is_in_codes(text):
            reason = (
                f"sequence {sequence_id!r} is in three-letter codes ({sequence[:12]}...); write "
                "one character per residue"
            )
        if reason:
            yield Fault(record=record, sequence_id=sequence_id, reason=reason, is_empty=is_empty)


def _fault_of_id(sequence_id: str) -> str:
    """Return why an id cannot be used as a key, a cell and a file name, or ""."""
    if _NBRF_HEADER.match(sequence_id):
        return (
            f"the header of {sequence_id!r} is one of NBRF/PIR format, whose second line is a "
            "title; convert the file to FASTA first, for example with Biopython: "
            "SeqIO.convert('x.pir', 'pir', 'x.fasta', 'fasta')"
        )
    for character in sequence_id if not sequence_id.isprintable() else "":
        if unicodedata.category(character) in ("Cc", "Cs"):
            return (
                f"the id {sequence_id!r} has the control character {character!r} in it; remove it"
            )
    return ""


def _count_in_any_case(text: bytes, character: str) -> int:
    return text.count(character.encode()) + text.count(character.lower().encode())
