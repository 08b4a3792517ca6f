"""Tests of the manifest: its states, its lock between real processes, its rebuilding."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from vnp_lib.checkpoint import manifest
from vnp_lib.checkpoint.manifest import CheckpointManifest
from vnp_lib.errors import LockTimeoutError, StorageError
from vnp_lib.storage import durable
from vnp_lib.storage.durable import DurableOps, read_sealed_json, write_sealed_json
from vnp_lib.storage.locks import FileLock


@dataclass(frozen=True, kw_only=True)
class Committed:
    """A checkpoint on disk, as the manifest sees it."""

    rank: int
    batch_idx: int
    rows: int = 10

    @property
    def path(self) -> Path:
        return Path(f"shard_{self.rank}/batch_{self.batch_idx:05d}.pt")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "manifest.json"


@pytest.fixture
def four_shards(path: Path) -> CheckpointManifest:
    four = CheckpointManifest(path)
    four.initialize(world_size=4, input_fingerprint="", model_config_hash="")
    return four


def status_of(of: CheckpointManifest, rank: int) -> dict[str, Any]:
    shard = of.get_shard_status(rank)
    assert shard is not None
    return shard


def update(of: CheckpointManifest, rank: int, batch_idx: int, num_sequences: int = 10) -> None:
    of.update_shard_checkpoint(rank, batch_idx, num_sequences, f"batch_{batch_idx:05d}.pt")


def updates_in_another_process(
    path: Path, rank: int, first: int, count: int
) -> subprocess.Popen[bytes]:
    code = """
import sys
from pathlib import Path
from vnp_lib.checkpoint.manifest import CheckpointManifest
path, (rank, first, count) = Path(sys.argv[1]), map(int, sys.argv[2:])
manifest = CheckpointManifest(path)
for k in range(first, first + count):
    manifest.update_shard_checkpoint(rank, k, 10, f"batch_{k:05d}.pt")
"""
    return subprocess.Popen(
        [sys.executable, "-c", code, str(path), str(rank), str(first), str(count)]
    )


def test_manifest_initialize_creates_json(path: Path) -> None:
    CheckpointManifest(path).initialize(world_size=4, input_fingerprint="", model_config_hash="")
    state = json.loads(path.read_text())
    assert state["version"] == "1.0"
    assert state["world_size"] == 4
    assert list(state["shards"]) == ["0", "1", "2", "3"]
    for rank, shard in enumerate(state["shards"].values()):
        assert shard["status"] == "in_progress"
        assert (shard["original_rank"], shard["assigned_rank"]) == (rank, rank)
        assert (shard["last_checkpoint_batch"], shard["total_sequences"], shard["checkpoints"]) == (
            -1,
            0,
            [],
        )
        assert (shard["retry_count"], shard["error"], shard["last_checkpoint_time"]) == (
            0,
            None,
            None,
        )


def test_manifest_update_shard_checkpoint(four_shards: CheckpointManifest) -> None:
    four_shards.update_shard_checkpoint(
        rank=0, batch_idx=5, num_sequences=100, checkpoint_file="batch_00005.pt"
    )
    shard = status_of(four_shards, 0)
    assert (shard["last_checkpoint_batch"], shard["total_sequences"]) == (5, 100)
    (entry,) = shard["checkpoints"]
    assert entry == {
        "batch_idx": 5,
        "num_sequences": 100,
        "file": "batch_00005.pt",
        "timestamp": shard["last_checkpoint_time"],
    }
    assert datetime.fromisoformat(entry["timestamp"]).tzinfo is UTC
    assert status_of(four_shards, 1)["total_sequences"] == 0


@pytest.mark.parametrize(
    "name", ["shard_0/batch_00005.pt", "../a.pt", "/a.pt", "a\\b.pt", "a\0.pt", "..", ".", ""]
)
def test_a_file_name_with_a_path_in_it_is_refused(
    four_shards: CheckpointManifest, name: str
) -> None:
    with pytest.raises(ValueError, match="must be a bare file name"):
        four_shards.update_shard_checkpoint(
            rank=0, batch_idx=5, num_sequences=1, checkpoint_file=name
        )


def test_manifest_mark_shard_complete(four_shards: CheckpointManifest) -> None:
    four_shards.mark_shard_complete(0)
    shard = status_of(four_shards, 0)
    assert shard["status"] == "complete"
    assert datetime.fromisoformat(shard["completed_at"]).tzinfo is UTC


def test_manifest_mark_shard_failed(four_shards: CheckpointManifest) -> None:
    four_shards.mark_shard_failed(2, error="out of memory")
    four_shards.mark_shard_failed(2, error="out of memory again")
    shard = status_of(four_shards, 2)
    assert (shard["status"], shard["error"], shard["retry_count"]) == (
        "failed",
        "out of memory again",
        2,
    )
    assert datetime.fromisoformat(shard["failed_at"]).tzinfo is UTC


def test_manifest_get_resumable_shards(four_shards: CheckpointManifest) -> None:
    four_shards.mark_shard_complete(0)
    four_shards.mark_shard_failed(2, "x")
    assert four_shards.get_resumable_shards() == [1, 2, 3]


def test_manifest_get_completed_shards(four_shards: CheckpointManifest) -> None:
    four_shards.mark_shard_complete(0)
    four_shards.mark_shard_failed(2, "x")
    assert four_shards.get_completed_shards() == [0]


def test_manifest_get_global_progress(four_shards: CheckpointManifest) -> None:
    update(four_shards, 0, 0, 100)
    update(four_shards, 1, 0, 50)
    four_shards.mark_shard_complete(0)
    four_shards.mark_shard_failed(2, "x")
    assert four_shards.get_global_progress() == {
        "total_shards": 4,
        "completed": 1,
        "in_progress": 2,
        "failed": 1,
        "total_sequences_checkpointed": 150,
    }


def test_manifest_atomic_write_no_temp_remains(four_shards: CheckpointManifest) -> None:
    update(four_shards, 0, 0)
    assert sorted(os.listdir(four_shards.path.parent)) == ["manifest.json", "manifest.lock"]


def test_manifest_exists_false_before_init(path: Path) -> None:
    unborn = CheckpointManifest(path)
    assert not unborn.exists()
    unborn.initialize(1, "", "")
    assert unborn.exists()


def test_manifest_cumulative_sequence_count(four_shards: CheckpointManifest) -> None:
    update(four_shards, 0, 0, 100)
    update(four_shards, 0, 1, 150)
    shard = status_of(four_shards, 0)
    assert (shard["total_sequences"], shard["num_checkpoints"]) == (250, 2)


def test_manifest_concurrent_updates_no_corruption(four_shards: CheckpointManifest) -> None:
    """Four real processes, fifty updates each, on four shards: nobody's is lost."""
    processes = [updates_in_another_process(four_shards.path, rank, 0, 50) for rank in range(4)]
    assert [process.wait(timeout=120) for process in processes] == [0] * 4
    json.loads(four_shards.path.read_text())
    for rank in range(4):
        shard = status_of(four_shards, rank)
        assert [entry["batch_idx"] for entry in shard["checkpoints"]] == list(range(50))
        assert (shard["num_checkpoints"], shard["total_sequences"]) == (50, 500)


def test_manifest_concurrent_same_shard_updates(four_shards: CheckpointManifest) -> None:
    """Two real processes, twenty-five updates each, on one shard: the sum of fifty."""
    processes = [updates_in_another_process(four_shards.path, 0, first, 25) for first in (0, 25)]
    assert [process.wait(timeout=120) for process in processes] == [0] * 2
    shard = status_of(four_shards, 0)
    assert sorted(entry["batch_idx"] for entry in shard["checkpoints"]) == list(range(50))
    assert shard["total_sequences"] == 500


def test_manifest_file_lock_prevents_corruption(
    four_shards: CheckpointManifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[str] = []
    flock, replace = fcntl.flock, os.replace

    def recorded_flock(fd: int, operation: int) -> None:
        steps.append(
            "LOCK_EX"
            if operation & fcntl.LOCK_EX
            else "LOCK_UN"
            if operation & fcntl.LOCK_UN
            else "?"
        )
        flock(fd, operation)

    def recorded_replace(source: Path, target: Path) -> None:
        steps.append("write")
        replace(source, target)

    monkeypatch.setattr(fcntl, "flock", recorded_flock)
    monkeypatch.setattr(os, "replace", recorded_replace)
    update(four_shards, 0, 0)
    assert steps == ["LOCK_EX", "write", "LOCK_UN"]


def test_manifest_record_redistribution(four_shards: CheckpointManifest) -> None:
    four_shards.record_redistribution(failed_rank=2, new_rank=0)
    shard = status_of(four_shards, 2)
    assert (shard["original_rank"], shard["assigned_rank"]) == (2, 0)
    assert datetime.fromisoformat(shard["redistributed_at"]).tzinfo is UTC


def test_manifest_get_redistributed_shards(four_shards: CheckpointManifest) -> None:
    assert four_shards.get_redistributed_shards() == {}
    four_shards.record_redistribution(failed_rank=2, new_rank=0)
    four_shards.record_redistribution(failed_rank=3, new_rank=1)
    assert four_shards.get_redistributed_shards() == {2: 0, 3: 1}


def test_the_same_checkpoint_again_counts_once(four_shards: CheckpointManifest) -> None:
    update(four_shards, 0, 0, 100)
    update(four_shards, 0, 1, 10)
    update(four_shards, 0, 0, 100)
    update(four_shards, 0, 1, 12)
    shard = status_of(four_shards, 0)
    assert (shard["total_sequences"], shard["num_checkpoints"], shard["last_checkpoint_batch"]) == (
        112,
        2,
        1,
    )


def test_an_update_costs_the_same_however_many_there_were(
    four_shards: CheckpointManifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(manifest, "MAX_CHECKPOINTS_LISTED", 8)
    sizes = []
    for batch_idx in range(24):
        update(four_shards, 0, batch_idx + 10_000)
        sizes.append(four_shards.path.stat().st_size)
    assert max(sizes[8:]) - min(sizes[8:]) <= 2  # the digits of the totals
    shard = status_of(four_shards, 0)
    assert [entry["batch_idx"] for entry in shard["checkpoints"]] == list(range(10_016, 10_024))
    assert (shard["num_checkpoints"], shard["total_sequences"]) == (24, 240)


@pytest.mark.parametrize(("batch_idx", "num_sequences"), [(-1, 1), (0, -1)])
def test_negative_numbers_are_refused(
    four_shards: CheckpointManifest, batch_idx: int, num_sequences: int
) -> None:
    with pytest.raises(ValueError, match="must not be negative"):
        four_shards.update_shard_checkpoint(0, batch_idx, num_sequences, "a.pt")


def test_a_shard_that_is_not_there_is_said(four_shards: CheckpointManifest) -> None:
    assert four_shards.get_shard_status(4) is None
    with pytest.raises(ValueError, match="there is no shard 4: the manifest has 0, 1, 2, 3"):
        four_shards.mark_shard_complete(4)


def test_attempts_are_counted_and_put_a_failed_shard_in_progress(
    four_shards: CheckpointManifest,
) -> None:
    assert four_shards.start_attempt(1) == 1
    four_shards.mark_shard_failed(1, "x")
    assert CheckpointManifest(four_shards.path).start_attempt(1) == 2
    assert status_of(four_shards, 1)["status"] == "in_progress"


def test_failures_outlive_the_process_and_only_the_newest_are_kept(
    four_shards: CheckpointManifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(manifest, "MAX_FAILURES_KEPT", 3)
    for strike in range(5):
        four_shards.record_failure(2, {"kind": "poison_input", "batch_idx": 42, "strike": strike})
    assert [record["strike"] for record in CheckpointManifest(four_shards.path).failures(2)] == [
        2,
        3,
        4,
    ]
    assert four_shards.failures(0) == []


def test_a_failure_that_is_no_json_changes_nothing(four_shards: CheckpointManifest) -> None:
    with pytest.raises(TypeError):
        four_shards.record_failure(0, {"error": object()})
    assert four_shards.failures(0) == []
    assert sorted(os.listdir(four_shards.path.parent)) == ["manifest.json", "manifest.lock"]


def test_a_silent_shard_is_stale(path: Path) -> None:
    """A shard is stale when it has recorded nothing for too long."""
    now_s = 1e9
    watched = CheckpointManifest(path, staleness_threshold_sec=600, clock=lambda: now_s)
    watched.initialize(3, "", "")
    watched.mark_shard_complete(2)
    now_s += 601
    update(watched, 1, 0)
    assert [watched.is_shard_stale(rank) for rank in range(3)] == [True, False, False]
    watched.start_attempt(0)
    assert not watched.is_shard_stale(0)
    now_s += 601
    assert [watched.is_shard_stale(rank) for rank in range(3)] == [True, True, False]


def test_initialize_leaves_one_that_is_there(four_shards: CheckpointManifest) -> None:
    update(four_shards, 0, 0)
    four_shards.initialize(world_size=2, input_fingerprint="x", model_config_hash="y")
    assert four_shards.get_global_progress()["total_shards"] == 4
    assert status_of(four_shards, 0)["total_sequences"] == 10


def test_a_run_has_a_shard(path: Path) -> None:
    with pytest.raises(ValueError, match="world_size is 0"):
        CheckpointManifest(path).initialize(0, "", "")


READS: list[Callable[[CheckpointManifest], Any]] = [
    lambda of: of.get_shard_status(0),
    lambda of: of.get_resumable_shards(),
    lambda of: of.get_completed_shards(),
    lambda of: of.get_global_progress(),
    lambda of: of.get_redistributed_shards(),
    lambda of: of.is_shard_stale(0),
    lambda of: of.failures(0),
    lambda of: of.start_attempt(0),
    lambda of: update(of, 0, 0),
    lambda of: of.reconcile([]),
]


@pytest.mark.parametrize("read", READS)
def test_a_missing_manifest_is_said(
    tmp_path: Path, read: Callable[[CheckpointManifest], Any]
) -> None:
    with pytest.raises(StorageError, match=r"none/manifest.json is missing: a run creates it"):
        read(CheckpointManifest(tmp_path / "none" / "manifest.json"))


def tear(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def age(path: Path) -> None:
    write_sealed_json(path, read_sealed_json(path) | {"version": "0.9"}, replace=True)


def flip(path: Path) -> None:
    """A total of 10 becomes 18, which is JSON all the same."""
    path.write_text(path.read_text().replace('"total_sequences":10', '"total_sequences":18'))


def empty(path: Path) -> None:
    os.truncate(path, 0)


def turn_into_a_list(path: Path) -> None:
    path.write_text("[]")


DAMAGES = [tear, age, flip, empty, turn_into_a_list]


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("read", READS)
def test_a_damaged_manifest_is_never_believed(
    four_shards: CheckpointManifest,
    damage: Callable[[Path], None],
    read: Callable[[CheckpointManifest], Any],
) -> None:
    update(four_shards, 0, 0)
    damage(four_shards.path)
    with pytest.raises(StorageError, match=r"manifest.json"):
        read(four_shards)


@pytest.mark.parametrize("damage", [*DAMAGES, Path.unlink])
def test_a_damaged_manifest_is_rebuilt(
    path: Path, damage: Callable[[Path], None], caplog: pytest.LogCaptureFixture
) -> None:
    lost = CheckpointManifest(path)
    lost.open_or_rebuild(2, "run", "model", [])
    update(lost, 0, 0)
    damage(path)
    lost.open_or_rebuild(
        2, "run", "model", [Committed(rank=0, batch_idx=0), Committed(rank=1, batch_idx=3, rows=7)]
    )
    assert lost.get_global_progress()["total_sequences_checkpointed"] == 17
    assert status_of(lost, 1)["last_checkpoint_batch"] == 3
    assert status_of(lost, 1)["checkpoints"][0]["file"] == "batch_00003.pt"
    assert ("rebuilt from the checkpoints" in caplog.text) is (damage is not Path.unlink)


def test_another_runs_manifest_is_rebuilt(
    four_shards: CheckpointManifest, caplog: pytest.LogCaptureFixture
) -> None:
    four_shards.record_failure(0, {"kind": "poison_input"})
    four_shards.open_or_rebuild(2, "another", "", [])
    assert "belongs to another run" in caplog.text
    assert four_shards.failures(0) == []


def test_a_manifest_keeps_history_and_counts_the_disk(path: Path) -> None:
    """A good manifest keeps its history and gets its counts from the disk."""
    kept = CheckpointManifest(path)
    kept.open_or_rebuild(2, "run", "model", [])
    for batch_idx in range(3):
        update(kept, 0, batch_idx)
    update(kept, 1, 0)
    kept.start_attempt(1)
    kept.record_failure(1, {"kind": "oom"})
    kept.mark_shard_complete(0)
    kept.mark_shard_complete(1)
    written_at = status_of(kept, 0)["checkpoints"][0]["timestamp"]
    kept.open_or_rebuild(
        2,
        "run",
        "model",
        [
            Committed(rank=1, batch_idx=0),
            Committed(rank=0, batch_idx=2),
            Committed(rank=0, batch_idx=0),
        ],
    )
    assert status_of(kept, 0)["total_sequences"] == 20
    assert [entry["batch_idx"] for entry in status_of(kept, 0)["checkpoints"]] == [0, 2]
    assert status_of(kept, 0)["checkpoints"][0]["timestamp"] == written_at
    assert status_of(kept, 0)["status"] == "in_progress"  # it has lost a checkpoint
    assert status_of(kept, 1)["status"] == "complete"
    assert (status_of(kept, 1)["attempts"], kept.failures(1)) == (1, [{"kind": "oom"}])


def test_rebuilding_keeps_the_history_that_can_be_read(four_shards: CheckpointManifest) -> None:
    four_shards.start_attempt(3)
    four_shards.record_failure(3, {"kind": "oom"})
    four_shards.mark_shard_failed(3, "x")
    four_shards.rebuild(2, "run", [Committed(rank=5, batch_idx=0)])
    assert four_shards.failures(3) == [{"kind": "oom"}]
    assert (status_of(four_shards, 3)["attempts"], status_of(four_shards, 3)["retry_count"]) == (
        1,
        1,
    )
    assert four_shards.get_global_progress()["total_sequences_checkpointed"] == 10
    tear(four_shards.path)
    four_shards.rebuild(2, "run", [])
    assert four_shards.get_resumable_shards() == [0, 1]


def test_rebuilding_keeps_nothing_of_another_run(four_shards: CheckpointManifest) -> None:
    """The ordinals in its strikes and suspects are other sequences in this one."""
    four_shards.rebuild(2, "run", [])
    four_shards.add_suspects(0, [7])
    four_shards.record_failure(0, {"ordinal": 7, "accuses_batch": True})
    four_shards.rebuild(2, "run", [])
    assert (four_shards.suspects(), len(four_shards.failures(0))) == ([7], 1)
    four_shards.rebuild(2, "another", [])
    assert (four_shards.suspects(), four_shards.failures(0)) == ([], [])


def test_the_number_of_shards_may_change_from_run_to_run(path: Path) -> None:
    """What the former shards have done stays counted; only this run's are to be resumed."""
    grown = CheckpointManifest(path)
    records = [Committed(rank=rank, batch_idx=0) for rank in range(4)]
    grown.open_or_rebuild(4, "run", "model", records)
    grown.open_or_rebuild(2, "run", "model", records)
    assert grown.get_resumable_shards() == [0, 1]
    assert grown.get_global_progress() == {
        "total_shards": 2,
        "completed": 0,
        "in_progress": 2,
        "failed": 0,
        "total_sequences_checkpointed": 40,
    }
    grown.open_or_rebuild(6, "run", "model", records)
    assert grown.get_resumable_shards() == [0, 1, 2, 3, 4, 5]
    assert status_of(grown, 3)["total_sequences"] == 10


def test_reconciling_one_shard_leaves_the_others(four_shards: CheckpointManifest) -> None:
    update(four_shards, 0, 0)
    update(four_shards, 1, 0)
    four_shards.reconcile([], rank=0)
    assert (
        status_of(four_shards, 0)["total_sequences"],
        status_of(four_shards, 1)["total_sequences"],
    ) == (0, 10)


def test_a_lock_that_is_not_given_up_names_its_holder(
    four_shards: CheckpointManifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(manifest, "LOCK_TIMEOUT_S", 0.01)
    lock = FileLock(four_shards.path.with_suffix(".lock"), purpose="test")
    with (
        lock.held(timeout_s=0),
        pytest.raises(LockTimeoutError, match=f"process {os.getpid()} on .* to test"),
    ):
        update(four_shards, 0, 0)
    update(four_shards, 0, 0)


def test_the_lock_file_is_never_removed(four_shards: CheckpointManifest) -> None:
    lock_file = four_shards.path.with_suffix(".lock")
    inode = lock_file.stat().st_ino
    for batch_idx in range(3):
        update(four_shards, 0, batch_idx)
    assert lock_file.stat().st_ino == inode


def test_readers_never_see_a_half_written_manifest(four_shards: CheckpointManifest) -> None:
    writer = updates_in_another_process(four_shards.path, 0, 0, 50)
    totals = [0]
    while writer.poll() is None:
        totals.append(four_shards.get_global_progress()["total_sequences_checkpointed"])
    assert writer.returncode == 0
    assert totals == sorted(totals)


OPERATIONS = [
    "open",
    "flock",
    "open",
    "write",
    "fsync",
    "close",
    "replace",
    "fsync_directory",
    "flock",
    "close",
]


@pytest.mark.parametrize("kill_at", range(len(OPERATIONS)), ids=OPERATIONS)
@pytest.mark.parametrize("is_before", [True, False], ids=["before", "after"])
def test_a_writer_killed_at_any_operation_leaves_a_valid_manifest(
    four_shards: CheckpointManifest, kill_at: int, is_before: bool
) -> None:
    """With the update or without it; and the next writer waits for nobody."""
    code = """
import os, signal, sys
from pathlib import Path
from vnp_lib.storage import durable
from vnp_lib.checkpoint.manifest import CheckpointManifest

class Killing(durable.DurableOps):
    count = 0
    def __getattribute__(self, name):
        call = super().__getattribute__(name)
        def killing(*arguments):
            index = Killing.count
            Killing.count += 1
            if index == int(sys.argv[2]) and sys.argv[3] == "True":
                os.kill(os.getpid(), signal.SIGKILL)
            result = call(*arguments)
            if index == int(sys.argv[2]):
                os.kill(os.getpid(), signal.SIGKILL)
            return result
        return killing

durable.ops = Killing()
CheckpointManifest(Path(sys.argv[1])).update_shard_checkpoint(0, 0, 10, "batch_00000.pt")
"""
    command = [sys.executable, "-c", code, str(four_shards.path), str(kill_at), str(is_before)]
    assert subprocess.run(command, timeout=60).returncode == -signal.SIGKILL
    replaced = OPERATIONS.index("replace")
    is_recorded = kill_at > replaced or (kill_at == replaced and not is_before)
    assert status_of(four_shards, 0)["total_sequences"] == (10 if is_recorded else 0)
    update(four_shards, 0, 0)
    assert status_of(four_shards, 0)["total_sequences"] == 10


def test_the_operations_of_an_update_are_the_ones_that_are_killed(
    four_shards: CheckpointManifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []

    class Recording(DurableOps):
        def __getattribute__(self, name: str) -> Any:
            calls.append(name)
            return super().__getattribute__(name)

    monkeypatch.setattr(durable, "ops", Recording())
    update(four_shards, 0, 0)
    assert calls == OPERATIONS


def test_a_thousand_shards_stay_readable_and_cheap(path: Path) -> None:
    """With 256 checkpoints of each of 1,280 shards it had 34 MiB, too many to be read."""
    of_many = CheckpointManifest(path)
    records = [
        Committed(rank=rank, batch_idx=number, rows=10)
        for rank in range(1280)
        for number in range(5)
    ]
    of_many.open_or_rebuild(1280, "", "", records)
    of_many.update_shard_checkpoint(1279, 5, 10, "batch_00005.pt")
    shard = of_many.get_shard_status(1279)
    assert (shard["num_checkpoints"], shard["total_sequences"]) == (6, 60)
    assert [each["batch_idx"] for each in shard["checkpoints"]] == [3, 4, 5]
    assert path.stat().st_size < 2 * 1024**2


def test_failures_of_all_shards_together_are_bounded(
    four_shards: CheckpointManifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(manifest, "MAX_FAILURES_KEPT_IN_ALL", 16)
    for number in range(40):
        four_shards.record_failure(number % 4, {"number": number, "accuses_batch": number < 8})
    kept = four_shards.failures(0)
    assert [each["number"] for each in kept if each["accuses_batch"]] == [0, 4]
    assert kept[-1]["number"] == 36
    assert sum(len(four_shards.failures(rank)) for rank in range(4)) <= 16
