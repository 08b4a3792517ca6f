"""The manifest: which shards there are, how far each has come, and what has gone wrong with them.

It is a record, not the truth: the checkpoints are. Lost or damaged it is made anew from them; only attempts and failures
live nowhere else. Every change happens under a lock between processes and replaces the file as a whole, so that readers
need no lock.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from typing import Any, Protocol, TypeVar

from vnp_lib.errors import StorageError
from vnp_lib.storage import FileLock, make_directory, read_sealed_json, write_sealed_json

VERSION = "1.0"
MAX_CHECKPOINTS_LISTED = 256  # of a shard
MAX_CHECKPOINTS_LISTED_IN_ALL = 4096
MAX_FAILURES_KEPT = 200  # of a shard
MAX_FAILURES_KEPT_IN_ALL = 8000
LOCK_TIMEOUT_S = 30.0

_HISTORY = (
    "attempts",
    "failures",
    "retry_count",
    "suspects",
    "token_budgets",
)  # lives nowhere else

logger = logging.getLogger(__name__)

T = TypeVar("T")


class ShardStatus(StrEnum):
    """How a shard stands."""

    IN_PROGRESS = "in_progress"
    COMPLETE = "complete"
    FAILED = "failed"


class CommittedCheckpoint(Protocol):
    """What the manifest wants to know of a checkpoint on disk; `checkpoint.CheckpointRecord` has it."""

    @property
    def path(self) -> Path: ...
    @property
    def rank(self) -> int: ...
    @property
    def batch_idx(self) -> int: ...
    @property
    def rows(self) -> int: ...


class CheckpointManifest:
    """`manifest.json`, with `manifest.lock` beside it.

    A shard lists its newest 256 checkpoints, or fewer where there are more than 16 shards; `num_checkpoints` and
    `total_sequences` count them all. So an update costs the same however long the run: some milliseconds, and some tens of
    them for a thousand shards. Every method that changes something raises LockTimeoutError when
    the lock cannot be had within 30 s, and every method but those that make a manifest raises StorageError when there is
    none or it is damaged. A rank that is not in the manifest is a ValueError.
    """

    def __init__(
        self,
        manifest_path: Path,
        staleness_threshold_sec: float = 600,
        *,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """`clock` gives seconds since the epoch: its readings are written down and outlive the process."""
        self.path = Path(manifest_path)
        self.staleness_threshold_sec = staleness_threshold_sec
        self._clock = clock
        self._lock = FileLock(self.path.with_suffix(".lock"), purpose=f"update {self.path.name}")

    def exists(self) -> bool:
        return self.path.is_file()

    def initialize(
        self, world_size: int, input_fingerprint: str = "", model_config_hash: str = ""
    ) -> None:
        """Write a manifest of `world_size` shards in progress, unless there is one: that is left as it is."""
        with self._exclusive():
            if not self.exists():
                self._write(self._new_state(world_size, input_fingerprint, model_config_hash))

    def open_or_rebuild(
        self,
        world_size: int,
        input_fingerprint: str,
        model_config_hash: str,
        records: Iterable[CommittedCheckpoint],
    ) -> None:
        """Make the manifest fit the run and what is on disk, whatever state it is in. Never fatal for want of a manifest.

        One of the same input and model is kept: shards are added up to `world_size`, those beyond it stay as a record, and
        all counts are set from `records`. Any other, and a damaged one, is made anew, which the log says.

        Args:
            world_size: Shards of this run; may differ from the last run's.
            records: All valid checkpoints under the run directory, of any shard.
        """
        with self._exclusive():
            found = self._state_to_keep(input_fingerprint, model_config_hash)
            self._write(
                self._fitted(found, world_size, input_fingerprint, model_config_hash, records)
            )

    def rebuild(
        self,
        world_size: int,
        input_fingerprint: str,
        records: Iterable[CommittedCheckpoint],
        *,
        model_config_hash: str = "",
    ) -> None:
        """Make the manifest anew from the checkpoints.

        Attempts and failures are kept where they can still be read and are not of another run, whose ordinals are other sequences.
        """
        with self._exclusive():
            state = self._new_state(world_size, input_fingerprint, model_config_hash)
            self._keep_history(state)
            self._set_counts(state, records)
            self._write(state)

    def reconcile(self, records: Iterable[CommittedCheckpoint], *, rank: int | None = None) -> None:
        """Set the counts of all shards, or of one, from the checkpoints on disk.

        A shard that has fewer sequences than were recorded is in progress again.
        """
        listed = list(records)
        self._change(lambda state: self._set_counts(state, listed, rank=rank))

    def update_shard_checkpoint(
        self, rank: int, batch_idx: int, num_sequences: int, checkpoint_file: str
    ) -> None:
        """Record a committed checkpoint. The same one (number and file) again takes the place of the first.

        Args:
            checkpoint_file: Its name within the shard's directory. ValueError if it holds a path.
        """
        _require_bare_name(checkpoint_file)
        if batch_idx < 0 or num_sequences < 0:
            raise ValueError(
                f"batch_idx {batch_idx} and num_sequences {num_sequences} must not be negative"
            )
        entry = {
            "batch_idx": batch_idx,
            "num_sequences": num_sequences,
            "file": checkpoint_file,
            "timestamp": self._now(),
        }
        self._change(lambda state: _record_checkpoint(_shard(state, rank), entry))

    def mark_shard_complete(self, rank: int) -> None:
        complete = {
            "status": ShardStatus.COMPLETE,
            "completed_at": self._now(),
            "failed_at": None,
            "error": None,
        }
        self._change(lambda state: _shard(state, rank).update(complete))

    def mark_shard_failed(self, rank: int, error: str) -> None:
        """Record that a shard has failed, why, and when; its retry count grows by one."""
        failed_at = self._now()

        def change(state: dict[str, Any]) -> None:
            shard = _shard(state, rank)
            shard.update(status=ShardStatus.FAILED, failed_at=failed_at, error=error)
            shard["retry_count"] += 1

        self._change(change)

    def start_attempt(self, rank: int, *, device: str | None = None) -> int:
        """Count an attempt on a shard, put it in progress, and return which attempt it is, from 1."""
        started_at = self._now()

        def change(state: dict[str, Any]) -> int:
            shard = _shard(state, rank)
            shard.update(
                status=ShardStatus.IN_PROGRESS, attempt_started_at=started_at, device=device
            )
            shard["attempts"] += 1
            return int(shard["attempts"])

        return self._change(change)

    def record_failure(self, rank: int, record: dict[str, Any]) -> None:
        """Add `record`, anything that is JSON, to the failures of a shard.

        The newest 200 are kept, and the newest 200 with a true `accuses_batch`: a thousand preemptions push no strike out.
        Where all shards have more than 8,000, each keeps its share of them.
        """

        def change(state: dict[str, Any]) -> None:
            shard = _shard(state, rank)
            shard["failures"] = _newest_failures([*shard["failures"], record], MAX_FAILURES_KEPT)

        self._change(change)

    def failures(self, rank: int) -> list[dict[str, Any]]:
        """What `record_failure` recorded for a shard, oldest first, over all runs on this directory."""
        return list(_shard(self._read(), rank)["failures"])

    def add_suspects(self, rank: int, ordinals: Sequence[int]) -> None:
        """Record that one of these sequences may be what a child dies of: from now on each is computed alone."""

        def change(state: dict[str, Any]) -> None:
            shard = _shard(state, rank)
            shard["suspects"] = list(dict.fromkeys([*shard.get("suspects", []), *ordinals]))

        self._change(change)

    def suspects(self) -> list[int]:
        """Ordinals of all shards' suspects, also of shards that only an earlier run had."""
        return [
            ordinal for shard in self.shards().values() for ordinal in shard.get("suspects", [])
        ]

    def remember_token_budget(self, rank: int, device: str, tokens: int) -> None:
        """Record how many tokens fit into a device's memory with a shard's sequences."""

        def change(state: dict[str, Any]) -> None:
            shard = _shard(state, rank)
            shard["token_budgets"] = shard.get("token_budgets", {}) | {device: tokens}

        self._change(change)

    def token_budget(self, rank: int, device: str) -> int | None:
        """What is remembered for a shard on a device, else the least of other shards on it; None where nothing is."""
        budgets = {
            other: shard.get("token_budgets", {}).get(device)
            for other, shard in self.shards().items()
        }
        known = [tokens for tokens in budgets.values() if tokens is not None]
        return budgets.get(rank) or min(known, default=None)

    def record_redistribution(self, failed_rank: int, new_rank: int) -> None:
        """Record that the shard of `failed_rank` is `new_rank`'s work now."""
        moved = {"assigned_rank": new_rank, "redistributed_at": self._now()}
        self._change(lambda state: _shard(state, failed_rank).update(moved))

    def get_redistributed_shards(self) -> dict[int, int]:
        """From the rank that failed to the rank that has its shard now."""
        shards = _shards_by_rank(self._read())
        return {
            rank: shard["assigned_rank"]
            for rank, shard in shards.items()
            if shard["assigned_rank"] != shard["original_rank"]
        }

    def get_shard_status(self, rank: int) -> dict[str, Any] | None:
        """All that is recorded of a shard, or None where there is no such shard."""
        return _shards_by_rank(self._read()).get(rank)

    def shards(self) -> dict[int, dict[str, Any]]:
        """All that is recorded, by rank, also of shards that only an earlier run had."""
        return _shards_by_rank(self._read())

    def get_resumable_shards(self) -> list[int]:
        """Ranks of this run's shards that are not complete, in order."""
        return [
            rank
            for rank, shard in self._current_shards()
            if shard["status"] != ShardStatus.COMPLETE
        ]

    def get_completed_shards(self) -> list[int]:
        """Ranks of this run's shards that are complete, in order."""
        return [
            rank
            for rank, shard in self._current_shards()
            if shard["status"] == ShardStatus.COMPLETE
        ]

    def get_global_progress(self) -> dict[str, int]:
        """Counts of this run's shards by status, and of the sequences in checkpoints of any shard, this run's or not."""
        state = self._read()
        statuses = [
            shard["status"]
            for rank, shard in _shards_by_rank(state).items()
            if rank < state["world_size"]
        ]
        return {
            "total_shards": len(statuses),
            "completed": statuses.count(ShardStatus.COMPLETE),
            "in_progress": statuses.count(ShardStatus.IN_PROGRESS),
            "failed": statuses.count(ShardStatus.FAILED),
            "total_sequences_checkpointed": sum(
                shard["total_sequences"] for shard in state["shards"].values()
            ),
        }

    def is_shard_stale(self, rank: int) -> bool:
        """Whether a shard in progress has recorded nothing for longer than the staleness threshold."""
        state = self._read()
        shard = _shard(state, rank)
        if shard["status"] != ShardStatus.IN_PROGRESS:
            return False
        signs_of_life = (
            state["created_at"],
            shard["attempt_started_at"],
            shard["last_checkpoint_time"],
        )
        newest_s = max(
            datetime.fromisoformat(time_).timestamp() for time_ in signs_of_life if time_
        )
        return self._clock() - newest_s > self.staleness_threshold_sec

    @contextmanager
    def _exclusive(self) -> Iterator[None]:
        make_directory(self.path.parent)
        with self._lock.held(timeout_s=LOCK_TIMEOUT_S):
            yield

    def _change(self, change: Callable[[dict[str, Any]], T]) -> T:
        """Have `change` change the state in place, under the lock, and return what it returns."""
        self._require_exists()
        with self._lock.held(timeout_s=LOCK_TIMEOUT_S):
            state = self._read()
            result = change(state)
            self._write(state)
        return result

    def _require_exists(self) -> None:
        if not self.exists():
            raise StorageError(
                f"{self.path} is missing: a run makes it, and makes it anew from the checkpoints"
            )

    def _read(self) -> dict[str, Any]:
        self._require_exists()
        state = read_sealed_json(self.path)
        if state.get("version") != VERSION:
            raise StorageError(
                f"{self.path} has version {state.get('version')!r}; this version reads {VERSION!r}"
            )
        return state

    def _write(self, state: dict[str, Any]) -> None:
        _shorten(list(state["shards"].values()))
        write_sealed_json(self.path, state, replace=True)

    def _current_shards(self) -> list[tuple[int, dict[str, Any]]]:
        state = self._read()
        return [
            (rank, shard)
            for rank, shard in _shards_by_rank(state).items()
            if rank < state["world_size"]
        ]

    def _state_to_keep(
        self, input_fingerprint: str, model_config_hash: str
    ) -> dict[str, Any] | None:
        """The state on disk, if it is whole and of this run."""
        if not self.exists():
            return None
        try:
            state = self._read()
        except (StorageError, OSError) as error:
            logger.warning("%s; it is made anew from the checkpoints", error)
            return None
        if not is_of_run(state, input_fingerprint, model_config_hash):
            logger.warning("%s is another run's; it is made anew from the checkpoints", self.path)
            return None
        return state

    def _fitted(
        self,
        found: dict[str, Any] | None,
        world_size: int,
        input_fingerprint: str,
        model_config_hash: str,
        records: Iterable[CommittedCheckpoint],
    ) -> dict[str, Any]:
        """Make the state that was found, or a new one, fit the run and what is on disk."""
        state = (
            self._new_state(world_size, input_fingerprint, model_config_hash)
            if found is None
            else found
        )
        self._resize(state, world_size)
        self._set_counts(state, records)
        return state

    def _keep_history(self, state: dict[str, Any]) -> None:
        try:
            old_state = self._read()
        except (StorageError, OSError) as error:
            logger.warning("%s; attempts and failures are counted from none", error)
            return
        if old_state["input_fingerprint"] not in ("", state["input_fingerprint"]):
            logger.warning(
                "%s is another run's; attempts and failures are counted from none", self.path
            )
            return
        for rank, old in _shards_by_rank(old_state).items():
            shard = state["shards"].setdefault(str(rank), _new_shard(rank))
            shard.update({key: old[key] for key in _HISTORY if key in old})

    def _new_state(
        self, world_size: int, input_fingerprint: str, model_config_hash: str
    ) -> dict[str, Any]:
        state: dict[str, Any] = {
            "version": VERSION,
            "created_at": self._now(),
            "input_fingerprint": input_fingerprint,
            "model_config_hash": model_config_hash,
            "shards": {},
        }
        self._resize(state, world_size)
        return state

    def _resize(self, state: dict[str, Any], world_size: int) -> None:
        if world_size < 1:
            raise ValueError(f"world_size is {world_size}; a run has at least one shard")
        state["world_size"] = world_size
        for rank in range(world_size):
            state["shards"].setdefault(str(rank), _new_shard(rank))

    def _set_counts(
        self,
        state: dict[str, Any],
        records: Iterable[CommittedCheckpoint],
        *,
        rank: int | None = None,
    ) -> None:
        listed: dict[int, list[CommittedCheckpoint]] = {}
        for record in records:
            listed.setdefault(record.rank, []).append(record)
        ranks = set(listed) | set(_shards_by_rank(state)) if rank is None else {rank}
        for each in sorted(ranks):
            shard = state["shards"].setdefault(str(each), _new_shard(each))
            _count(
                shard,
                sorted(listed.get(each, []), key=lambda record: record.batch_idx),
                now=self._now(),
            )

    def _now(self) -> str:
        return datetime.fromtimestamp(self._clock(), UTC).isoformat(timespec="milliseconds")


def _new_shard(rank: int) -> dict[str, Any]:
    return {
        "status": ShardStatus.IN_PROGRESS,
        "original_rank": rank,
        "assigned_rank": rank,
        "redistributed_at": None,
        "last_checkpoint_batch": -1,
        "last_checkpoint_time": None,
        "total_sequences": 0,
        "num_checkpoints": 0,
        "checkpoints": [],
        "attempts": 0,
        "attempt_started_at": None,
        "device": None,
        "retry_count": 0,
        "failures": [],
        "suspects": [],
        "token_budgets": {},
        "error": None,
        "completed_at": None,
        "failed_at": None,
    }


def _shard(state: dict[str, Any], rank: int) -> dict[str, Any]:
    shard: dict[str, Any] | None = state["shards"].get(str(rank))
    if shard is None:
        raise ValueError(
            f"there is no shard {rank}: the manifest has {', '.join(map(str, _shards_by_rank(state)))}"
        )
    return shard


def _shards_by_rank(state: dict[str, Any]) -> dict[int, dict[str, Any]]:
    return {int(rank): state["shards"][rank] for rank in sorted(state["shards"], key=int)}


def _record_checkpoint(shard: dict[str, Any], entry: dict[str, Any]) -> None:
    others = [old for old in shard["checkpoints"] if _identity(old) != _identity(entry)]
    replaced = [old for old in shard["checkpoints"] if _identity(old) == _identity(entry)]
    shard["num_checkpoints"] += 1 - len(replaced)
    shard["total_sequences"] += entry["num_sequences"] - sum(
        old["num_sequences"] for old in replaced
    )
    shard["checkpoints"] = [*others, entry][-MAX_CHECKPOINTS_LISTED:]
    shard["last_checkpoint_batch"] = max(shard["last_checkpoint_batch"], entry["batch_idx"])
    shard["last_checkpoint_time"] = entry["timestamp"]


def is_of_run(state: dict[str, Any], input_fingerprint: str, model_config_hash: str) -> bool:
    """Whether a state of a manifest is that of a run."""
    return (state["input_fingerprint"], state["model_config_hash"]) == (
        input_fingerprint,
        model_config_hash,
    )


def _shorten(shards: list[dict[str, Any]]) -> None:
    """Leave each of many shards its share of what is listed in all: a manifest that is written at each checkpoint stays small."""
    most_listed = max(1, MAX_CHECKPOINTS_LISTED_IN_ALL // len(shards))
    for shard in shards:
        shard["checkpoints"] = shard["checkpoints"][-most_listed:]
    if sum(len(shard["failures"]) for shard in shards) > MAX_FAILURES_KEPT_IN_ALL:
        for shard in shards:
            shard["failures"] = _newest_failures(
                shard["failures"], max(1, MAX_FAILURES_KEPT_IN_ALL // len(shards) // 2)
            )


def _newest_failures(records: list[dict[str, Any]], most: int) -> list[dict[str, Any]]:
    """The newest of those that accuse a batch and the newest of the others, so many of each."""
    strikes = [place for place, record in enumerate(records) if record.get("accuses_batch")]
    others = [place for place, record in enumerate(records) if not record.get("accuses_batch")]
    return [records[place] for place in sorted(strikes[-most:] + others[-most:])]


def _identity(entry: dict[str, Any]) -> tuple[int, str]:
    return entry["batch_idx"], entry["file"]


def _count(shard: dict[str, Any], records: list[CommittedCheckpoint], *, now: str) -> None:
    total_sequences = sum(record.rows for record in records)
    if total_sequences < shard["total_sequences"]:
        shard.update(status=ShardStatus.IN_PROGRESS, completed_at=None)
    times = {_identity(entry): entry["timestamp"] for entry in shard["checkpoints"]}
    shard.update(
        total_sequences=total_sequences,
        num_checkpoints=len(records),
        last_checkpoint_batch=records[-1].batch_idx if records else -1,
        checkpoints=[
            {
                "batch_idx": record.batch_idx,
                "num_sequences": record.rows,
                "file": record.path.name,
                "timestamp": times.get((record.batch_idx, record.path.name), now),
            }
            for record in records[-MAX_CHECKPOINTS_LISTED:]
        ],
    )


def _require_bare_name(name: str) -> None:
    if name in {"", ".", ".."} or any(letter in name for letter in "/\\\0"):
        raise ValueError(f"checkpoint_file {name!r} must be a bare file name, without a path")
