"""The content of a checkpoint file: save it, load it safely, and validate it.

A checkpoint is `shard_{rank}/batch_{k:05d}.pt`, a dict of exactly three keys: `embeddings`, a float
tensor (rows, D) with a storage of its own; `sequence_ids`, one string per row; `metadata`, plain
values. Rows of different widths lie end to end, (values,), and the metadata's `offsets`, rows + 1
numbers from 0, gives where each begins and ends. The bytes of a checkpoint are a function of its
content: they hold no time, no host name and no address.

A reader trusts, in this order: the marker, the file's size and sha256 by the marker, and only then
the content, read by `torch.load(weights_only=True)` and by nothing else. Other tools save
`embeddings` as a NumPy array; that is read too.
"""

from __future__ import annotations

import os
import pickle
import struct
import zipfile
from array import array
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import IO, Any, BinaryIO, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor

from vnp_lib.checkpoint.archive import check_archive
from vnp_lib.checkpoint.array_pickle import arrays_allowed
from vnp_lib.checkpoint.markers import (
    open_checkpoint,
    parse_ordinals,
    read_checkpoint_marker,
    require_digest,
    require_fingerprint,
)
from vnp_lib.errors import CheckpointError, NumericalInstabilityError, StorageError
from vnp_lib.storage import FileDigest, durable_file, marker_path

_KEYS = ("embeddings", "sequence_ids", "metadata")
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# What torch.load and zipfile raise, on purpose or by accident, for bytes that are no checkpoint.
_LOAD_ERRORS = (
    *(ArithmeticError, AssertionError, AttributeError, EOFError, ImportError, LookupError),
    *(MemoryError, OSError, RuntimeError, TypeError, ValueError),
    *(pickle.UnpicklingError, struct.error, zipfile.BadZipFile),
)


class CheckpointContent(NamedTuple):
    """A checkpoint in memory, as it is saved."""

    embeddings: Tensor  # (rows, D), or (values,) with `offsets`
    sequence_ids: list[str]
    metadata: dict[str, Any]

    @property
    def width(self) -> int:
        """Values per row; 0 if rows differ."""
        return self.embeddings.shape[1] if self.embeddings.dim() == 2 else 0

    @property
    def is_ragged(self) -> bool:
        """True if rows of different widths lie end to end."""
        return (
            self.embeddings.dim() == 1
            and type(self.metadata) is dict
            and "offsets" in self.metadata
        )

    @property
    def dtype(self) -> str:
        """Name in the marker: "float16", "bfloat16", "float32" or "float64"."""
        return str(self.embeddings.dtype).removeprefix("torch.")

    def marker_fields(self) -> dict[str, Any]:
        """Return the fields of its marker, besides the file's size and digest."""
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
    """The content of a checkpoint, as its readers use it."""

    # (rows, D), or (values,) with `offsets` in the metadata; bfloat16 is converted to float32.
    embeddings: np.ndarray[Any, Any]
    sequence_ids: list[str]
    metadata: dict[str, Any]


def load_checkpoint(path: Path, *, fingerprint: str | None) -> Checkpoint:
    """Read a checkpoint, validating its marker first and then its content.

    Args:
        path: The checkpoint.
        fingerprint: The run that it has to belong to; None accepts any.

    Raises:
        CheckpointError: It fails validation; the message gives the reason.
        StorageError: It cannot be read for a reason other than damage.
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
    """Read a checkpoint as `load_checkpoint` does, with the embeddings as a tensor.

    Args:
        path: The checkpoint. It is not named in the message of a CheckpointError.
        fingerprint: The run that it has to belong to; None accepts any.
        may_be_bare: Accept an empty marker, as `touch` creates it, if the content is valid and
            names no run.
    """
    with open_checkpoint(path) as file:
        has_bare_marker = marker_path(path).exists() and marker_path(path).stat().st_size == 0
        marker = None if may_be_bare and has_bare_marker else read_checkpoint_marker(path)
        if marker is not None:
            require_fingerprint(marker, fingerprint)
            require_digest(file, marker)
        content = _parse(file, may_be_integers=marker is None)
    if marker is not None:
        _require_agreement(content, marker)
    elif "fingerprint" in content.metadata:
        raise CheckpointError("its marker is empty, though it names its run")
    return content


def readable_ids(path: Path) -> list[str]:
    """Return the ids in a checkpoint that failed validation, or none if it cannot be parsed."""
    try:
        with open_checkpoint(path) as file:
            return _parse(file, may_be_integers=True).sequence_ids
    except StorageError:
        return []


def plain_copy(value: Any, name: str = "metadata") -> Any:
    """Copy metadata into its canonical form, with sorted keys.

    Raises:
        TypeError: It holds anything but str, int, float, bool, None, and lists and dicts of them.
    """
    if value is None or type(value) in (str, int, float, bool):
        return value
    if type(value) is list:
        return [plain_copy(each, name) for each in value]
    if type(value) is dict and all(type(key) is str for key in value):
        return {key: plain_copy(value[key], f"{name}[{key!r}]") for key in sorted(value)}
    raise TypeError(
        f"{name} holds a {type(value).__name__}; "
        f"only str, int, float, bool, None, lists and dicts are kept"
    )


def require_committable(content: CheckpointContent) -> None:
    """Raise if no reader would accept this content.

    Raises:
        ValueError: It is not a valid checkpoint; the message gives the reason.
        NumericalInstabilityError: A row is not finite; the message names ten of them at most.
    """
    try:
        _check_content(content)
    except CheckpointError as error:
        raise ValueError(f"this is no checkpoint: {error}") from None
    if _is_finite(content.embeddings):
        return
    rows = (
        content.embeddings
        if content.embeddings.dim() == 2
        else content.embeddings.split_with_sizes(np.diff(content.metadata["offsets"]).tolist())
    )
    bad_ids = [
        id_
        for id_, row in zip(content.sequence_ids, rows, strict=True)
        if not torch.isfinite(row).all()
    ]
    raise NumericalInstabilityError(f"not finite: {', '.join(bad_ids[:10])}")


def save_content(path: Path, content: CheckpointContent) -> FileDigest:
    """Write a checkpoint's file durably, without its marker. Equal content gives equal bytes.

    Raises:
        FileExistsError: A file of this name exists.
        OSError: It cannot be written; no file of this name is left.
    """
    with durable_file(path) as file:
        torch.save(_canonical(content._asdict(), {}), cast(IO[bytes], file))
    return file.digest


def to_numpy(embeddings: Tensor) -> np.ndarray[Any, Any]:
    """Convert a tensor to an array; bfloat16, which NumPy lacks, becomes float32."""
    array: np.ndarray[Any, Any] = (
        embeddings.float() if embeddings.dtype == torch.bfloat16 else embeddings
    ).numpy()
    return array


def tensor_of(array: np.ndarray[Any, Any]) -> Tensor:
    """Copy an array into a contiguous tensor, in the machine's byte order."""
    return torch.from_numpy(np.array(array, dtype=array.dtype.newbyteorder("="), order="C"))


def _is_finite(embeddings: Tensor) -> bool:
    # A value that is not finite shows in the sum, which takes a fiftieth of the time. But the sum
    # of finite values can overflow too.
    return bool(torch.isfinite(embeddings.sum())) or bool(torch.isfinite(embeddings).all())


def _canonical(value: Any, strings: dict[str, str]) -> Any:
    """Copy `value` so that equal strings are one object, and the pickle depends on values only.

    Pickle writes an object once and then refers to it.
    """
    if isinstance(value, str):
        # A new object: a string that torch happens to use itself would become a reference to that.
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


def _parse(file: BinaryIO, *, may_be_integers: bool) -> CheckpointContent:
    size_bytes = os.fstat(file.fileno()).st_size
    try:
        holds_array = check_archive(file, size_bytes)
        file.seek(0)
        with arrays_allowed() if holds_array else nullcontext():
            loaded = torch.load(file, map_location="cpu", weights_only=True)
    except _LOAD_ERRORS as error:
        raise CheckpointError(f"failed to load: {error}") from error
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
    content = CheckpointContent(**loaded)
    _check_content(content, max_bytes=size_bytes, may_be_integers=may_be_integers)
    if not _is_finite(content.embeddings):
        raise CheckpointError("it holds values that are not finite")
    return content


def _check_content(
    content: CheckpointContent, *, max_bytes: int | None = None, may_be_integers: bool = False
) -> None:
    """Check what holds for every checkpoint, when it is written and when it is read."""
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
    if (embeddings.dim() != 2 and not content.is_ragged) or embeddings.numel() == 0:
        raise CheckpointError(
            f"shape mismatch: embeddings is {tuple(embeddings.shape)}; it must be (rows, width)"
        )
    if not embeddings.is_contiguous() or (max_bytes is not None and embeddings.nbytes > max_bytes):
        raise CheckpointError("embeddings claims more than the file holds")
    if type(sequence_ids) is not list or not all(isinstance(id_, str) for id_ in sequence_ids):
        raise CheckpointError("sequence_ids is no list of strings")
    rows = (
        _num_rows(metadata["offsets"], embeddings.numel())
        if content.is_ragged
        else embeddings.shape[0]
    )
    if len(sequence_ids) != rows:
        raise CheckpointError(f"shape mismatch: {rows} rows, {len(sequence_ids)} sequence_ids")
    if type(metadata) is not dict:
        raise CheckpointError("metadata is no dict")
    if "ordinals" in metadata:
        parse_ordinals(metadata["ordinals"], rows=rows)
    if type(metadata.get("fingerprint", "")) is not str:
        raise CheckpointError("fingerprint is no string")


def _num_rows(offsets: Any, num_values: int) -> int:
    """Validate offsets, and return the number of rows that lie end to end."""
    if type(offsets) is not list or not all(type(value) is int for value in offsets):
        raise CheckpointError("offsets is no list of whole numbers")
    ascends = all(start < stop for start, stop in pairwise(offsets))
    if offsets[:1] != [0] or offsets[-1] != num_values or not ascends:
        raise CheckpointError(
            f"shape mismatch: offsets does not ascend from 0 to {num_values}, the number of values"
        )
    return len(offsets) - 1


def _require_agreement(content: CheckpointContent, marker: dict[str, Any]) -> None:
    for key, value in content.marker_fields().items():
        recorded = marker.get(key)
        if (recorded.tolist() if isinstance(recorded, array) else recorded) != value:
            raise CheckpointError(f"its {key} is not what its marker says")
