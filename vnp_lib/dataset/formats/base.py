"""The formats in which a dataset can be exported, each as its readers expect it.

Every writer takes the rows a batch at a time, so that memory does not grow with their number, and leaves its file or
directory whole or not at all. Errors of the disk come out as OSError.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv
from numpy.typing import NDArray

from vnp_lib.dataset.reader import EmbeddingDataset, as_rows
from vnp_lib.errors import ConfigError
from vnp_lib.plan import Output, StoreDtype, Values, as_stored

_BATCH_BYTES = 16 * 1024**2  # of embeddings, at a time
_BATCH_IDS = 65_536


@dataclass(frozen=True, kw_only=True)
class Rows:
    """What is to be exported: columns of a dataset, its rows in input order."""

    dataset: EmbeddingDataset
    columns: tuple[str, ...]  # one, but for a format that holds several
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
        """Whether there is nothing but vectors."""
        return all(output.is_fixed for output in self.outputs)

    @property
    def about(self) -> dict[str, str]:
        """What the one column is of: model, layer if it is of one, pooling, dtype of the computation, fingerprint of the run."""
        (output,) = self.outputs
        identity = self.dataset.metadata["identity"]
        of_a_layer = {} if output.layer is None else {"layer": str(output.layer)}
        return {
            "model": str(identity["model"]),
            **of_a_layer,
            "pooling": output.kind.value,
            "dtype": str(identity["dtype"]),
            "fingerprint": str(self.dataset.metadata["fingerprint"]),
        }

    @property
    def num_values(self) -> int:
        if self.is_fixed:  # which says it without looking at each of many millions
            return len(self) * len(self.columns) * self.dim
        return sum(int(output.widths(self.lengths, self.dim).sum()) for output in self.outputs)

    @cached_property
    def lengths(self) -> NDArray[np.int32]:
        """Residues, (N,)."""
        batches = self.dataset.record_batches(_BATCH_IDS, ["length"])
        return np.concatenate(
            [np.empty(0, dtype=np.int32), *(batch.column("length").to_numpy() for batch in batches)]
        )

    @cached_property
    def id_width(self) -> int:
        """Characters of the longest id, and 1 at least: NumPy takes 0 for any number."""
        return max((len(sequence_id) for ids in self.ids() for sequence_id in ids), default=1)

    def ids(self) -> Iterator[list[str]]:
        for batch in self.dataset.record_batches(_BATCH_IDS, ["id"]):
            yield _ids(batch)

    def batches(self) -> Iterator[tuple[list[str], Values]]:
        """Ids and vectors, (n, dim), of the one column."""
        for batch in self._batches("id"):
            ids = _ids(batch)
            yield ids, self._vectors(ids, batch)

    def placed(self) -> Iterator[tuple[list[int], list[str], Values]]:
        """Positions in the input, from 0, ids and vectors, (n, dim), of the one column."""
        for batch in self._batches("ordinal", "id"):
            ids = _ids(batch)
            yield batch.column("ordinal").to_pylist(), ids, self._vectors(ids, batch)

    def arrays(self) -> Iterator[tuple[list[str], Sequence[Values]]]:
        """Ids and arrays, each in its shape, of the one column."""
        (column,) = self.columns
        for batch in self._batches("id", "length"):
            ids = _ids(batch)
            yield ids, self._arrays(ids, batch, column)

    def headed(self) -> Iterator[tuple[str, dict[Output, Values]]]:
        """Each sequence's FASTA header without ">", one space between id and description, and its arrays, in their shapes."""
        for batch in self._batches("id", "description", "length"):
            ids = _ids(batch)
            arrays = [self._arrays(ids, batch, column) for column in self.columns]
            for id_, description, *own in zip(
                ids, batch.column("description").to_pylist(), *arrays, strict=True
            ):
                yield f"{id_} {description}".rstrip(), dict(zip(self.outputs, own, strict=True))

    def _batches(self, *beside: str) -> Iterator[pa.RecordBatch]:
        """The columns, and others beside them."""
        columns = [*beside, *self.columns]
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
        """Rows, (n, W), in the precision that is wanted."""
        if self.dtype is StoreDtype.FLOAT32:
            return rows
        halved = as_stored(rows, self.dtype)
        is_finite = np.isfinite(halved).all(axis=1)
        if not is_finite.all():
            row = int(np.argmin(is_finite))
            raise ConfigError(
                f"the embedding of {ids[row]!r} has a value of {np.abs(rows[row]).max():,.0f}, and float16 ends at 65,504: "
                f"export with --store-dtype float32"
            )
        return halved


@dataclass(frozen=True, slots=True, kw_only=True)
class Format:
    """A format: how it is written, what that takes, and how it is read."""

    write: Callable[[Rows, Path, bool], None]  # rows, where to, whether to replace what is there
    about: str  # in a line
    holds_several: bool = False  # columns; others hold one
    suffixes: tuple[
        str, ...
    ] = ()  # names that a file may have, the first by default; none: it is a directory
    has_ids_beside: bool = False  # a second file, `ids_beside`
    library: str | None = None  # needed to write it, and not among what is always there
    dtypes: tuple[StoreDtype, ...] = tuple(StoreDtype)
    bytes_per_value: int | None = None  # where it is text
    bytes_per_row: int = 64  # besides the values
    num_rows_advised: int | None = None  # more are warned of
    read: str = field(repr=False)  # Python that gives `ids` and `embeddings`, of `path`

    def files(self, path: Path) -> list[Path]:
        """What is written for `path`, by name: it, and the ids beside it where they are a file of their own."""
        return [path, ids_beside(path)] if self.has_ids_beside else [path]

    def size_bytes(self, rows: Rows) -> int:
        """Space that it takes on disk, about."""
        bytes_per_value = self.bytes_per_value or np.dtype(rows.dtype).itemsize
        return rows.num_values * bytes_per_value + len(rows) * self.bytes_per_row


def ids_beside(path: Path) -> Path:
    """Where the ids of a `.npy` file are: `x.ids.txt` beside `x.npy`."""
    return path.with_name(path.name.removesuffix(".npy") + ".ids.txt")


def _ids(batch: pa.RecordBatch) -> list[str]:
    """The ids of a batch; one that would not come out of a text file or of HDF5 as it went in is refused."""
    ids: list[str] = batch.column("id").to_pylist()
    text = "\n".join(ids)
    if "\0" in text or len(text.splitlines()) != len(ids):
        odd = next(
            sequence_id
            for sequence_id in ids
            if "\0" in sequence_id or len(sequence_id.splitlines()) != 1
        )
        raise ConfigError(
            f"the id {odd!r} has a line break or NUL in it, which readers of these formats do not expect"
        )
    return ids
