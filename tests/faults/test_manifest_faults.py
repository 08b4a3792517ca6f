"""The manifest under eight concurrent processes, and under SIGKILL at each operation."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from pathlib import Path

import pytest

from tests.faults.figures import record_figure
from tests.faults.ops import CountingOps, KillingOps, install
from tests.faults.trials import Fork, call
from vnp_lib.checkpoint.manifest import CheckpointManifest

pytestmark = pytest.mark.slow

NUM_PROCESSES = 8
CHANGES = (
    "update",
    "mark_complete",
    "mark_failed",
    "start_attempt",
    "record_failure",
    "initialize",
    "rebuild",
)


def test_no_update_of_eight_processes_is_lost(trials, scale) -> None:
    """Half of them share a shard with another."""
    num_updates = scale(40, 500)
    recorded = trials.once(eight_processes, num_updates)
    assert recorded == NUM_PROCESSES * num_updates
    record_figure(
        f"manifest: 8 processes x {num_updates} updates",
        NUM_PROCESSES * num_updates,
        f"{recorded:,} recorded",
    )


def test_a_manifest_survives_a_killed_writer(trials, scale) -> None:
    """Each kind of change is killed at each operation, while another process continues."""
    num_operations = {change: trials.once(count_operations, change) for change in CHANGES}
    every = [
        (change, number) for change in CHANGES for number in range(1, num_operations[change] + 1)
    ]
    num_trials = len(trials.run(kill_a_change, range(len(every) * scale(1, 8)), every))
    record_figure(
        "manifest: killed at each operation of each change",
        num_trials,
        "JSON valid, nothing acknowledged lost",
    )


def test_no_update_is_lost_among_processes_that_are_killed(trials, seeds, scale) -> None:
    """Eight processes update the manifest, are killed at any moment, and start again."""
    counts = trials.run(kill_updaters, seeds(scale(2, 20)))
    record_figure(
        "manifest: 8 processes killed at random",
        sum(counts),
        "JSON valid, nothing acknowledged lost",
    )


def eight_processes(directory: Path, num_updates: int) -> int:
    manifest = new_manifest(directory)
    forks = [
        Fork(update, manifest.path, number // 2, number * num_updates, num_updates)
        for number in range(8)
    ]
    ended = [fork.wait() for fork in forks]
    assert not any(each.error for each in ended), [each.error for each in ended]
    shards = [manifest.get_shard_status(rank) for rank in range(NUM_PROCESSES)]
    assert (
        manifest.get_global_progress()["total_sequences_checkpointed"]
        == 10 * NUM_PROCESSES * num_updates
    )
    return sum(shard["num_checkpoints"] for shard in shards)


def count_operations(directory: Path, change: str) -> int:
    new_manifest(directory)
    ops = CountingOps()
    install(ops)
    do(change, directory)
    return len(ops.names)


def kill_a_change(directory: Path, seed: int, every: list[tuple[str, int]]) -> None:
    change, kill_at = every[seed % len(every)]
    manifest = new_manifest(directory)
    manifest.record_failure(1, {"kind": "before"})
    other = Fork(update, manifest.path, 2, 0, 10)
    assert call(do_and_crash, change, kill_at, directory).was_killed
    ended = other.wait()
    assert not ended.error, f"{change} killed at {kill_at}: {ended.error}"

    json.loads(manifest.path.read_bytes())
    assert manifest.get_shard_status(2)["num_checkpoints"] == 10
    assert manifest.failures(1)[0] == {"kind": "before"}
    # The lock is free, and the same change can be made again.
    assert not call(do, change, directory).error


def kill_updaters(directory: Path, seed: int) -> int:
    """Return how many updates were acknowledged."""
    draw = random.Random(seed)
    manifest = new_manifest(directory)
    running = {
        rank: Fork(update_and_acknowledge, manifest.path, rank, 0) for rank in range(NUM_PROCESSES)
    }
    for _ in range(24):
        rank = draw.randrange(NUM_PROCESSES)
        _until_acknowledged(
            manifest.path, rank, at_least=_acknowledged(manifest.path, rank) + draw.randint(0, 2)
        )
        kill(running[rank])
        json.loads(manifest.path.read_bytes())
        running[rank] = Fork(
            update_and_acknowledge, manifest.path, rank, 100_000 * (1 + _round(manifest.path, rank))
        )
    for fork in running.values():
        kill(fork)
    total = 0
    for rank in range(NUM_PROCESSES):
        acknowledged = _acknowledged(manifest.path, rank)
        recorded = manifest.get_shard_status(rank)["num_checkpoints"]
        kills = _round(manifest.path, rank) + 1
        assert acknowledged <= recorded <= acknowledged + kills, (
            f"shard {rank}: {acknowledged} acknowledged, {recorded} recorded"
        )
        total += acknowledged
    return total


def new_manifest(directory: Path) -> CheckpointManifest:
    manifest = CheckpointManifest(directory / "manifest.json")
    manifest.initialize(world_size=NUM_PROCESSES, input_fingerprint="", model_config_hash="")
    return manifest


def do(change: str, directory: Path) -> None:
    manifest = CheckpointManifest(directory / "manifest.json")
    match change:
        case "update":
            manifest.update_shard_checkpoint(0, 7, 10, "batch_00007.pt")
        case "mark_complete":
            manifest.mark_shard_complete(0)
        case "mark_failed":
            manifest.mark_shard_failed(0, "an error")
        case "start_attempt":
            manifest.start_attempt(0)
        case "record_failure":
            manifest.record_failure(0, {"kind": "oom"})
        case "initialize":
            (directory / "new").mkdir(exist_ok=True)
            CheckpointManifest(directory / "new" / "manifest.json").initialize(1, "", "")
        case "rebuild":
            manifest.reconcile([], rank=0)


def do_and_crash(change: str, kill_at: int, directory: Path) -> None:
    install(KillingOps(kill_at))
    do(change, directory)


def update(path: Path, rank: int, first: int, count: int) -> None:
    manifest = CheckpointManifest(path)
    for number in range(first, first + count):
        manifest.update_shard_checkpoint(rank, number, 10, f"batch_{number:05d}.pt")


def update_and_acknowledge(path: Path, rank: int, first: int) -> None:
    """Update forever; each update that has returned adds one byte to a file."""
    log = os.open(path.with_name(f"acknowledged_{rank}"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.close(os.open(path.with_name(f"round_{rank}_{first}"), os.O_CREAT))
    for number in range(first, first + 100_000):
        update(path, rank, number, 1)
        os.write(log, b".")


def kill(fork: Fork) -> None:
    os.kill(fork.pid, signal.SIGKILL)
    ended = fork.wait()
    assert ended.was_killed, ended.error


def _acknowledged(path: Path, rank: int) -> int:
    log = path.with_name(f"acknowledged_{rank}")
    return log.stat().st_size if log.exists() else 0


def _round(path: Path, rank: int) -> int:
    return len(list(path.parent.glob(f"round_{rank}_*"))) - 1


def _until_acknowledged(path: Path, rank: int, *, at_least: int) -> None:
    deadline_s = time.monotonic() + 60
    while _acknowledged(path, rank) < at_least:
        assert time.monotonic() < deadline_s
        time.sleep(0.001)
