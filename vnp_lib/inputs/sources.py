"""The files that are meant by paths, patterns and directories, and what of these is left out."""

from __future__ import annotations

import glob
import os
import re
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from difflib import get_close_matches
from itertools import islice
from pathlib import Path

from vnp_lib.errors import FastaError
from vnp_lib.formatting import listed
from vnp_lib.inputs.files import COMPRESSIONS, FASTA_SUFFIXES, NUCLEOTIDE_SUFFIXES, suffix_of
from vnp_lib.user_paths import is_pattern, is_utf8, shown

_NUM_SHOWN = 5
_MOST_SIBLINGS = 10_000  # whose names are looked at for one that is like another


@dataclass(frozen=True, slots=True, kw_only=True)
class FoundFiles:
    """What a path, a pattern or a directory stands for."""

    given: Path
    paths: tuple[Path, ...]  # those of a pattern or directory sorted
    left_out: tuple[
        str, ...
    ] = ()  # names of what else is there, sorted; directories end with a slash
    num_hidden: int = 0  # files that are left out too, whose names begin with a dot

    def describe_left_out(self) -> str:
        """Say what was left out: `data: 1 file is read, 2 are left out: d.txt, old/`; "" if nothing was."""
        if not self.left_out and not self.num_hidden:
            return ""
        names = listed(self.left_out, _NUM_SHOWN)
        hidden = f"{self.num_hidden:,} hidden" if self.num_hidden else ""
        number = len(self.left_out) + self.num_hidden
        return (
            f"{shown(self.given)}: {len(self.paths):,} {'file is' if len(self.paths) == 1 else 'files are'} read, "
            f"{number:,} {'is' if number == 1 else 'are'} left out: {', '.join(filter(None, [names, hidden]))}"
        )


def find_files(given: Path) -> FoundFiles:
    """Find the files that are meant by a path, a pattern or a directory.

    A directory stands for the files in it whose names end as those of FASTA files do, compressed or not. Hidden ones are left
    out, and what is in its subdirectories. A pattern stands for the files that match.

    Raises:
        FastaError: A file that is not there or whose name is not UTF-8, a pattern that nothing matches, or a directory without
            FASTA files.
    """
    try:
        found = _found(given)
    except FileNotFoundError:
        raise FastaError(f"{shown(given)}: there is no such file{_hint(given)}") from None
    except OSError as error:
        raise FastaError(
            f"{shown(given)}: this cannot be read ({error.strerror or error})"
        ) from error
    for path in found.paths:
        _require_usable(path)
    return found


def input_exists(given: Path) -> bool:
    """Whether a file or directory has this name, or something matches this pattern."""
    if is_pattern(str(given)):
        return any(glob.iglob(str(given), recursive=True))
    return os.path.exists(given)


def _found(given: Path) -> FoundFiles:
    if os.path.isdir(given):
        return _files_in(given)
    if is_pattern(str(given)):
        return _files_matching(given)
    given.lstat()
    return FoundFiles(given=given, paths=(given,))


def _files_in(directory: Path) -> FoundFiles:
    entries = sorted(directory.iterdir())
    hidden = [entry for entry in entries if entry.name.startswith(".")]
    seen = [entry for entry in entries if not entry.name.startswith(".")]
    # A link that leads nowhere is taken, and refused when it is read: it was to be a file.
    taken = [
        entry for entry in seen if suffix_of(entry) in FASTA_SUFFIXES and _is_file_or_link(entry)
    ]
    left_out = tuple(_name_of(entry) for entry in seen if entry not in set(taken))
    found = FoundFiles(
        given=directory, paths=tuple(taken), left_out=left_out, num_hidden=len(hidden)
    )
    if not taken:
        held = f"; it holds {listed(left_out, _NUM_SHOWN)}" if left_out else ""
        raise FastaError(
            f"{shown(directory)}: there is no FASTA file in this directory; wanted are names that end in "
            f"{', '.join(FASTA_SUFFIXES)}, or one of these and {', '.join(COMPRESSIONS)}{held}"
        )
    return found


def _files_matching(pattern: Path) -> FoundFiles:
    matching = sorted(map(Path, glob.glob(str(pattern), recursive=True)))
    if not matching:
        raise FastaError(
            f"{shown(pattern)}: nothing matches this pattern; mend it, or give the files by name"
        )
    paths = tuple(path for path in matching if not os.path.isdir(path))
    if not paths:
        raise FastaError(
            f"{shown(pattern)}: only directories match this pattern; say which files in them, as in '{pattern}/*.faa'"
        )
    return FoundFiles(
        given=pattern,
        paths=paths,
        left_out=tuple(_name_of(path) for path in matching if path not in set(paths)),
    )


def _hint(absent: Path) -> str:
    """What may have been meant by a file that is not there: `; is it x.fasta.gz?`."""
    if "{" in absent.name or "}" in absent.name:
        return "; braces are expanded by a shell only: put commas between the files, or use a pattern with * or [...]"
    if any(Path(part).exists() for part in re.split(r"[;:\s]+", str(absent)) if part):
        return "; put commas between several files"
    directory = absent.parent
    if not directory.is_dir():
        return f", nor a directory {shown(directory)}"
    names = {
        _looks_of(path.name): path.name for path in islice(directory.iterdir(), _MOST_SIBLINGS)
    }
    looks = _looks_of(absent.name)
    alike = get_close_matches(looks, names, n=1, cutoff=0.8)
    if alike:
        same = (
            ", whose accents are other characters that look the same"
            if absent.name.casefold() != looks == alike[0]
            else ""
        )
        return f"; is it {shown(names[alike[0]])}{same}?"
    return "" if absent.is_absolute() else f" in {shown(Path.cwd() / directory)}"


def _looks_of(name: str) -> str:
    """What cannot be told apart by looking is the same: accents are composed on one system and decomposed on another."""
    return unicodedata.normalize("NFD", name).casefold()


def _name_of(path: Path) -> str:
    return shown(path.name) + ("/" if os.path.isdir(path) else "")


def _is_file_or_link(path: Path) -> bool:
    return path.is_file() or (path.is_symlink() and not path.is_dir())


def _require_usable(path: Path) -> None:
    if not is_utf8(os.fsencode(path)):
        raise FastaError(
            f"{shown(path)}: this name is not UTF-8 text; rename the file, or give a link to it whose name is"
        )
    try:
        path.stat()
    except FileNotFoundError:
        target = shown(os.readlink(path))
        raise FastaError(
            f"{shown(path)}: this is a link to {target}, and there is no such file; mend the link"
        ) from None
    except OSError:
        pass  # whoever reads it says so


STDIN = Path("-")


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """One file of the input."""

    path: Path
    name: str  # for people
    rather: str = (
        ""  # `'dir/*.faa'`, where other files are nucleotides by their names, or this one alone is
    )


def has_fasta_suffix(path: Path) -> bool:
    """Whether it is called as FASTA files are; their compression does not matter."""
    return suffix_of(path) in FASTA_SUFFIXES


def _raise(error: FastaError) -> None:
    raise error


def find_sources(
    fasta: Sequence[Path], *, stdin: Path, refuse: Callable[[FastaError], None] = _raise
) -> list[Source]:
    """The files that are meant by paths, patterns and directories, in this order; those of one pattern or directory sorted.

    Args:
        fasta: What was given; `-` is standard input.
        stdin: Where that is kept.
        refuse: What is done with an error; as it comes, it is raised.

    Raises:
        FastaError: A file that is not there, a pattern that nothing matches, a directory without FASTA files, or a file that is
            meant twice.
    """
    sources: list[Source] = []
    for given in fasta:
        try:
            sources += _sources_of(given, stdin)
        except FastaError as error:
            refuse(error)
    return _each_kind_pointed_at_the_other(list(_distinct(sources, refuse)))


def describe_left_out(fasta: Sequence[Path]) -> list[str]:
    """Say of each directory and pattern what was left out of it; of those that `find_sources` refuses, nothing."""
    told = []
    for given in fasta:
        with suppress(FastaError):
            told.append("" if given == STDIN else find_files(given).describe_left_out())
    return [each for each in told if each]


def _sources_of(given: Path, stdin: Path) -> list[Source]:
    if given == STDIN:
        return [Source(path=stdin, name="standard input")]
    return [Source(path=path, name=str(path)) for path in find_files(given).paths]


def _distinct(sources: list[Source], refuse: Callable[[FastaError], None]) -> Iterator[Source]:
    """Each file once: its records would be there twice, under the same ids."""
    first: dict[object, Source] = {}
    for source in sources:
        try:
            found = os.stat(source.path)
        except OSError:  # whoever reads it says so
            yield source
            continue
        before = first.setdefault((found.st_dev, found.st_ino), source)
        if before is source:
            yield source
        elif before.name == source.name:
            refuse(FastaError(f"{source.name}: this is given twice; give it once"))
        else:
            refuse(
                FastaError(
                    f"{source.name}: this is the same file as {before.name}; give one of them"
                )
            )


def _each_kind_pointed_at_the_other(sources: list[Source]) -> list[Source]:
    is_nucleotides = [suffix_of(source.path) in NUCLEOTIDE_SUFFIXES for source in sources]
    if len(set(is_nucleotides)) < 2:
        return sources
    patterns: dict[bool, dict[str, None]] = {False: {}, True: {}}
    for source, kind in zip(sources, is_nucleotides, strict=True):
        patterns[kind].setdefault(_pattern_of(source.path))
    return [
        replace(source, rather=f"'{','.join(patterns[not kind])}'")
        for source, kind in zip(sources, is_nucleotides, strict=True)
    ]


def _pattern_of(path: Path) -> str:
    """The pattern of the files beside it whose names end as its does."""
    num_suffixes = 1 if suffix_of(path) == path.suffix.lower() else 2
    return str(path.parent / f"*{''.join(path.suffixes[-num_suffixes:])}")
