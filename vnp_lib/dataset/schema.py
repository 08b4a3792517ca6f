"""The Parquet columns of outputs: vectors of fixed size, or lists in the shape of the sequence."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from vnp_lib.plan import Output, RowLayout, StoreDtype, Values, offsets_of


def column_names(layout: RowLayout) -> list[str]:
    """Return the names of the columns: `embedding` for one mean, else those of the outputs."""
    return ["embedding"] if layout.is_one_mean else list(layout.names)


def fields_of(layout: RowLayout, dtype: StoreDtype, *, is_large: bool) -> list[pa.Field]:
    """Return the fields of the columns.

    Args:
        layout: The outputs.
        dtype: The precision of the stored values.
        is_large: Whether a part may have 2^31 values or more, too many for 32-bit list offsets.
    """
    types = [
        _type(output, layout.embed_dim, np.dtype(dtype), is_large=is_large)
        for output in layout.outputs
    ]
    return [
        pa.field(name, type_, nullable=False)
        for name, type_ in zip(column_names(layout), types, strict=True)
    ]


def columns_of(
    layout: RowLayout, rows: Values, lengths: NDArray[np.int32], *, is_large: bool
) -> list[pa.Array]:
    """Return the columns of rows, in the precision of the rows.

    Args:
        layout: The outputs.
        rows: (n, W), or concatenated, (V,).
        lengths: Residues per sequence, (n,).
        is_large: As for `fields_of`.
    """
    if layout.is_fixed:
        by_output = np.split(rows, len(layout.outputs), axis=1)
        return [
            _as_list(np.ascontiguousarray(values).ravel(), output, layout.embed_dim)
            for output, values in zip(layout.outputs, by_output, strict=True)
        ]
    columns = []
    starts = offsets_of(layout.widths(lengths))[:-1]
    for output in layout.outputs:
        widths = output.widths(lengths, layout.embed_dim)
        stops = starts + widths
        values = rows
        if len(layout.outputs) > 1:
            pieces = (rows[start:stop] for start, stop in zip(starts, stops, strict=True))
            values = np.concatenate([rows[:0], *pieces])
        if output.is_fixed:
            columns.append(_as_list(values, output, layout.embed_dim))
        else:
            kind, offset = (
                (pa.LargeListArray, pa.int64()) if is_large else (pa.ListArray, pa.int32())
            )
            offsets = pa.array(offsets_of(widths), type=offset)
            type_ = _type(output, layout.embed_dim, values.dtype, is_large=is_large)
            columns.append(kind.from_arrays(offsets, pa.array(values), type=type_))
        starts = stops
    return columns


def values_at(column: pa.Array, row: int) -> NDArray[np.float32]:
    """Return the values of one row of a column, flat, writable, in float32."""
    # A copy: Arrow's memory is read-only.
    values: NDArray[np.float32] = column[row].values.to_numpy().astype(np.float32)
    return values


def _type(output: Output, embed_dim: int, dtype: np.dtype[Any], *, is_large: bool) -> pa.DataType:
    # Nullable values halve the speed of reading.
    value = pa.field("element", pa.from_numpy_dtype(dtype), nullable=False)
    if output.is_fixed:
        return pa.list_(value, embed_dim)
    return pa.large_list(value) if is_large else pa.list_(value)


def _as_list(values: Values, output: Output, embed_dim: int) -> pa.Array:
    type_ = _type(output, embed_dim, values.dtype, is_large=False)
    return pa.FixedSizeListArray.from_arrays(pa.array(values), type=type_)
