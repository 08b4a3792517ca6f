"""Export to safetensors."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate, chain
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vnp_lib.dataset.formats.base import Rows
from vnp_lib.plan import OutputKind, offsets_of
from vnp_lib.storage import durable_file

_IN_SAFETENSORS = {
    "int64": "I64",
    "int32": "I32",
    "float32": "F32",
    "float16": "F16",
    "uint8": "U8",
}


def write_safetensors(rows: Rows, path: Path, replace: bool) -> None:
    """The tensors `embeddings`, (N, D), `ids`, uint8, all ids in UTF-8 end to end, and `id_offsets`, int64, (N + 1,).

    The ids are tensors since the header, where `__metadata__` is, may have no more than 100 MB and is read as a whole by
    everybody who opens the file.
    """
    _write_safetensors(path, [*_utf8_ids(rows), _matrix(rows)], rows.about, replace)


def write_ragged_safetensors(rows: Rows, path: Path, replace: bool) -> None:
    """The tensors `values`, `offsets` and `lengths`, as `_ragged` has them, and `ids` and `id_offsets` as in other exports."""
    _write_safetensors(path, [*_utf8_ids(rows), *_ragged(rows)], rows.about, replace)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Streamed:
    """An array that is written piece by piece."""

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    pieces: Iterable[NDArray[Any]]  # end to end, they are its values

    @property
    def size_bytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


def _matrix(rows: Rows) -> _Streamed:
    """`embeddings`, (N, D)."""
    pieces = (values for _, values in rows.batches())
    return _Streamed(
        name="embeddings", dtype=np.dtype(rows.dtype), shape=(len(rows), rows.dim), pieces=pieces
    )


def _ragged(rows: Rows) -> list[_Streamed]:
    """`values`, `offsets`, int64 (N + 1,), where those of each sequence begin and end, and `lengths`, int32 (N,), residues.

    `values` has a row for each residue, (R, D), of all sequences; of contacts, which are as wide as they are long, a number
    for each pair of residues, (P,). So `values[offsets[i]:offsets[i + 1]].reshape(lengths[i], -1)` is in shape.
    """
    (output,) = rows.outputs
    is_square = output.kind == OutputKind.CONTACTS
    offsets = offsets_of(rows.lengths.astype(np.int64) ** (2 if is_square else 1))
    width = () if is_square else output.shape(1, rows.dim)[1:]
    values = (array for _, arrays in rows.arrays() for array in arrays)
    return [
        _whole("offsets", offsets),
        _whole("lengths", rows.lengths),
        _Streamed(
            name="values",
            dtype=np.dtype(rows.dtype),
            shape=(int(offsets[-1]), *width),
            pieces=values,
        ),
    ]


def _utf8_ids(rows: Rows) -> list[_Streamed]:
    widths = (len(sequence_id.encode()) for ids in rows.ids() for sequence_id in ids)
    offsets = offsets_of(np.fromiter(widths, dtype=np.int64, count=len(rows)))
    pieces = (np.frombuffer("".join(ids).encode(), dtype=np.uint8) for ids in rows.ids())
    return [
        _whole("id_offsets", offsets),
        _Streamed(name="ids", dtype=np.dtype(np.uint8), shape=(int(offsets[-1]),), pieces=pieces),
    ]


def _whole(name: str, array: NDArray[Any]) -> _Streamed:
    return _Streamed(name=name, dtype=array.dtype, shape=array.shape, pieces=[array])


def _write_safetensors(
    path: Path, tensors: Sequence[_Streamed], about: dict[str, str], replace: bool
) -> None:
    aligned = sorted(
        tensors, key=lambda tensor: -tensor.dtype.itemsize
    )  # the widest first: so they all are
    with durable_file(path, replace=replace) as file:
        file.write(_safetensors_header(aligned, about))
        for tensor in aligned:
            for piece in tensor.pieces:
                file.write(piece.data)


def _safetensors_header(tensors: Sequence[_Streamed], about: dict[str, str]) -> bytes:
    """Of tensors that lie end to end. The length comes first, then JSON, a multiple of 8."""
    ends = list(accumulate(tensor.size_bytes for tensor in tensors))
    fields: dict[str, Any] = {"__metadata__": {"format": "pt"} | about}
    for tensor, start, end in zip(tensors, chain([0], ends), ends, strict=False):
        fields[tensor.name] = {
            "dtype": _IN_SAFETENSORS[tensor.dtype.name],
            "shape": tensor.shape,
            "data_offsets": [start, end],
        }
    text = json.dumps(fields, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
