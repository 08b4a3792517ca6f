"""Read a dataset: Parquet parts in input order, with their digests in `_SUCCESS.json`.

`open_dataset` reads single rows or all, and no other part of the files; `verify_dataset` reads
every byte. `vnp_lib/run/assembly.py` writes the dataset.
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

if TYPE_CHECKING:
    # torch takes seconds to import, and most readers need none.
    from torch import Tensor

    from vnp_lib.dataset.torch_dataset import EmbeddingRows

DATASET_SCHEMA = 1
SUCCESS_NAME = "_SUCCESS.json"

# One mean, (D,), or the outputs by name, each in its shape.
Row: TypeAlias = NDArray[np.float32] | dict[str, NDArray[np.float32]]
# The column of a batch of n rows: vectors, (n, D), or n arrays, each in its shape.
OutputBatch: TypeAlias = NDArray[np.float32] | list[NDArray[np.float32]]
# Means, (n, D), or the outputs by name.
RowBatch: TypeAlias = NDArray[np.float32] | dict[str, OutputBatch]

_BATCH_ROWS = 1024
# Stands for the position of an id that occurs more than once.
_AMBIGUOUS = -1
# Of an empty list of ordinals.
_NONE_SHA256 = hashlib.sha256().hexdigest()
# A Parquet file ends with the length of its footer and "PAR1".
_FOOTER_TAIL_BYTES = 8


def open_dataset(path: Path | str) -> EmbeddingDataset:
    """Open the dataset of a run.

    A dataset is complete unless the run was started with `--allow-partial`: then
    `metadata["num_missing"]` counts the sequences that have not been computed yet.

    Args:
        path: The run directory, or the directory `embeddings` in it.

    Raises:
        StorageError: There is no dataset, or a part of it is missing or has the wrong size.
        ConfigError: The path is a URL, or names an unknown user or environment variable.
    """
    directory = _find_dataset(user_path(path, PathUse.RUN))
    return EmbeddingDataset(directory, read_success(directory))


def verify_dataset(path: Path | str) -> list[str]:
    """Read every byte of a dataset and return a description of each damage; [] if it is intact."""
    try:
        directory = _find_dataset(user_path(path, PathUse.RUN))
        success = read_success(directory)
    except StorageError as error:
        return [str(error)]
    damages = []
    for part in success["parts"]:
        file = directory / str(part["name"])
        try:
            if digest_file(file).sha256 != part["sha256"]:
                damages.append(f"{file} is damaged: its sha256 differs from {SUCCESS_NAME}")
        except OSError as error:
            damages.append(f"{file} cannot be read ({error})")
    return damages


class EmbeddingDataset:
    """Read access to a dataset, with rows in input order.

    A quarantined sequence has no row (`metadata["num_quarantined"]` counts them), nor has one that
    was not computed when a partial dataset was assembled (`metadata["num_missing"]`, 0 if the
    dataset is complete). Both counts include identical sequences.

    If the run computed one mean and nothing else, a row is a vector, (D,). Otherwise it is a
    dictionary of all `outputs` by name: `mean_33`, `bos_33`, `max_33` and `std_33`, (D,),
    `per_tok_33`, (L, D), `contacts`, (L, L), and `logits`, (L, 33), where L is the number of
    residues and the suffix _33 the layer. Rows are float32, also if the dataset stores float16
    (`metadata["store_dtype"]`), and writable.

    Nothing is read before it is needed. The first lookup by id builds a dictionary of all ids,
    about 150 bytes each. Methods that read raise StorageError if a part is damaged.

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
        self.metadata = metadata
        """The content of `_SUCCESS.json`: counts, identity, fingerprint, parts."""
        self.directory = directory
        self._part_starts = [0, *accumulate(part["rows"] for part in metadata["parts"])]
        self._file = lru_cache(maxsize=16)(self._open_part)
        self._ordinals = lru_cache(maxsize=16)(
            lambda part: self._column(part, "ordinal").to_numpy()
        )
        self._row_group = lru_cache(maxsize=8)(self._read_row_group)
        self._layout = RowLayout.of_names(self.outputs, embed_dim=self.dim)

    def __reduce__(self) -> tuple[type[EmbeddingDataset], tuple[Path, dict[str, Any]]]:
        """Pickle the path and the metadata: the copy opens the files itself."""
        return EmbeddingDataset, (self.directory, self.metadata)

    def __len__(self) -> int:
        return int(self._part_starts[-1])

    def __contains__(self, sequence_id: object) -> bool:
        return sequence_id in self._row_of_id

    def __getitem__(self, sequence_id: str) -> Row:
        """Return the row of a sequence: its embedding, (dim,), or its outputs by name.

        Raises:
            KeyError: The dataset does not have the id, or has it more than once.
        """
        if sequence_id not in self._row_of_id:
            raise KeyError(f"{sequence_id!r} is not in {self.directory}")
        row = self._row_of_id[sequence_id]
        if row == _AMBIGUOUS:
            raise KeyError(
                f"{sequence_id!r} occurs more than once in {self.directory}: use row(ordinal), "
                f"by position in the input"
            )
        return self.at(row)[1]

    @property
    def dim(self) -> int:
        """Width D of an embedding, and of every state of the network."""
        return int(self.metadata["dim"])

    @property
    def outputs(self) -> tuple[str, ...]:
        """Names of the outputs per sequence: `("mean_33",)`, `("mean_33", "contacts")`."""
        return tuple(self.metadata.get("outputs") or [f"mean_{self.metadata['identity']['layer']}"])

    @cached_property
    def columns(self) -> dict[str, Output]:
        """The outputs by the name of their column: `embedding`, or one column per output."""
        return dict(zip(column_names(self._layout), self._layout.outputs, strict=True))

    @property
    def is_one_mean(self) -> bool:
        """Whether a row is a vector: the mean of one layer, and nothing else."""
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
        """Return the row of the sequence at a position in the input, from 0.

        Raises:
            KeyError: The sequence has no row.
        """
        if "first_ordinals" in self.metadata:
            part = bisect_right(self.metadata["first_ordinals"], ordinal) - 1
        else:
            # Datasets of earlier versions have the same number of ordinals in every part.
            part = ordinal // int(self.metadata["ordinals_per_part"])
        if 0 <= part < self._num_parts:
            ordinals = self._ordinals(part)
            row = int(np.searchsorted(ordinals, ordinal))
            if row < ordinals.size and ordinals[row] == ordinal:
                return self._read(part, row)[1]
        is_partial = self.metadata["num_missing"] > 0
        raise KeyError(
            f"ordinal {ordinal} is not in {self.directory}: it is not in the input, or quarantined"
            + (", or not computed yet: the dataset is partial" if is_partial else "")
        )

    def at(self, position: int) -> tuple[str, Row]:
        """Return the id and the row at a position in the dataset, from 0.

        Positions in the dataset and in the input, which `row` takes, differ if earlier sequences
        have no row.

        Raises:
            IndexError: The dataset has no such position.
        """
        if not 0 <= position < len(self):
            raise IndexError(f"row {position} is not in {self.directory}, which has {len(self):,}")
        part = bisect_right(self._part_starts, position) - 1
        return self._read(part, position - self._part_starts[part])

    def to_numpy(self) -> tuple[list[str], NDArray[np.float32]]:
        """Return all ids and embeddings, float32, (N, dim), in input order.

        Raises:
            ValueError: A row is not one mean.

        >>> ids, embeddings = open_dataset("runs/mine").to_numpy()
        >>> ids[0], embeddings.shape
        ('P12345', (3, 8))
        """
        self._require_one_mean()
        embeddings = np.empty((len(self), self.dim), dtype=np.float32)
        ids: list[str] = []
        for batch_ids, rows in self.batches(_BATCH_ROWS):
            assert isinstance(rows, np.ndarray)
            embeddings[len(ids) : len(ids) + len(rows)] = rows
            ids += batch_ids
        return ids, embeddings

    def as_torch_dataset(self) -> EmbeddingRows:
        """Return a map-style torch dataset of (id, float32 tensor of shape (dim,)).

        A DataLoader may use any number of workers. Reading one row reads the 4 MiB around it:
        iterate in order, or shuffle in memory.

        Raises:
            ValueError: A row is not one mean.

        >>> from torch.utils.data import DataLoader
        >>> rows = open_dataset("runs/mine").as_torch_dataset()
        >>> for ids, vectors in DataLoader(rows, batch_size=2):
        ...     print(ids, vectors.shape)
        ('P12345', 'P67890') torch.Size([2, 8])
        ('Q24680',) torch.Size([1, 8])
        """
        from vnp_lib.dataset.torch_dataset import EmbeddingRows

        self._require_one_mean()
        return EmbeddingRows(self)

    def torch_batches(self, batch_size: int) -> Iterator[tuple[list[str], Tensor]]:
        """Yield what `batches` does, as float32 tensors, (n, dim).

        Raises:
            ValueError: A row is not one mean.
        """
        import torch

        self._require_one_mean()
        for ids, rows in self.batches(batch_size):
            assert isinstance(rows, np.ndarray)
            yield ids, torch.from_numpy(rows)

    def batches(self, batch_size: int) -> Iterator[tuple[list[str], RowBatch]]:
        """Yield ids and embeddings, (n, dim), in input order, at most `batch_size` rows at a time.

        If a row is not one mean, yield ids and a dictionary of outputs by name: vectors as an
        array, (n, dim), others as a list of n arrays.

        >>> for ids, rows in open_dataset("runs/mine").batches(2):
        ...     print(ids, rows.shape)
        ['P12345', 'P67890'] (2, 8)
        ['Q24680'] (1, 8)
        """
        for batch in self.record_batches(batch_size, self._columns):
            ids: list[str] = batch.column("id").to_pylist()
            if self.is_one_mean:
                yield ids, as_rows(batch.column("embedding"))
            else:
                yield ids, {name: self.arrays_in(batch, name) for name in self.columns}

    def record_batches(self, batch_size: int, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
        """Yield columns of all rows in input order, at most `batch_size` rows at a time.

        The columns are `ordinal`, `id`, `description`, `length` and `original_length`, and either
        `embedding`, which `as_rows` converts to a matrix, or one per output.
        """
        for part in range(self._num_parts):
            with _raise_storage_error(self._path(part)):
                yield from self._file(part).iter_batches(batch_size, columns=list(columns))

    def row_groups(self, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
        """Yield columns of all rows in input order, about 4 MiB at a time, or one larger row."""
        for part in range(self._num_parts):
            with _raise_storage_error(self._path(part)):
                for group in range(self._file(part).num_row_groups):
                    yield _as_batch(self._file(part).read_row_group(group, columns=list(columns)))

    def arrays_in(self, batch: pa.RecordBatch, column: str) -> OutputBatch:
        """Return a column of a batch: vectors as (n, dim), others as n arrays in their shapes.

        For outputs other than vectors the batch needs the column `length` too.
        """
        output, values = self.columns[column], batch.column(column)
        if output.is_fixed:
            return as_rows(values)
        return [
            values_at(values, row).reshape(output.shape(length, self.dim))
            for row, length in enumerate(batch.column("length").to_pylist())
        ]

    @property
    def _columns(self) -> list[str]:
        return ["id", "length", *self.columns]

    def _require_one_mean(self) -> None:
        if not self.is_one_mean:
            raise ValueError(
                f"{self.directory} has {', '.join(self.outputs)} per sequence, not a single "
                f"vector: use `batches`"
            )

    @property
    def _num_parts(self) -> int:
        return len(self.metadata["parts"])

    @cached_property
    def _row_of_id(self) -> dict[str, int]:
        rows = {sequence_id: row for row, sequence_id in enumerate(self.ids)}
        if len(rows) < len(self):
            rows |= {
                sequence_id: _AMBIGUOUS
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
        batch, row_in_group = self._row_group(part, group), row - starts[group]
        length = batch.column("length")[row_in_group].as_py()
        sequence_id = batch.column("id")[row_in_group].as_py()
        values = {
            output.name: values_at(batch.column(column), row_in_group).reshape(
                output.shape(length, self.dim)
            )
            for column, output in self.columns.items()
        }
        return sequence_id, values[self.outputs[0]] if self.is_one_mean else values

    def _open_part(self, part: int) -> pq.ParquetFile:
        path, written = self._path(part), self.metadata["parts"][part]
        with _raise_storage_error(path):
            # Parquet has checksums for pages, but none for the footer.
            if _sha256_of_end(path, written["footer_bytes"]) != written["footer_sha256"]:
                raise StorageError(f"{path} is damaged: its footer is not the one that was written")
            return pq.ParquetFile(path, memory_map=True, page_checksum_verification=True)

    def _column(self, part: int, name: str) -> pa.ChunkedArray:
        with _raise_storage_error(self._path(part)):
            return self._file(part).read(columns=[name]).column(name)

    def _read_row_group(self, part: int, group: int) -> pa.RecordBatch:
        with _raise_storage_error(self._path(part)):
            # A forked process does not have Arrow's threads.
            return _as_batch(
                self._file(part).read_row_group(group, columns=self._columns, use_threads=False)
            )


def as_rows(embeddings: pa.FixedSizeListArray) -> NDArray[np.float32]:
    """Return a column of vectors as a writable matrix, float32, (n, dim)."""
    values = embeddings.flatten().to_numpy()
    # A copy: Arrow's memory is read-only.
    rows: NDArray[np.float32] = values.reshape(-1, embeddings.type.list_size).astype(np.float32)
    return rows


def describe_rows(num_rows: int, *, num_quarantined: int, num_missing: int) -> str:
    """Return a sentence on the rows of a dataset: `997 sequences embedded, 3 in quarantine`."""
    lacking = ((num_quarantined, "in quarantine"), (num_missing, "missing"))
    return ", ".join(
        [
            f"{num_rows:,} sequences embedded",
            *(f"{count:,} {what}" for count, what in lacking if count),
        ]
    )


def read_success(directory: Path) -> dict[str, Any]:
    """Return the content of `_SUCCESS.json` in the directory of a dataset.

    Raises:
        StorageError: It is damaged or has another schema, or a part is missing or has another size.
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
                f"{path} has {size_bytes:,} bytes, and {part['size_bytes']:,} were written; start "
                f"the run again to rebuild the dataset"
            )
    # What earlier versions did, which did not record these fields yet.
    defaults = {
        "num_missing": 0,
        "missing_sha256": _NONE_SHA256,
        "original_lengths_sha256": "",
        "precision": None,
        "store_dtype": StoreDtype.FLOAT32,
        "software": [],
    }
    return defaults | success


def stored_dtype(directory: Path) -> StoreDtype | None:
    """Return the store dtype of a complete dataset with rows; None if there is no such dataset.

    Parts are checked by their sizes only.
    """
    try:
        success = read_success(directory)
    except (StorageError, OSError):
        return None
    has_all = not success["num_missing"] and any(part["rows"] for part in success["parts"])
    return StoreDtype(success["store_dtype"]) if has_all else None


def footer_of(path: Path) -> dict[str, Any]:
    """Return size and sha256 of the footer of a part, for which Parquet has no checksum."""
    with path.open("rb") as file:
        file.seek(-_FOOTER_TAIL_BYTES, os.SEEK_END)
        length = int.from_bytes(file.read(4), "little")
    size_bytes = length + _FOOTER_TAIL_BYTES
    return {"footer_bytes": size_bytes, "footer_sha256": _sha256_of_end(path, size_bytes)}


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
        f"{path}: there is no complete dataset here (no {SUCCESS_NAME}); start the run again with "
        f"the same output directory to resume it"
    )


@contextmanager
def _raise_storage_error(path: Path) -> Iterator[None]:
    """Raise errors of reading a part as StorageError."""
    try:
        yield
    except (OSError, pa.ArrowException) as error:
        raise StorageError(f"{path} is damaged: {error}") from error
