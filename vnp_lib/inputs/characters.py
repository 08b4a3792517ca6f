"""Classes of the characters in sequence text, and what each policy does with them."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from functools import cache

# Unicode's property White_Space. The separators U+001C to U+001F, which Python's `isspace` adds,
# are control characters here.
WHITE_SPACE = r"\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"

# Unicode's property Default_Ignorable_Code_Point (byte order marks, zero-width characters, soft
# hyphens, marks of the writing direction, variation selectors), and Ctrl-Z, which ends a DOS text.
INVISIBLE = (
    r"\x1a\xad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b-\u200f\u202a-\u202e"
    r"\u2060-\u206f"
    r"\u3164\ufe00-\ufe0f\ufeff\uffa0\ufff0-\ufff8\U0001bca0-\U0001bca3\U0001d173-\U0001d17a"
    r"\U000e0000-\U000e0fff"
)

_is_white_space = re.compile(f"[{WHITE_SPACE}]").fullmatch
_is_invisible = re.compile(f"[{INVISIBLE}]").fullmatch


class Treatment(StrEnum):
    """What to do with a character, or with the record that holds it."""

    KEPT = "kept"
    RAISED = "raised to upper case"
    DROPPED = "dropped"
    REMOVED = "removed, and counted"
    UNKNOWN = "read as X"
    REFUSED = "refused"
    LEFT_OUT = "the record is left out"


@dataclass(frozen=True, slots=True, kw_only=True)
class CharacterClass:
    """Characters that are treated alike in input of every kind."""

    name: str
    members: str  # for people
    error: Treatment  # under --invalid-residues error
    map: Treatment
    skip: Treatment
    advice: str = ""  # what the user can do about a refused one
    contains: Callable[[str], object]  # a single character, which no class before has


def _always(
    treatment: Treatment, *, name: str, members: str, contains: Callable[[str], object]
) -> CharacterClass:
    return CharacterClass(
        name=name,
        members=members,
        error=treatment,
        map=treatment,
        skip=treatment,
        contains=contains,
    )


def _refused(
    *,
    name: str,
    members: str,
    advice: str,
    contains: Callable[[str], object],
    map_: Treatment = Treatment.REFUSED,
) -> CharacterClass:
    return CharacterClass(
        name=name,
        members=members,
        error=Treatment.REFUSED,
        map=map_,
        skip=Treatment.LEFT_OUT,
        advice=advice,
        contains=contains,
    )


def _never(_: str) -> bool:
    """Contain nothing: for classes whose members are found by their place, not by `class_of`."""
    return False


def _category(*initials: str) -> Callable[[str], bool]:
    """Return a test for characters of these general categories of Unicode."""
    return lambda character: unicodedata.category(character).startswith(initials)


_UNKNOWN = "write {unknown} for an unknown {residue}"

# The first class that contains a character is its own.
CLASSES = (
    _always(
        Treatment.KEPT,
        name="residues",
        members="the 20 amino acids, and `X`, `B`, `U`, `Z` and `O`",
        contains=_never,
    ),
    _always(Treatment.RAISED, name="lower case", members="the same in lower case", contains=_never),
    _always(
        Treatment.UNKNOWN, name="J", members="`J`, which ESM-2's alphabet lacks", contains=_never
    ),
    _always(
        Treatment.DROPPED,
        name="final stop",
        members="one `*` at the end of a sequence",
        contains=_never,
    ),
    _refused(
        map_=Treatment.UNKNOWN,
        name="inner stop",
        members="any other `*`",
        advice="a stop codon inside a protein: cut the sequence there, or write {unknown}",
        contains="*".__eq__,
    ),
    _always(
        Treatment.REMOVED,
        name="white space",
        members="spaces, tabs and all that Unicode calls white space, such as the no-break space",
        contains=_is_white_space,
    ),
    _always(
        Treatment.REMOVED,
        name="invisible characters",
        members="byte order marks, zero-width characters, soft hyphens, marks of the writing "
        "direction, Ctrl-Z",
        contains=_is_invisible,
    ),
    _refused(
        map_=Treatment.UNKNOWN,
        name="other alphabetic characters",
        members="those of any script: `É`, `β`, CJK",
        advice="allowed are {allowed}: " + _UNKNOWN,
        contains=str.isalpha,
    ),
    _refused(
        name="gaps",
        members="`-`, `.`, `~`, and the dashes of word processors",
        advice="gaps belong to an alignment: remove them first, for example with "
        "`seqkit seq --remove-gaps`",
        contains=re.compile(
            "[-.~\u00b7\u2010-\u2015\u2026\u2212\ufe58\ufe63\uff0d\uff0e]"
        ).fullmatch,
    ),
    _refused(
        name="header marks",
        members="`>` inside a line",
        advice="a line break is missing before this '>', as happens if `cat` joins a file that "
        "does not end in one with another: insert it",
        contains=">".__eq__,
    ),
    _refused(
        name="digits",
        members="digits and numbers of any script",
        advice="the lines are numbered, as in GenBank and EMBL files, or this is no sequence: "
        "remove the numbers",
        contains=_category("N"),
    ),
    _refused(
        name="chain separators",
        members="`:`, `/`, `|`, `\\`",
        advice="several chains in one record: make each a record of its own",
        contains=re.compile(r"[:/|\\]").fullmatch,
    ),
    _refused(
        name="brackets",
        members="`[`, `]`, `(`, `)`, `{`, `}`, `<`, `+`, `#`",
        advice="text in brackets, or added with '+', describes a modified residue: write the plain "
        "residue for it",
        contains=re.compile(r"[][(){}<+#]").fullmatch,
    ),
    _refused(
        name="lists",
        members="`,`, `;` inside a line, quotation marks",
        advice="this belongs to a list or a table: make each sequence a record of its own, or give "
        "the table as .csv or .tsv",
        contains=re.compile("[,;\"'`\u2018-\u201f]").fullmatch,
    ),
    _refused(
        name="other punctuation",
        members="`?`, `!`, `@`, `_`, `=` and all other punctuation and symbols, quality strings "
        "among them",
        advice="this is no residue: " + _UNKNOWN + ", and remove text that is no sequence",
        contains=_category("P", "S"),
    ),
    _refused(
        name="control characters",
        members="NUL, escape and all others that are no white space",
        advice="this is a control character: the file is damaged, or is no text; get it again from "
        "its source",
        contains=_category("Cc"),
    ),
    _refused(
        name="everything else",
        members="combining accents, unassigned code points, halves of surrogate pairs",
        advice="this is no residue: " + _UNKNOWN,
        contains=lambda _: True,
    ),
)


@cache
def class_of(character: str) -> CharacterClass:
    """Return the class of a character that is no residue."""
    return next(each for each in CLASSES if each.contains(character))


def is_mapped(character: str) -> bool:
    """Return whether `--invalid-residues map` reads a character that is no residue as unknown."""
    return class_of(character).map == Treatment.UNKNOWN
