"""The rows to export, and the description of an export format.

Every writer takes the rows in batches, so that memory does not grow with their number, and
publishes its file or directory completely or not at all. Errors of the disk are raised as OSError.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from vnp_lib.dataset.reader import EmbeddingDataset, as_rows
from vnp_lib.errors import ConfigError
from vnp_lib.plan import Output, OutputKind, StoreDtype, Values, as_stored, offsets_of

# Of the vectors that are in memory at a time.
_BATCH_BYTES = 16 * 1024**2
_BATCH_IDS = 65_536


@dataclass(frozen=True, kw_only=True)
class ExportRows:
    """The columns of a dataset to export, with rows in input order."""

    dataset: EmbeddingDataset
    # One column, unless the format holds several.
    columns: tuple[str, ...]
    dtype: StoreDtype

    def __len__(self) -> int:
        return len(self.dataset)

    @property
    def dim(self) -> int:
        return self.dataset.dim

    @property
    def outputs(self) -> tuple[Output, ...]:
        return tuple(self.dataset.columns[column] for column in self.columns)

    @property
    def is_fixed(self) -> bool:
        """Whether all columns are vectors."""
        return all(output.is_fixed for output in self.outputs)

    @property
    def about(self) -> dict[str, str]:
        """The model, layer, pooling and dtype of the one column, and the fingerprint of the run."""
        (output,) = self.outputs
        identity = self.dataset.metadata["identity"]
        layer = {} if output.layer is None else {"layer": str(output.layer)}
        return {
            "model": str(identity["model"]),
            **layer,
            "pooling": output.kind.value,
            "dtype": str(identity["dtype"]),
            "fingerprint": str(self.dataset.metadata["fingerprint"]),
        }

    @property
    def num_values(self) -> int:
        # Fixed widths spare a pass over the lengths of what may be millions of sequences.
        if self.is_fixed:
            return len(self) * len(self.columns) * self.dim
        return sum(int(output.widths(self.lengths, self.dim).sum()) for output in self.outputs)

    @cached_property
    def lengths(self) -> NDArray[np.int32]:
        """Residues per sequence, (N,)."""
        batches = self.dataset.record_batches(_BATCH_IDS, ["length"])
        return np.concatenate(
            [np.empty(0, dtype=np.int32), *(batch.column("length").to_numpy() for batch in batches)]
        )

    @cached_property
    def id_width(self) -> int:
        """Characters of the longest id, at least 1: NumPy reads 0 as any width."""
        return max((len(sequence_id) for ids in self.ids() for sequence_id in ids), default=1)

    def ids(self) -> Iterator[list[str]]:
        for batch in self.dataset.record_batches(_BATCH_IDS, ["id"]):
            yield _ids(batch)

    def batches(self) -> Iterator[tuple[list[str], Values]]:
        """Yield ids and vectors, (n, dim), of the one column."""
        for batch in self._batches("id"):
            ids = _ids(batch)
            yield ids, self._vectors(ids, batch)

    def batches_with_ordinals(self) -> Iterator[tuple[list[int], list[str], Values]]:
        """Yield ordinals, ids and vectors, (n, dim), of the one column."""
        for batch in self._batches("ordinal", "id"):
            ids = _ids(batch)
            yield batch.column("ordinal").to_pylist(), ids, self._vectors(ids, batch)

    def arrays(self) -> Iterator[tuple[list[str], Sequence[Values]]]:
        """Yield ids and arrays, each in its shape, of the one column."""
        (column,) = self.columns
        for batch in self._batches("id", "length"):
            ids = _ids(batch)
            yield ids, self._arrays(ids, batch, column)

    def with_headers(self) -> Iterator[tuple[str, dict[Output, Values]]]:
        """Yield each sequence's FASTA header and its outputs, each in its shape.

        The header is without ">", and has one space between id and description.
        """
        for batch in self._batches("id", "description", "length"):
            ids = _ids(batch)
            arrays = [self._arrays(ids, batch, column) for column in self.columns]
            for id_, description, *own in zip(
                ids, batch.column("description").to_pylist(), *arrays, strict=True
            ):
                yield f"{id_} {description}".rstrip(), dict(zip(self.outputs, own, strict=True))

    def _batches(self, *others: str) -> Iterator[pa.RecordBatch]:
        """Yield batches of the columns, and of others."""
        columns = [*others, *self.columns]
        if not self.is_fixed:
            return self.dataset.row_groups(columns)
        return self.dataset.record_batches(
            max(1, _BATCH_BYTES // (4 * self.dim * len(self.columns))), columns
        )

    def _vectors(self, ids: list[str], batch: pa.RecordBatch) -> Values:
        (column,) = self.columns
        return self._as_stored(ids, as_rows(batch.column(column)))

    def _arrays(self, ids: list[str], batch: pa.RecordBatch, column: str) -> Sequence[Values]:
        arrays = self.dataset.arrays_in(batch, column)
        if isinstance(arrays, np.ndarray):
            return list(self._as_stored(ids, arrays))
        flat = (
            self._as_stored([id_], array.reshape(1, -1))
            for id_, array in zip(ids, arrays, strict=True)
        )
        return [values.reshape(array.shape) for values, array in zip(flat, arrays, strict=True)]

    def _as_stored(self, ids: list[str], rows: NDArray[np.float32]) -> Values:
        """Return rows, (n, W), in the requested precision."""
        if self.dtype is StoreDtype.FLOAT32:
            return rows
        halved = as_stored(rows, self.dtype)
        is_finite = np.isfinite(halved).all(axis=1)
        if not is_finite.all():
            row = int(np.argmin(is_finite))
            raise ConfigError(
                f"the embedding of {ids[row]!r} has a value of {np.abs(rows[row]).max():,.0f}, and "
                f"float16 ends at 65,504: export with --store-dtype float32"
            )
        return halved


@dataclass(frozen=True, slots=True, kw_only=True)
class Format:
    """An export format: its writer and requirements, and the code that reads it."""

    # Takes the rows, the path, and whether to replace an existing file.
    write: Callable[[ExportRows, Path, bool], None]
    # One line for `vnp export --help`.
    about: str
    # Whether it holds several columns.
    holds_several: bool = False
    # Permitted suffixes of a file, the first by default; empty if the format is a directory.
    suffixes: tuple[str, ...] = ()
    # Whether the ids are in a second file, `ids_path_of(path)`.
    has_ids_file: bool = False
    # An optional dependency that the writer needs.
    library: str | None = None
    dtypes: tuple[StoreDtype, ...] = tuple(StoreDtype)
    # Of a text format; other formats take as much as the dtype.
    bytes_per_value: int | None = None
    # In addition to the values.
    bytes_per_row: int = 64
    # More rows cause a warning.
    num_rows_advised: int | None = None
    # Python code that reads `ids` and `embeddings` from `path`.
    read: str = field(repr=False)

    def files(self, path: Path) -> list[Path]:
        """Return the paths that are written for `path`."""
        return [path, ids_path_of(path)] if self.has_ids_file else [path]

    def size_bytes(self, rows: ExportRows) -> int:
        """Return an estimate of the disk space."""
        bytes_per_value = self.bytes_per_value or np.dtype(rows.dtype).itemsize
        return rows.num_values * bytes_per_value + len(rows) * self.bytes_per_row


def ids_path_of(path: Path) -> Path:
    """Return the path of the ids of a `.npy` file: `x.ids.txt` for `x.npy`."""
    return path.with_name(path.name.removesuffix(".npy") + ".ids.txt")


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamedArray:
    """An array that is written in pieces."""

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    # Concatenated, these are the values.
    pieces: Iterable[NDArray[Any]]

    @classmethod
    def of_array(cls, name: str, array: NDArray[Any]) -> StreamedArray:
        """Return an array in memory as a single piece."""
        return cls(name=name, dtype=array.dtype, shape=array.shape, pieces=[array])

    @property
    def size_bytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


def stream_matrix(rows: ExportRows) -> StreamedArray:
    """Return `embeddings`, (N, D)."""
    pieces = (values for _, values in rows.batches())
    dtype = np.dtype(rows.dtype)
    return StreamedArray(name="embeddings", dtype=dtype, shape=(len(rows), rows.dim), pieces=pieces)


def stream_ragged(rows: ExportRows) -> list[StreamedArray]:
    """Return `offsets`, `lengths` and `values` of per-residue outputs.

    `values` has one row per residue of all sequences, (R, D), or for contacts, which are square,
    one value per pair of residues, (P,). `offsets`, int64, (N + 1,), are the boundaries of the
    sequences in it, and `lengths`, int32, (N,), their residues:
    `values[offsets[i]:offsets[i + 1]].reshape(lengths[i], -1)` has the shape of the output.
    """
    (output,) = rows.outputs
    is_square = output.kind == OutputKind.CONTACTS
    offsets = offsets_of(rows.lengths.astype(np.int64) ** (2 if is_square else 1))
    width = () if is_square else output.shape(1, rows.dim)[1:]
    values = (array for _, arrays in rows.arrays() for array in arrays)
    return [
        StreamedArray.of_array("offsets", offsets),
        StreamedArray.of_array("lengths", rows.lengths),
        StreamedArray(
            name="values",
            dtype=np.dtype(rows.dtype),
            shape=(int(offsets[-1]), *width),
            pieces=values,
        ),
    ]


def _ids(batch: pa.RecordBatch) -> list[str]:
    """Return the ids of a batch; raise ConfigError for one that a text file would change."""
    ids: list[str] = batch.column("id").to_pylist()
    text = "\n".join(ids)
    if "\0" in text or len(text.splitlines()) != len(ids):
        odd = next(
            sequence_id
            for sequence_id in ids
            if "\0" in sequence_id or len(sequence_id.splitlines()) != 1
        )
        raise ConfigError(
            f"the id {odd!r} contains a line break or NUL, which readers of these formats do not "
            f"expect"
        )
    return ids
