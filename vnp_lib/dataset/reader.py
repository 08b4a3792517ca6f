"""The dataset: every sequence's embedding, in input order, in Parquet parts that `_SUCCESS.json` vouches for.

`open_dataset` reads it, a few rows or all, without the rest; `verify_dataset` reads every byte. `assembly.py` writes it.
"""

from __future__ import annotations

import hashlib
import os
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property, lru_cache
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from vnp_lib.dataset.schema import column_names, values_at
from vnp_lib.errors import StorageError
from vnp_lib.plan import Output, RowLayout, StoreDtype
from vnp_lib.storage import digest_file, digest_stream, read_sealed_json
from vnp_lib.user_paths import PathUse, user_path

if TYPE_CHECKING:  # torch takes seconds to import, and most readers do without
    from torch import Tensor

    from vnp_lib.dataset.torch_dataset import EmbeddingRows

DATASET_SCHEMA = 1
SUCCESS_NAME = "_SUCCESS.json"

Row: TypeAlias = Any  # float32 (D,), or a dict of float32 arrays by output
Rows: TypeAlias = Any  # float32 (n, D), or a dict by output of float32 (n, D) or n float32 arrays

_BATCH_ROWS = 1024
_SEVERAL = -1  # in the place of a row
_NONE_SHA256 = hashlib.sha256().hexdigest()  # of no ordinals
_FOOTER_TAIL_BYTES = 8  # its length and "PAR1" end a Parquet file


def open_dataset(path: Path | str) -> EmbeddingDataset:
    """Open the dataset of a run, by its run directory or the `embeddings` directory in it.

    Of a partial dataset, which only a run that was asked for one makes, `metadata["num_missing"]` is not 0.

    Raises:
        StorageError: There is no dataset, or a part of it is missing or has another size.
        ConfigError: The path is an address, or names an unknown user or variable.
    """
    directory = _find_dataset(user_path(path, PathUse.RUN))
    return EmbeddingDataset(directory, read_success(directory))


def verify_dataset(path: Path | str) -> list[str]:
    """Read every byte of a dataset and say what is wrong with it: nothing, if it is whole."""
    try:
        directory = _find_dataset(user_path(path, PathUse.RUN))
        success = read_success(directory)
    except StorageError as error:
        return [str(error)]
    return [damage for part in success["parts"] if (damage := _damage(directory, part))]


class EmbeddingDataset:
    """Read access to a dataset. Rows are in input order; a sequence in quarantine has none.

    Nor has one that had not been computed when a partial dataset was put together: `metadata["num_missing"]` counts these,
    and is 0 in a dataset that is complete; `metadata["num_quarantined"]` counts the others. Both include copies.

    A row is the mean of a layer, a vector, where the run computed nothing else; otherwise it is a dictionary of all `outputs` by
    name: `mean_33`, `bos_33`, `max_33` and `std_33`, (D,), `per_tok_33`, (L, D), `contacts`, (L, L), and `logits`, (L, 33), with
    L the sequence's residues and 33 the layer.

    Rows are float32, also where the dataset stores float16 (`metadata["store_dtype"]`).

    Nothing is read before it is asked for. Looking up by id makes a dictionary of all ids first, about 150 bytes each.
    Whatever reads raises StorageError where a part is damaged. What is given out is the caller's own to change.

    >>> dataset = open_dataset("runs/mine")
    >>> len(dataset), dataset.dim
    (3, 8)
    >>> dataset.ids
    ['P12345', 'P67890', 'Q24680']
    >>> dataset["P67890"].dtype, dataset["P67890"].shape
    (dtype('float32'), (8,))
    >>> "nobody" in dataset
    False
    """

    def __init__(self, directory: Path, metadata: dict[str, Any]) -> None:
        self.metadata = metadata  # what `_SUCCESS.json` says: counts, identity, fingerprint, parts
        self.directory = directory
        self._part_starts = [0, *accumulate(part["rows"] for part in metadata["parts"])]
        self._file = lru_cache(maxsize=16)(self._open_part)
        self._part_ordinals = lru_cache(maxsize=16)(self._read_ordinals)
        self._row_group = lru_cache(maxsize=8)(self._read_row_group)
        self._layout = RowLayout.of_names(self.outputs, embed_dim=self.dim)

    def __reduce__(self) -> tuple[type[EmbeddingDataset], tuple[Path, dict[str, Any]]]:
        """As in another process: nothing is open yet."""
        return EmbeddingDataset, (self.directory, self.metadata)

    def __len__(self) -> int:
        return int(self._part_starts[-1])

    def __contains__(self, sequence_id: object) -> bool:
        return sequence_id in self._row_of_id

    def __getitem__(self, sequence_id: str) -> Row:
        """The row of a sequence: its embedding, (dim,), or its outputs by name.

        KeyError if the dataset has no such id, or several.
        """
        if sequence_id not in self._row_of_id:
            raise KeyError(f"{sequence_id!r} is not in {self.directory}")
        row = self._row_of_id[sequence_id]
        if row == _SEVERAL:
            raise KeyError(
                f"{sequence_id!r} is more than once in {self.directory}: use row(ordinal), by position in the input"
            )
        return self.at(row)[1]

    @property
    def dim(self) -> int:
        """Width of an embedding, and of every state."""
        return int(self.metadata["dim"])

    @property
    def outputs(self) -> tuple[str, ...]:
        """What there is of each sequence, by name: `("mean_33",)`, `("mean_33", "per_tok_33", "contacts")`."""
        return tuple(self.metadata.get("outputs") or [f"mean_{self.metadata['identity']['layer']}"])

    @cached_property
    def columns(self) -> dict[str, Output]:
        """The columns that hold what was computed, by name: `embedding`, or one for each of `outputs`."""
        return dict(zip(column_names(self._layout), self._layout.outputs, strict=True))

    @property
    def is_one_mean(self) -> bool:
        """Whether a row is a vector: the mean of a layer, and nothing else."""
        return self._layout.is_one_mean

    @cached_property
    def ids(self) -> list[str]:
        """The ids of all rows, in input order."""
        return [
            sequence_id
            for part in range(self._num_parts)
            for sequence_id in self._column(part, "id").to_pylist()
        ]

    def row(self, ordinal: int) -> Row:
        """The row of the sequence at a position in the input, from 0. KeyError if it has none."""
        part = self._part_of(ordinal)
        if 0 <= part < self._num_parts:
            ordinals = self._part_ordinals(part)
            row = int(np.searchsorted(ordinals, ordinal))
            if row < ordinals.size and ordinals[row] == ordinal:
                return self._read(part, row)[1]
        raise KeyError(
            f"ordinal {ordinal} is not in {self.directory}: it is not in the input, or in quarantine"
            + (
                ", or not computed yet: the dataset is partial"
                if self.metadata["num_missing"]
                else ""
            )
        )

    def at(self, position: int) -> tuple[str, Row]:
        """Id and embedding, as `row` gives it, of the row at a position in the dataset, from 0. IndexError if it has no such row.

        That is not its position in the input, which `row` takes, where sequences before it have no row.
        """
        if not 0 <= position < len(self):
            raise IndexError(f"row {position} is not in {self.directory}, which has {len(self):,}")
        part = bisect_right(self._part_starts, position) - 1
        return self._read(part, position - self._part_starts[part])

    def to_numpy(self) -> tuple[list[str], NDArray[np.float32]]:
        """All ids and embeddings, (N, dim), in input order, in memory. ValueError where there is more than one mean.

        >>> ids, embeddings = open_dataset("runs/mine").to_numpy()
        >>> ids[0], embeddings.shape
        ('P12345', (3, 8))
        """
        self._require_one_mean()
        embeddings = np.empty((len(self), self.dim), dtype=np.float32)
        ids: list[str] = []
        for batch_ids, rows in self.batches(_BATCH_ROWS):
            embeddings[len(ids) : len(ids) + len(rows)] = rows
            ids += batch_ids
        return ids, embeddings

    def as_torch_dataset(self) -> EmbeddingRows:
        """The rows as a map-style dataset of torch's, (id, float32 tensor of shape (dim,)), for any number of workers.

        ValueError where there is more than one mean.

        Reading one row reads the 4 MiB around it: go through it in order, or shuffle what fits into memory.

        >>> from torch.utils.data import DataLoader
        >>> for ids, vectors in DataLoader(open_dataset("runs/mine").as_torch_dataset(), batch_size=2):
        ...     print(ids, vectors.shape)
        ('P12345', 'P67890') torch.Size([2, 8])
        ('Q24680',) torch.Size([1, 8])
        """
        from vnp_lib.dataset.torch_dataset import EmbeddingRows

        self._require_one_mean()
        return EmbeddingRows(self)

    def torch_batches(self, batch_size: int) -> Iterator[tuple[list[str], Tensor]]:
        """`batches`, with torch tensors in the place of arrays. ValueError where there is more than one mean."""
        import torch

        self._require_one_mean()
        for ids, rows in self.batches(batch_size):
            yield ids, torch.from_numpy(rows)

    def batches(self, batch_size: int) -> Iterator[tuple[list[str], Rows]]:
        """Ids and embeddings, (n, dim), of all rows in input order, at most `batch_size` at a time.

        Where there is more than one mean, they are a dictionary of outputs by name: vectors as (n, dim), others as n arrays.

        >>> for ids, rows in open_dataset("runs/mine").batches(2):
        ...     print(ids, rows.shape)
        ['P12345', 'P67890'] (2, 8)
        ['Q24680'] (1, 8)
        """
        for batch in self.record_batches(batch_size, self._columns):
            yield batch.column("id").to_pylist(), self._rows_in(batch)

    def record_batches(self, batch_size: int, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
        """Columns of all rows in input order, at most `batch_size` rows at a time.

        There are `ordinal`, `id`, `description`, `length`, `original_length` and `embedding`, which `as_rows` makes a matrix
        of; or in the place of that a column for each of `outputs`.
        """
        for part in range(self._num_parts):
            with _damage_is_storage_error(self._path(part)):
                yield from self._file(part).iter_batches(batch_size, columns=list(columns))

    def row_groups(self, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
        """The same, as many rows at a time as take about 4 MiB, or one that takes more: however long its sequence is."""
        for part in range(self._num_parts):
            with _damage_is_storage_error(self._path(part)):
                for group in range(self._file(part).num_row_groups):
                    yield _as_batch(self._file(part).read_row_group(group, columns=list(columns)))

    def arrays_in(
        self, batch: pa.RecordBatch, column: str
    ) -> NDArray[np.float32] | list[NDArray[np.float32]]:
        """A column of a batch: vectors as (n, dim); others, for which the batch needs `length`, as n arrays in their shapes."""
        output, values = self.columns[column], batch.column(column)
        if output.is_fixed:
            return as_rows(values)
        return [
            values_at(values, row).reshape(output.shape(length, self.dim))
            for row, length in enumerate(batch.column("length").to_pylist())
        ]

    def _rows_in(self, batch: pa.RecordBatch) -> Rows:
        rows = {name: self.arrays_in(batch, name) for name in self.columns}
        return rows["embedding"] if self.is_one_mean else rows

    @property
    def _columns(self) -> list[str]:
        return ["id", "length", *self.columns]

    def _part_of(self, ordinal: int) -> int:
        if "first_ordinals" in self.metadata:
            return bisect_right(self.metadata["first_ordinals"], ordinal) - 1
        return ordinal // int(self.metadata["ordinals_per_part"])

    def _require_one_mean(self) -> None:
        if not self.is_one_mean:
            raise ValueError(
                f"{self.directory} has no single vector for each sequence, but {', '.join(self.outputs)}: use `batches`"
            )

    @property
    def _num_parts(self) -> int:
        return len(self.metadata["parts"])

    @cached_property
    def _row_of_id(self) -> dict[str, int]:
        rows = {sequence_id: row for row, sequence_id in enumerate(self.ids)}
        if len(rows) < len(self):
            rows |= {
                sequence_id: _SEVERAL
                for sequence_id, count in Counter(self.ids).items()
                if count > 1
            }
        return rows

    def _path(self, part: int) -> Path:
        return self.directory / str(self.metadata["parts"][part]["name"])

    def _read(self, part: int, row: int) -> tuple[str, Row]:
        metadata = self._file(part).metadata
        starts = [
            0,
            *accumulate(
                metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)
            ),
        ]
        group = bisect_right(starts, row) - 1
        batch, place = self._row_group(part, group), row - starts[group]
        length = batch.column("length")[place].as_py()
        values = {
            output.name: values_at(batch.column(column), place).reshape(
                output.shape(length, self.dim)
            )
            for column, output in self.columns.items()
        }
        return batch.column("id")[place].as_py(), values[
            self.outputs[0]
        ] if self.is_one_mean else values

    def _open_part(self, part: int) -> pq.ParquetFile:
        with _damage_is_storage_error(self._path(part)):
            _require_footer(self._path(part), self.metadata["parts"][part])
            return pq.ParquetFile(
                self._path(part), memory_map=True, page_checksum_verification=True
            )

    def _column(self, part: int, name: str) -> pa.ChunkedArray:
        with _damage_is_storage_error(self._path(part)):
            return self._file(part).read(columns=[name]).column(name)

    def _read_ordinals(self, part: int) -> NDArray[np.int64]:
        ordinals: NDArray[np.int64] = self._column(part, "ordinal").to_numpy()
        return ordinals

    def _read_row_group(self, part: int, group: int) -> pa.RecordBatch:
        with _damage_is_storage_error(self._path(part)):
            # Without Arrow's threads, which a forked child lacks.
            return _as_batch(
                self._file(part).read_row_group(group, columns=self._columns, use_threads=False)
            )


def as_rows(embeddings: pa.FixedSizeListArray) -> NDArray[np.float32]:
    """The column `embedding`, or another of vectors, as a matrix of the caller's own, float32 (n, dim)."""
    values = embeddings.flatten().to_numpy()  # read-only: it is Arrow's memory
    rows: NDArray[np.float32] = values.reshape(-1, embeddings.type.list_size).astype(np.float32)
    return rows


def describe_rows(num_rows: int, *, num_quarantined: int, num_missing: int) -> str:
    """Say how many rows a dataset has, and what it lacks: `997 sequences embedded, 3 in quarantine`."""
    lacking = ((num_quarantined, "in quarantine"), (num_missing, "missing"))
    return ", ".join(
        [
            f"{num_rows:,} sequences embedded",
            *(f"{count:,} {what}" for count, what in lacking if count),
        ]
    )


def read_success(directory: Path) -> dict[str, Any]:
    """Raises StorageError where it is damaged, or a part is missing or of another size.

    One that says nothing of missing rows was written when there could be none; one that says nothing of precision, when it
    was not measured; one that says nothing of how values are stored, when it was in float32; one that says nothing of lengths
    before sequences were cut, when that was not looked at; and one that says nothing of the software that computed it, when
    checkpoints did not tell.
    """
    success = read_sealed_json(directory / SUCCESS_NAME)
    if success["schema"] != DATASET_SCHEMA:
        raise StorageError(
            f"{directory} has schema {success['schema']}; this version reads {DATASET_SCHEMA}"
        )
    for part in success["parts"]:
        path = directory / part["name"]
        size_bytes = path.stat().st_size if path.exists() else 0
        if size_bytes != part["size_bytes"]:
            raise StorageError(
                f"{path} has {size_bytes:,} bytes, and {part['size_bytes']:,} were written; start the run again: the "
                f"dataset is then put together anew"
            )
    assumed = {
        "num_missing": 0,
        "missing_sha256": _NONE_SHA256,
        "original_lengths_sha256": "",
        "precision": None,
        "store_dtype": StoreDtype.FLOAT32,
        "software": [],
    }
    return assumed | success


def stored_dtype(directory: Path) -> StoreDtype | None:
    """The precision of a dataset that has rows and lacks none; None where there is no such one, by the sizes of its parts."""
    try:
        success = read_success(directory)
    except (StorageError, OSError):
        return None
    has_all = not success["num_missing"] and any(part["rows"] for part in success["parts"])
    return StoreDtype(success["store_dtype"]) if has_all else None


def footer_of(path: Path) -> dict[str, Any]:
    """Size and sha256 of a part's end, which says what is where in it: pages have checksums of their own, this has none."""
    with path.open("rb") as file:
        file.seek(-_FOOTER_TAIL_BYTES, os.SEEK_END)
        length = int.from_bytes(file.read(4), "little")
    size_bytes = length + _FOOTER_TAIL_BYTES
    return {"footer_bytes": size_bytes, "footer_sha256": _sha256_of_end(path, size_bytes)}


def _require_footer(path: Path, part: dict[str, Any]) -> None:
    if _sha256_of_end(path, part["footer_bytes"]) != part["footer_sha256"]:
        raise StorageError(f"{path} is damaged: its footer is not the one that was written")


def _as_batch(table: pa.Table) -> pa.RecordBatch:
    return table.combine_chunks().to_batches()[0]


def _sha256_of_end(path: Path, size_bytes: int) -> str:
    with path.open("rb") as file:
        file.seek(-size_bytes, os.SEEK_END)
        return digest_stream(file).sha256


def _find_dataset(path: Path) -> Path:
    for directory in (path, path / "embeddings"):
        if (directory / SUCCESS_NAME).exists():
            return directory
    if not path.is_dir():
        raise StorageError(f"{path}: there is no such directory")
    raise StorageError(
        f"{path}: there is no complete dataset here (no {SUCCESS_NAME}); start the run again with the same output "
        f"directory, and it goes on where it ended"
    )


def _damage(directory: Path, part: dict[str, Any]) -> str | None:
    path = directory / str(part["name"])
    try:
        digest = digest_file(path)
    except OSError as error:
        return f"{path} cannot be read ({error})"
    return (
        None
        if digest.sha256 == part["sha256"]
        else f"{path} is damaged: its sha256 is not the one of {SUCCESS_NAME}"
    )


@contextmanager
def _damage_is_storage_error(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, pa.ArrowException) as error:
        raise StorageError(f"{path} is damaged: {error}") from error
