"""Find the words that the project's English avoids, each with the word to use instead.

Usage: python -m tests.english [paths]

Without paths: `vnp_lib`, `flows`, `docs`, `README.md` and `deployments`. Exits with 1 on any hit.
The words are those of the word list in the notes of the review of the layout. They are also found
in identifiers (`set_aside`, `ChildEvent`) and across line ends, in comments and strings too.
"""

from __future__ import annotations

import re
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
PATHS = ("vnp_lib", "flows", "docs", "README.md", "deployments")
SUFFIXES = {".py", ".md", ".jinja", ".yaml", ".yml", ".toml", ".css", ".json", ""}

# Written by other programs: their words are not ours.
EXCLUDED_NAMES = {"requirements.lock", "gpu-base-job-template.json", "py.typed"}

# Between two words: blanks, an underscore, a hyphen, or a line end with the comment sign or the
# quotes of a string that continues on the next line.
_GAP = r"""(?:[ \t]+|[_-]|[ \t]*["']?[ \t]*\n[ \t>*]*(?:\#:?|[rfb]{0,2}["'])?[ \t]*)"""


def _word(*forms: str) -> str:
    """Return a pattern for words, alone or as a part of snake_case or CamelCase."""
    parts = []
    for form in forms:
        lower = form.replace(" ", _GAP)
        parts.append(f"(?<![A-Za-z]){lower}")
        parts.append(lower[0].upper() + lower[1:])
        parts.append(form.upper().replace(" ", _GAP))
    return f"(?:{'|'.join(parts)})(?![a-z])"


# What to find: the name of the word, the pattern, what to write instead.
WORDS: tuple[tuple[str, str, str], ...] = (
    ("child", _word("child", "children"), "worker process, worker"),
    (
        # The verb without an object: "leaves nothing behind" is plain English.
        "leaves",
        _word("leaves")
        + r"(?=[\"']|\s*[.,;:|)]|\s*\Z"
        + rf"|{_GAP}(?:at{_GAP}once|early|cleanly|with|without|by|and|on|when|if|after|before)"
        + r"(?![a-z]))",
        "exits",
    ),
    ("dies", _word("dies", "die of", "died of", "dying of"), "crashes on, exits"),
    (
        "set aside",
        _word("set aside", "sets aside", "setting aside"),
        "quarantined (sequence), moved to damaged/ (file), excluded (device)",
    ),
    (
        "put together",
        _word("put together", "puts together", "putting together"),
        "assembled",
    ),
    ("anew", _word("anew"), "again, rebuilt, rewritten"),
    ("goes on", _word("goes on"), "resumes, continues"),
    ("going on", _word("going on"), "running"),
    ("told", _word("told"), "reported"),
    ("mended", _word("mend", "mends", "mended", "mending"), "normalised, fixed"),
    (
        "prove itself",
        _word(
            "prove itself",
            "proves itself",
            "proved itself",
            "proving itself",
            "prove themselves",
        ),
        "pass validation, fail validation",
    ),
    ("asked for", _word("asked for"), "requested"),
    ("at the door", _word("at the door"), "up front"),
    ("letters", _word("letters"), "residues, characters"),
    ("beside", _word("beside"), "next to, compared with"),
    ("in the place of", _word("in the place of"), "instead of"),
    (
        "a line a",
        _word("a line a", "a line an", "a protein a", "a protein an"),
        "one per line, per protein",
    ),
    ("becomes of", _word("becomes of"), "what to do with"),
    ("where there is none", _word("where there is none"), "if there is none"),
    ("as it comes", _word("as it comes"), "in the order of the input, as it is"),
    ("by whomever", _word("by whomever"), "by any process, by another user"),
    ("who comes later", _word("who comes later", "whoever comes later"), "for later readers"),
)

# Where a word is right: it belongs to another library, or means what it says. A hit within a match
# of its pattern is no hit.
ALLOWED: dict[str, tuple[str, ...]] = {
    "child": (
        # Prefect's term for a flow that is called by a flow.
        rf"child{_GAP}flow(?:{_GAP}runs?)?(?![a-z])",
        # Methods of torch, logging, psutil and the standard library.
        r"(?:named_|active_|\.)children\(",
        r"\.getChild\(",
        r"RUSAGE_CHILDREN",
        r"ChildProcessError",
        # A list of pids that Linux publishes.
        r"/proc/\S*/children",
    ),
    "letters": (
        # The case of a text, and the alphabet of ids and names.
        rf"(?:upper|lower)-?(?:{_GAP})?case{_GAP}letters",
        rf"case{_GAP}of{_GAP}letters",
        rf"letters(?:,|{_GAP}(?:and|or)){_GAP}digits",
        # A key of plan.json, and the field that is written under it.
        r"[\"'`]letters[\"'`]",
        r"\.letters(?![a-z])",
        r"(?<![a-z_])letters(?:=|: CharacterCounts)",
    ),
}

# Lines with a string that is fixed by the contract: the path and the text of the line, as patterns.
FIXED: tuple[tuple[str, str], ...] = ()

_PATTERNS = tuple((word, re.compile(pattern)) for word, pattern, _ in WORDS)
_ALLOWED = {
    word: tuple(re.compile(pattern, re.IGNORECASE) for pattern in patterns)
    for word, patterns in ALLOWED.items()
}
_FIXED = tuple((re.compile(path), re.compile(text)) for path, text in FIXED)

Hit = tuple[Path, int, str, str]


def find(text: str) -> Iterator[tuple[int, str]]:
    """Yield the offset and the word of each hit in a text."""
    for word, pattern in _PATTERNS:
        allowed = [match.span() for rule in _ALLOWED.get(word, ()) for match in rule.finditer(text)]
        for match in pattern.finditer(text):
            if not any(start <= match.start() and match.end() <= end for start, end in allowed):
                yield match.start(), word


def files_of(paths: Iterable[Path]) -> Iterator[Path]:
    """Yield the text files of files and folders. A file that is named is always read."""
    for path in paths:
        if path.is_file():
            yield path
            continue
        for found in sorted(path.rglob("*")):
            if (
                found.is_file()
                and found.suffix in SUFFIXES
                and found.name not in EXCLUDED_NAMES
                and "__pycache__" not in found.parts
            ):
                yield found


def hits(paths: Iterable[Path]) -> list[Hit]:
    """Return path, line number, word and text of the line for each hit below the paths."""
    found: list[Hit] = []
    for path in files_of(paths):
        text = path.read_text(encoding="utf-8")
        lines = text.splitlines()
        for offset, word in sorted(find(text)):
            number = text.count("\n", 0, offset) + 1
            line = lines[number - 1].strip()
            if not any(
                where.search(path.as_posix()) and what.search(line) for where, what in _FIXED
            ):
                found.append((path, number, word, line))
    return found


def main(arguments: list[str]) -> int:
    """Print the hits, and the sums by word on standard error."""
    instead = {word: better for word, _, better in WORDS}
    found = hits([Path(argument) for argument in arguments] or [ROOT / path for path in PATHS])
    for path, number, word, line in found:
        shown = path.relative_to(ROOT) if path.is_relative_to(ROOT) else path
        print(f"{shown}:{number}: {word}: {line}")
    for word, count in Counter(word for _, _, word, _ in found).most_common():
        print(f"{count:5}  {word} -> {instead[word]}", file=sys.stderr)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
