"""HDF5 files that are written through a file of ours, so that a disk that takes no more ends in an error.

HDF5 itself cannot give up a file that it cannot write: it tries again as the process ends, and takes it down with SIGSEGV.
"""

from __future__ import annotations

import io
from collections.abc import Container, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vnp_lib.dataset.formats.base import Rows
from vnp_lib.errors import ConfigError
from vnp_lib.storage import durable_path

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer, WriteableBuffer

_CHUNK_CACHE_BYTES = 4 * 1024**2
_CHUNK_BYTES = 1024**2  # of an HDF5 dataset: what is read to get at one row


class Hdf5File(io.RawIOBase):
    """A file of which h5py believes that every write succeeds. Made by `open_hdf5`."""

    def __init__(self, path: Path) -> None:
        self.root: Any = None  # h5py's File, once it is open
        self._error: OSError | None = None
        self._file = path.open("r+b", buffering=0)

    def require_sound(self) -> None:
        """Raise what the first write that failed raised; to be called now and then, or all is written in vain."""
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
    """Write an HDF5 file over what is at `path`, through `root` of what is yielded.

    Raises:
        OSError: What the system said of the first write that failed, whatever h5py made of it.
    """
    import h5py

    with Hdf5File(path) as file:
        try:
            # Indexed groups, of HDF5 1.8 and later: among a million names each is found at once.
            with h5py.File(
                file, "w", libver=("v108", "v108"), rdcc_nbytes=_CHUNK_CACHE_BYTES
            ) as file.root:
                yield file
        finally:
            file.require_sound()


def write_hdf5(rows: Rows, path: Path, replace: bool) -> None:
    """The datasets `embeddings`, (N, D), chunked, and `sequence_ids`, (N,), strings of any length."""
    with durable_path(path, replace=replace) as temporary, open_hdf5(temporary) as file:
        _describe(file.root, rows)
        embeddings = _create_matrix(file.root, "embeddings", rows)
        sequence_ids = _create_strings(file.root, "sequence_ids", len(rows))
        _fill(file, embeddings, sequence_ids, rows)


def write_hdf5_uniprot(rows: Rows, path: Path, replace: bool) -> None:
    """A dataset for each accession, (D,), or (L, D) where residues have their own, all at the root."""
    with durable_path(path, replace=replace) as temporary, open_hdf5(temporary) as file:
        _describe(file.root, rows)
        for ids, arrays in rows.arrays():
            for sequence_id, array in zip(ids, arrays, strict=True):
                file.root.create_dataset(
                    _key(sequence_id, taken=file.root), data=array, track_times=False
                )
            file.require_sound()


def accession(sequence_id: str) -> str:
    """The accession in an id of UniProt's, `P12345` of `sp|P12345|NAME`; of any other, all of it."""
    database, *rest = sequence_id.split("|")
    return rest[0] if database in ("sp", "tr") and rest and rest[0] else sequence_id


def write_h5ad(rows: Rows, path: Path, replace: bool) -> None:
    """X, (N, D), with the ids as `obs_names` and `dim_0` to `dim_{D-1}` as `var_names`.

    It follows anndata's on-disk format of version 0.1.0 (anndata 0.8 and later): anndata itself would take the whole of X.
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
            f"{sequence_id!r} cannot be a name at the root of an HDF5 file: choose another format"
        )
    if key in taken:
        raise ConfigError(
            f"{sequence_id!r} is not the only sequence with the accession {key!r}, and there is one place for each: choose "
            f"another format"
        )
    return key


def _describe(group: Any, rows: Rows) -> None:
    about = rows.about
    group.attrs.update({"model_name": about.pop("model")} | about)


def _create_matrix(group: Any, name: str, rows: Rows) -> Any:
    rows_per_chunk = max(
        1, min(len(rows), _CHUNK_BYTES // (rows.dim * np.dtype(rows.dtype).itemsize))
    )
    chunks = (
        (rows_per_chunk, rows.dim) if len(rows) else None
    )  # a chunk may not be larger than the whole
    return group.create_dataset(name, (len(rows), rows.dim), rows.dtype, chunks=chunks)


def _create_strings(group: Any, name: str, length: int) -> Any:
    import h5py

    return group.create_dataset(name, (length,), h5py.string_dtype())


def _create_index(group: Any, length: int) -> Any:
    """Make `group` one of anndata's data frames without columns, and return its index."""
    _encode(group, "dataframe", "0.2.0")
    group.attrs.update({"_index": "_index", "column-order": np.array([], dtype=float)})
    return _encode(_create_strings(group, "_index", length), "string-array", "0.2.0")


def _encode(element: Any, kind: str, version: str) -> Any:
    """Say what an element of an AnnData file is."""
    element.attrs.update({"encoding-type": kind, "encoding-version": version})
    return element


def _fill(file: Hdf5File, matrix: Any, names: Any, rows: Rows) -> None:
    start = 0
    for ids, values in rows.batches():
        span = slice(start, start + len(ids))
        matrix[span], names[span] = values, ids
        file.require_sound()
        start = span.stop
