"""Export to safetensors."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vnp_lib.dataset.formats.base import ExportRows, StreamedArray, stream_matrix, stream_ragged
from vnp_lib.plan import offsets_of
from vnp_lib.storage import durable_file

_DTYPE_NAMES = {
    "int64": "I64",
    "int32": "I32",
    "float32": "F32",
    "float16": "F16",
    "uint8": "U8",
}


def write_safetensors(rows: ExportRows, path: Path, replace: bool) -> None:
    """Write the tensors `embeddings`, (N, D), `ids`, uint8, and `id_offsets`, int64, (N + 1,).

    `ids` are all ids in UTF-8, concatenated. They are tensors because the header, which holds
    `__metadata__`, is limited to 100 MB and read completely by everyone who opens the file.
    """
    _write_tensors(path, [*_utf8_ids(rows), stream_matrix(rows)], rows.about, replace)


def write_ragged_safetensors(rows: ExportRows, path: Path, replace: bool) -> None:
    """Write the tensors of `stream_ragged`, and `ids` and `id_offsets` as for vectors."""
    _write_tensors(path, [*_utf8_ids(rows), *stream_ragged(rows)], rows.about, replace)


def _utf8_ids(rows: ExportRows) -> list[StreamedArray]:
    widths = (len(sequence_id.encode()) for ids in rows.ids() for sequence_id in ids)
    offsets = offsets_of(np.fromiter(widths, dtype=np.int64, count=len(rows)))
    pieces = (np.frombuffer("".join(ids).encode(), dtype=np.uint8) for ids in rows.ids())
    return [
        StreamedArray.of_array("id_offsets", offsets),
        StreamedArray(
            name="ids", dtype=np.dtype(np.uint8), shape=(int(offsets[-1]),), pieces=pieces
        ),
    ]


def _write_tensors(
    path: Path, tensors: Sequence[StreamedArray], about: dict[str, str], replace: bool
) -> None:
    # Tensors of the widest type come first, so that all are aligned.
    aligned = sorted(tensors, key=lambda tensor: -tensor.dtype.itemsize)
    fields: dict[str, Any] = {"__metadata__": {"format": "pt"} | about}
    end = 0
    for tensor in aligned:
        start, end = end, end + tensor.size_bytes
        fields[tensor.name] = {
            "dtype": _DTYPE_NAMES[tensor.dtype.name],
            "shape": tensor.shape,
            "data_offsets": [start, end],
        }
    # The header is its length, then JSON padded to a multiple of 8.
    header = json.dumps(fields, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    with durable_file(path, replace=replace) as file:
        file.write(len(header).to_bytes(8, "little") + header)
        for tensor in aligned:
            for piece in tensor.pieces:
                file.write(piece.data)
