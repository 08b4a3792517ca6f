"""Checkpoints: when to write one, how it is written so that it proves itself, and what is believed on the way back.

A checkpoint is `shard_{rank}/batch_{k:05d}.pt`, a dict of exactly three keys: `embeddings`, a float tensor (rows, D) with a
storage of its own; `sequence_ids`, as many strings; `metadata`, plain values. Rows of different widths lie end to end, (values,),
and the metadata's `offsets`, rows + 1 numbers from 0, says where each begins and ends. Its marker, `batch_{k:05d}.pt.done`, holds
size_bytes and sha256 of the file, rows, width (0 where they differ), dtype, and the metadata's `ordinals` and `fingerprint`
where the metadata has them. The bytes of a checkpoint are a function of its content: no times, no host, no addresses.

What a reader believes, in this order: the marker, the file's size and sha256 by the marker, and only then its content,
read by `torch.load(weights_only=True)` and by nothing else.
"""

from __future__ import annotations

import errno
import logging
import os
import pickle
import pickletools
import re
import struct
import threading
import time
import uuid
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import IO, Any, BinaryIO, Literal, NamedTuple, Self, TypeVar, cast

import numpy as np
import torch
from torch import Tensor

from vnp_lib.config import viral_checkpoint_mode
from vnp_lib.failures import (
    CheckpointError,
    CheckpointWriteError,
    FingerprintMismatchError,
    NumericalInstabilityError,
    StorageError,
    StorageFailingError,
)
from vnp_lib.files import (
    FileDigest,
    digest_stream,
    durable_file,
    fsync_directory,
    make_directory,
    marker_path,
    move_file,
    read_marker,
    write_marker,
)
from vnp_lib.manifest import CheckpointManifest

DEFAULT_SEQ_THRESHOLD = 10_000
DEFAULT_TIME_THRESHOLD_S = 300.0
VIRAL_SEQ_THRESHOLD = 5_000
VIRAL_TIME_THRESHOLD_S = 180.0

MAX_IN_FLIGHT = 2
MAX_IN_FLIGHT_BYTES = 256 * 1024**2
DISK_FULL_DELAYS_S = (1.0, 5.0, 15.0, 30.0)

_KEYS = ("embeddings", "sequence_ids", "metadata")
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
_SHARD_DIRECTORY = re.compile(r"shard_(0|[1-9]\d*)")
_CHECKPOINT_FILE = re.compile(r"batch_(\d{5}|[1-9]\d{5,})\.pt")
# What torch.load and zipfile raise for bytes that are no checkpoint, on purpose and by accident.
_NOT_A_CHECKPOINT = (
    *(ArithmeticError, AssertionError, AttributeError, EOFError, ImportError, LookupError, MemoryError, OSError),
    *(RuntimeError, TypeError, ValueError, pickle.UnpicklingError, struct.error, zipfile.BadZipFile),
)
# What torch.save makes of a checkpoint. A pickle of no more than this builds plain values and one tensor, in memory for
# a hundred times its size at the very most: torch itself would also take `bytearray(10**11)`.
_OPCODES = re.compile(
    r"PROTO|STOP|MARK|GLOBAL|REDUCE|BINPERSID|NONE|NEWTRUE|NEWFALSE|BININT[12]?|LONG1|BINFLOAT|BINUNICODE|(LONG_)?BIN(PUT|GET)|"
    r"EMPTY_(DICT|LIST|TUPLE)|TUPLE[123]?|APPENDS?|SETITEMS?"
)
_GLOBALS = re.compile(
    r"torch\._utils _rebuild_tensor_v2|collections OrderedDict|torch (Half|BFloat16|Float|Double|Int|Long)Storage"
)
_MAX_CALLS = 2  # of _rebuild_tensor_v2, and of OrderedDict for its hooks
_MAX_TUPLES = 16  # a tuple of twice the tuple before, and so on, takes for ever to hash

logger = logging.getLogger(__name__)

T = TypeVar("T")


class CheckpointTrigger:
    """When to write a checkpoint: after so many sequences or so much time since the last.

    With `VIRNUCPRO_VIRAL_CHECKPOINT_MODE` set, thresholds left at their defaults become 5,000 sequences and 180 s.
    """

    def __init__(
        self,
        seq_threshold: int = DEFAULT_SEQ_THRESHOLD,
        time_threshold_sec: float = DEFAULT_TIME_THRESHOLD_S,
        emergency_override_sec: float = 600.0,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if viral_checkpoint_mode():
            seq_threshold = VIRAL_SEQ_THRESHOLD if seq_threshold == DEFAULT_SEQ_THRESHOLD else seq_threshold
            if time_threshold_sec == DEFAULT_TIME_THRESHOLD_S:
                time_threshold_sec = VIRAL_TIME_THRESHOLD_S
        if not seq_threshold > 0:
            raise ValueError(f"seq_threshold is {seq_threshold}; it must be positive")
        if not time_threshold_sec > 0:
            raise ValueError(f"time_threshold_sec is {time_threshold_sec}; it must be positive")
        if not emergency_override_sec > time_threshold_sec:
            raise ValueError(
                f"emergency_override_sec is {emergency_override_sec}; "
                f"it must be above time_threshold_sec, {time_threshold_sec}"
            )
        self.seq_threshold = seq_threshold
        self.time_threshold_sec = time_threshold_sec
        self.emergency_override_sec = emergency_override_sec
        self._clock = clock
        self.reset()

    def should_checkpoint(self, batch_size: int) -> tuple[bool, str | None]:
        """Count a batch of `batch_size` sequences and say whether a checkpoint is due, and why."""
        self._sequences += batch_size
        elapsed_s = self._clock() - self._since_s
        if elapsed_s >= self.emergency_override_sec:
            return True, "emergency_time_override"
        if self._sequences >= self.seq_threshold:
            return True, "sequence_threshold"
        if elapsed_s >= self.time_threshold_sec:
            return True, "time_threshold"
        return False, None

    def reset(self) -> None:
        """Start counting anew: a checkpoint has been handed over."""
        self._sequences = 0
        self._since_s = self._clock()


class AsyncCheckpointWriter:
    """Writes checkpoints on a thread of its own, while the caller computes on.

    A checkpoint is committed in this order: the file, its marker, both durable; the manifest; then its future resolves. At
    most two checkpoints and 256 MB are in flight (or one, however large): more make the caller wait. An error is raised
    once more by whatever is called next, so that nobody calls a shard complete that is not. Used as a context manager it
    waits for all writes at the end of the block.
    """

    def __init__(
        self,
        max_workers: int = 1,
        manifest: CheckpointManifest | None = None,
        rank: int | None = None,
        *,
        disk_full_delays_s: Sequence[float] = DISK_FULL_DELAYS_S,
        sleep: Callable[[float], None] = time.sleep,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Start nothing yet.

        Args:
            max_workers: Threads that write.
            manifest: Where to record what has been committed; wants `rank`.
            rank: The shard whose checkpoints these are.
            disk_full_delays_s: How long to wait before each new try when the disk is full.
        """
        if manifest is not None and rank is None:
            raise ValueError("rank is None: a manifest records checkpoints by shard")
        self._manifest = manifest
        self._rank = rank
        self._disk_full_delays_s = tuple(disk_full_delays_s)
        self._sleep = sleep
        self._clock = clock
        self._executor = ThreadPoolExecutor(max_workers, thread_name_prefix="checkpoint-writer")
        self._in_flight = _InFlight(max_checkpoints=MAX_IN_FLIGHT, max_bytes=MAX_IN_FLIGHT_BYTES)
        self._futures: list[Future[float]] = []
        self._are_failures_told = False

    def write_checkpoint_async(
        self,
        checkpoint_path: Path,
        embeddings: Tensor | np.ndarray[Any, Any],
        sequence_ids: Sequence[str],
        metadata: dict[str, Any],
    ) -> Future[float]:
        """Take a copy of what is given and write it in the background; waits while too much is in flight.

        Args:
            checkpoint_path: Where it is to be; its directory is made. A file of that name without a valid marker, which
                a crash left, is moved aside.
            embeddings: (rows, D), at least one row, float16, bfloat16, float32 or float64, on any device; or rows of different
                widths end to end, with `offsets` in the metadata.
            sequence_ids: One for each row.
            metadata: str, int, float, bool, None, and lists and dicts of them. `ordinals` (one int for each row) and
                `fingerprint` (str) go into the marker too.

        Returns:
            Resolves when the checkpoint is committed, to the seconds that writing it took.

        Raises:
            CheckpointWriteError: An earlier checkpoint could not be written.
            TypeError, ValueError: What was given is no checkpoint. Nothing has been written.
            NumericalInstabilityError: A row is not finite.
        """
        _require_array(embeddings)

        def begin() -> Future[float]:
            content = _Content(_snapshot(embeddings), list(sequence_ids), _plain_copy(metadata))
            _require_committable(content)
            return self._executor.submit(self._write_checkpoint_sync, Path(checkpoint_path), *content)

        return self._begun(begin, int(embeddings.nbytes))

    def hand_over(
        self, checkpoint_path: Path, pieces: Sequence[Tensor], sequence_ids: list[str], metadata: dict[str, Any]
    ) -> Future[float]:
        """Write what the caller gives away, and changes no more: it is put together, copied and checked in the background.

        Args:
            pieces: (rows, D) each, or (values,), on the CPU; together they are the checkpoint's rows.

        As `write_checkpoint_async` otherwise, except that what is no checkpoint, or not finite, is its future's error.
        """
        size_bytes = sum(piece.nbytes for piece in pieces)
        return self._begun(
            lambda: self._executor.submit(self._write_pieces, Path(checkpoint_path), pieces, sequence_ids, metadata),
            size_bytes,
        )

    def _begun(self, begin: Callable[[], Future[float]], size_bytes: int) -> Future[float]:
        """Begin to write, once there is room for it."""
        self._in_flight.enter(size_bytes)
        try:
            self._raise_failures()
            future = begin()
        except BaseException:
            self._in_flight.leave(size_bytes)
            raise
        future.add_done_callback(lambda _: self._in_flight.leave(size_bytes))
        self._futures = [*(each for each in self._futures if not each.done() or _failure_of(each)), future]
        return future

    def wait_all(self, timeout: float | None = None) -> None:
        """Wait until all is committed.

        Args:
            timeout: Seconds; None waits as long as it takes.

        Raises:
            CheckpointWriteError: A RuntimeError too. Some could not be written; says which and why.
            TimeoutError: Some are still being written; they go on.
        """
        unfinished = wait(self._futures, timeout).not_done
        if unfinished:
            raise TimeoutError(f"{len(unfinished)} checkpoints are still being written after {timeout} s")
        self._raise_failures()

    def has_pending(self) -> bool:
        """Whether anything is still being written."""
        return any(not future.done() for future in self._futures)

    def shutdown(self) -> None:
        """Wait until all is written and end the thread. Raises CheckpointWriteError if nobody has heard of a failure."""
        self._executor.shutdown(wait=True)
        if not self._are_failures_told:
            self._raise_failures()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, error_type: type[BaseException] | None, *_: object) -> None:
        if error_type is None:
            self.shutdown()
        else:
            self._executor.shutdown(wait=True)

    def _raise_failures(self) -> None:
        failures = [error for future in self._futures if future.done() and (error := _failure_of(future))]
        if failures:
            self._are_failures_told = True
            told = "; ".join(str(failure) for failure in failures)
            raise CheckpointWriteError(f"{len(failures)} checkpoints could not be written: {told}") from failures[0]

    def _write_pieces(
        self, checkpoint_path: Path, pieces: Sequence[Tensor], sequence_ids: list[str], metadata: dict[str, Any]
    ) -> float:
        content = _Content(torch.cat(list(pieces)), sequence_ids, _plain_copy(metadata))
        _require_committable(content)
        return self._write_checkpoint_sync(checkpoint_path, *content)

    def _write_checkpoint_sync(
        self, checkpoint_path: Path, embeddings: Tensor, sequence_ids: list[str], metadata: dict[str, Any]
    ) -> float:
        started_at_s = self._clock()
        path = checkpoint_path
        content = _Content(embeddings, sequence_ids, metadata)
        self._persist(path, lambda: make_directory(path.parent))
        self._persist(path, lambda: _make_way(path))
        digest = self._persist(path, lambda: _save(path, content))
        self._persist(path, lambda: write_marker(path, digest, **_marker_fields(content)))
        self._record(path, rows=len(sequence_ids))
        return self._clock() - started_at_s

    def _persist(self, path: Path, act: Callable[[], T]) -> T:
        """Do `act`; again after a while where the disk is full, and once more after an I/O error, on a new file."""
        delays_s = iter(self._disk_full_delays_s)
        may_rewrite = True
        while True:
            try:
                return act()
            except FileExistsError as error:
                raise StorageError(
                    f"{path}: another writer has just written it; is a second run using this directory?"
                ) from error
            except OSError as error:
                if error.errno in _DISK_FULL and (delay_s := next(delays_s, None)) is not None:
                    logger.warning("%s: %s; trying again in %g s", path, error, delay_s)
                    self._sleep(delay_s)
                elif error.errno == errno.EIO and may_rewrite:
                    logger.warning("%s: %s; writing it once more, to a new file", path, error)
                    may_rewrite = False
                else:
                    raise StorageError(_what_to_do(path, error)) from error

    def _record(self, path: Path, *, rows: int) -> None:
        if self._manifest is None or self._rank is None:
            return
        try:
            self._manifest.update_shard_checkpoint(self._rank, batch_idx_of(path), rows, path.name)
        except (StorageError, OSError) as error:  # the checkpoint is committed, and the manifest can be made from it
            logger.warning("%s is committed, but the manifest does not know it yet: %s", path, error)


class ResumedRows(NamedTuple):
    """What the checkpoints of one shard hold."""

    ids: list[str]
    embeddings: np.ndarray[Any, Any] | None  # (len(ids), D) or end to end, in the order of the ids; bfloat16 as float32
    resume_batch_idx: int  # the number of the next checkpoint
    corrupted_ids: list[str]  # what unused checkpoints say they held; all that is not in `ids` is to be computed


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


@dataclass(frozen=True, slots=True, kw_only=True)
class Damage:
    """A checkpoint that cannot be used."""

    path: Path  # of the .pt, which itself may be missing
    reason: str
    is_unfinished: bool  # without a marker: its writer was stopped, the disk has lost nothing


@dataclass(frozen=True, slots=True, kw_only=True)
class Survey:
    """All checkpoints of a run, in order of shard and number."""

    valid: tuple[CheckpointRecord, ...]
    damaged: tuple[Damage, ...]

    def done_mask(self, num_sequences: int) -> np.ndarray[Any, np.dtype[np.bool_]]:
        """Which of a run's ordinals are in valid checkpoints, bool (num_sequences,)."""
        is_done = np.zeros(num_sequences, dtype=bool)
        for record in self.valid:
            is_done[record.ordinals[record.ordinals < num_sequences]] = True  # assembly refuses what has others
        return is_done

    def require_sound_storage(self) -> None:
        """Raise StorageFailingError where more than 3 checkpoints and more than 1 % were finished and are damaged now."""
        lost = [damage for damage in self.damaged if not damage.is_unfinished]
        _require_sound_storage(lost, total=len(self.valid) + len(lost))


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """The content of a checkpoint."""

    embeddings: np.ndarray[Any, Any]  # (rows, D), or (values,) with `offsets`; bfloat16 comes as float32
    sequence_ids: list[str]
    metadata: dict[str, Any]


def survey_checkpoints(
    checkpoints_dir: Path, fingerprint: str, *, verify_digests: bool, rank: int | None = None
) -> Survey:
    """Read all markers under `checkpoints_dir`, or one shard's, and judge the checkpoints by them. Moves nothing.

    What is found is synced: a writer killed between publishing and syncing a name leaves one that a power cut could undo.

    Args:
        checkpoints_dir: Has a `shard_{rank}` for each shard, of this run's number of shards or another. May be missing.
        fingerprint: A checkpoint of another run counts as damaged.
        verify_digests: Read every file and compare its sha256; otherwise only its size.
        rank: Of the one shard to look at.

    Raises:
        StorageError: A file cannot be read for a reason that is not damage (permission, too many open files).
    """
    surveys = [
        _survey_shard(shard_dir, each, fingerprint, verify_digests=verify_digests)
        for each, shard_dir in _shard_directories(checkpoints_dir)
        if rank in (None, each)
    ]
    return Survey(
        valid=tuple(record for survey in surveys for record in survey.valid),
        damaged=tuple(damage for survey in surveys for damage in survey.damaged),
    )


def heal_shard(checkpoints_dir: Path, rank: int, fingerprint: str) -> int:
    """Read one shard's checkpoints whole, move the damaged ones aside, and return the number of the next one.

    Only for who holds the shard's lock: another's checkpoint between its file and its marker looks damaged.

    Raises:
        StorageFailingError: So many are damaged that the storage is failing. Nothing has been moved.
    """
    survey = _survey_shard(checkpoints_dir / f"shard_{rank}", rank, fingerprint, verify_digests=True)
    survey.require_sound_storage()
    for damage in survey.damaged:
        logger.warning("%s cannot be used: %s", damage.path, damage.reason)
        set_aside(damage.path)
    return survey.valid[-1].batch_idx + 1 if survey.valid else 0


def load_checkpoint(path: Path, *, fingerprint: str | None) -> Checkpoint:
    """Read a checkpoint that proves itself: by its marker first, then by what is in it.

    Args:
        fingerprint: The run that it has to be of; None takes any.

    Raises:
        CheckpointError: It does not; says why.
        StorageError: It cannot be read for a reason that is not damage.
    """
    try:
        content = _read(path, fingerprint=fingerprint, may_be_bare=False)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error
    return Checkpoint(
        embeddings=_to_numpy(content.embeddings), sequence_ids=content.sequence_ids, metadata=content.metadata
    )


def validate_checkpoint_pt(path: Path) -> tuple[bool, str]:
    """Say whether a checkpoint can be used, and if not, why.

    An empty marker, as `touch` makes it, proves nothing; it is let pass beside a checkpoint that names no run, as other
    tools leave them, when its content is right in itself.
    """
    try:
        _read(Path(path), fingerprint=None, may_be_bare=True)
    except StorageError as error:
        return False, str(error)
    return True, ""


def resume_from_checkpoints(
    checkpoint_dir: Path,
    rank: int,
    force_restart: bool = False,
    manifest: CheckpointManifest | None = None,
    *,
    on_damage: Literal["stop", "skip"] = "stop",
    fingerprint: str | None = None,
) -> ResumedRows:
    """Load the checkpoints of one shard, in order, all at once.

    What is not used is moved aside, so that its number and its rows are free to be written again: damaged checkpoints to
    `damaged/`, good ones that come after them or before a forced restart to `superseded/`, in the shard's directory.

    Args:
        checkpoint_dir: Holds `shard_{rank}`.
        force_restart: Use none.
        manifest: Its counts for this shard are set from what is used.
        on_damage: "stop" uses what comes before the first damaged checkpoint; "skip" uses all but the damaged ones.
        fingerprint: The run that they have to be of; None takes any.

    Raises:
        FingerprintMismatchError: They are of another run. Nothing has been moved.
        StorageFailingError: With "skip", more than 3 and more than 1 % are damaged: the storage is failing. Nothing has been moved.
    """
    shard_dir = Path(checkpoint_dir) / f"shard_{rank}"
    paths = _checkpoint_paths(shard_dir)
    usable, damaged = ([], []) if force_restart else _usable_checkpoints(paths, fingerprint, on_damage)
    if on_damage == "skip":
        _require_sound_storage([each for each in damaged if not each.is_unfinished], total=len(paths))
    used = {path for path, _ in usable}
    unused = [path for path in paths if path not in used]
    corrupted_ids = [] if force_restart else [id_ for path in unused for id_ in _readable_ids(path)]
    damaged_paths = {each.path for each in damaged}
    for path in unused:
        set_aside(path, under="damaged" if path in damaged_paths else "superseded")
    if manifest is not None:
        _reconcile(manifest, rank, usable)
    return ResumedRows(
        ids=[id_ for _, content in usable for id_ in content.sequence_ids],
        embeddings=_to_numpy(torch.cat([content.embeddings for _, content in usable])) if usable else None,
        resume_batch_idx=_next_batch_idx([path for path, _ in usable] if on_damage == "stop" else paths),
        corrupted_ids=corrupted_ids,
    )


def set_aside(path: Path, *, under: str = "damaged") -> Path:
    """Move a checkpoint and its marker, whichever are there, to a directory beside it, under a name that is not taken.

    Returns:
        Where the checkpoint is now: evidence, which nothing here reads again.
    """
    make_directory(path.parent / under)
    target = path.parent / under / f"{path.stem}-{uuid.uuid4().hex[:8]}{path.suffix}"
    for source, destination in ((marker_path(path), marker_path(target)), (path, target)):  # never a marker alone
        if os.path.lexists(source):  # also a link to nowhere: its name is not free
            move_file(source, destination)
    logger.warning("%s is moved aside, to %s", path, target)
    return target


def batch_idx_of(path: Path) -> int:
    """The number in a checkpoint's name: 12 in `batch_00012.pt`. ValueError if it is no such name."""
    match = _CHECKPOINT_FILE.fullmatch(path.name)
    if match is None:
        raise ValueError(f"{path.name!r} is no name of a checkpoint, such as batch_00012.pt")
    return int(match[1])


class _Content(NamedTuple):
    """A checkpoint in memory, as it is saved."""

    embeddings: Tensor
    sequence_ids: list[str]
    metadata: dict[str, Any]


class _Committed(NamedTuple):
    path: Path
    rank: int
    batch_idx: int
    rows: int


class _InFlight:
    """How much is being written: `enter` waits for room, and one checkpoint always has room when there is no other."""

    def __init__(self, *, max_checkpoints: int, max_bytes: int) -> None:
        self._max_checkpoints = max_checkpoints
        self._max_bytes = max_bytes
        self._checkpoints = 0
        self._bytes = 0
        self._changed = threading.Condition()

    def enter(self, size_bytes: int) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._has_room(size_bytes))
            self._checkpoints += 1
            self._bytes += size_bytes

    def leave(self, size_bytes: int) -> None:
        with self._changed:
            self._checkpoints -= 1
            self._bytes -= size_bytes
            self._changed.notify_all()

    def _has_room(self, size_bytes: int) -> bool:
        if self._checkpoints == 0:
            return True
        return self._checkpoints < self._max_checkpoints and self._bytes + size_bytes <= self._max_bytes


def _require_array(embeddings: object) -> None:
    if not isinstance(embeddings, Tensor | np.ndarray):
        raise TypeError(f"embeddings is a {type(embeddings).__name__}; it must be a tensor or a NumPy array")


def _snapshot(embeddings: Tensor | np.ndarray[Any, Any]) -> Tensor:
    if isinstance(embeddings, Tensor):
        return embeddings.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
    return torch.from_numpy(np.array(embeddings, dtype=embeddings.dtype.newbyteorder("="), order="C"))


def _plain_copy(value: Any, name: str = "metadata") -> Any:
    if value is None or type(value) in (str, int, float, bool):
        return value
    if type(value) is list:
        return [_plain_copy(each, name) for each in value]
    if type(value) is dict and all(type(key) is str for key in value):
        return {key: _plain_copy(value[key], f"{name}[{key!r}]") for key in sorted(value)}
    raise TypeError(
        f"{name} holds a {type(value).__name__}; only str, int, float, bool, None, lists and dicts are kept"
    )


def _require_committable(content: _Content) -> None:
    try:
        _check_content(content)
    except CheckpointError as error:
        raise ValueError(f"this is no checkpoint: {error}") from None
    if not _is_finite(content.embeddings):
        raise NumericalInstabilityError(f"not finite: {', '.join(_ids_of_bad_rows(content)[:10])}")


def _is_finite(embeddings: Tensor) -> bool:
    # What is not finite shows in the sum, which takes a fiftieth of the time; a sum can also be too large by itself.
    return bool(torch.isfinite(embeddings.sum())) or bool(torch.isfinite(embeddings).all())


def _ids_of_bad_rows(content: _Content) -> list[str]:
    rows = (
        content.embeddings
        if content.embeddings.dim() == 2
        else content.embeddings.split_with_sizes(np.diff(content.metadata["offsets"]).tolist())
    )
    return [id_ for id_, row in zip(content.sequence_ids, rows, strict=True) if not torch.isfinite(row).all()]


def _make_way(path: Path) -> None:
    """Move aside what a crash has left under this name; a checkpoint that proves itself is somebody's work."""
    if not os.path.lexists(path) and not os.path.lexists(marker_path(path)):
        return
    try:
        _read(path, fingerprint=None, may_be_bare=True)
    except CheckpointError as error:
        logger.warning("%s cannot be used: %s", path, error)
        set_aside(path)
    else:
        raise FileExistsError(errno.EEXIST, "a valid checkpoint is there", str(path))


def _save(path: Path, content: _Content) -> FileDigest:
    with durable_file(path) as file:
        torch.save(_canonical(content._asdict(), {}), cast(IO[bytes], file))
    return file.digest


def _canonical(value: Any, strings: dict[str, str]) -> Any:
    """Copy `value` so that equal strings are one object: pickle writes an object once and then refers to it.

    The copies are new objects, or a string that torch happens to use itself would be a reference to that.
    """
    if isinstance(value, str):
        return strings.setdefault(value, value.encode("utf-8", "surrogatepass").decode("utf-8", "surrogatepass"))
    if isinstance(value, list):
        return [_canonical(each, strings) for each in value]
    if isinstance(value, dict):
        return {_canonical(key, strings): _canonical(each, strings) for key, each in value.items()}
    if isinstance(value, Tensor):
        return value if value.untyped_storage().nbytes() == value.nbytes else value.clone()
    return value


def _marker_fields(content: _Content) -> dict[str, Any]:
    repeated: dict[str, Any] = {
        key: content.metadata[key] for key in ("ordinals", "fingerprint") if key in content.metadata
    }
    return {
        "rows": len(content.sequence_ids),
        "width": _width(content.embeddings),
        "dtype": _dtype_name(content.embeddings),
        **repeated,
    }


def _width(embeddings: Tensor) -> int:
    return embeddings.shape[1] if embeddings.dim() == 2 else 0


def _what_to_do(path: Path, error: OSError) -> str:
    if error.errno in _DISK_FULL:
        return (
            f"{path}: the disk is full or the quota reached ({error}): make room and start the same run again; "
            f"all that has been committed stays valid"
        )
    return f"{path}: {error}: see to the storage and start the same run again; all that has been committed stays valid"


def _failure_of(future: Future[float]) -> BaseException | None:
    return CancelledError("cancelled before it was written") if future.cancelled() else future.exception()


def _shard_directories(checkpoints_dir: Path) -> list[tuple[int, Path]]:
    if not checkpoints_dir.is_dir():
        return []
    found = [(match, path) for path in checkpoints_dir.iterdir() if (match := _SHARD_DIRECTORY.fullmatch(path.name))]
    return sorted((int(match[1]), path) for match, path in found if path.is_dir())


def _checkpoint_paths(shard_dir: Path) -> list[Path]:
    """Checkpoints by number, also those of which only the marker is there."""
    if not shard_dir.is_dir():
        return []
    names = {path.name.removesuffix(".done") for path in shard_dir.iterdir()}
    return sorted((shard_dir / name for name in names if _CHECKPOINT_FILE.fullmatch(name)), key=batch_idx_of)


def _survey_shard(shard_dir: Path, rank: int, fingerprint: str, *, verify_digests: bool) -> Survey:
    paths = _checkpoint_paths(shard_dir)
    if paths:
        _sync_names(shard_dir)
    valid: list[CheckpointRecord] = []
    damaged: list[Damage] = []
    for path in paths:
        try:
            valid.append(_survey_one(path, rank, fingerprint, verify_digest=verify_digests))
        except CheckpointError as error:
            damaged.append(_damage(path, error))
    return Survey(valid=tuple(valid), damaged=tuple(damaged))


def _sync_names(shard_dir: Path) -> None:
    try:
        fsync_directory(shard_dir)
    except OSError as error:
        if error.errno != errno.EROFS:  # what cannot be written to is looked at as it is
            raise StorageError(f"{shard_dir} cannot be synced: {error}") from error


def _damage(path: Path, error: CheckpointError) -> Damage:
    return Damage(path=path, reason=str(error), is_unfinished=not marker_path(path).exists())


def _survey_one(path: Path, rank: int, fingerprint: str, *, verify_digest: bool) -> CheckpointRecord:
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


def _usable_checkpoints(
    paths: list[Path], fingerprint: str | None, on_damage: Literal["stop", "skip"]
) -> tuple[list[tuple[Path, _Content]], list[Damage]]:
    usable: list[tuple[Path, _Content]] = []
    damaged: list[Damage] = []
    for path in paths:
        try:
            content = _read(path, fingerprint=None, may_be_bare=True)
            _require_alike(content, usable[0][1] if usable else content)
        except CheckpointError as error:
            damaged.append(_damage(path, error))
            logger.warning("%s cannot be used: %s", path, error)
            if on_damage == "stop":
                break
        else:
            _require_same_run(path, content, fingerprint)
            usable.append((path, content))
    return usable, damaged


def _require_alike(content: _Content, first: _Content) -> None:
    ours, theirs = content.embeddings, first.embeddings
    if (_width(ours), ours.dtype) != (_width(theirs), theirs.dtype):
        raise CheckpointError(
            f"rows of {_width(ours)} {_dtype_name(ours)}; those before it have {_width(theirs)} {_dtype_name(theirs)}"
        )


def _require_same_run(path: Path, content: _Content, fingerprint: str | None) -> None:
    found = content.metadata.get("fingerprint")
    if fingerprint is not None and found != fingerprint:
        raise FingerprintMismatchError(
            f"{path} is of the run {found!r}, and this run is {fingerprint!r}: choose another directory, or force a restart"
        )


def _require_sound_storage(lost: Sequence[Damage], *, total: int) -> None:
    if len(lost) > 3 and len(lost) * 100 > total:
        reasons = "; ".join(f"{each.path}: {each.reason}" for each in lost[:3])
        raise StorageFailingError(
            f"{len(lost)} of {total} checkpoints are damaged: the storage is failing. See to it before anything is computed "
            f"again; the first are: {reasons}"
        )


def _readable_ids(path: Path) -> list[str]:
    try:
        with _opened(path) as file:
            return _parse(file, may_be_integers=True).sequence_ids
    except StorageError:
        return []


def _reconcile(manifest: CheckpointManifest, rank: int, usable: Sequence[tuple[Path, _Content]]) -> None:
    records = [
        _Committed(path=path, rank=rank, batch_idx=batch_idx_of(path), rows=len(content.sequence_ids))
        for path, content in usable
    ]
    try:
        manifest.reconcile(records, rank=rank)
    except (StorageError, OSError) as error:
        logger.warning("the manifest does not know which checkpoints of shard %d are used: %s", rank, error)


def _next_batch_idx(paths: Sequence[Path]) -> int:
    return batch_idx_of(paths[-1]) + 1 if paths else 0


def _read(path: Path, *, fingerprint: str | None, may_be_bare: bool) -> _Content:
    """The content of a checkpoint that proves itself; CheckpointError says only why, not where."""
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
        marker = read_marker(path)
    except StorageError as error:
        raise CheckpointError(str(error)) from error
    for key, kind in (("size_bytes", int), ("sha256", str), ("rows", int), ("width", int), ("dtype", str)):
        if type(marker.get(key)) is not kind:
            raise CheckpointError(f"its marker has no {key}")
    return marker


def _require_fingerprint(marker: dict[str, Any], fingerprint: str | None) -> None:
    if fingerprint is not None and marker.get("fingerprint") != fingerprint:
        raise CheckpointError(f"is of the run {marker.get('fingerprint')!r}, and this run is {fingerprint!r}")


def _verify_size(file: BinaryIO, marker: dict[str, Any]) -> None:
    size_bytes = os.fstat(file.fileno()).st_size
    if size_bytes != marker["size_bytes"]:
        raise CheckpointError(f"the file has {size_bytes:,} bytes, its marker says {marker['size_bytes']:,}")


def _verify_digest(file: BinaryIO, marker: dict[str, Any]) -> None:
    _verify_size(file, marker)
    if digest_stream(file).sha256 != marker["sha256"]:
        raise CheckpointError("its sha256 is not what its marker says: bytes have changed since it was written")


def _parse(file: BinaryIO, *, may_be_integers: bool) -> _Content:
    size_bytes = os.fstat(file.fileno()).st_size
    try:
        _check_archive(file, size_bytes)
        file.seek(0)
        loaded = torch.load(file, map_location="cpu", weights_only=True)
    except _NOT_A_CHECKPOINT as error:
        raise CheckpointError(f"failed to load: {error}") from error
    content = _as_content(loaded)
    _check_content(content, max_bytes=size_bytes, may_be_integers=may_be_integers)
    if not _is_finite(content.embeddings):
        raise CheckpointError("it holds values that are not finite")
    return content


def _check_archive(file: BinaryIO, size_bytes: int) -> None:
    """Refuse what torch.load could make more of than the file holds; ValueError says why."""
    _require_plain_directory(file, size_bytes)
    with zipfile.ZipFile(file) as archive:
        members = archive.infolist()
        if any(member.compress_type != zipfile.ZIP_STORED for member in members):
            raise ValueError("a member of the archive is compressed")
        if sum(member.file_size for member in members) > size_bytes:
            raise ValueError("the members of the archive claim more than the file holds")
        names = {member.filename.casefold() for member in members}
        if len(names) < len(members):
            raise ValueError("two members of the archive have one name")
        if any(name.endswith("/constants.pkl") for name in names):
            raise ValueError("it is a program (TorchScript)")
        _check_pickle(archive.read(members[0].filename.split("/")[0] + "/data.pkl"))


def _require_plain_directory(file: BinaryIO, size_bytes: int) -> None:
    """The archive starts where the file does and its directory ends it: torch and zipfile then see the same members."""
    file.seek(max(0, size_bytes - 98))
    tail = file.read().rjust(98, b"\0")
    directory64, locator, end = tail[:56], tail[56:76], tail[76:]
    if end[:4] != b"PK\5\6":
        raise ValueError("it is no zip archive, or is followed by other bytes")
    length, start, stop = *struct.unpack("<II", end[12:20]), size_bytes - len(end)
    if locator[:4] == b"PK\6\7":
        length, start, stop = *struct.unpack("<QQ", directory64[40:]), size_bytes - len(tail)
        if directory64[:4] != b"PK\6\6" or struct.unpack("<Q", locator[8:16])[0] != stop:
            raise ValueError("the directory of the archive is not where it says")
    if start + length != stop:
        raise ValueError("the directory of the archive is not where it says")


def _check_pickle(data: bytes) -> None:
    counts: Counter[str] = Counter()
    for opcode, argument, _ in pickletools.genops(data):
        counts[opcode.name] += 1
        if not _OPCODES.fullmatch(opcode.name):
            raise ValueError(f"its pickle has the operation {opcode.name}, which no checkpoint needs")
        if opcode.name == "GLOBAL" and not _GLOBALS.fullmatch(str(argument)):
            raise ValueError(f"its pickle names {str(argument)[:100]!r}, which no checkpoint needs")
    num_tuples = sum(counts[name] for name in ("TUPLE", "TUPLE1", "TUPLE2", "TUPLE3"))
    if counts["REDUCE"] > _MAX_CALLS or counts["BINPERSID"] > 1 or num_tuples > _MAX_TUPLES:
        raise ValueError("its pickle builds more than one tensor and plain values")


def _as_content(loaded: Any) -> _Content:
    if type(loaded) is not dict:
        raise CheckpointError(f"it holds a {type(loaded).__name__}, not a dict")
    if missing := [key for key in _KEYS if key not in loaded]:
        raise CheckpointError(f"missing key: {', '.join(missing)}")
    if len(loaded) > len(_KEYS):
        raise CheckpointError(f"unknown key: {', '.join(repr(key) for key in loaded if key not in _KEYS)}")
    return _Content(**loaded)


def _check_content(content: _Content, *, max_bytes: int | None = None, may_be_integers: bool = False) -> None:
    """What holds for every checkpoint, when it is written and when it is read."""
    embeddings, sequence_ids, metadata = content
    if type(embeddings) is not Tensor or embeddings.layout != torch.strided or embeddings.device.type != "cpu":
        raise CheckpointError("embeddings is no plain tensor on the CPU")
    is_integer = embeddings.dtype in (torch.int64, torch.int32)
    if embeddings.dtype not in _DTYPES and not (may_be_integers and is_integer):
        raise CheckpointError(f"embeddings is {_dtype_name(embeddings)}; it must be a floating type")
    is_end_to_end = embeddings.dim() == 1 and type(metadata) is dict and "offsets" in metadata
    if (embeddings.dim() != 2 and not is_end_to_end) or embeddings.numel() == 0:
        raise CheckpointError(f"shape mismatch: embeddings is {tuple(embeddings.shape)}; it must be (rows, width)")
    if not embeddings.is_contiguous() or (max_bytes is not None and embeddings.nbytes > max_bytes):
        raise CheckpointError("embeddings claims more than the file holds")
    if type(sequence_ids) is not list or not all(isinstance(id_, str) for id_ in sequence_ids):
        raise CheckpointError("sequence_ids is no list of strings")
    rows = _num_rows(metadata["offsets"], embeddings.numel()) if is_end_to_end else embeddings.shape[0]
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
        raise CheckpointError(f"shape mismatch: offsets does not ascend from 0 to {num_values}, the number of values")
    return len(offsets) - 1


def _ordinals(values: Any, *, rows: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    if type(values) is not list or not all(type(value) is int and 0 <= value < 2**63 for value in values):
        raise CheckpointError("ordinals is no list of whole numbers from 0")
    if len(values) != rows:
        raise CheckpointError(f"shape mismatch: {rows} rows, {len(values)} ordinals")
    ordinals = np.array(values, dtype=np.int64)
    if np.unique(ordinals).size != rows:
        raise CheckpointError("an ordinal is there twice")
    return ordinals


def _require_agreement(content: _Content, marker: dict[str, Any]) -> None:
    for key, value in _marker_fields(content).items():
        if marker.get(key) != value:
            raise CheckpointError(f"its {key} is not what its marker says")


def _to_numpy(embeddings: Tensor) -> np.ndarray[Any, Any]:
    array: np.ndarray[Any, Any] = (embeddings.float() if embeddings.dtype == torch.bfloat16 else embeddings).numpy()
    return array


def _dtype_name(embeddings: Tensor) -> str:
    return str(embeddings.dtype).removeprefix("torch.")
