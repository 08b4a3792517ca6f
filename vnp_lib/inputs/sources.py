"""Find the input files that paths, patterns and directories stand for."""

from __future__ import annotations

import glob
import os
import re
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from enum import StrEnum
from itertools import islice
from pathlib import Path

from vnp_lib.errors import FastaError
from vnp_lib.formatting import listed
from vnp_lib.inputs.files import COMPRESSIONS, FASTA_SUFFIXES, NUCLEOTIDE_SUFFIXES, suffix_of
from vnp_lib.user_paths import is_pattern, is_utf8, shown

STDIN = Path("-")

_NUM_SHOWN = 5

# A directory may hold millions of files; a hint is not worth reading all of their names.
_MAX_SIBLINGS = 10_000


class SourceFormat(StrEnum):
    """What a file is read as."""

    FASTA = "fasta"  # or FASTQ, by its first bytes
    CSV = "csv"
    TSV = "tsv"
    PARQUET = "parquet"

    @classmethod
    def of(cls, path: Path) -> SourceFormat:
        """Return the format that a file's name promises. CSV and TSV may be compressed."""
        if path.suffix.lower() in (".parquet", ".pq"):
            return cls.PARQUET
        return {".csv": cls.CSV, ".tsv": cls.TSV}.get(suffix_of(path), cls.FASTA)

    @property
    def is_table(self) -> bool:
        return self != SourceFormat.FASTA


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """One file of the input."""

    path: Path
    name: str  # for people
    # The pattern of the input's files of the other kind (proteins or nucleotides, by their
    # names): `'dir/*.faa'`. Empty if all files are of one kind.
    alternative: str = ""
    format: SourceFormat = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "format", SourceFormat.of(self.path))


@dataclass(frozen=True, slots=True, kw_only=True)
class FoundFiles:
    """The files that a path, a pattern or a directory stands for."""

    given: Path
    paths: tuple[Path, ...]  # sorted, if they are those of a pattern or a directory
    left_out: tuple[str, ...] = ()  # other names there, sorted; directories end with a slash
    num_hidden: int = 0  # files whose names begin with a dot, which are left out too

    def describe_left_out(self) -> str:
        """Describe what is not read: `data: 1 file is read, 2 are left out: d.txt, old/`.

        Return "" if nothing is left out.
        """
        if not self.left_out and not self.num_hidden:
            return ""
        names = listed(self.left_out, _NUM_SHOWN)
        hidden = f"{self.num_hidden:,} hidden" if self.num_hidden else ""
        num_read, num_left_out = len(self.paths), len(self.left_out) + self.num_hidden
        return (
            f"{shown(self.given)}: {num_read:,} {'file is' if num_read == 1 else 'files are'} "
            f"read, {num_left_out:,} {'is' if num_left_out == 1 else 'are'} left out: "
            f"{', '.join(filter(None, [names, hidden]))}"
        )


def find_files(given: Path) -> FoundFiles:
    """Find the files that a path, a pattern or a directory stands for.

    A directory stands for the files in it whose names end as those of FASTA files do, compressed
    or not. Hidden files and subdirectories are left out. A pattern stands for the files that match.

    Raises:
        FastaError: A file is missing or its name is not UTF-8, nothing matches a pattern, or a
            directory has no FASTA files.
    """
    try:
        if os.path.isdir(given):
            found = _files_in(given)
        elif is_pattern(str(given)):
            found = _files_matching(given)
        else:
            given.lstat()
            found = FoundFiles(given=given, paths=(given,))
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
    """Return whether a file or directory has this name, or something matches this pattern."""
    if is_pattern(str(given)):
        return any(glob.iglob(str(given), recursive=True))
    return os.path.exists(given)


def _raise(error: FastaError) -> None:
    raise error


def find_sources(
    fasta: Sequence[Path],
    *,
    stdin: Path,
    refuse: Callable[[FastaError], None] = _raise,
    left_out: list[str] | None = None,
) -> list[Source]:
    """Return the files that paths, patterns and directories stand for, in the order given.

    Files of one pattern or directory are sorted.

    Args:
        fasta: Paths, patterns and directories; `-` is standard input.
        stdin: File that standard input is saved in.
        refuse: Called with each error, which is raised by default.
        left_out: Extended by a description of what each directory and pattern leaves out.

    Raises:
        FastaError: A file is missing or given twice, nothing matches a pattern, or a directory
            has no FASTA files.
    """
    sources: list[Source] = []
    for given in fasta:
        if given == STDIN:
            sources.append(Source(path=stdin, name="standard input"))
            continue
        try:
            found = find_files(given)
        except FastaError as error:
            refuse(error)
            continue
        sources += [Source(path=path, name=str(path)) for path in found.paths]
        if left_out is not None and (described := found.describe_left_out()):
            left_out.append(described)
    return _with_alternatives(list(_distinct(sources, refuse)))


def describe_left_out(fasta: Sequence[Path]) -> list[str]:
    """Describe what each directory and pattern leaves out, unless `find_sources` refuses it."""
    left_out: list[str] = []
    find_sources(fasta, stdin=STDIN, refuse=lambda _: None, left_out=left_out)
    return left_out


def _files_in(directory: Path) -> FoundFiles:
    entries = sorted(directory.iterdir())
    visible = [entry for entry in entries if not entry.name.startswith(".")]
    # A dangling link is taken, and refused when it is read: a file was meant to be there.
    paths = tuple(
        entry
        for entry in visible
        if suffix_of(entry) in FASTA_SUFFIXES
        and (entry.is_file() or (entry.is_symlink() and not entry.is_dir()))
    )
    left_out = tuple(_name_of(entry) for entry in visible if entry not in set(paths))
    if not paths:
        content = f"; it holds {listed(left_out, _NUM_SHOWN)}" if left_out else ""
        raise FastaError(
            f"{shown(directory)}: there is no FASTA file in this directory; wanted are names that "
            f"end in {', '.join(FASTA_SUFFIXES)}, or one of these and "
            f"{', '.join(COMPRESSIONS)}{content}"
        )
    return FoundFiles(
        given=directory, paths=paths, left_out=left_out, num_hidden=len(entries) - len(visible)
    )


def _files_matching(pattern: Path) -> FoundFiles:
    matching = sorted(map(Path, glob.glob(str(pattern), recursive=True)))
    if not matching:
        raise FastaError(
            f"{shown(pattern)}: nothing matches this pattern; correct it, or give the files by name"
        )
    paths = tuple(path for path in matching if not os.path.isdir(path))
    if not paths:
        raise FastaError(
            f"{shown(pattern)}: only directories match this pattern; say which files in them, as "
            f"in '{pattern}/*.faa'"
        )
    left_out = tuple(_name_of(path) for path in matching if path not in set(paths))
    return FoundFiles(given=pattern, paths=paths, left_out=left_out)


def _hint(absent: Path) -> str:
    """Suggest what a missing file may have meant: `; is it x.fasta.gz?`."""
    if "{" in absent.name or "}" in absent.name:
        return (
            "; braces are expanded by a shell only: put commas between the files, or use a "
            "pattern with * or [...]"
        )
    if any(Path(part).exists() for part in re.split(r"[;:\s]+", str(absent)) if part):
        return "; put commas between several files"
    directory = absent.parent
    if not directory.is_dir():
        return f", nor a directory {shown(directory)}"
    names = {
        _appearance(path.name): path.name for path in islice(directory.iterdir(), _MAX_SIBLINGS)
    }
    appearance = _appearance(absent.name)
    alike = get_close_matches(appearance, names, n=1, cutoff=0.8)
    if alike:
        same = (
            ", whose accents are other characters that look the same"
            if absent.name.casefold() != appearance == alike[0]
            else ""
        )
        return f"; is it {shown(names[alike[0]])}{same}?"
    return "" if absent.is_absolute() else f" in {shown(Path.cwd() / directory)}"


def _appearance(name: str) -> str:
    """Return a key that is equal for names that look the same.

    Accents are composed characters on one system and decomposed ones on another.
    """
    return unicodedata.normalize("NFD", name).casefold()


def _name_of(path: Path) -> str:
    return shown(path.name) + ("/" if os.path.isdir(path) else "")


def _require_usable(path: Path) -> None:
    """Raise FastaError for a name that is not UTF-8 and for a dangling link."""
    if not is_utf8(os.fsencode(path)):
        raise FastaError(
            f"{shown(path)}: this name is not UTF-8 text; rename the file, or give a link to it "
            "whose name is"
        )
    try:
        path.stat()
    except FileNotFoundError:
        target = shown(os.readlink(path))
        raise FastaError(
            f"{shown(path)}: this is a link to {target}, and there is no such file; correct the "
            "link"
        ) from None
    except OSError:
        # The error is reported when the file is read.
        pass


def _distinct(sources: list[Source], refuse: Callable[[FastaError], None]) -> Iterator[Source]:
    """Yield each file once, and refuse the others, whose records would repeat all ids."""
    first: dict[object, Source] = {}
    for source in sources:
        try:
            found = os.stat(source.path)
        except OSError:
            # The error is reported when the file is read.
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


def _with_alternatives(sources: list[Source]) -> list[Source]:
    """Point proteins and nucleotides, if both are given, at each other's files."""
    suffixes = [suffix_of(source.path) for source in sources]
    is_nucleotides = [suffix in NUCLEOTIDE_SUFFIXES for suffix in suffixes]
    if len(set(is_nucleotides)) < 2:
        return sources
    patterns: dict[bool, dict[str, None]] = {False: {}, True: {}}
    for source, suffix, kind in zip(sources, suffixes, is_nucleotides, strict=True):
        num_suffixes = 1 if suffix == source.path.suffix.lower() else 2
        ending = "".join(source.path.suffixes[-num_suffixes:])
        patterns[kind].setdefault(str(source.path.parent / f"*{ending}"))
    return [
        replace(source, alternative=f"'{','.join(patterns[not kind])}'")
        for source, kind in zip(sources, is_nucleotides, strict=True)
    ]
