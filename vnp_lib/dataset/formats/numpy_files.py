"""Export to .npy, .npz and CSV."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import IO

import numpy as np
import pyarrow as pa
import pyarrow.csv
from numpy.typing import DTypeLike

from vnp_lib.dataset.formats.base import Rows, ids_beside
from vnp_lib.dataset.formats.safetensors import _matrix, _ragged, _Streamed
from vnp_lib.storage import durable_file, fsync_directory, remove_file


def write_npy(rows: Rows, path: Path, replace: bool) -> None:
    """One matrix, (N, D), and beside it the ids, a line each. The matrix is never there without its own ids."""
    ids_path = ids_beside(path)
    with (
        durable_file(path, replace=replace) as matrix,
        durable_file(ids_path, replace=replace) as lines,
    ):
        _write_npy_header(matrix, (len(rows), rows.dim), rows.dtype)
        for ids, values in rows.batches():
            matrix.write(values.data)
            lines.write("".join(f"{sequence_id}\n" for sequence_id in ids).encode())
        if replace and path.exists():
            remove_file(path)
            fsync_directory(path.parent)


def write_npz(rows: Rows, path: Path, replace: bool) -> None:
    """The arrays `ids` and `embeddings`, uncompressed."""
    _write_npz(path, [_fixed_width_ids(rows), _matrix(rows)], replace)


def write_ragged_npz(rows: Rows, path: Path, replace: bool) -> None:
    """The arrays `ids`, `values`, `offsets` and `lengths`, uncompressed, as `_ragged` has them."""
    _write_npz(path, [_fixed_width_ids(rows), *_ragged(rows)], replace)


def write_csv(rows: Rows, path: Path, replace: bool) -> None:
    """The columns `id` and `dim_0` to `dim_{D-1}`, in as many digits as it takes to read the same numbers back."""
    names = ["id", *(f"dim_{number}" for number in range(rows.dim))]
    schema = pa.schema([(name, pa.string() if name == "id" else pa.float32()) for name in names])
    with durable_file(path, replace=replace) as file, pyarrow.csv.CSVWriter(file, schema) as writer:
        for ids, values in rows.batches():
            columns = np.ascontiguousarray(values.T, dtype=np.float32)
            writer.write_batch(
                pa.record_batch([pa.array(ids), *map(pa.array, columns)], schema=schema)
            )


def _write_npy_header(
    file: IO[bytes] | io.RawIOBase, shape: tuple[int, ...], dtype: DTypeLike
) -> None:
    described = {
        "descr": np.dtype(dtype).newbyteorder("<").str,
        "fortran_order": False,
        "shape": shape,
    }
    np.lib.format.write_array_header_1_0(file, described)


def _fixed_width_ids(rows: Rows) -> _Streamed:
    dtype = np.dtype(f"<U{rows.id_width}")
    pieces = (np.array(ids, dtype=dtype) for ids in rows.ids())
    return _Streamed(name="ids", dtype=dtype, shape=(len(rows),), pieces=pieces)


def _write_npz(path: Path, arrays: Sequence[_Streamed], replace: bool) -> None:
    with durable_file(path, replace=replace) as file, zipfile.ZipFile(file, "w") as archive:
        for array in arrays:
            with archive.open(f"{array.name}.npy", "w", force_zip64=True) as member:
                _write_npy_header(member, array.shape, array.dtype)
                for piece in array.pieces:
                    member.write(piece.data)
