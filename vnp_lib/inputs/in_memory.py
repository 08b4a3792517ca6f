"""Read proteins from Python objects: paths, texts, dictionaries, tables, Biopython's records."""

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
from vnp_lib.inputs.files import FASTA_SUFFIXES, suffix_of
from vnp_lib.inputs.sources import SourceFormat
from vnp_lib.user_paths import PathUse, user_path


class Residues(Protocol):
    """A sequence whose `str` is its residues, as Biopython's `Seq`."""

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


Text: TypeAlias = str | bytes | Residues
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
    "give sequences as texts, pairs of id and sequence, a dictionary of sequences by id, a table "
    "with columns for both, Biopython's records, or paths of FASTA files"
)
_UNKNOWN_OF_BIOPYTHON = ("<unknown id>", "<unknown name>", "<unknown description>")

# Longer texts are sequences, not names of files.
_MAX_PATH_CHARACTERS = 4096
_MAX_SHOWN_CHARACTERS = 80


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordsInMemory:
    """Records as they were given; the lists run in parallel."""

    ids: list[str] = field(default_factory=list)
    descriptions: list[str] = field(default_factory=list)  # "" for a record without one
    sequences: list[str] = field(default_factory=list)

    def add(self, sequence_id: str, sequence: str, description: str = "") -> None:
        self.ids.append(sequence_id)
        self.descriptions.append(description)
        self.sequences.append(sequence)


def files_or_records(
    given: Any, *, id_column: str = "id", sequence_column: str = "sequence"
) -> list[Path] | RecordsInMemory:
    """Return the files that an object names, or else the records that it holds.

    No library is imported for this: an object is recognised by the protocol that its library
    documents. No object is changed.

    Sequences without ids are numbered, "0", "1" and so on; a pandas Series has the ids of its
    index.

    Args:
        given: An object of a type in `Proteins`.
        id_column: Column of a table, or key of a record's dictionary, that holds the ids.
        sequence_column: The same for the sequences.

    Raises:
        FastaError: It is of no such type; says which record, and what can be given.
        ConfigError: A path that cannot be one of a file here, such as an address.
    """
    if isinstance(given, str | bytes | bytearray | UserString | os.PathLike):
        return [_file_of(given)]
    if _is_series(given):
        values = _to_list(given)
        return _files_among(values) or _rows_with_ids(
            zip(_to_list(given.index), values, strict=True)
        )
    _refuse_objects_without_records(given)
    if hasattr(given, "as_py"):  # a pyarrow scalar
        return files_or_records(given.as_py(), id_column=id_column, sequence_column=sequence_column)
    if (rows := _rows_of_table(given, id_column, sequence_column)) is not None:
        return _rows_with_ids(rows)
    if (mapping := _as_mapping(given)) is not None:
        return _rows_with_ids(_rows_of_mapping(mapping))
    is_record = hasattr(given, "id") and any(
        hasattr(given, name) for name in ("seq", "sequence", sequence_column)
    )
    if is_record or _is_one_sequence(given):
        return _records([given], id_column, sequence_column)
    items = _items(given)
    return _files_among(items) or _records(items, id_column, sequence_column)


def _file_of(given: Any) -> Path:
    """Return the path that one text or path-like object names."""
    if isinstance(given, str | UserString):
        text = str(given)
    else:
        text = os.fsdecode(bytes(given) if isinstance(given, bytearray) else given)
    if text.lstrip().startswith(">") and not os.path.lexists(text):
        raise FastaError(
            f"{_shown(text)} is the text of a FASTA file, and a path is wanted; write it to a "
            "file, or give SeqIO.parse(io.StringIO(text), 'fasta')"
        )
    if (path := _existing(text)) is None and not _may_be_a_sequence(text):
        # Raises the error for a path that cannot be used.
        path = user_path(text, PathUse.INPUT)
    if path is None or not _names_files(path):
        raise FastaError(
            f"{_cut(text)}: there is no such file; a single sequence goes into a list: [sequence]"
        )
    return path


def _refuse_objects_without_records(given: Any) -> None:
    """Raise FastaError for sets, open files and lazy tables."""
    if isinstance(given, set | frozenset):
        raise FastaError(
            "a set has no order, and rows come back in the order given; give a list, such as "
            "sorted(...)"
        )
    if hasattr(given, "read") and hasattr(given, "readline"):
        name = getattr(given, "name", None)
        path = repr(name) if isinstance(name, str) and os.path.exists(name) else "its path"
        raise FastaError(
            f"this is an open file; give {path} instead, or SeqIO.parse(file, 'fasta')"
        )
    if hasattr(type(given), "collect") or hasattr(type(given), "compute"):
        raise FastaError(
            f"a {type(given).__name__} is not computed yet; give what its collect() or compute() "
            "returns, with ids and sequences"
        )


def _rows_of_table(
    table: Any, id_column: str, sequence_column: str
) -> Iterable[tuple[Any, Any]] | None:
    """Return ids and sequences; None if it is no table.

    The ids may be the named index of a pandas DataFrame.
    """
    if isinstance(table, Mapping):
        return None
    # A structured NumPy array has its columns in its dtype.
    of_fields = getattr(getattr(table, "dtype", None), "names", None)
    found = (of_fields, getattr(table, "column_names", None), getattr(table, "columns", None))
    columns = next((each for each in found if each is not None and not callable(each)), None)
    if columns is None:
        return None
    names = list(columns)
    index = getattr(table, "index", None)
    index_is_id = getattr(index, "name", None) == id_column and id_column not in names
    wanted = [sequence_column] if index_is_id else [id_column, sequence_column]
    has_index = hasattr(table, "iloc") and sequence_column in names
    or_series = (
        f", or give table[{sequence_column!r}], whose index has the ids" if has_index else ""
    )
    for name in wanted:
        if (count := names.count(name)) != 1:
            problem = "there is no column" if count == 0 else f"{count} columns are called"
            raise FastaError(
                f"{problem} {name!r} in this {type(table).__name__}, which has the columns "
                f"{_quoted(names)}; name them with id_column and sequence_column{or_series}"
            )
    ids = _to_list(index) if index_is_id else _to_list(table[id_column])
    return zip(ids, _to_list(table[sequence_column]), strict=True)


def _quoted(names: Sequence[Any]) -> str:
    # `str` gives NumPy's texts the same quotes as Python's.
    return (
        ", ".join(repr(str(name) if isinstance(name, str) else name) for name in names) or "(none)"
    )


def _is_series(given: Any) -> bool:
    """Return whether it is a pandas Series: values with an index.

    Its type decides, since its labels can be attributes of the object.
    """
    return hasattr(type(given), "iloc") and getattr(given, "ndim", None) == 1


def _to_list(column: Any) -> list[Any]:
    """Return the values of a column, an array or an index, as Python's."""
    # The first is pyarrow's method, the second that of pandas and polars, the third NumPy's.
    for method in ("to_pylist", "to_list", "tolist"):
        if callable(to_list := getattr(column, method, None)):
            values: list[Any] = to_list()
            return values
    return list(column)


def _as_mapping(given: Any) -> Mapping[Any, Any] | None:
    """Return what `dict` takes for a mapping: an object with keys that gives the value of each."""
    if isinstance(given, Mapping):
        return given
    if callable(getattr(given, "keys", None)) and hasattr(given, "__getitem__"):
        # Iteration over the object itself need not give its keys.
        keys = given.keys()
        return {key: given[key] for key in keys}
    return None


def _rows_of_mapping(mapping: Mapping[Any, Any]) -> Iterator[tuple[Any, Any]]:
    for place, (key, value) in enumerate(mapping.items()):
        if isinstance(value, os.PathLike):
            raise FastaError(
                f"record {place} ({key!r}) is the path {_shown(value)}, and a file has ids of its "
                "own; give a list of paths"
            )
        if isinstance(value, list | tuple) or _is_series(value):
            raise FastaError(
                f"record {place} ({key!r}) is {_shown(value)}; a dictionary has one sequence for "
                "each id: for columns give dict(zip(ids, sequences))"
            )
        yield key, value


def _items(given: Any) -> list[Any]:
    """Return the elements of an array or of any iterable."""
    if getattr(given, "ndim", None) == 0:
        raise FastaError(f"{_shown(given)} is a single value; {_WANTED}")
    if hasattr(given, "to_pylist") or hasattr(given, "ndim"):
        return _to_list(given)
    try:
        iterator = iter(given)
    except TypeError:
        raise FastaError(
            f"sequences is {_shown(given)}, a {type(given).__name__}; {_WANTED}"
        ) from None
    return [*iterator]


def _files_among(items: Sequence[Any]) -> list[Path]:
    """Return the paths that all items are, by their type or since such files exist.

    Return no path if they are sequences.

    Raises:
        FastaError: Some are paths and others are not, or an item may be either.
    """
    if not items or not _is_file(items[0]):
        _refuse_files_among_sequences(items)
        return []
    odd = next((place for place, item in enumerate(items) if not _is_file(item)), None)
    if odd is None:
        for place, item in enumerate(items):
            if isinstance(item, str) and item.isalpha():
                raise FastaError(
                    f"record {place}, {item!r}, could be a sequence, and there is a file of this "
                    f"name; give Path({item!r}) for the file, or ({str(place)!r}, {item!r}) for "
                    "the sequence"
                )
        return [user_path(item, PathUse.INPUT) for item in items]
    # A file may happen to have the name of a sequence.
    if isinstance(items[0], str) and items[0].isalpha():
        _refuse_files_among_sequences(items)
        return []
    raise FastaError(
        f"record {odd} is {_shown(items[odd])}, which is no file that exists, and record 0, "
        f"{_shown(items[0])}, is one; give files or sequences, not both"
    )


def _refuse_files_among_sequences(items: Sequence[Any]) -> None:
    for place, item in enumerate(items):
        if isinstance(item, os.PathLike):
            raise FastaError(
                f"record {place} is the path {_shown(item)}, and record 0 is {_shown(items[0])}; "
                "give files or sequences, not both"
            )
        if not isinstance(item, str) or item.isalpha():
            continue
        if item.lstrip().startswith(">"):
            raise FastaError(
                f"record {place} is {_shown(item)}, a line of a FASTA file; give the path of the "
                "file, or SeqIO.parse(path, 'fasta')"
            )
        if len(item) >= _MAX_PATH_CHARACTERS:
            continue
        # Chains may be separated by slashes: MKV/MKL.
        is_chains = item.isupper() and item.replace("/", "").isalpha()
        has_suffix = suffix_of(Path(item)) in FASTA_SUFFIXES or SourceFormat.of(Path(item)).is_table
        if has_suffix or ("/" in item and not is_chains):
            # Raises the error for a path that cannot be used.
            path = user_path(item, PathUse.INPUT)
            there_is = "there is such a file" if _names_files(path) else "there is no such file"
            raise FastaError(
                f"record {place} is {_shown(item)}, which looks like the name of a file, and "
                f"{there_is}; give sequences, or paths of files that exist"
            )


def _is_file(item: Any) -> bool:
    """Return whether it is a path, which need not exist, or a text that names a file."""
    return isinstance(item, os.PathLike) or (isinstance(item, str) and _existing(item) is not None)


def _existing(text: str) -> Path | None:
    """Return the path that a text names, if there is such a file.

    A text that may be a sequence is no pattern, and is not expanded: there may be millions.
    """
    if _may_be_a_sequence(text):
        return Path(text) if os.path.exists(text) else None
    try:
        path = user_path(text, PathUse.INPUT)
    except ConfigError:
        return None
    return path if _names_files(path) else None


def _may_be_a_sequence(text: str) -> bool:
    """Return whether all characters are alphabetic, but for white space and final stops."""
    return text.isalpha() or "".join(text.split()).rstrip("*").isalpha()


def _names_files(path: Path) -> bool:
    """Return whether there is such a file or directory, or a pattern matches something."""
    return os.path.exists(path) or (
        glob.has_magic(str(path)) and any(glob.iglob(str(path), recursive=True))
    )


def _records(items: Sequence[Any], id_column: str, sequence_column: str) -> RecordsInMemory:
    """Return records with the ids that they have, if all have one, or else with their numbers."""
    records = RecordsInMemory()
    have_ids = False
    for place, item in enumerate(items):
        sequence_id, sequence, description = _split_record(place, item, id_column, sequence_column)
        has_id = sequence_id is not None
        if place == 0:
            have_ids = has_id
        if has_id != have_ids:
            here, there = ("an id", "none") if has_id else ("no id", "one")
            raise FastaError(
                f"record {place}, {_shown(item)}, has {here}, and record 0, {_shown(items[0])}, "
                f"has {there}; give all of them an id, or none"
            )
        if sequence_id is None:
            sequence_id = str(place)
        records.add(sequence_id, _sequence_text(place, sequence, sequence_id), description)
    return records


def _rows_with_ids(rows: Iterable[tuple[Any, Any]]) -> RecordsInMemory:
    records = RecordsInMemory()
    for place, (id_, sequence) in enumerate(rows):
        sequence_id, description = _id_text(place, id_), ""
        # A dictionary may hold Biopython's records; its keys are the ids.
        if hasattr(sequence, "id") and hasattr(sequence, "seq"):
            sequence, description = sequence.seq, _description(sequence)
        records.add(sequence_id, _sequence_text(place, sequence, sequence_id), description)
    return records


def _split_record(
    place: int, item: Any, id_column: str, sequence_column: str
) -> tuple[str | None, Any, str]:
    """Return the id of a record, if it has one, its sequence and its description."""
    if hasattr(item, "as_py"):
        item = item.as_py()
    if isinstance(item, str | bytes | bytearray) or _is_biopython_sequence(item):
        return None, item, ""
    if (mapping := _as_mapping(item)) is not None:
        for name in (id_column, sequence_column):
            if name not in mapping:
                raise FastaError(
                    f"record {place} has no {name!r}, but {_quoted([*mapping])}; name its keys "
                    "with id_column and sequence_column"
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


def _is_biopython_sequence(given: Any) -> bool:
    """Return whether it is one of Biopython's sequences, which iterate over their residues."""
    # If the module is not imported, there are no such objects.
    module = sys.modules.get("Bio.Seq")
    return module is not None and isinstance(given, module.Seq | module.MutableSeq)


def _is_one_sequence(given: Any) -> bool:
    """Return whether an object of some library holds the residues of one protein.

    Iteration over it would give single residues.
    """
    if _is_biopython_sequence(given):
        return True
    if isinstance(given, list | tuple | deque) or hasattr(given, "ndim"):
        return False
    if not (hasattr(given, "__len__") and hasattr(given, "__getitem__")):
        return False
    # The text of other containers has brackets.
    text = str(given)
    return len(text) == len(given) and text.isalpha()


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
        f"record {place} has the id {_shown(id_)}, a {type(id_).__name__}; ids are texts or whole "
        "numbers: convert it to one"
    )


def _sequence_text(place: int, sequence: Any, sequence_id: str) -> str:
    if isinstance(sequence, str):
        return str(sequence)
    if hasattr(sequence, "as_py"):
        return _sequence_text(place, sequence.as_py(), sequence_id)
    if isinstance(sequence, bytes | bytearray):
        return _decoded(place, sequence)
    name = f"record {place} ({sequence_id!r})"
    if _is_missing(sequence):
        raise FastaError(f"{name} has no sequence ({sequence}); leave it out")
    if isinstance(sequence, os.PathLike):
        raise FastaError(
            f"{name} is the path {_shown(sequence)}; give files or sequences, not both"
        )
    is_sequence = _is_biopython_sequence(sequence) or isinstance(sequence, UserString)
    is_container = isinstance(sequence, list | tuple | set | frozenset | Mapping) or hasattr(
        sequence, "ndim"
    )
    if is_sequence or (not is_container and hasattr(sequence, "__len__")):
        try:
            text = str(sequence)
        except ValueError as error:
            # Biopython has sequences of a known length and unknown content.
            raise FastaError(f"{name} has no residues ({error}); leave it out") from error
        if is_sequence or len(text) == len(sequence):
            return text
    raise FastaError(f"{name} is {_shown(sequence)}, a {type(sequence).__name__}; {_WANTED}")


def _decoded(place: int, text: bytes | bytearray) -> str:
    try:
        return text.decode()
    except UnicodeDecodeError:
        raise FastaError(
            f"record {place} is {_shown(bytes(text))}, which is not UTF-8 text; decode it first"
        ) from None


def _description(record: Any) -> str:
    """Return what a FASTA header has after the id."""
    described = getattr(record, "description", None)
    if not isinstance(described, str) or described in _UNKNOWN_OF_BIOPYTHON:
        return ""
    words = described.split()
    return " ".join(words[1:] if words[:1] == [record.id] else words)


def _is_missing(value: Any) -> bool:
    """Return whether some library uses the value for a missing one: None, NaN, NA, NaT."""
    return (
        value is None
        or (isinstance(value, float) and math.isnan(value))
        or type(value).__name__ in ("NAType", "NaTType")
    )


def _shown(value: Any) -> str:
    return _cut(" ".join(repr(value).split()))


def _cut(text: str) -> str:
    is_short = len(text) <= _MAX_SHOWN_CHARACTERS
    return text if is_short else f"{text[:_MAX_SHOWN_CHARACTERS]}..."
