"""What one checkpoint is on disk, and how it proves itself.

A checkpoint is `shard_{rank}/batch_{k:05d}.pt`, a dict of exactly three keys: `embeddings`, a float tensor (rows, D) with a
storage of its own; `sequence_ids`, as many strings; `metadata`, plain values. Rows of different widths lie end to end, (values,),
and the metadata's `offsets`, rows + 1 numbers from 0, says where each begins and ends. Its marker, `batch_{k:05d}.pt.done`, holds
size_bytes and sha256 of the file, rows, width (0 where they differ), dtype, and the metadata's `ordinals` and `fingerprint`
where the metadata has them. The bytes of a checkpoint are a function of its content: no times, no host, no addresses.

What a reader believes, in this order: the marker, the file's size and sha256 by the marker, and only then its content,
read by `torch.load(weights_only=True)` and by nothing else. Other tools save `embeddings` as a NumPy array: that is read too.
"""

from __future__ import annotations

import errno
import logging
import os
import pickle
import re
import struct
import uuid
import zipfile
from array import array
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import IO, Any, BinaryIO, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor

from vnp_lib.checkpoint.archive import check_archive
from vnp_lib.checkpoint.array_pickle import arrays_allowed
from vnp_lib.errors import CheckpointError, NumericalInstabilityError, StorageError
from vnp_lib.formatting import listed
from vnp_lib.storage import (
    FileDigest,
    digest_stream,
    durable_file,
    make_directory,
    marker_path,
    move_file,
    read_marker_arrays,
)

_KEYS = ("embeddings", "sequence_ids", "metadata")
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_CHECKPOINT_FILE = re.compile(r"batch_(\d{5}|[1-9]\d{5,})\.pt")
# What torch.load and zipfile raise for bytes that are no checkpoint, on purpose and by accident.
_NOT_A_CHECKPOINT = (
    *(
        ArithmeticError,
        AssertionError,
        AttributeError,
        EOFError,
        ImportError,
        LookupError,
        MemoryError,
        OSError,
    ),
    *(
        RuntimeError,
        TypeError,
        ValueError,
        pickle.UnpicklingError,
        struct.error,
        zipfile.BadZipFile,
    ),
)

logger = logging.getLogger(__name__)


class CheckpointContent(NamedTuple):
    """A checkpoint in memory, as it is saved."""

    embeddings: Tensor  # (rows, D), or (values,) with `offsets`
    sequence_ids: list[str]
    metadata: dict[str, Any]

    @property
    def width(self) -> int:
        """Values in each row; 0 where rows differ."""
        return self.embeddings.shape[1] if self.embeddings.dim() == 2 else 0

    @property
    def dtype(self) -> str:
        """As the marker has it: "float16", "bfloat16", "float32" or "float64"."""
        return str(self.embeddings.dtype).removeprefix("torch.")

    def marker_fields(self) -> dict[str, Any]:
        """What its marker says of it, beside the file's size and digest."""
        repeated: dict[str, Any] = {
            key: self.metadata[key] for key in ("ordinals", "fingerprint") if key in self.metadata
        }
        return {
            "rows": len(self.sequence_ids),
            "width": self.width,
            "dtype": self.dtype,
            **repeated,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """The content of a checkpoint, as it is used."""

    embeddings: np.ndarray[
        Any, Any
    ]  # (rows, D), or (values,) with `offsets`; bfloat16 comes as float32
    sequence_ids: list[str]
    metadata: dict[str, Any]


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
    """The number in a checkpoint's name: 12 in `batch_00012.pt`. ValueError if it is no such name."""
    match = _CHECKPOINT_FILE.fullmatch(path.name)
    if match is None:
        raise ValueError(f"{path.name!r} is no name of a checkpoint, such as batch_00012.pt")
    return int(match[1])


def checkpoint_paths(shard_dir: Path) -> list[Path]:
    """The checkpoints in a directory by number, also those of which only the marker is there. It may be missing."""
    if not shard_dir.is_dir():
        return []
    names = {path.name.removesuffix(".done") for path in shard_dir.iterdir()}
    return sorted(
        (shard_dir / name for name in names if _CHECKPOINT_FILE.fullmatch(name)), key=batch_idx_of
    )


def load_checkpoint(path: Path, *, fingerprint: str | None) -> Checkpoint:
    """Read a checkpoint that proves itself: by its marker first, then by what is in it.

    Args:
        fingerprint: The run that it has to be of; None takes any.

    Raises:
        CheckpointError: It does not; says why.
        StorageError: It cannot be read for a reason that is not damage.
    """
    try:
        content = read_content(path, fingerprint=fingerprint, may_be_bare=False)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error
    return Checkpoint(
        embeddings=to_numpy(content.embeddings),
        sequence_ids=content.sequence_ids,
        metadata=content.metadata,
    )


def read_content(path: Path, *, fingerprint: str | None, may_be_bare: bool) -> CheckpointContent:
    """Read a checkpoint as `load_checkpoint` does, into a tensor; CheckpointError says only why, not where.

    Args:
        may_be_bare: Take also an empty marker, as `touch` makes it, beside content that names no run and is right in itself.
    """
    with _opened(path) as file:
        marker = None if may_be_bare and _has_bare_marker(path) else _read_marker(path)
        if marker is not None:
            _require_fingerprint(marker, fingerprint)
            _verify_digest(file, marker)
        content = _parse(file, may_be_integers=marker is None)
    if marker is not None:
        _require_agreement(content, marker)
    elif "fingerprint" in content.metadata:
        raise CheckpointError("its marker is empty, though it names its run")
    return content


def read_record(
    path: Path, rank: int, fingerprint: str, *, verify_digest: bool
) -> CheckpointRecord:
    """Read a checkpoint's marker, and see that the file is what it says; its content stays unread.

    Args:
        rank: Of the shard in whose directory it is.
        fingerprint: The run that it has to be of.
        verify_digest: Compare the file's sha256; otherwise only its size.

    Raises:
        CheckpointError: It does not prove itself; says only why, not where.
        StorageError: It cannot be read for a reason that is not damage.
    """
    with _opened(path) as file:
        marker = _read_marker(path)
        _require_fingerprint(marker, fingerprint)
        if verify_digest:
            _verify_digest(file, marker)
        else:
            _verify_size(file, marker)
    if "ordinals" not in marker:
        raise CheckpointError("its marker names no ordinals")
    return CheckpointRecord(
        path=path,
        rank=rank,
        batch_idx=batch_idx_of(path),
        rows=marker["rows"],
        width=marker["width"],
        dtype=marker["dtype"],
        ordinals=_ordinals(marker["ordinals"], rows=marker["rows"]),
        fingerprint=fingerprint,
        size_bytes=marker["size_bytes"],
        sha256=marker["sha256"],
    )


def readable_ids(path: Path) -> list[str]:
    """The ids in a checkpoint that proves nothing, as far as it can be read: what would have to be computed again."""
    try:
        with _opened(path) as file:
            return _parse(file, may_be_integers=True).sequence_ids
    except StorageError:
        return []


def plain_copy(value: Any, name: str = "metadata") -> Any:
    """Copy metadata into the one form in which it is kept, with its keys in order.

    Raises:
        TypeError: It holds something else than str, int, float, bool, None, and lists and dicts of them.
    """
    if value is None or type(value) in (str, int, float, bool):
        return value
    if type(value) is list:
        return [plain_copy(each, name) for each in value]
    if type(value) is dict and all(type(key) is str for key in value):
        return {key: plain_copy(value[key], f"{name}[{key!r}]") for key in sorted(value)}
    raise TypeError(
        f"{name} holds a {type(value).__name__}; only str, int, float, bool, None, lists and dicts are kept"
    )


def require_committable(content: CheckpointContent) -> None:
    """Refuse at the door what no reader would take.

    Raises:
        ValueError: It is no checkpoint; says why.
        NumericalInstabilityError: A row is not finite; names ten at most.
    """
    try:
        _check_content(content)
    except CheckpointError as error:
        raise ValueError(f"this is no checkpoint: {error}") from None
    if not _is_finite(content.embeddings):
        raise NumericalInstabilityError(f"not finite: {listed(_ids_of_bad_rows(content), 10)}")


def save_content(path: Path, content: CheckpointContent) -> FileDigest:
    """Write a checkpoint's file, durably, without its marker: equal content gives equal bytes.

    Raises:
        FileExistsError: Something is there under this name.
        OSError: It cannot be written; nothing is left under this name.
    """
    with durable_file(path) as file:
        torch.save(_canonical(content._asdict(), {}), cast(IO[bytes], file))
    return file.digest


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
    for source, destination in (
        (marker_path(path), marker_path(target)),
        (path, target),
    ):  # never a marker alone
        if os.path.lexists(source):  # also a link to nowhere: its name is not free
            move_file(source, destination)
    logger.warning("%s is moved aside, to %s", path, target)
    return target


def to_numpy(embeddings: Tensor) -> np.ndarray[Any, Any]:
    """The same values as an array; bfloat16, which NumPy lacks, as float32."""
    array: np.ndarray[Any, Any] = (
        embeddings.float() if embeddings.dtype == torch.bfloat16 else embeddings
    ).numpy()
    return array


def tensor_of(array: np.ndarray[Any, Any]) -> Tensor:
    """A copy of an array as a tensor, contiguous, in the machine's byte order."""
    return torch.from_numpy(np.array(array, dtype=array.dtype.newbyteorder("="), order="C"))


def _is_finite(embeddings: Tensor) -> bool:
    # What is not finite shows in the sum, which takes a fiftieth of the time; a sum can also be too large by itself.
    return bool(torch.isfinite(embeddings.sum())) or bool(torch.isfinite(embeddings).all())


def _ids_of_bad_rows(content: CheckpointContent) -> list[str]:
    rows = (
        content.embeddings
        if content.embeddings.dim() == 2
        else content.embeddings.split_with_sizes(np.diff(content.metadata["offsets"]).tolist())
    )
    return [
        id_
        for id_, row in zip(content.sequence_ids, rows, strict=True)
        if not torch.isfinite(row).all()
    ]


def _canonical(value: Any, strings: dict[str, str]) -> Any:
    """Copy `value` so that equal strings are one object: pickle writes an object once and then refers to it.

    The copies are new objects, or a string that torch happens to use itself would be a reference to that.
    """
    if isinstance(value, str):
        return strings.setdefault(
            value, value.encode("utf-8", "surrogatepass").decode("utf-8", "surrogatepass")
        )
    if isinstance(value, list):
        return [_canonical(each, strings) for each in value]
    if isinstance(value, dict):
        return {_canonical(key, strings): _canonical(each, strings) for key, each in value.items()}
    if isinstance(value, Tensor):
        return value if value.untyped_storage().nbytes() == value.nbytes else value.clone()
    return value


@contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
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


def _has_bare_marker(path: Path) -> bool:
    marker = marker_path(path)
    return marker.exists() and marker.stat().st_size == 0


def _read_marker(path: Path) -> dict[str, Any]:
    if not marker_path(path).exists():
        raise CheckpointError("missing .done marker: it was never finished")
    try:
        marker = read_marker_arrays(path)
    except StorageError as error:
        raise CheckpointError(str(error)) from error
    for key, kind in (
        ("size_bytes", int),
        ("sha256", str),
        ("rows", int),
        ("width", int),
        ("dtype", str),
    ):
        if type(marker.get(key)) is not kind:
            raise CheckpointError(f"its marker has no {key}")
    return marker


def _require_fingerprint(marker: dict[str, Any], fingerprint: str | None) -> None:
    if fingerprint is not None and marker.get("fingerprint") != fingerprint:
        raise CheckpointError(
            f"is of the run {marker.get('fingerprint')!r}, and this run is {fingerprint!r}"
        )


def _verify_size(file: BinaryIO, marker: dict[str, Any]) -> None:
    size_bytes = os.fstat(file.fileno()).st_size
    if size_bytes != marker["size_bytes"]:
        raise CheckpointError(
            f"the file has {size_bytes:,} bytes, its marker says {marker['size_bytes']:,}"
        )


def _verify_digest(file: BinaryIO, marker: dict[str, Any]) -> None:
    _verify_size(file, marker)
    if digest_stream(file).sha256 != marker["sha256"]:
        raise CheckpointError(
            "its sha256 is not what its marker says: bytes have changed since it was written"
        )


def _parse(file: BinaryIO, *, may_be_integers: bool) -> CheckpointContent:
    size_bytes = os.fstat(file.fileno()).st_size
    try:
        holds_array = check_archive(file, size_bytes)
        file.seek(0)
        with arrays_allowed() if holds_array else nullcontext():
            loaded = torch.load(file, map_location="cpu", weights_only=True)
    except _NOT_A_CHECKPOINT as error:
        raise CheckpointError(f"failed to load: {error}") from error
    content = _as_content(loaded)
    _check_content(content, max_bytes=size_bytes, may_be_integers=may_be_integers)
    if not _is_finite(content.embeddings):
        raise CheckpointError("it holds values that are not finite")
    return content


def _as_content(loaded: Any) -> CheckpointContent:
    if type(loaded) is not dict:
        raise CheckpointError(f"it holds a {type(loaded).__name__}, not a dict")
    if missing := [key for key in _KEYS if key not in loaded]:
        raise CheckpointError(f"missing required keys: {', '.join(missing)}")
    if len(loaded) > len(_KEYS):
        raise CheckpointError(
            f"unknown key: {', '.join(repr(key) for key in loaded if key not in _KEYS)}"
        )
    if isinstance(loaded["embeddings"], np.ndarray):
        loaded["embeddings"] = tensor_of(loaded["embeddings"])
    return CheckpointContent(**loaded)


def _check_content(
    content: CheckpointContent, *, max_bytes: int | None = None, may_be_integers: bool = False
) -> None:
    """What holds for every checkpoint, when it is written and when it is read."""
    embeddings, sequence_ids, metadata = content
    if (
        type(embeddings) is not Tensor
        or embeddings.layout != torch.strided
        or embeddings.device.type != "cpu"
    ):
        raise CheckpointError("embeddings is no plain tensor on the CPU")
    is_integer = embeddings.dtype in (torch.int64, torch.int32)
    if embeddings.dtype not in _DTYPES and not (may_be_integers and is_integer):
        raise CheckpointError(f"embeddings is {content.dtype}; it must be a floating type")
    is_end_to_end = embeddings.dim() == 1 and type(metadata) is dict and "offsets" in metadata
    if (embeddings.dim() != 2 and not is_end_to_end) or embeddings.numel() == 0:
        raise CheckpointError(
            f"shape mismatch: embeddings is {tuple(embeddings.shape)}; it must be (rows, width)"
        )
    if not embeddings.is_contiguous() or (max_bytes is not None and embeddings.nbytes > max_bytes):
        raise CheckpointError("embeddings claims more than the file holds")
    if type(sequence_ids) is not list or not all(isinstance(id_, str) for id_ in sequence_ids):
        raise CheckpointError("sequence_ids is no list of strings")
    rows = (
        _num_rows(metadata["offsets"], embeddings.numel()) if is_end_to_end else embeddings.shape[0]
    )
    if len(sequence_ids) != rows:
        raise CheckpointError(f"shape mismatch: {rows} rows, {len(sequence_ids)} sequence_ids")
    if type(metadata) is not dict:
        raise CheckpointError("metadata is no dict")
    if "ordinals" in metadata:
        _ordinals(metadata["ordinals"], rows=len(sequence_ids))
    if type(metadata.get("fingerprint", "")) is not str:
        raise CheckpointError("fingerprint is no string")


def _num_rows(offsets: Any, num_values: int) -> int:
    """How many rows lie end to end in so many values."""
    if type(offsets) is not list or not all(type(value) is int for value in offsets):
        raise CheckpointError("offsets is no list of whole numbers")
    ascends = all(start < stop for start, stop in pairwise(offsets))
    if offsets[:1] != [0] or offsets[-1] != num_values or not ascends:
        raise CheckpointError(
            f"shape mismatch: offsets does not ascend from 0 to {num_values}, the number of values"
        )
    return len(offsets) - 1


def _ordinals(values: Any, *, rows: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Validate ordinals: a list, or an array of a marker's, which holds whole numbers from 0."""
    if not isinstance(values, array):
        if type(values) is not list or not all(
            type(value) is int and 0 <= value < 2**63 for value in values
        ):
            raise CheckpointError("ordinals is no list of whole numbers from 0")
        values = array("q", values)
    ordinals = np.asarray(values)
    if ordinals.size != rows:
        raise CheckpointError(f"shape mismatch: {rows} rows, {ordinals.size} ordinals")
    in_order = np.sort(ordinals)
    if (in_order[1:] == in_order[:-1]).any():
        raise CheckpointError("an ordinal is there twice")
    return ordinals.astype(np.int64)


def _require_agreement(content: CheckpointContent, marker: dict[str, Any]) -> None:
    for key, value in content.marker_fields().items():
        said = marker.get(key)
        if (said.tolist() if isinstance(said, array) else said) != value:
            raise CheckpointError(f"its {key} is not what its marker says")
