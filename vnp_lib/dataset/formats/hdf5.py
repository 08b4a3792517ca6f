"""Export to HDF5 and AnnData, with an error instead of a crash if the disk is full.

HDF5 cannot abandon a file that it cannot write: it tries again when the process exits, and crashes
it with SIGSEGV. h5py therefore writes through a Python file object, which hides errors from HDF5.
"""

from __future__ import annotations

import io
from collections.abc import Container, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vnp_lib.dataset.formats.base import ExportRows
from vnp_lib.errors import ConfigError
from vnp_lib.storage import durable_path

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer, WriteableBuffer

_CHUNK_CACHE_BYTES = 4 * 1024**2
# The part of an HDF5 dataset that is read for one row.
_CHUNK_BYTES = 1024**2


class Hdf5File(io.RawIOBase):
    """A file whose writes always succeed for h5py. Created by `open_hdf5`."""

    def __init__(self, path: Path) -> None:
        # The h5py.File, once it is open.
        self.root: Any = None
        self._error: OSError | None = None
        self._file = path.open("r+b", buffering=0)

    def raise_write_error(self) -> None:
        """Raise the error of the first failed write, if any. Later data are discarded."""
        if self._error is not None:
            raise self._error

    def write(self, data: ReadableBuffer, /) -> int:
        view = memoryview(data).cast("B")
        size_bytes = len(view)
        try:
            while view and self._error is None:
                view = view[self._file.write(view) :]
        except OSError as error:
            self._error = error
        return size_bytes

    def truncate(self, size: int | None = None, /) -> int:
        try:
            return self._file.truncate(size)
        except OSError as error:
            self._error = self._error or error
            return size or 0

    def readinto(self, buffer: WriteableBuffer, /) -> int:
        return self._file.readinto(buffer)

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()

    def readable(self) -> bool:
        return True

    def writable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def close(self) -> None:
        self._file.close()
        super().close()


@contextmanager
def open_hdf5(path: Path) -> Iterator[Hdf5File]:
    """Overwrite the file at `path` with an HDF5 file, whose root group is `root`.

    Raises:
        OSError: The error of the first failed write, whatever h5py raised.
    """
    import h5py

    with Hdf5File(path) as file:
        try:
            # Groups of HDF5 1.8 and later are indexed, which a million names require.
            with h5py.File(
                file, "w", libver=("v108", "v108"), rdcc_nbytes=_CHUNK_CACHE_BYTES
            ) as file.root:
                yield file
        finally:
            file.raise_write_error()


def write_hdf5(rows: ExportRows, path: Path, replace: bool) -> None:
    """Write the datasets `embeddings`, (N, D), chunked, and `sequence_ids`, (N,), strings."""
    with durable_path(path, replace=replace) as temporary, open_hdf5(temporary) as file:
        _describe(file.root, rows)
        embeddings = _create_matrix(file.root, "embeddings", rows)
        sequence_ids = _create_strings(file.root, "sequence_ids", len(rows))
        _fill(file, embeddings, sequence_ids, rows)


def write_hdf5_uniprot(rows: ExportRows, path: Path, replace: bool) -> None:
    """Write a dataset per accession, (D,), or (L, D) for per-residue outputs, in the root group."""
    with durable_path(path, replace=replace) as temporary, open_hdf5(temporary) as file:
        _describe(file.root, rows)
        for ids, arrays in rows.arrays():
            for sequence_id, array in zip(ids, arrays, strict=True):
                file.root.create_dataset(
                    _key(sequence_id, taken=file.root), data=array, track_times=False
                )
            file.raise_write_error()


def accession(sequence_id: str) -> str:
    """Return the accession of a UniProt id, `P12345` of `sp|P12345|NAME`, or another id itself."""
    database, *rest = sequence_id.split("|")
    return rest[0] if database in ("sp", "tr") and rest and rest[0] else sequence_id


def write_h5ad(rows: ExportRows, path: Path, replace: bool) -> None:
    """Write X, (N, D), with the ids as `obs_names` and `dim_0` to `dim_{D-1}` as `var_names`.

    The format is version 0.1.0 of anndata's on-disk format (anndata 0.8 and later). anndata itself
    would need all of X in memory.
    """
    with durable_path(path, replace=replace) as temporary, open_hdf5(temporary) as file:
        _encode(file.root, "anndata", "0.1.0")
        matrix = _encode(_create_matrix(file.root, "X", rows), "array", "0.2.0")
        names = _create_index(file.root.create_group("obs"), len(rows))
        dimensions = _create_index(file.root.create_group("var"), rows.dim)
        dimensions[:] = [f"dim_{number}" for number in range(rows.dim)]
        for group in ("layers", "obsm", "obsp", "uns", "varm", "varp"):
            _encode(file.root.create_group(group), "dict", "0.1.0")
        _fill(file, matrix, names, rows)


def _key(sequence_id: str, *, taken: Container[str]) -> str:
    key = accession(sequence_id)
    if "/" in key or key == ".":
        raise ConfigError(
            f"{sequence_id!r} cannot be a name in the root group of an HDF5 file: choose another "
            f"format"
        )
    if key in taken:
        raise ConfigError(
            f"{sequence_id!r} is not the only sequence with the accession {key!r}, which must be "
            f"unique: choose another format"
        )
    return key


def _describe(group: Any, rows: ExportRows) -> None:
    about = rows.about
    group.attrs.update({"model_name": about.pop("model")} | about)


def _create_matrix(group: Any, name: str, rows: ExportRows) -> Any:
    rows_per_chunk = max(
        1, min(len(rows), _CHUNK_BYTES // (rows.dim * np.dtype(rows.dtype).itemsize))
    )
    # A chunk must not be larger than the dataset.
    chunks = (rows_per_chunk, rows.dim) if len(rows) else None
    return group.create_dataset(name, (len(rows), rows.dim), rows.dtype, chunks=chunks)


def _create_strings(group: Any, name: str, length: int) -> Any:
    import h5py

    return group.create_dataset(name, (length,), h5py.string_dtype())


def _create_index(group: Any, length: int) -> Any:
    """Make `group` an AnnData data frame without columns, and return its index."""
    _encode(group, "dataframe", "0.2.0")
    group.attrs.update({"_index": "_index", "column-order": np.array([], dtype=float)})
    return _encode(_create_strings(group, "_index", length), "string-array", "0.2.0")


def _encode(element: Any, kind: str, version: str) -> Any:
    """Set the encoding of an element of an AnnData file, and return it."""
    element.attrs.update({"encoding-type": kind, "encoding-version": version})
    return element


def _fill(file: Hdf5File, matrix: Any, names: Any, rows: ExportRows) -> None:
    start = 0
    for ids, values in rows.batches():
        span = slice(start, start + len(ids))
        matrix[span], names[span] = values, ids
        file.raise_write_error()
        start = span.stop
