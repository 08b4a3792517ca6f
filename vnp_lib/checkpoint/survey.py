"""Survey the checkpoints of a run: which are valid by their markers, and which are damaged."""

from __future__ import annotations

import errno
import logging
import os
import re
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np

from vnp_lib.checkpoint.markers import (
    CheckpointRecord,
    checkpoint_paths,
    move_to_damaged,
    read_record,
)
from vnp_lib.errors import CheckpointError, StorageError, StorageFailingError
from vnp_lib.storage import fsync_directory, marker_path, refresh_listing

# Together longer than the 60 s for which NFS caches the content of a directory.
LOOKUP_DELAYS_S = (1.0, 4.0, 15.0, 45.0)

# Coarser than the clocks of file systems: FAT counts in steps of two seconds.
_SETTLED_AFTER_NS = 2 * 10**9

_SHARD_DIRECTORY = re.compile(r"shard_(0|[1-9]\d*)")

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Damage:
    """A checkpoint that cannot be used."""

    path: Path  # of the .pt, which itself may be missing
    reason: str
    is_unfinished: bool  # no marker: its writer was stopped, and the disk has lost nothing

    @classmethod
    def of(cls, path: Path, error: CheckpointError) -> Self:
        """Return the damage that an error reported."""
        return cls(path=path, reason=str(error), is_unfinished=not marker_path(path).exists())


@dataclass(frozen=True, slots=True, kw_only=True)
class Survey:
    """All checkpoints of a run, in order of shard and number."""

    valid: tuple[CheckpointRecord, ...]
    damaged: tuple[Damage, ...]

    def done_mask(self, num_sequences: int) -> np.ndarray[Any, np.dtype[np.bool_]]:
        """Return which of a run's ordinals are in valid checkpoints, bool (num_sequences,)."""
        is_done = np.zeros(num_sequences, dtype=bool)
        for record in self.valid:
            # Assembly refuses checkpoints with other ordinals.
            is_done[record.ordinals[record.ordinals < num_sequences]] = True
        return is_done

    def require_sound_storage(self) -> None:
        """Raise StorageFailingError if more than 3 and 1 % of finished ones are damaged."""
        lost = [damage for damage in self.damaged if not damage.is_unfinished]
        require_few_lost(lost, total=len(self.valid) + len(lost))


class CommittedRows:
    """The sequences of a run that are in valid checkpoints, for repeated reads.

    Each call reads only the markers that are new or have changed since the last call. A marker
    counts as unchanged while it and its checkpoint keep their inode, size and times. One that was
    written within the last two seconds is read again: a file could change and keep its time.
    """

    def __init__(
        self,
        checkpoints_dir: Path,
        fingerprint: str,
        num_sequences: int,
        *,
        clock_ns: Callable[[], int] = time.time_ns,
    ) -> None:
        self._checkpoints_dir = checkpoints_dir
        self._fingerprint = fingerprint
        self._clock_ns = clock_ns
        self._lock = threading.Lock()
        self._is_done = np.zeros(num_sequences, dtype=bool)
        self._stamps: dict[Path, _Stamp] = {}

    def done_mask(self) -> np.ndarray[Any, np.dtype[np.bool_]]:
        """Return which ordinals are in valid checkpoints, by their markers, bool (num_sequences,).

        Raises:
            StorageError: As `survey_checkpoints`, which gives the same result.
        """
        with self._lock:
            paths = [
                (rank, path)
                for rank, shard_dir in _shard_directories(self._checkpoints_dir)
                for path in _synced_paths(shard_dir)
            ]
            stamps = {path: _Stamp.of(path) for _, path in paths}
            if any(stamps.get(path) != stamp for path, stamp in self._stamps.items()):
                self._stamps.clear()
                self._is_done[:] = False
            is_young = np.zeros_like(self._is_done)
            settled_ns = self._clock_ns() - _SETTLED_AFTER_NS
            for rank, path in paths:
                if path in self._stamps:
                    continue
                with suppress(CheckpointError):
                    ordinals = read_record(
                        path, rank, self._fingerprint, verify_digest=False
                    ).ordinals
                    # Assembly refuses checkpoints with other ordinals.
                    ordinals = ordinals[ordinals < self._is_done.size]
                    stamp = stamps[path]
                    if stamp is not None and stamp.changed_ns < settled_ns:
                        self._is_done[ordinals] = True
                        self._stamps[path] = stamp
                    else:
                        is_young[ordinals] = True
            return self._is_done | is_young


def survey_checkpoints(
    checkpoints_dir: Path, fingerprint: str, *, verify_digests: bool, rank: int | None = None
) -> Survey:
    """Read all markers under `checkpoints_dir`, or those of one shard. Nothing is moved.

    The directories are synced: a writer that was killed between publishing and syncing a name
    leaves a name that a power cut could undo.

    Args:
        checkpoints_dir: Has a `shard_{rank}` for each shard, of this run's number of shards or
            another. May be missing.
        fingerprint: The run. A checkpoint of another run counts as damaged.
        verify_digests: Read every file and compare its sha256, not only its size.
        rank: The only shard to survey.

    Raises:
        StorageError: A file cannot be read for a reason other than damage, such as permissions.
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


def heal_shard(
    checkpoints_dir: Path,
    rank: int,
    fingerprint: str,
    *,
    sleep: Callable[[float], None] = time.sleep,
) -> int:
    """Read one shard's checkpoints completely, and move the damaged ones to `damaged/`.

    The caller must hold the shard's lock: a checkpoint of another process between its file and its
    marker looks damaged. A file that another machine has just written may be listed here but not
    found yet, as over NFS; this is waited for.

    Returns:
        The number of the next checkpoint.

    Raises:
        StorageFailingError: So many are damaged that the storage is failing. Nothing was moved.
    """
    wait_for_listed_files(checkpoints_dir, rank=rank, sleep=sleep)
    survey = _survey_shard(
        checkpoints_dir / f"shard_{rank}", rank, fingerprint, verify_digests=True
    )
    survey.require_sound_storage()
    for damage in survey.damaged:
        logger.warning("%s cannot be used: %s", damage.path, damage.reason)
        move_to_damaged(damage.path)
    return survey.valid[-1].batch_idx + 1 if survey.valid else 0


def refresh_listings(checkpoints_dir: Path) -> None:
    """Make the system read the directories again instead of using a cache, as over NFS."""
    for directory in (checkpoints_dir, *(path for _, path in _shard_directories(checkpoints_dir))):
        refresh_listing(directory)


def wait_for_listed_files(
    checkpoints_dir: Path, *, rank: int | None = None, sleep: Callable[[float], None] = time.sleep
) -> None:
    """Wait, for a minute at most, until every listed checkpoint and marker is found by its name.

    On a network file system, a machine may cache for a while that a file of another one is missing.
    """
    directories = [
        path for each, path in _shard_directories(checkpoints_dir) if rank in (None, each)
    ]
    for directory in directories:
        refresh_listing(directory)
    for number, delay_s in enumerate(LOOKUP_DELAYS_S):
        hidden = [path for directory in directories for path in _hidden_files(directory)]
        if not hidden:
            return
        if number == 0:
            logger.warning(
                "%d files are listed and not found, such as %s: waiting until this machine sees "
                "them",
                len(hidden),
                hidden[0],
            )
        sleep(delay_s)


def require_few_lost(lost: Sequence[Damage], *, total: int) -> None:
    """Raise StorageFailingError if more than 3 checkpoints and 1 % of `total` are lost."""
    if len(lost) > 3 and len(lost) * 100 > total:
        reasons = "; ".join(f"{each.path}: {each.reason}" for each in lost[:3])
        raise StorageFailingError(
            f"{len(lost)} of {total} checkpoints are damaged: the storage is failing. See to it "
            f"before anything is computed again; the first are: {reasons}"
        )


def _shard_directories(checkpoints_dir: Path) -> list[tuple[int, Path]]:
    if not checkpoints_dir.is_dir():
        return []
    found = [
        (match, path)
        for path in checkpoints_dir.iterdir()
        if (match := _SHARD_DIRECTORY.fullmatch(path.name))
    ]
    return sorted((int(match[1]), path) for match, path in found if path.is_dir())


def _hidden_files(shard_dir: Path) -> list[Path]:
    """Return checkpoints and markers that the directory lists, but that are not found by name."""
    if not shard_dir.is_dir():
        return []
    listed = {path.name for path in shard_dir.iterdir()}
    expected = [each for path in checkpoint_paths(shard_dir) for each in (path, marker_path(path))]
    return [path for path in expected if path.name in listed and not os.path.lexists(path)]


class _Stamp(NamedTuple):
    """What changes when a checkpoint or its marker does."""

    changed_ns: int  # the newest of the times
    values: tuple[int, ...]  # inode, size and times of both files

    @classmethod
    def of(cls, path: Path) -> Self | None:
        """Return the stamp of a checkpoint, or None if it or its marker is missing."""
        try:
            files = [os.stat(each) for each in (path, marker_path(path))]
        except OSError:
            return None
        times_ns = [time for each in files for time in (each.st_mtime_ns, each.st_ctime_ns)]
        sizes = [value for each in files for value in (each.st_ino, each.st_size)]
        return cls(changed_ns=max(times_ns), values=(*times_ns, *sizes))


def _survey_shard(shard_dir: Path, rank: int, fingerprint: str, *, verify_digests: bool) -> Survey:
    valid: list[CheckpointRecord] = []
    damaged: list[Damage] = []
    for path in _synced_paths(shard_dir):
        try:
            valid.append(read_record(path, rank, fingerprint, verify_digest=verify_digests))
        except CheckpointError as error:
            damaged.append(Damage.of(path, error))
    return Survey(valid=tuple(valid), damaged=tuple(damaged))


def _synced_paths(shard_dir: Path) -> list[Path]:
    """Return the checkpoints in a directory, whose names are durable then."""
    paths = checkpoint_paths(shard_dir)
    if paths:
        _sync_names(shard_dir)
    return paths


def _sync_names(shard_dir: Path) -> None:
    try:
        fsync_directory(shard_dir)
    except OSError as error:
        # A read-only directory is read as it is.
        if error.errno != errno.EROFS:
            raise StorageError(f"{shard_dir} cannot be synced: {error}") from error
