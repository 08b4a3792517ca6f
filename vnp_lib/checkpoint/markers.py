"""Checkpoint files by name and marker, without reading their content.

The marker of `shard_{rank}/batch_{k:05d}.pt` is `batch_{k:05d}.pt.done`. It holds `size_bytes` and
`sha256` of the file, `rows`, `width` (0 if rows differ in width), `dtype`, and `ordinals` and
`fingerprint` if the checkpoint's metadata has them. This module needs no torch.
"""

from __future__ import annotations

import errno
import logging
import os
import re
import uuid
from array import array
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from vnp_lib.errors import CheckpointError, StorageError
from vnp_lib.storage import (
    digest_stream,
    make_directory,
    marker_path,
    move_file,
    read_marker_arrays,
)

_CHECKPOINT_FILE = re.compile(r"batch_(\d{5}|[1-9]\d{5,})\.pt")
_MARKER_FIELDS = {"size_bytes": int, "sha256": str, "rows": int, "width": int, "dtype": str}

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointRecord:
    """A checkpoint on disk, as its marker describes it."""

    path: Path
    rank: int
    batch_idx: int
    rows: int
    width: int  # 0: rows of different widths
    dtype: str  # "float16", "bfloat16", "float32" or "float64"
    ordinals: np.ndarray[Any, np.dtype[np.int64]]  # (rows,)
    fingerprint: str
    size_bytes: int
    sha256: str


def batch_idx_of(path: Path) -> int:
    """Return the number in a checkpoint's name, such as 12 in `batch_00012.pt`.

    Raises:
        ValueError: It is not the name of a checkpoint.
    """
    match = _CHECKPOINT_FILE.fullmatch(path.name)
    if match is None:
        raise ValueError(f"{path.name!r} is not a checkpoint name such as batch_00012.pt")
    return int(match[1])


def checkpoint_paths(shard_dir: Path) -> list[Path]:
    """Return the checkpoints in a directory by number, including those with only a marker left.

    The directory may be missing.
    """
    if not shard_dir.is_dir():
        return []
    names = {path.name.removesuffix(".done") for path in shard_dir.iterdir()}
    return sorted(
        (shard_dir / name for name in names if _CHECKPOINT_FILE.fullmatch(name)), key=batch_idx_of
    )


def read_record(
    path: Path, rank: int, fingerprint: str, *, verify_digest: bool
) -> CheckpointRecord:
    """Read a checkpoint's marker and check that the file matches it. The content is not parsed.

    Args:
        path: The checkpoint.
        rank: The shard in whose directory it is.
        fingerprint: The run that it has to belong to.
        verify_digest: Compare the file's sha256 too, not only its size.

    Raises:
        CheckpointError: It fails validation. The message gives the reason without the path.
        StorageError: It cannot be read for a reason other than damage.
    """
    with open_checkpoint(path) as file:
        marker = read_checkpoint_marker(path)
        require_fingerprint(marker, fingerprint)
        if verify_digest:
            require_digest(file, marker)
        else:
            _require_size(file, marker)
    if "ordinals" not in marker:
        raise CheckpointError("its marker names no ordinals")
    return CheckpointRecord(
        path=path,
        rank=rank,
        batch_idx=batch_idx_of(path),
        rows=marker["rows"],
        width=marker["width"],
        dtype=marker["dtype"],
        ordinals=parse_ordinals(marker["ordinals"], rows=marker["rows"]),
        fingerprint=fingerprint,
        size_bytes=marker["size_bytes"],
        sha256=marker["sha256"],
    )


def move_to_damaged(path: Path) -> Path:
    """Move a checkpoint and its marker to `damaged/` in the shard's directory."""
    return move_checkpoint(path, to="damaged")


def move_checkpoint(path: Path, *, to: str) -> Path:
    """Move a checkpoint and its marker, whichever exist, to a subdirectory, under a unique name.

    Returns:
        The new path of the checkpoint. The files are kept as evidence; no code reads them again.
    """
    make_directory(path.parent / to)
    target = path.parent / to / f"{path.stem}-{uuid.uuid4().hex[:8]}{path.suffix}"
    # The marker goes first: a file without a marker is unfinished, a marker without its file is
    # damage.
    for source, destination in ((marker_path(path), marker_path(target)), (path, target)):
        # A broken link counts as well: its name has to become free.
        if os.path.lexists(source):
            move_file(source, destination)
    logger.warning("%s is moved to %s", path, target)
    return target


@contextmanager
def open_checkpoint(path: Path) -> Iterator[BinaryIO]:
    """Open a checkpoint for reading; a missing, empty or unreadable file is a CheckpointError."""
    try:
        with path.open("rb") as file:
            if os.fstat(file.fileno()).st_size == 0:
                raise CheckpointError("the file has 0 bytes")
            yield file
    except FileNotFoundError:
        raise CheckpointError("the file is missing") from None
    except OSError as error:
        if error.errno in (errno.EIO, errno.EISDIR):
            raise CheckpointError(f"cannot be read: {error}") from error
        raise StorageError(f"{path} cannot be read: {error}") from error


def read_checkpoint_marker(path: Path) -> dict[str, Any]:
    """Read the marker of a checkpoint and check that it has every field, of the right type."""
    if not marker_path(path).exists():
        raise CheckpointError("missing .done marker: it was never finished")
    try:
        marker = read_marker_arrays(path)
    except StorageError as error:
        raise CheckpointError(str(error)) from error
    for key, kind in _MARKER_FIELDS.items():
        if type(marker.get(key)) is not kind:
            raise CheckpointError(f"its marker has no {key}")
    return marker


def require_fingerprint(marker: dict[str, Any], fingerprint: str | None) -> None:
    """Raise CheckpointError if a marker belongs to another run; None accepts any."""
    if fingerprint is not None and marker.get("fingerprint") != fingerprint:
        raise CheckpointError(
            f"is of the run {marker.get('fingerprint')!r}, and this run is {fingerprint!r}"
        )


def require_digest(file: BinaryIO, marker: dict[str, Any]) -> None:
    """Raise CheckpointError if the size or the sha256 of a file differs from its marker."""
    _require_size(file, marker)
    if digest_stream(file).sha256 != marker["sha256"]:
        raise CheckpointError(
            "its sha256 is not what its marker says: bytes have changed since it was written"
        )


def _require_size(file: BinaryIO, marker: dict[str, Any]) -> None:
    size_bytes = os.fstat(file.fileno()).st_size
    if size_bytes != marker["size_bytes"]:
        raise CheckpointError(
            f"the file has {size_bytes:,} bytes, its marker says {marker['size_bytes']:,}"
        )


def parse_ordinals(values: Any, *, rows: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Validate the ordinals of a checkpoint: a list, or the array that was read from a marker."""
    if not isinstance(values, array):
        if type(values) is not list or not all(
            type(value) is int and 0 <= value < 2**63 for value in values
        ):
            raise CheckpointError("ordinals is no list of whole numbers from 0")
        values = array("q", values)
    ordinals = np.asarray(values)
    if ordinals.size != rows:
        raise CheckpointError(f"shape mismatch: {rows} rows, {ordinals.size} ordinals")
    ascending = np.sort(ordinals)
    if (ascending[1:] == ascending[:-1]).any():
        raise CheckpointError("an ordinal is there twice")
    return ordinals.astype(np.int64)
