"""Outputs as columns of a Parquet file: a vector of fixed size each, or a list whose shape follows from the sequence's length."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from vnp_lib.plan import Output, RowLayout, StoreDtype, Values, offsets_of


def column_names(layout: RowLayout) -> list[str]:
    """A column for each output, by its name; the one mean of a run that computes nothing else is `embedding`."""
    return ["embedding"] if layout.is_one_mean else list(layout.names)


def fields_of(layout: RowLayout, dtype: StoreDtype, *, is_large: bool) -> list[pa.Field]:
    """The columns' fields.

    Args:
        layout: The outputs.
        dtype: In which precision they are stored.
        is_large: Whether 2^31 values and more can come together in a part, too many for a list's offsets in 32 bits.
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
    """The columns, in the precision of the rows, (n, W) or end to end, of sequences of `lengths` residues, (n,)."""
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
        values = _gathered(rows, starts, widths) if len(layout.outputs) > 1 else rows
        if output.is_fixed:
            columns.append(_as_list(values, output, layout.embed_dim))
        else:
            columns.append(
                _as_ragged_list(values, widths, output, layout.embed_dim, is_large=is_large)
            )
        starts = starts + widths
    return columns


def values_at(column: pa.Array, row: int) -> NDArray[np.float32]:
    """The values of one row of a column, flat, in float32 however they are stored; they are the caller's own."""
    values: NDArray[np.float32] = (
        column[row].values.to_numpy().astype(np.float32)
    )  # a copy: Arrow's memory is read-only
    return values


def _type(output: Output, embed_dim: int, dtype: np.dtype[Any], *, is_large: bool) -> pa.DataType:
    value = pa.field(
        "element", pa.from_numpy_dtype(dtype), nullable=False
    )  # nulls would make reading half as fast
    if output.is_fixed:
        return pa.list_(value, embed_dim)
    return pa.large_list(value) if is_large else pa.list_(value)


def _as_list(values: Values, output: Output, embed_dim: int) -> pa.Array:
    type_ = _type(output, embed_dim, values.dtype, is_large=False)
    return pa.FixedSizeListArray.from_arrays(pa.array(values), type=type_)


def _as_ragged_list(
    values: Values, widths: NDArray[np.int64], output: Output, embed_dim: int, *, is_large: bool
) -> pa.Array:
    kind, offset = (pa.LargeListArray, pa.int64()) if is_large else (pa.ListArray, pa.int32())
    offsets = pa.array(offsets_of(widths), type=offset)
    return kind.from_arrays(
        offsets, pa.array(values), type=_type(output, embed_dim, values.dtype, is_large=is_large)
    )


def _gathered(rows: Values, starts: NDArray[np.int64], widths: NDArray[np.int64]) -> Values:
    pieces = (rows[start:stop] for start, stop in zip(starts, starts + widths, strict=True))
    return np.concatenate([rows[:0], *pieces])
