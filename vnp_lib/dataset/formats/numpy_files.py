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

from vnp_lib.dataset.formats.base import (
    ExportRows,
    StreamedArray,
    ids_path_of,
    stream_matrix,
    stream_ragged,
)
from vnp_lib.storage import durable_file, fsync_directory, remove_file


def write_npy(rows: ExportRows, path: Path, replace: bool) -> None:
    """Write one matrix, (N, D), and a file with one id per line."""
    ids_path = ids_path_of(path)
    with (
        durable_file(path, replace=replace) as matrix,
        durable_file(ids_path, replace=replace) as lines,
    ):
        _write_npy_header(matrix, (len(rows), rows.dim), rows.dtype)
        for ids, values in rows.batches():
            matrix.write(values.data)
            lines.write("".join(f"{sequence_id}\n" for sequence_id in ids).encode())
        # A matrix must never exist with the ids of another export: the previous one is removed
        # before the new ids are published.
        if replace and path.exists():
            remove_file(path)
            fsync_directory(path.parent)


def write_npz(rows: ExportRows, path: Path, replace: bool) -> None:
    """Write the arrays `ids` and `embeddings`, uncompressed."""
    _write_npz(path, [_fixed_width_ids(rows), stream_matrix(rows)], replace)


def write_ragged_npz(rows: ExportRows, path: Path, replace: bool) -> None:
    """Write the arrays `ids` and those of `stream_ragged`, uncompressed."""
    _write_npz(path, [_fixed_width_ids(rows), *stream_ragged(rows)], replace)


def write_csv(rows: ExportRows, path: Path, replace: bool) -> None:
    """Write the columns `id` and `dim_0` to `dim_{D-1}`, with enough digits for exact values."""
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


def _fixed_width_ids(rows: ExportRows) -> StreamedArray:
    dtype = np.dtype(f"<U{rows.id_width}")
    pieces = (np.array(ids, dtype=dtype) for ids in rows.ids())
    return StreamedArray(name="ids", dtype=dtype, shape=(len(rows),), pieces=pieces)


def _write_npz(path: Path, arrays: Sequence[StreamedArray], replace: bool) -> None:
    with durable_file(path, replace=replace) as file, zipfile.ZipFile(file, "w") as archive:
        for array in arrays:
            with archive.open(f"{array.name}.npy", "w", force_zip64=True) as member:
                _write_npy_header(member, array.shape, array.dtype)
                for piece in array.pieces:
                    member.write(piece.data)
