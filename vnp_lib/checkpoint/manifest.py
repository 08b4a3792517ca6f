"""The manifest: a locked record of a run's shards, their progress and their failures.

It is a record, not the truth: the checkpoints are. If it is lost or damaged, it is rebuilt from
them; only attempts and failures are recorded nowhere else. Every change happens under a lock
between processes and replaces the file as a whole, so that readers need no lock.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from typing import Any, Protocol, Self, TypeVar

from vnp_lib.errors import StorageError
from vnp_lib.storage import FileLock, make_directory, read_sealed_json, write_sealed_json

VERSION = "1.0"
MAX_CHECKPOINTS_LISTED = 256  # per shard
MAX_CHECKPOINTS_LISTED_IN_ALL = 4096
MAX_FAILURES_KEPT = 200  # per shard
MAX_FAILURES_KEPT_IN_ALL = 8000
LOCK_TIMEOUT_S = 30.0

logger = logging.getLogger(__name__)

T = TypeVar("T")


class ShardStatus(StrEnum):
    """Status of a shard."""

    IN_PROGRESS = "in_progress"
    COMPLETE = "complete"
    FAILED = "failed"


@dataclass(frozen=True, slots=True, kw_only=True)
class ListedCheckpoint:
    """A committed checkpoint, as the manifest lists it."""

    batch_idx: int
    num_sequences: int
    file: str  # name within the shard's directory
    timestamp: str  # ISO 8601, UTC

    @property
    def key(self) -> tuple[int, str]:
        return self.batch_idx, self.file


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardRecord:
    """What the manifest records of one shard. The fields are the keys of its JSON object."""

    status: ShardStatus = ShardStatus.IN_PROGRESS
    original_rank: int
    assigned_rank: int
    redistributed_at: str | None = None
    last_checkpoint_batch: int = -1
    last_checkpoint_time: str | None = None
    total_sequences: int = 0  # in its checkpoints
    num_checkpoints: int = 0
    checkpoints: tuple[ListedCheckpoint, ...] = ()  # the newest ones
    attempts: int = 0
    attempt_started_at: str | None = None
    device: str | None = None
    retry_count: int = 0
    failures: tuple[dict[str, Any], ...] = ()  # oldest first
    suspects: tuple[int, ...] = ()  # ordinals that are computed alone
    token_budgets: dict[str, int] = field(default_factory=dict)  # tokens, by device
    error: str | None = None
    completed_at: str | None = None
    failed_at: str | None = None

    @classmethod
    def new(cls, rank: int) -> Self:
        """Return the record of a shard of which nothing is known."""
        return cls(original_rank=rank, assigned_rank=rank)

    @classmethod
    def from_json(cls, shard: dict[str, Any]) -> Self:
        """Read a record; a field that an older version did not write takes its default."""
        known = {name: shard[name] for name in _FIELDS if name in shard}
        for name in ("failures", "suspects"):
            known[name] = tuple(shard.get(name, ()))
        known["status"] = ShardStatus(shard["status"])
        known["checkpoints"] = tuple(ListedCheckpoint(**each) for each in shard["checkpoints"])
        return cls(**known)

    def to_json(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in _FIELDS} | {
            "checkpoints": [asdict(each) for each in self.checkpoints],
            "failures": list(self.failures),
            "suspects": list(self.suspects),
        }

    def with_checkpoint(self, checkpoint: ListedCheckpoint) -> Self:
        """Add a checkpoint, or replace the one of the same number and file."""
        others = [each for each in self.checkpoints if each.key != checkpoint.key]
        replaced = [each for each in self.checkpoints if each.key == checkpoint.key]
        return replace(
            self,
            num_checkpoints=self.num_checkpoints + 1 - len(replaced),
            total_sequences=self.total_sequences
            + checkpoint.num_sequences
            - sum(each.num_sequences for each in replaced),
            checkpoints=tuple([*others, checkpoint][-MAX_CHECKPOINTS_LISTED:]),
            last_checkpoint_batch=max(self.last_checkpoint_batch, checkpoint.batch_idx),
            last_checkpoint_time=checkpoint.timestamp,
        )

    def counted(self, committed: Sequence[CommittedCheckpoint], *, now: str) -> Self:
        """Set the counts from the checkpoints on disk; one that has lost rows is in progress."""
        total_sequences = sum(each.rows for each in committed)
        times = {each.key: each.timestamp for each in self.checkpoints}
        has_lost_rows = total_sequences < self.total_sequences
        return replace(
            self,
            status=ShardStatus.IN_PROGRESS if has_lost_rows else self.status,
            completed_at=None if has_lost_rows else self.completed_at,
            total_sequences=total_sequences,
            num_checkpoints=len(committed),
            last_checkpoint_batch=committed[-1].batch_idx if committed else -1,
            checkpoints=tuple(
                ListedCheckpoint(
                    batch_idx=each.batch_idx,
                    num_sequences=each.rows,
                    file=each.path.name,
                    timestamp=times.get((each.batch_idx, each.path.name), now),
                )
                for each in committed[-MAX_CHECKPOINTS_LISTED:]
            ),
        )

    def with_history_of(self, other: ShardRecord) -> Self:
        """Take over from another record what cannot be rebuilt from the checkpoints."""
        return replace(
            self,
            attempts=other.attempts,
            failures=other.failures,
            retry_count=other.retry_count,
            suspects=other.suspects,
            token_budgets=other.token_budgets,
        )


_FIELDS = tuple(each.name for each in fields(ShardRecord))


class CommittedCheckpoint(Protocol):
    """What the manifest needs to know of a checkpoint on disk, such as a `CheckpointRecord`."""

    @property
    def path(self) -> Path: ...
    @property
    def rank(self) -> int: ...
    @property
    def batch_idx(self) -> int: ...
    @property
    def rows(self) -> int: ...


class CheckpointManifest:
    """`manifest.json`, with the lock file `manifest.lock` in the same directory.

    A shard lists its newest 256 checkpoints, or fewer if there are more than 16 shards;
    `num_checkpoints` and `total_sequences` count all of them. So the cost of an update does not
    grow with the run: a few milliseconds, and some tens of milliseconds for a thousand shards.

    Every method that changes the manifest raises LockTimeoutError if the lock is not free within
    30 s. Every method but those that create a manifest raises StorageError if it is missing or
    damaged. A rank that is not in the manifest is a ValueError.
    """

    def __init__(
        self,
        manifest_path: Path,
        staleness_threshold_sec: float = 600,
        *,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """Open a manifest; nothing is read or written yet.

        Args:
            manifest_path: The file, which need not exist.
            staleness_threshold_sec: Silence after which `is_shard_stale` is true.
            clock: Seconds since the epoch, since its readings outlive the process.
        """
        self.path = Path(manifest_path)
        self.staleness_threshold_sec = staleness_threshold_sec
        self._clock = clock
        self._lock = FileLock(self.path.with_suffix(".lock"), purpose=f"update {self.path.name}")

    def exists(self) -> bool:
        return self.path.is_file()

    def initialize(
        self, world_size: int, input_fingerprint: str = "", model_config_hash: str = ""
    ) -> None:
        """Write a manifest of `world_size` shards in progress, unless a manifest exists."""
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
        """Make the manifest fit the run and the checkpoints on disk, even if missing or damaged.

        A manifest of the same input and model is kept: shards are added up to `world_size`, those
        beyond it stay as a record, and all counts are set from `records`. Any other manifest, and a
        damaged one, is rebuilt, with a warning in the log.

        Args:
            world_size: Number of shards of this run; may differ from that of the last run.
            input_fingerprint: The run.
            model_config_hash: The weights.
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
        """Rebuild the manifest from the checkpoints.

        Attempts and failures are kept if they can still be read and belong to the same run: the
        ordinals of another run mean other sequences.
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
        """Record a committed checkpoint. One of the same number and file name replaces the first.

        Args:
            rank: The shard.
            batch_idx: Number of the checkpoint.
            num_sequences: Rows in it.
            checkpoint_file: Its name within the shard's directory. ValueError if it holds a path.
        """
        if checkpoint_file in {"", ".", ".."} or set(checkpoint_file) & set("/\\\0"):
            raise ValueError(
                f"checkpoint_file {checkpoint_file!r} must be a bare file name, without a path"
            )
        if batch_idx < 0 or num_sequences < 0:
            raise ValueError(
                f"batch_idx {batch_idx} and num_sequences {num_sequences} must not be negative"
            )
        checkpoint = ListedCheckpoint(
            batch_idx=batch_idx,
            num_sequences=num_sequences,
            file=checkpoint_file,
            timestamp=self._now(),
        )
        self._change_shard(rank, lambda shard: shard.with_checkpoint(checkpoint))

    def mark_shard_complete(self, rank: int) -> None:
        """Record that a shard is complete."""
        now = self._now()
        self._change_shard(
            rank,
            lambda shard: replace(
                shard, status=ShardStatus.COMPLETE, completed_at=now, failed_at=None, error=None
            ),
        )

    def mark_shard_failed(self, rank: int, error: str) -> None:
        """Record that a shard has failed, why and when; its retry count grows by one."""
        now = self._now()
        self._change_shard(
            rank,
            lambda shard: replace(
                shard,
                status=ShardStatus.FAILED,
                failed_at=now,
                error=error,
                retry_count=shard.retry_count + 1,
            ),
        )

    def start_attempt(self, rank: int, *, device: str | None = None) -> int:
        """Count an attempt on a shard, put it in progress, and return the attempt's number."""
        now = self._now()
        return self._change_shard(
            rank,
            lambda shard: replace(
                shard,
                status=ShardStatus.IN_PROGRESS,
                attempt_started_at=now,
                device=device,
                attempts=shard.attempts + 1,
            ),
        ).attempts

    def record_failure(self, rank: int, record: dict[str, Any]) -> None:
        """Add a JSON object to the failures of a shard.

        The newest 200 are kept, and the newest 200 with a true `accuses_batch`: a thousand
        preemptions push no strike out. If all shards together have more than 8,000, each keeps its
        share of them.
        """
        self._change_shard(
            rank,
            lambda shard: replace(
                shard,
                failures=tuple(_newest_failures([*shard.failures, record], MAX_FAILURES_KEPT)),
            ),
        )

    def failures(self, rank: int) -> list[dict[str, Any]]:
        """Return the recorded failures of a shard, oldest first, over all runs on the directory."""
        return list(_shard(self._read(), rank).failures)

    def add_suspects(self, rank: int, ordinals: Sequence[int]) -> None:
        """Record sequences of which one may crash the worker, to be computed one by one."""
        self._change_shard(
            rank,
            lambda shard: replace(
                shard, suspects=tuple(dict.fromkeys([*shard.suspects, *ordinals]))
            ),
        )

    def suspects(self) -> list[int]:
        """Return the suspects of all shards, including shards that only an earlier run had."""
        return [ordinal for shard in self.shards().values() for ordinal in shard.suspects]

    def remember_token_budget(self, rank: int, device: str, tokens: int) -> None:
        """Record how many tokens of a shard's sequences fit into the memory of a device."""
        self._change_shard(
            rank,
            lambda shard: replace(shard, token_budgets=shard.token_budgets | {device: tokens}),
        )

    def token_budget(self, rank: int, device: str) -> int | None:
        """Return the budget recorded for a shard on a device, or else the least of other shards.

        None if none is recorded for the device.
        """
        budgets = {
            other: shard.token_budgets[device]
            for other, shard in self.shards().items()
            if device in shard.token_budgets
        }
        return budgets.get(rank) or min(budgets.values(), default=None)

    def record_redistribution(self, failed_rank: int, new_rank: int) -> None:
        """Record that `new_rank` has taken over the shard of `failed_rank`."""
        now = self._now()
        self._change_shard(
            failed_rank,
            lambda shard: replace(shard, assigned_rank=new_rank, redistributed_at=now),
        )

    def get_redistributed_shards(self) -> dict[int, int]:
        """Return the rank that has each redistributed shard now, by the rank that failed."""
        return {
            rank: shard.assigned_rank
            for rank, shard in self.shards().items()
            if shard.assigned_rank != shard.original_rank
        }

    def get_shard_status(self, rank: int) -> dict[str, Any] | None:
        """Return a shard's record as a JSON object, or None if there is no such shard."""
        shard: dict[str, Any] | None = self._read()["shards"].get(str(rank))
        return shard

    def shard(self, rank: int) -> ShardRecord | None:
        """Return a shard's record, or None if there is no such shard."""
        shard = self.get_shard_status(rank)
        return None if shard is None else ShardRecord.from_json(shard)

    def shards(self) -> dict[int, ShardRecord]:
        """Return all records by rank, including shards that only an earlier run had."""
        return _shards_by_rank(self._read())

    def get_resumable_shards(self) -> list[int]:
        """Return the ranks of this run's shards that are not complete, in order."""
        shards = self._current_shards().items()
        return [rank for rank, shard in shards if shard.status != ShardStatus.COMPLETE]

    def get_completed_shards(self) -> list[int]:
        """Return the ranks of this run's shards that are complete, in order."""
        shards = self._current_shards().items()
        return [rank for rank, shard in shards if shard.status == ShardStatus.COMPLETE]

    def get_global_progress(self) -> dict[str, int]:
        """Count this run's shards by status, and the sequences in checkpoints of any shard."""
        state = self._read()
        shards = _shards_by_rank(state)
        statuses = [shard.status for rank, shard in shards.items() if rank < state["world_size"]]
        return {
            "total_shards": len(statuses),
            "completed": statuses.count(ShardStatus.COMPLETE),
            "in_progress": statuses.count(ShardStatus.IN_PROGRESS),
            "failed": statuses.count(ShardStatus.FAILED),
            "total_sequences_checkpointed": sum(shard.total_sequences for shard in shards.values()),
        }

    def is_shard_stale(self, rank: int) -> bool:
        """Return True if a shard in progress has recorded nothing for the staleness threshold."""
        state = self._read()
        shard = _shard(state, rank)
        if shard.status != ShardStatus.IN_PROGRESS:
            return False
        times = (state["created_at"], shard.attempt_started_at, shard.last_checkpoint_time)
        newest_s = max(datetime.fromisoformat(time_).timestamp() for time_ in times if time_)
        return self._clock() - newest_s > self.staleness_threshold_sec

    @contextmanager
    def _exclusive(self) -> Iterator[None]:
        make_directory(self.path.parent)
        with self._lock.held(timeout_s=LOCK_TIMEOUT_S):
            yield

    def _change_shard(self, rank: int, change: Callable[[ShardRecord], ShardRecord]) -> ShardRecord:
        """Replace the record of a shard under the lock, and return the new one."""

        def change_state(state: dict[str, Any]) -> ShardRecord:
            changed = change(_shard(state, rank))
            _set_shard(state, rank, changed)
            return changed

        return self._change(change_state)

    def _change(self, change: Callable[[dict[str, Any]], T]) -> T:
        """Apply `change` to the state, in place and under the lock, and return its result."""
        self._require_exists()
        with self._lock.held(timeout_s=LOCK_TIMEOUT_S):
            state = self._read()
            result = change(state)
            self._write(state)
        return result

    def _require_exists(self) -> None:
        if not self.exists():
            raise StorageError(
                f"{self.path} is missing: a run creates it, and rebuilds it from the checkpoints"
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
        # Each shard lists no more than its share: the file is written again at each checkpoint.
        shards = list(state["shards"].values())
        most_listed = max(1, MAX_CHECKPOINTS_LISTED_IN_ALL // len(shards))
        for shard in shards:
            shard["checkpoints"] = shard["checkpoints"][-most_listed:]
        if sum(len(shard["failures"]) for shard in shards) > MAX_FAILURES_KEPT_IN_ALL:
            most_kept = max(1, MAX_FAILURES_KEPT_IN_ALL // len(shards) // 2)
            for shard in shards:
                shard["failures"] = _newest_failures(shard["failures"], most_kept)
        write_sealed_json(self.path, state, replace=True)

    def _current_shards(self) -> dict[int, ShardRecord]:
        """Return the records of this run's shards, without those that only an earlier run had."""
        state = self._read()
        shards = _shards_by_rank(state)
        return {rank: shard for rank, shard in shards.items() if rank < state["world_size"]}

    def _state_to_keep(
        self, input_fingerprint: str, model_config_hash: str
    ) -> dict[str, Any] | None:
        """Return the state on disk if it is intact and belongs to this run."""
        if not self.exists():
            return None
        try:
            state = self._read()
        except (StorageError, OSError) as error:
            logger.warning("%s; it is rebuilt from the checkpoints", error)
            return None
        if not is_of_run(state, input_fingerprint, model_config_hash):
            logger.warning(
                "%s belongs to another run; it is rebuilt from the checkpoints", self.path
            )
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
        """Make the state that was found, or a new one, fit the run and the checkpoints."""
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
            logger.warning("%s; attempts and failures are counted from zero", error)
            return
        if old_state["input_fingerprint"] not in ("", state["input_fingerprint"]):
            logger.warning(
                "%s belongs to another run; attempts and failures are counted from zero", self.path
            )
            return
        for rank, old in _shards_by_rank(old_state).items():
            _set_shard(state, rank, _shard_or_new(state, rank).with_history_of(old))

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
            state["shards"].setdefault(str(rank), ShardRecord.new(rank).to_json())

    def _set_counts(
        self,
        state: dict[str, Any],
        records: Iterable[CommittedCheckpoint],
        *,
        rank: int | None = None,
    ) -> None:
        committed: dict[int, list[CommittedCheckpoint]] = {}
        for record in records:
            committed.setdefault(record.rank, []).append(record)
        known = {int(each) for each in state["shards"]}
        for each in sorted(known | set(committed)) if rank is None else [rank]:
            ordered = sorted(committed.get(each, []), key=lambda record: record.batch_idx)
            shard = _shard_or_new(state, each).counted(ordered, now=self._now())
            _set_shard(state, each, shard)

    def _now(self) -> str:
        return datetime.fromtimestamp(self._clock(), UTC).isoformat(timespec="milliseconds")


def is_of_run(state: dict[str, Any], input_fingerprint: str, model_config_hash: str) -> bool:
    """Return True if the state of a manifest belongs to a run."""
    return (state["input_fingerprint"], state["model_config_hash"]) == (
        input_fingerprint,
        model_config_hash,
    )


def _shard(state: dict[str, Any], rank: int) -> ShardRecord:
    shard: dict[str, Any] | None = state["shards"].get(str(rank))
    if shard is None:
        known = ", ".join(sorted(state["shards"], key=int))
        raise ValueError(f"there is no shard {rank}: the manifest has {known}")
    return ShardRecord.from_json(shard)


def _shard_or_new(state: dict[str, Any], rank: int) -> ShardRecord:
    return _shard(state, rank) if str(rank) in state["shards"] else ShardRecord.new(rank)


def _set_shard(state: dict[str, Any], rank: int, shard: ShardRecord) -> None:
    # Keys that a newer version wrote stay.
    state["shards"][str(rank)] = state["shards"].get(str(rank), {}) | shard.to_json()


def _shards_by_rank(state: dict[str, Any]) -> dict[int, ShardRecord]:
    return {
        int(rank): ShardRecord.from_json(state["shards"][rank])
        for rank in sorted(state["shards"], key=int)
    }


def _newest_failures(records: list[dict[str, Any]], most: int) -> list[dict[str, Any]]:
    """Return the newest `most` that accuse a batch and the newest `most` of the others."""
    strikes = [place for place, record in enumerate(records) if record.get("accuses_batch")]
    others = [place for place, record in enumerate(records) if not record.get("accuses_batch")]
    return [records[place] for place in sorted(strikes[-most:] + others[-most:])]
