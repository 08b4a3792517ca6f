"""Proteins as a Python program holds them: paths, texts, dictionaries, tables of other libraries, Biopython's records.

No library is imported for this: an object is recognised by the protocol that its library documents. Nothing that was given is
changed.
"""

from __future__ import annotations

import glob
import math
import os
import sys
from collections import UserString, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Integral
from pathlib import Path
from typing import Any, Protocol, TypeAlias

from vnp_lib.errors import ConfigError, FastaError
from vnp_lib.inputs.sources import has_fasta_suffix
from vnp_lib.inputs.tables import is_table
from vnp_lib.user_paths import PathUse, user_path


class Letters(Protocol):
    """A sequence whose `str` is its letters, as Biopython's `Seq`."""

    def __len__(self) -> int: ...
    def __str__(self) -> str: ...


class Record(Protocol):
    """A sequence with its id, as Biopython's `SeqRecord`."""

    @property
    def id(self) -> Any: ...
    @property
    def seq(self) -> Any: ...


class Table(Protocol):
    """Named columns: a pandas or polars DataFrame, a pyarrow Table."""

    @property
    def columns(self) -> Any: ...
    def __getitem__(self, name: str, /) -> Any: ...


Text: TypeAlias = str | bytes | Letters
Proteins: TypeAlias = (
    str
    | os.PathLike[str]
    | Record
    | Table
    | Mapping[Any, Text]
    | Iterable[Text]
    | Iterable[tuple[Any, Text]]
    | Iterable[Record]
    | Iterable[Mapping[str, Any]]
    | Iterable[os.PathLike[str]]
)

_WANTED = (
    "give sequences as texts, pairs of id and sequence, a dictionary of sequences by id, a table with columns for both, "
    "Biopython's records, or paths of FASTA files"
)
_UNKNOWN_OF_BIOPYTHON = ("<unknown id>", "<unknown name>", "<unknown description>")


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordsInMemory:
    """Records as they were given; the lists run in parallel."""

    ids: list[str] = field(default_factory=list)
    descriptions: list[str] = field(default_factory=list)  # "" where there is none
    sequences: list[str] = field(default_factory=list)

    def add(self, sequence_id: str, sequence: str, description: str = "") -> None:
        self.ids.append(sequence_id)
        self.descriptions.append(description)
        self.sequences.append(sequence)


def files_or_records(
    given: Any, *, id_column: str = "id", sequence_column: str = "sequence"
) -> list[Path] | RecordsInMemory:
    """Return the files that are meant, or else the records that are held.

    Sequences without ids have their positions, "0", "1" and so on; a pandas Series has those of its index.

    Args:
        given: What `Proteins` names.
        id_column: Column of a table, or key of a dictionary for each record, that holds the ids.
        sequence_column: The same for the sequences.

    Raises:
        FastaError: It is nothing of the kind; says which record, and what can be given.
        ConfigError: A path that cannot be one of a file here, such as an address.
    """
    if isinstance(given, str | bytes | bytearray | UserString | os.PathLike):
        return [_path(given)]
    if _is_series(given):
        values = _listed(given)
        return _paths(values) or _with_ids(zip(_listed(given.index), values, strict=True))
    _refuse_what_has_no_records(given)
    if hasattr(given, "as_py"):  # a scalar of pyarrow
        return files_or_records(given.as_py(), id_column=id_column, sequence_column=sequence_column)
    names = _column_names(given)
    if names is not None:
        return _with_ids(_rows_of_table(given, names, id_column, sequence_column))
    if (mapping := _as_mapping(given)) is not None:
        return _with_ids(_rows_of_mapping(mapping))
    if _is_record(given, sequence_column) or _is_one_sequence(given):
        return _records([given], id_column, sequence_column)
    items = _items(given)
    return _paths(items) or _records(items, id_column, sequence_column)


def _path(given: Any) -> Path:
    """The path that one text or path-like object names."""
    text = os.fsdecode(
        bytes(given) if isinstance(given, bytearray) else str(given) if _is_text(given) else given
    )
    if text.lstrip().startswith(">") and not os.path.lexists(text):
        raise FastaError(
            f"{_shown(text)} is the text of a FASTA file, and a path is wanted; write it to a file, or give "
            "SeqIO.parse(io.StringIO(text), 'fasta')"
        )
    if (path := _existing(text)) is None and not _is_of_letters(text):
        path = user_path(text, PathUse.INPUT)  # says what is wrong with it
    if path is None or not _names_files(path):
        raise FastaError(
            f"{_cut(text)}: there is no such file; a single sequence goes into a list: [sequence]"
        )
    return path


def _refuse_what_has_no_records(given: Any) -> None:
    if isinstance(given, set | frozenset):
        raise FastaError(
            "a set has no order, and rows come back in the order given; give a list, such as sorted(...)"
        )
    if hasattr(given, "read") and hasattr(given, "readline"):
        name = getattr(given, "name", None)
        path = repr(name) if isinstance(name, str) and os.path.exists(name) else "its path"
        raise FastaError(
            f"this is an open file; give {path} instead, or SeqIO.parse(file, 'fasta')"
        )
    if hasattr(type(given), "collect") or hasattr(type(given), "compute"):
        raise FastaError(
            f"a {type(given).__name__} is not computed yet; give what its collect() or compute() returns, with ids and sequences"
        )


def _column_names(given: Any) -> list[Any] | None:
    """The names of a table's columns; None if it is no table."""
    if isinstance(given, Mapping):
        return None
    of_fields = getattr(getattr(given, "dtype", None), "names", None)  # a structured array of NumPy
    for names in (of_fields, getattr(given, "column_names", None), getattr(given, "columns", None)):
        if names is not None and not callable(names):
            return list(names)
    return None


def _rows_of_table(
    table: Any, names: Sequence[Any], id_column: str, sequence_column: str
) -> Iterable[tuple[Any, Any]]:
    index = getattr(table, "index", None)
    index_is_id = getattr(index, "name", None) == id_column and id_column not in names
    wanted = [sequence_column] if index_is_id else [id_column, sequence_column]
    has_index = hasattr(table, "iloc") and sequence_column in names
    or_series = (
        f", or give table[{sequence_column!r}], whose index has the ids" if has_index else ""
    )
    for name in wanted:
        if (count := names.count(name)) != 1:
            found = "there is no column" if count == 0 else f"{count} columns are called"
            raise FastaError(
                f"{found} {name!r} in this {type(table).__name__}, which has the columns {_listed_names(names)}; name them "
                f"with id_column and sequence_column{or_series}"
            )
    ids = _listed(index) if index_is_id else _listed(table[id_column])
    return zip(ids, _listed(table[sequence_column]), strict=True)


def _listed_names(names: Sequence[Any]) -> str:
    return (
        ", ".join(repr(str(name) if isinstance(name, str) else name) for name in names) or "(none)"
    )


def _is_series(given: Any) -> bool:
    """Whether it is a Series of pandas: values with an index. What its labels are can be its attributes too."""
    return hasattr(type(given), "iloc") and getattr(given, "ndim", None) == 1


def _listed(column: Any) -> list[Any]:
    """The values of a column, an array or an index, as Python's."""
    for method in ("to_pylist", "to_list", "tolist"):  # of pyarrow; of pandas and polars; of NumPy
        if callable(listed := getattr(column, method, None)):
            values: list[Any] = listed()
            return values
    return list(column)


def _as_mapping(given: Any) -> Mapping[Any, Any] | None:
    """What `dict` would take for a mapping: it has keys and gives what belongs to one."""
    if isinstance(given, Mapping):
        return given
    if callable(getattr(given, "keys", None)) and hasattr(given, "__getitem__"):
        keys = given.keys()  # going through `given` itself need not give these
        return {key: given[key] for key in keys}
    return None


def _rows_of_mapping(mapping: Mapping[Any, Any]) -> Iterator[tuple[Any, Any]]:
    for place, (key, value) in enumerate(mapping.items()):
        if isinstance(value, os.PathLike):
            raise FastaError(
                f"record {place} ({key!r}) is the path {_shown(value)}, and a file has ids of its own; give a list of paths"
            )
        if isinstance(value, list | tuple) or _is_series(value):
            raise FastaError(
                f"record {place} ({key!r}) is {_shown(value)}; a dictionary has one sequence for each id: for columns give "
                "dict(zip(ids, sequences))"
            )
        yield key, value


def _items(given: Any) -> list[Any]:
    if getattr(given, "ndim", None) == 0:
        raise FastaError(f"{_shown(given)} is a single value; {_WANTED}")
    if hasattr(given, "to_pylist") or hasattr(given, "ndim"):
        return _listed(given)
    try:
        iterator = iter(given)
    except TypeError:
        raise FastaError(
            f"sequences is {_shown(given)}, a {type(given).__name__}; {_WANTED}"
        ) from None
    return [*iterator]


def _paths(items: Sequence[Any]) -> list[Path]:
    """The paths that all of `items` are, by their type or as texts that name existing files; none if they are sequences.

    Raises:
        FastaError: Some are and others are not, or it cannot be told.
    """
    if not items or not _is_file(items[0]):
        _refuse_files_among_sequences(items)
        return []
    odd = next((place for place, item in enumerate(items) if not _is_file(item)), None)
    if odd is None:
        for place, item in enumerate(items):
            if isinstance(item, str) and item.isalpha():
                raise FastaError(
                    f"record {place}, {item!r}, could be a sequence, and there is a file of this name; give Path({item!r}) "
                    f"for the file, or ({str(place)!r}, {item!r}) for the sequence"
                )
        return [user_path(item, PathUse.INPUT) for item in items]
    if (
        isinstance(items[0], str) and items[0].isalpha()
    ):  # a sequence that a file happens to be named like
        _refuse_files_among_sequences(items)
        return []
    raise FastaError(
        f"record {odd} is {_shown(items[odd])}, which is no file that exists, and record 0, {_shown(items[0])}, is one; give "
        "files or sequences, not both"
    )


def _refuse_files_among_sequences(items: Sequence[Any]) -> None:
    for place, item in enumerate(items):
        if isinstance(item, os.PathLike):
            raise FastaError(
                f"record {place} is the path {_shown(item)}, and record 0 is {_shown(items[0])}; give files or sequences, "
                "not both"
            )
        if not isinstance(item, str) or item.isalpha():
            continue
        if item.lstrip().startswith(">"):
            raise FastaError(
                f"record {place} is {_shown(item)}, a line of a FASTA file; give the path of the file, or "
                "SeqIO.parse(path, 'fasta')"
            )
        if len(item) < 4096 and _looks_like_a_file(item):
            path = user_path(item, PathUse.INPUT)  # says what is wrong with it
            there_is = "there is such a file" if _names_files(path) else "there is no such file"
            raise FastaError(
                f"record {place} is {_shown(item)}, which looks like the name of a file, and {there_is}; give sequences, "
                "or paths of files that exist"
            )


def _is_file(item: Any) -> bool:
    """Whether it is a path, or a text that names a file; a path need not exist, which is said of it as of any other file."""
    return isinstance(item, os.PathLike) or (isinstance(item, str) and _existing(item) is not None)


def _existing(text: str) -> Path | None:
    """The path that a text means, if there is such a file. Of letters alone it is no pattern, and may be one of millions."""
    if _is_of_letters(text):
        return Path(text) if os.path.exists(text) else None
    try:
        path = user_path(text, PathUse.INPUT)
    except ConfigError:
        return None
    return path if _names_files(path) else None


def _looks_like_a_file(text: str) -> bool:
    has_directory = "/" in text and not (
        text.isupper() and text.replace("/", "").isalpha()
    )  # chains, as MKV/MKL
    return has_directory or has_fasta_suffix(Path(text)) or is_table(Path(text))


def _is_of_letters(text: str) -> bool:
    """Whether it could be a sequence by its letters, with a stop at its end."""
    return text.isalpha() or "".join(text.split()).rstrip("*").isalpha()


def _is_text(given: Any) -> bool:
    return isinstance(given, str | UserString)


def _names_files(path: Path) -> bool:
    """Whether there is such a file or directory, or a pattern matches something."""
    return os.path.exists(path) or (
        glob.has_magic(str(path)) and any(glob.iglob(str(path), recursive=True))
    )


def _records(items: Sequence[Any], id_column: str, sequence_column: str) -> RecordsInMemory:
    """Records that have ids, all or none of them."""
    records = RecordsInMemory()
    have_ids = False
    for place, item in enumerate(items):
        sequence_id, sequence, description = _taken_apart(place, item, id_column, sequence_column)
        has_id = sequence_id is not None
        if place == 0:
            have_ids = has_id
        if has_id != have_ids:
            here, there = ("an id", "none") if has_id else ("no id", "one")
            raise FastaError(
                f"record {place}, {_shown(item)}, has {here}, and record 0, {_shown(items[0])}, has {there}; give all of "
                "them an id, or none"
            )
        if sequence_id is None:
            sequence_id = str(place)
        records.add(sequence_id, _sequence_text(place, sequence, sequence_id), description)
    return records


def _with_ids(rows: Iterable[tuple[Any, Any]]) -> RecordsInMemory:
    records = RecordsInMemory()
    for place, (id_, sequence) in enumerate(rows):
        sequence_id = _id_text(place, id_)
        if _has_id_of_its_own(sequence):  # a record of Biopython's in a dictionary
            sequence, description = sequence.seq, _description(sequence)
        else:
            description = ""
        records.add(sequence_id, _sequence_text(place, sequence, sequence_id), description)
    return records


def _taken_apart(
    place: int, item: Any, id_column: str, sequence_column: str
) -> tuple[str | None, Any, str]:
    """Id, if it has one, sequence and description of a record."""
    if hasattr(item, "as_py"):
        item = item.as_py()
    if isinstance(item, str | bytes | bytearray) or _is_biopython_sequence(item):
        return None, item, ""
    if (mapping := _as_mapping(item)) is not None:
        for name in (id_column, sequence_column):
            if name not in mapping:
                raise FastaError(
                    f"record {place} has no {name!r}, but {_listed_names([*mapping])}; name its keys with id_column and "
                    "sequence_column"
                )
        return _id_text(place, mapping[id_column]), mapping[sequence_column], ""
    for name in ("seq", sequence_column, "sequence"):
        if hasattr(item, "id") and hasattr(item, name):
            return _id_text(place, item.id), getattr(item, name), _description(item)
    if isinstance(item, tuple | list):
        if len(item) != 2:
            raise FastaError(f"record {place} is {_shown(item)}, of {len(item)}; {_WANTED}")
        return _id_text(place, item[0]), item[1], ""
    return None, item, ""


def _is_record(given: Any, sequence_column: str) -> bool:
    return hasattr(given, "id") and any(
        hasattr(given, name) for name in ("seq", "sequence", sequence_column)
    )


def _has_id_of_its_own(value: Any) -> bool:
    return hasattr(value, "id") and hasattr(value, "seq")


def _is_biopython_sequence(given: Any) -> bool:
    """Whether it is one sequence of Biopython's, which goes through its letters as if they were many."""
    module = sys.modules.get("Bio.Seq")  # where that is not imported, there is none
    return module is not None and isinstance(given, module.Seq | module.MutableSeq)


def _is_one_sequence(given: Any) -> bool:
    """Whether it is the letters of one protein, in a class of some library's; going through it would give single letters."""
    if _is_biopython_sequence(given):
        return True
    if isinstance(given, list | tuple | deque) or hasattr(given, "ndim"):
        return False
    if not (hasattr(given, "__len__") and hasattr(given, "__getitem__")):
        return False
    text = str(given)
    return (
        len(text) == len(given) and text.isalpha()
    )  # what other containers look like has brackets


def _id_text(place: int, id_: Any) -> str:
    if hasattr(id_, "as_py"):
        id_ = id_.as_py()
    if _is_missing(id_) or (isinstance(id_, str) and id_ in _UNKNOWN_OF_BIOPYTHON):
        raise FastaError(f"record {place} has no id ({id_}); give it one")
    if isinstance(id_, bytes | bytearray):
        id_ = _decoded(place, id_)
    if isinstance(id_, str | UserString):
        return str(id_)
    if isinstance(id_, Integral) and id_ is not True and id_ is not False:
        return str(int(id_))
    raise FastaError(
        f"record {place} has the id {_shown(id_)}, a {type(id_).__name__}; ids are texts or whole numbers: turn it into one"
    )


def _sequence_text(place: int, sequence: Any, sequence_id: str) -> str:
    if isinstance(sequence, str):
        return str(sequence)
    if hasattr(sequence, "as_py"):
        return _sequence_text(place, sequence.as_py(), sequence_id)
    if isinstance(sequence, bytes | bytearray):
        return _decoded(place, sequence)
    named = f"record {place} ({sequence_id!r})"
    if _is_missing(sequence):
        raise FastaError(f"{named} has no sequence ({sequence}); leave it out")
    if isinstance(sequence, os.PathLike):
        raise FastaError(
            f"{named} is the path {_shown(sequence)}; give files or sequences, not both"
        )
    if _is_biopython_sequence(sequence) or isinstance(sequence, UserString):
        return _letters(named, sequence)
    is_container = isinstance(sequence, list | tuple | set | frozenset | Mapping) or hasattr(
        sequence, "ndim"
    )
    if (
        not is_container
        and hasattr(sequence, "__len__")
        and len(text := _letters(named, sequence)) == len(sequence)
    ):
        return text
    raise FastaError(f"{named} is {_shown(sequence)}, a {type(sequence).__name__}; {_WANTED}")


def _letters(named: str, sequence: Any) -> str:
    try:
        return str(sequence)
    except ValueError as error:  # Biopython's of a sequence of which it knows the length alone
        raise FastaError(f"{named} has no letters ({error}); leave it out") from error


def _decoded(place: int, text: bytes | bytearray) -> str:
    try:
        return text.decode()
    except UnicodeDecodeError:
        raise FastaError(
            f"record {place} is {_shown(bytes(text))}, which is no UTF-8 text; decode it first"
        ) from None


def _description(record: Any) -> str:
    """What a FASTA header would have after the id."""
    described = getattr(record, "description", None)
    if not isinstance(described, str) or described in _UNKNOWN_OF_BIOPYTHON:
        return ""
    words = described.split()
    return " ".join(words[1:] if words[:1] == [record.id] else words)


def _is_missing(value: Any) -> bool:
    """Whether it stands for nothing in some library: None, NaN, NA, NaT."""
    return (
        value is None
        or (isinstance(value, float) and math.isnan(value))
        or type(value).__name__ in ("NAType", "NaTType")
    )


def _shown(value: Any) -> str:
    return _cut(" ".join(repr(value).split()))


def _cut(text: str) -> str:
    return text if len(text) <= 80 else f"{text[:80]}..."
