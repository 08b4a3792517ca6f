"""Write checkpoints in the background, and decide when one is due."""

from __future__ import annotations

import errno
import logging
import os
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any, Self, TypeVar

import numpy as np
import torch
from torch import Tensor

from vnp_lib.checkpoint.file import (
    CheckpointContent,
    plain_copy,
    read_content,
    require_committable,
    save_content,
    tensor_of,
)
from vnp_lib.checkpoint.manifest import CheckpointManifest
from vnp_lib.checkpoint.markers import batch_idx_of, move_to_damaged
from vnp_lib.environment import viral_checkpoint_mode
from vnp_lib.errors import CheckpointError, CheckpointWriteError, StorageError
from vnp_lib.storage import make_directory, marker_path, write_marker


class _DefaultCount(int):
    """The default count: an explicit 10,000 stays 10,000 in viral mode."""


class _DefaultSeconds(float):
    """The default time, likewise."""


DEFAULT_SEQ_THRESHOLD = _DefaultCount(10_000)
DEFAULT_TIME_THRESHOLD_S = _DefaultSeconds(300.0)
VIRAL_SEQ_THRESHOLD = 5_000
VIRAL_TIME_THRESHOLD_S = 180.0

MAX_IN_FLIGHT = 2
MAX_IN_FLIGHT_BYTES = 256 * 1024**2
DISK_FULL_DELAYS_S = (1.0, 5.0, 15.0, 30.0)

_DISK_FULL = (errno.ENOSPC, errno.EDQUOT)

logger = logging.getLogger(__name__)

T = TypeVar("T")


class CheckpointTrigger:
    """Decide when to write a checkpoint: after a number of sequences or a time since the last one.

    With `VIRNUCPRO_VIRAL_CHECKPOINT_MODE` set the defaults are 5,000 sequences and 180 s, unless
    one of the two is given.
    """

    def __init__(
        self,
        seq_threshold: int = DEFAULT_SEQ_THRESHOLD,
        time_threshold_sec: float = DEFAULT_TIME_THRESHOLD_S,
        emergency_override_sec: float = 600.0,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        is_given = (
            seq_threshold is not DEFAULT_SEQ_THRESHOLD
            or time_threshold_sec is not DEFAULT_TIME_THRESHOLD_S
        )
        if viral_checkpoint_mode() and not is_given:
            seq_threshold, time_threshold_sec = VIRAL_SEQ_THRESHOLD, VIRAL_TIME_THRESHOLD_S
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
        """Count a batch of sequences, and return whether a checkpoint is due, and why."""
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
        """Restart counting after a checkpoint."""
        self._sequences = 0
        self._since_s = self._clock()


class AsyncCheckpointWriter:
    """Writes checkpoints in a background thread while the caller computes.

    A checkpoint is committed in this order: the file and its marker, both durable; the manifest;
    then its future resolves. At most two checkpoints and 256 MB are in flight, or one of any size;
    a caller that writes more waits. An error is raised again by the next call, so that no shard
    with a failed write is called complete. As a context manager, it waits for all writes at the
    end.
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
        """Create a writer; no thread starts yet.

        Args:
            max_workers: Number of writer threads.
            manifest: Where committed checkpoints are recorded; requires `rank`.
            rank: The shard that the checkpoints belong to.
            disk_full_delays_s: Seconds to wait before each retry if the disk is full.
            sleep: Waits for a number of seconds.
            clock: Gives the seconds that a write takes.
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
        self._are_failures_raised = False

    def write_checkpoint_async(
        self,
        checkpoint_path: Path,
        embeddings: Tensor | np.ndarray[Any, Any],
        sequence_ids: Sequence[str],
        metadata: dict[str, Any],
    ) -> Future[float]:
        """Copy a checkpoint and write it in the background; wait while too much is in flight.

        Args:
            checkpoint_path: The file; its directory is created. A file of that name without a valid
                marker, which a crash left, is moved to `damaged/`.
            embeddings: (rows, D), at least one row, float16, bfloat16, float32 or float64, on any
                device; or rows of different widths end to end, with `offsets` in the metadata.
            sequence_ids: One per row.
            metadata: str, int, float, bool, None, and lists and dicts of them. `ordinals` (one int
                per row) and `fingerprint` (str) are repeated in the marker.

        Returns:
            Resolves when the checkpoint is committed, to the seconds that writing it took.

        Raises:
            TypeError, ValueError: This is not a valid checkpoint. Nothing has been written.
            NumericalInstabilityError: A row is not finite.
        """
        if not isinstance(embeddings, Tensor | np.ndarray):
            raise TypeError(
                f"embeddings is a {type(embeddings).__name__}; it must be a tensor or a NumPy array"
            )

        def begin() -> Future[float]:
            content = CheckpointContent(
                _snapshot(embeddings), list(sequence_ids), plain_copy(metadata)
            )
            require_committable(content)
            return self._executor.submit(
                self._write_checkpoint_sync, Path(checkpoint_path), *content
            )

        return self._track(begin, int(embeddings.nbytes))

    def hand_over(
        self,
        checkpoint_path: Path,
        pieces: Sequence[Tensor],
        sequence_ids: list[str],
        metadata: dict[str, Any],
    ) -> Future[float]:
        """Write tensors that the caller will not change; copy and check them in the background.

        Args:
            checkpoint_path: The file.
            pieces: (rows, D) each, or (values,), on the CPU; together they are the rows.
            sequence_ids: One per row.
            metadata: As for `write_checkpoint_async`.

        Returns:
            As `write_checkpoint_async`, but an invalid checkpoint is the error of the future.

        Raises:
            CheckpointWriteError: An earlier checkpoint could not be written.
        """
        size_bytes = sum(piece.nbytes for piece in pieces)

        def begin() -> Future[float]:
            self._raise_failures()
            return self._executor.submit(
                self._write_pieces, Path(checkpoint_path), pieces, sequence_ids, metadata
            )

        return self._track(begin, size_bytes)

    def _track(self, begin: Callable[[], Future[float]], size_bytes: int) -> Future[float]:
        """Begin to write once there is room, and keep the future."""
        self._in_flight.enter(size_bytes)
        try:
            future = begin()
        except BaseException:
            self._in_flight.leave(size_bytes)
            raise
        future.add_done_callback(lambda _: self._in_flight.leave(size_bytes))
        self._futures = [
            *(each for each in self._futures if not each.done() or _failure_of(each)),
            future,
        ]
        return future

    def wait_all(self, timeout: float | None = None) -> None:
        """Wait until all checkpoints are committed.

        Args:
            timeout: Seconds; None waits without limit.

        Raises:
            CheckpointWriteError: Some could not be written; the message says which and why. It is
                a RuntimeError too.
            TimeoutError: Some are still being written, and continue.
        """
        unfinished = wait(self._futures, timeout).not_done
        if unfinished:
            raise TimeoutError(
                f"{len(unfinished)} checkpoints are still being written after {timeout} s"
            )
        self._raise_failures()

    def has_pending(self) -> bool:
        """Return True while a checkpoint is being written."""
        return any(not future.done() for future in self._futures)

    def shutdown(self) -> None:
        """Wait for all writes and stop the thread; raise failures that were not raised before."""
        self._executor.shutdown(wait=True)
        if not self._are_failures_raised:
            self._raise_failures()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, error_type: type[BaseException] | None, *_: object) -> None:
        if error_type is None:
            self.shutdown()
        else:
            self._executor.shutdown(wait=True)

    def _raise_failures(self) -> None:
        failures = [
            error for future in self._futures if future.done() and (error := _failure_of(future))
        ]
        if failures:
            self._are_failures_raised = True
            messages = "; ".join(str(failure) for failure in failures)
            raise CheckpointWriteError(
                f"{len(failures)} checkpoint write(s) failed: {messages}"
            ) from failures[0]

    def _write_pieces(
        self,
        checkpoint_path: Path,
        pieces: Sequence[Tensor],
        sequence_ids: list[str],
        metadata: dict[str, Any],
    ) -> float:
        content = CheckpointContent(torch.cat(list(pieces)), sequence_ids, plain_copy(metadata))
        require_committable(content)
        return self._write_checkpoint_sync(checkpoint_path, *content)

    def _write_checkpoint_sync(
        self,
        checkpoint_path: Path,
        embeddings: Tensor,
        sequence_ids: list[str],
        metadata: dict[str, Any],
    ) -> float:
        started_at_s = self._clock()
        path = checkpoint_path
        content = CheckpointContent(embeddings, sequence_ids, metadata)
        self._persist(path, lambda: make_directory(path.parent))
        self._persist(path, lambda: _make_way(path))
        digest = self._persist(path, lambda: save_content(path, content))
        self._persist(path, lambda: write_marker(path, digest, **content.marker_fields()))
        self._record(path, rows=len(sequence_ids))
        return self._clock() - started_at_s

    def _persist(self, path: Path, act: Callable[[], T]) -> T:
        """Do `act`; retry it while the disk is full, and once after an I/O error, on a new file."""
        delays_s = iter(self._disk_full_delays_s)
        may_rewrite = True
        while True:
            try:
                return act()
            except FileExistsError as error:
                raise StorageError(
                    f"{path}: another writer has just written it; "
                    f"is a second run using this directory?"
                ) from error
            except OSError as error:
                if error.errno in _DISK_FULL and (delay_s := next(delays_s, None)) is not None:
                    logger.warning("%s: %s; trying again in %g s", path, error, delay_s)
                    self._sleep(delay_s)
                elif error.errno == errno.EIO and may_rewrite:
                    logger.warning("%s: %s; writing it once more, to a new file", path, error)
                    may_rewrite = False
                else:
                    what = (
                        f"the disk is full or the quota reached ({error}): make room"
                        if error.errno in _DISK_FULL
                        else f"{error}: see to the storage"
                    )
                    raise StorageError(
                        f"{path}: {what} and start the same run again; "
                        f"all that has been committed stays valid"
                    ) from error

    def _record(self, path: Path, *, rows: int) -> None:
        if self._manifest is None or self._rank is None:
            return
        try:
            self._manifest.update_shard_checkpoint(self._rank, batch_idx_of(path), rows, path.name)
        # The checkpoint is committed, and the manifest can be rebuilt from it.
        except (StorageError, OSError, ValueError) as error:
            logger.warning("%s is committed, but not in the manifest yet: %s", path, error)


class _InFlight:
    """The writes in flight: `enter` waits for room; a single checkpoint always has room."""

    def __init__(self, *, max_checkpoints: int, max_bytes: int) -> None:
        self._max_checkpoints = max_checkpoints
        self._max_bytes = max_bytes
        self._checkpoints = 0
        self._bytes = 0
        self._changed = threading.Condition()

    def enter(self, size_bytes: int) -> None:
        with self._changed:
            self._changed.wait_for(
                lambda: (
                    self._checkpoints == 0
                    or (
                        self._checkpoints < self._max_checkpoints
                        and self._bytes + size_bytes <= self._max_bytes
                    )
                )
            )
            self._checkpoints += 1
            self._bytes += size_bytes

    def leave(self, size_bytes: int) -> None:
        with self._changed:
            self._checkpoints -= 1
            self._bytes -= size_bytes
            self._changed.notify_all()


def _snapshot(embeddings: Tensor | np.ndarray[Any, Any]) -> Tensor:
    if isinstance(embeddings, np.ndarray):
        return tensor_of(embeddings)
    on_cpu = embeddings.to("cpu")
    # NumPy accepts neither.
    if on_cpu.dtype == torch.bfloat16 or on_cpu.requires_grad is True:
        return on_cpu.detach().clone(memory_format=torch.contiguous_format)
    return tensor_of(on_cpu.numpy())


def _make_way(path: Path) -> None:
    """Move what a crash left under this name to `damaged/`, unless it is a valid checkpoint."""
    if not os.path.lexists(path) and not os.path.lexists(marker_path(path)):
        return
    try:
        read_content(path, fingerprint=None, may_be_bare=True)
    except CheckpointError as error:
        logger.warning("%s cannot be used: %s", path, error)
        move_to_damaged(path)
    else:
        raise FileExistsError(errno.EEXIST, "a valid checkpoint is there", str(path))


def _failure_of(future: Future[float]) -> BaseException | None:
    return (
        CancelledError("cancelled before it was written")
        if future.cancelled()
        else future.exception()
    )
