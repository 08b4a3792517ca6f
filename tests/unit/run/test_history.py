"""Tests of the history of attempts: what a worker writes, what is read, and harmless errors."""

from __future__ import annotations

import errno
import json
import os
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import torch

from vnp_lib.checkpoint.manifest import CheckpointManifest
from vnp_lib.checkpoint.writer import AsyncCheckpointWriter
from vnp_lib.errors import InputError
from vnp_lib.failures import Failure, FailureCause
from vnp_lib.plan.paths import RunPaths
from vnp_lib.plan.plan import ModelIdentity, RunPlan
from vnp_lib.plan.planner import make_plan
from vnp_lib.run import history
from vnp_lib.run.history import AttemptHistory, Ending, read_attempts
from vnp_lib.storage.durable import make_directory
from vnp_lib.storage.locks import FileLock

MODEL = ModelIdentity(
    model="esm2_t6_8M_UR50D", weights_digest="random:seed=0", layer=6, dtype="float32"
)
NOON = datetime(2026, 11, 21, 12, tzinfo=UTC)


class Clock:
    """Noon, and a second more each time it is asked."""

    def __init__(self, start: datetime = NOON) -> None:
        self.now = start - timedelta(seconds=1)

    def __call__(self) -> datetime:
        self.now += timedelta(seconds=1)
        return self.now


@pytest.fixture
def paths(tmp_path: Path) -> RunPaths:
    paths = RunPaths(tmp_path / "run")
    make_directory(paths.shard_dir(0))
    return paths


@pytest.fixture
def plan(paths: RunPaths, tiny_fasta: Path) -> RunPlan:
    return make_plan(paths, [tiny_fasta], MODEL, num_shards=1, token_budget=100)


def commit(plan: RunPlan, paths: RunPaths, number: int, ordinals: Any) -> None:
    with AsyncCheckpointWriter() as writer:
        metadata = {"ordinals": ordinals.tolist(), "fingerprint": plan.fingerprint}
        writer.write_checkpoint_async(
            paths.checkpoint(0, number), torch.ones(ordinals.size, 4), plan.ids(ordinals), metadata
        )


def begin(paths: RunPaths, start: datetime = NOON) -> AttemptHistory:
    attempt = AttemptHistory(paths, 0, clock=Clock(start))
    attempt.started(device="cpu", pending=40)
    return attempt


def failure_at(at: datetime, cause: FailureCause = FailureCause.KILLED) -> dict[str, Any]:
    return Failure(cause=cause, message="worker process killed by SIGKILL").to_json() | {
        "at": at.isoformat()
    }


def test_an_attempt_is_read_back_as_it_was(plan: RunPlan, paths: RunPaths) -> None:
    """Tokens are those of the checkpoint; seconds count from when the model was loaded."""
    manifest = CheckpointManifest(paths.manifest)
    manifest.initialize(1, plan.fingerprint, "w")
    manifest.start_attempt(0)
    manifest.start_attempt(0, device="3")
    monotonic = iter([0.0, 10.0, 100.0, 108.0, 110.5])
    attempt = AttemptHistory(paths, 0, clock=Clock(), monotonic=lambda: next(monotonic))
    attempt.started(device="cuda", pending=40)
    attempt.loaded()
    for number, ordinals in enumerate([plan.order[:30], plan.order[30:]]):
        commit(plan, paths, number, ordinals)
        attempt.checkpoint(plan, number, ordinals.size)
    attempt.ended(Ending.DONE)
    (read,) = read_attempts(paths, 0)
    assert (read.number, read.device, read.pid, read.pending, read.ending) == (
        2,
        "3",
        os.getpid(),
        40,
        Ending.DONE,
    )
    assert (read.started_at, read.ended_at) == (NOON, NOON + timedelta(seconds=3))
    tokens = [plan.num_tokens(plan.order[:30]), plan.num_tokens(plan.order[30:])]
    assert [(each.number, each.rows, each.tokens, each.seconds) for each in read.checkpoints] == [
        (0, 30, tokens[0], 8.0),
        (1, 10, tokens[1], 2.5),
    ]
    assert read.checkpoints[1].tokens_per_s == tokens[1] / 2.5


def test_without_a_manifest_the_device_is_its_kind(paths: RunPaths) -> None:
    """Without a manifest the kind of the device is what is known."""
    begin(paths)
    (read,) = read_attempts(paths, 0)
    assert (read.number, read.device) == (None, "cpu")


def test_an_exception_is_the_end_of_an_attempt(paths: RunPaths) -> None:
    with pytest.raises(InputError), begin(paths):
        raise InputError("weights \udcff have changed\nsince")
    (read,) = read_attempts(paths, 0)
    assert (read.ending, read.cause, read.kind) == (Ending.FAILED, "configuration", "transient")
    assert read.message == "InputError: weights ? have changed\nsince"


def test_an_attempt_that_failed_before_it_began_has_no_line(paths: RunPaths) -> None:
    with pytest.raises(InputError), AttemptHistory(paths, 0):
        raise InputError("the plan is of another run by now")
    assert not paths.history(0).exists()


def test_a_killed_attempt_is_lost_and_ends_with_its_last_line(
    plan: RunPlan, paths: RunPaths
) -> None:
    attempt = begin(paths)
    commit(plan, paths, 0, plan.order[:5])
    attempt.checkpoint(plan, 0, 5)
    begin(paths, NOON + timedelta(minutes=5)).ended(Ending.STOPPED)
    lost, stopped = read_attempts(paths, 0)
    assert (lost.ending, lost.ended_at, lost.kind) == (
        Ending.LOST,
        NOON + timedelta(seconds=1),
        None,
    )
    assert (stopped.ending, stopped.started_at) == (Ending.STOPPED, NOON + timedelta(minutes=5))


def test_the_parents_judgement_tells_how_an_attempt_ended(paths: RunPaths) -> None:
    """It belongs to the attempt after whose last line and before whose successor it was made."""
    for minute in (0, 10, 20, 30):
        begin(paths, NOON + timedelta(minutes=minute))
    failures = [
        failure_at(NOON - timedelta(days=1), FailureCause.DISK_FULL),
        failure_at(NOON + timedelta(minutes=4)),
        {"at": "no time"},
        failure_at(NOON + timedelta(minutes=21), FailureCause.GPU_OOM),
        failure_at(NOON + timedelta(minutes=22), FailureCause.HANG),
    ]
    attempts = read_attempts(paths, 0, failures)
    assert [attempt.cause for attempt in attempts] == ["killed", None, "gpu_oom", None]
    assert [attempt.kind for attempt in attempts] == ["transient", None, "oom", None]
    assert attempts[0].message == "worker process killed by SIGKILL"


def test_who_holds_the_shards_lock_is_still_running(paths: RunPaths) -> None:
    begin(paths)
    with FileLock(paths.shard_lock(0), purpose="embed").held(timeout_s=0):
        assert read_attempts(paths, 0)[0].ending == Ending.RUNNING
    assert read_attempts(paths, 0)[0].ending == Ending.LOST


def test_lines_that_are_torn_or_foreign_are_passed_over(paths: RunPaths) -> None:
    """A line after a torn one is whole: the torn one is ended first."""
    begin(paths)
    with paths.history(0).open("ab") as file:
        file.write(b'{"event":"ended","ending":"do')
    begin(paths, NOON + timedelta(hours=1))
    whole = json.loads(paths.history(0).read_text().splitlines()[0])
    foreign = [
        whole | {"pending": -1},
        whole | {"at": "2026-11-21T12:00:00"},  # of no time zone
        whole | {"event": "party"},
        whole | {"pid": None},
        {"event": "ended", "ending": "done", "at": whole["at"], "host": "elsewhere", "pid": 1},
        [],
    ]
    with paths.history(0).open("ab") as file:
        file.write(
            b"\xff\xfe\n"
            + b"[" * 100_000
            + b"\n\n"
            + b"\n".join(json.dumps(line).encode() for line in foreign)
        )
    attempts = read_attempts(paths, 0)
    assert [(each.started_at, each.ending) for each in attempts] == [
        (NOON, Ending.LOST),
        (NOON + timedelta(hours=1), Ending.LOST),
    ]


def test_of_a_huge_file_only_the_end_is_read(
    paths: RunPaths, monkeypatch: pytest.MonkeyPatch
) -> None:
    begin(paths)
    line = paths.history(0).read_bytes()
    paths.history(0).write_bytes(line * 100)
    monkeypatch.setattr(history, "MAX_HISTORY_BYTES", 10 * len(line) + 7)
    assert len(read_attempts(paths, 0)) == 10


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EROFS])
def test_what_cannot_be_written_harms_nobody(
    plan: RunPlan, paths: RunPaths, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    def fail(fd: int, data: bytes) -> int:
        raise OSError(code, os.strerror(code))

    commit(plan, paths, 0, plan.order[:5])
    with monkeypatch.context() as patched:
        patched.setattr(history.os, "write", fail)
        attempt = begin(paths)
        attempt.checkpoint(plan, 0, 5)
        attempt.ended(Ending.DONE)
    assert paths.history(0).read_bytes() == b""


def test_a_checkpoint_without_its_marker_is_no_reason_to_fail(
    plan: RunPlan, paths: RunPaths
) -> None:
    begin(paths).checkpoint(plan, 7, 5)
    assert read_attempts(paths, 0)[0].checkpoints == ()


def test_links_and_pipes_are_not_written_to(paths: RunPaths, tmp_path: Path) -> None:
    """Nothing is written through a link and nobody waits at a pipe."""
    target = tmp_path / "target"
    target.write_text("mine")
    paths.history(0).symlink_to(target)
    begin(paths)
    assert target.read_text() == "mine"
    assert read_attempts(paths, 0) == []
    paths.history(0).unlink()
    os.mkfifo(paths.history(0))
    begin(paths)
    assert read_attempts(paths, 0) == []


def test_an_old_run_has_no_history(paths: RunPaths) -> None:
    assert read_attempts(paths, 0) == read_attempts(paths, 99) == []


def test_two_attempts_at_once_keep_their_lines_apart(paths: RunPaths) -> None:
    """As where locks do not work: a line belongs to the newest attempt of its process."""
    begin(paths)
    ours = paths.history(0).read_text()
    theirs = ours.replace(f'"pid":{os.getpid()}', '"pid":1')
    ended = json.dumps(json.loads(ours) | {"event": "ended", "ending": "stopped"})
    paths.history(0).write_text(ours + theirs + ended + "\n")
    assert [(each.pid, each.ending) for each in read_attempts(paths, 0)] == [
        (os.getpid(), Ending.STOPPED),
        (1, Ending.LOST),
    ]
