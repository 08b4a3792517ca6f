"""An attempt on a shard: its pending work, its lock, how it is stopped, and its quarantine."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from vnp_lib.checkpoint.quarantine import Quarantine, QuarantinedSequence
from vnp_lib.checkpoint.writer import AsyncCheckpointWriter
from vnp_lib.errors import ExitCode, InputError, QuarantineFullError
from vnp_lib.failures import Failure, FailureCause
from vnp_lib.inference import executor
from vnp_lib.model.esm2 import ESM2, Architecture
from vnp_lib.model.weights import Weights
from vnp_lib.plan.paths import RunPaths
from vnp_lib.plan.plan import ModelIdentity, RunPlan
from vnp_lib.plan.planner import make_plan
from vnp_lib.run.events import WaitingForShard, WorkerEvent
from vnp_lib.run.history import AttemptHistory, Ending, read_attempts
from vnp_lib.run.job import ShardJob
from vnp_lib.run.resume import find_pending_work
from vnp_lib.storage.durable import make_directory
from vnp_lib.storage.locks import FileLock
from vnp_lib.worker import attempt
from vnp_lib.worker.attempt import LivenessReporter, ShardAttempt, StopFlag, slowest_s

MODEL = ModelIdentity(
    model="esm2_t6_8M_UR50D", weights_digest="random:seed=0", layer=6, dtype="float32"
)


@pytest.fixture
def paths(tmp_path: Path) -> RunPaths:
    paths = RunPaths(tmp_path / "run")
    for rank in (0, 1, 7):
        make_directory(paths.shard_dir(rank))
    return paths


@pytest.fixture
def plan(paths: RunPaths, tiny_fasta: Path) -> RunPlan:
    return make_plan(paths, [tiny_fasta], MODEL, num_shards=2, token_budget=100)


def commit(plan: RunPlan, path: Path, ordinals: NDArray[np.int64]) -> None:
    metadata = {"ordinals": ordinals.tolist(), "fingerprint": plan.fingerprint}
    with AsyncCheckpointWriter() as writer:
        writer.write_checkpoint_async(
            path, torch.ones(ordinals.size, 4), plan.ids(ordinals), metadata
        )


def job_of(plan: RunPlan, paths: RunPaths, **changes: Any) -> ShardJob:
    fields: dict[str, Any] = {
        "run_dir": paths.run_dir,
        "rank": 0,
        "fingerprint": plan.fingerprint,
        "model": MODEL.model,
        "weights": "random",
        "weights_digest": MODEL.weights_digest,
        "dtype": "float32",
        "device": "cpu",
        "num_threads": 1,
        "token_budget": 100,
        "checkpoint_seq_threshold": 10,
        "checkpoint_time_threshold": 300.0,
    }
    return ShardJob(**fields | changes)


class Events:
    """Keeps the names of the events."""

    def __init__(self) -> None:
        self.names: list[str] = []

    def send(self, event: WorkerEvent) -> None:
        self.names.append(event.name)


def test_rows_in_checkpoints_of_any_shard_are_not_pending(plan: RunPlan, paths: RunPaths) -> None:
    """A damaged checkpoint costs its own rows, and its number is not used again."""
    ours = plan.shard_ordinals(0)
    commit(plan, paths.checkpoint(0, 0), ours[:3])
    commit(plan, paths.checkpoint(0, 1), ours[3:6])
    # Of an earlier division into more shards.
    commit(plan, paths.checkpoint(7, 0), ours[8:10])
    paths.checkpoint(0, 0).write_bytes(b"damaged")
    work = find_pending_work(plan, paths, 0)
    left = np.concatenate([ordinals for _, ordinals in work.batches])
    assert left.tolist() == [*ours[:3], *ours[6:8], *ours[10:]]
    assert (work.num_sequences, work.num_done) == (ours.size - 5, 5)
    assert work.tokens_left == plan.num_tokens(left)
    assert work.next_checkpoint == 2


def test_a_job_of_another_run_is_refused(plan: RunPlan, paths: RunPaths) -> None:
    attempt = ShardAttempt(job_of(plan, paths, fingerprint="0" * 64), Events(), StopFlag())
    with pytest.raises(InputError, match="now belongs to another run"):
        attempt.run()


def test_an_attempt_waits_for_the_lock_of_its_shard(
    plan: RunPlan, paths: RunPaths, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The previous attempt may still be saving: the pending work is determined afterwards."""
    commit(plan, paths.checkpoint(0, 0), plan.shard_ordinals(0))
    monkeypatch.setattr(attempt, "_LOCK_POLL_S", 0.01)
    other = FileLock(paths.shard_lock(0), purpose="save")
    other.acquire(timeout_s=0)

    class ReleasingEvents(Events):
        def send(self, event: WorkerEvent) -> None:
            super().send(event)
            if isinstance(event, WaitingForShard):
                other.release()

    events = ReleasingEvents()
    assert ShardAttempt(job_of(plan, paths), events, StopFlag()).run() == ExitCode.DONE
    assert events.names == ["waiting", "started", "done"]


def run_signalled(code: str, *, stdin: int | None = None) -> subprocess.CompletedProcess[str]:
    """Run code in a process with an installed StopFlag, whose clock it sets by `now[0] = ...`."""
    begin = """
import os, signal
from vnp_lib.worker.attempt import StopFlag
now = [5.0]
stop = StopFlag(clock=lambda: now[0])
stop.install()
"""
    return subprocess.run(
        [sys.executable, "-c", begin + code],
        stdin=stdin,
        stdout=subprocess.PIPE,
        text=True,
        timeout=60,
    )


@pytest.mark.parametrize(("seconds_later", "end"), [(7.9, "still here"), (8.0, "")])
def test_a_sigterm_after_eight_seconds_exits_at_once(seconds_later: float, end: str) -> None:
    """Earlier ones, of a service manager, wrappers and the parent, are one request."""
    code = f"""
print(stop.is_set())
for now[0] in (5.0, 5.05, 6.5, 12.0):
    os.kill(os.getpid(), signal.SIGTERM)
print(stop.is_set(), flush=True)
now[0] = 5.0 + {seconds_later}
os.kill(os.getpid(), signal.SIGTERM)
print("still here", end="", flush=True)
"""
    with open_pipe() as (read_end, _):
        process = run_signalled(code, stdin=read_end)
    assert process.stdout == f"False\nTrue\n{end}"
    assert process.returncode == (0 if end else ExitCode.STOPPED)


@pytest.mark.parametrize("is_read", [True, False], ids=["read", "not read yet"])
def test_a_late_sigterm_of_the_parent_is_not_urgent(is_read: bool) -> None:
    """The service manager's came long before; the parent was busy, and wrote its request first."""
    code = f"""
os.kill(os.getpid(), signal.SIGTERM)
now[0] = 60.0
{"stop.set()" if is_read else "pass"}
os.kill(os.getpid(), signal.SIGTERM)
print("saves")
"""
    with open_pipe() as (read_end, write_end):
        if not is_read:
            os.write(write_end, b"stop\n")
        process = run_signalled(code, stdin=read_end)
    assert (process.stdout, process.returncode) == ("saves\n", 0)


@contextmanager
def open_pipe() -> Iterator[tuple[int, int]]:
    """Open a pipe for the block, and give its two ends."""
    ends = os.pipe()
    try:
        yield ends
    finally:
        for end in ends:
            os.close(end)


def test_a_request_on_the_pipe_stops_a_worker() -> None:
    """It never gets a SIGTERM."""
    code = """
import threading, time
from vnp_lib.worker.attempt import _watch_parent
threading.Thread(target=_watch_parent, args=(stop,), daemon=True).start()
print("ready", flush=True)
while not stop.is_set():
    time.sleep(0.01)
"""
    begin = "from vnp_lib.worker.attempt import StopFlag\nstop = StopFlag()\nstop.install()\n"
    with subprocess.Popen(
        [sys.executable, "-c", begin + code],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdout.readline()
        process.stdin.write("stop\n")
        process.stdin.flush()
        assert process.wait(timeout=60) == 0


def test_a_hanging_worker_exits_after_its_parent() -> None:
    """It hangs where the stop flag is not read, as in native code."""
    code = """
import time
from vnp_lib.worker import attempt as worker
from vnp_lib.inference import executor
worker._ORPHAN_LIMIT_S = 1
stop = worker.StopFlag()
stop.install()
worker.threading.Thread(target=worker._watch_parent, args=(stop,), daemon=True).start()
time.sleep(300)
"""
    process = subprocess.run([sys.executable, "-c", code], stdin=subprocess.DEVNULL, timeout=60)
    assert process.returncode == ExitCode.STOPPED


def test_suspects_come_first_and_alone(plan: RunPlan, paths: RunPaths) -> None:
    """Except suspects of other shards, those in checkpoints, and those in quarantine."""
    ours, others = plan.shard_ordinals(0).tolist(), plan.shard_ordinals(1).tolist()
    commit(plan, paths.checkpoint(0, 0), np.array(ours[:2]))
    failure = Failure(cause=FailureCause.NATIVE_CRASH, message="SIGSEGV")
    quarantine = Quarantine.of(plan, paths)
    quarantine.add(QuarantinedSequence.of_failure(plan, ours[4], failure, attempts=2))
    suspects = [ours[7], others[0], ours[1], ours[4], ours[3]]
    work = find_pending_work(plan, paths, 0, suspects=suspects)
    assert [ordinals.tolist() for _, ordinals in work.batches[:2]] == [[ours[7]], [ours[3]]]
    left = [ordinal for _, ordinals in work.batches for ordinal in ordinals.tolist()]
    assert sorted(left) == sorted(set(ours) - set(ours[:2]) - {ours[4]})
    batch_of = {
        o: batch_idx
        for batch_idx, batch in enumerate(plan.shard_batches(0))
        for o in batch.tolist()
    }
    assert all(
        batch_of[ordinal] == batch_idx
        for batch_idx, ordinals in work.batches
        for ordinal in ordinals.tolist()
    )
    assert work.num_done == 3


def test_deferred_sequences_come_last_and_alone(plan: RunPlan, paths: RunPaths) -> None:
    """Even suspects: everything else is saved before they may hold up the attempt again."""
    ours, others = plan.shard_ordinals(0).tolist(), plan.shard_ordinals(1).tolist()
    work = find_pending_work(
        plan, paths, 0, suspects=[ours[3], ours[5]], deferred=[ours[5], others[0], ours[0]]
    )
    batches = [ordinals.tolist() for _, ordinals in work.batches]
    assert (batches[0], batches[-2:]) == ([ours[3]], [[ours[5]], [ours[0]]])
    assert sorted(ordinal for batch in batches for ordinal in batch) == sorted(ours)


def test_layers_are_signs_of_life_once_per_second() -> None:
    now = [0.0]
    times = iter([0.0, 0.4, 0.9, 1.0, 1.1, 2.5, 2.6, 3.4, 3.5])
    events = Events()
    liveness = LivenessReporter(events, clock=lambda: next(times, now[0]))
    network = ESM2(Architecture(num_layers=8, embed_dim=32, attention_heads=2))
    liveness.watch(network)
    network.forward_packed(torch.tensor([0, 5, 2]), torch.tensor([0, 3], dtype=torch.int32), 3)
    # At 1.0, 2.5 and 3.5.
    assert events.names == ["alive"] * 3


def test_the_slowest_sign_of_life_depends_on_the_work() -> None:
    """By the operations of a layer on a CPU, and of the whole pass on a GPU."""
    short, long = np.array([32] * 8), np.array([16_002])
    assert slowest_s("esm2_t6_8M_UR50D", short, device="cpu") < 2.0
    assert 500 < slowest_s("esm2_t6_8M_UR50D", long, device="cpu") < 1000
    assert slowest_s("esm2_t36_3B_UR50D", np.array([1024] * 16), device="cuda") < 600
    assert slowest_s("esm2_t36_3B_UR50D", np.array([34_352]), device="cuda") > 600


def test_an_attempt_is_recorded_in_the_history(plan: RunPlan, paths: RunPaths) -> None:
    commit(plan, paths.checkpoint(0, 0), plan.shard_ordinals(0))
    history = AttemptHistory(paths, 0)
    history.started(device="cpu", pending=20)
    callbacks = attempt._AttemptCallbacks(job_of(plan, paths), plan, Events(), StopFlag(), history)
    callbacks.on_checkpoint(0, 20, 0.5)
    ShardAttempt(job_of(plan, paths), Events(), StopFlag()).run()
    first, second = read_attempts(paths, 0)
    assert [(each.number, each.rows) for each in first.checkpoints] == [(0, 20)]
    assert (second.pending, second.device, second.ending) == (0, "cpu", Ending.DONE)


def test_a_float32_model_that_does_not_fit_is_not_used(
    plan: RunPlan, paths: RunPaths, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is loaded once; 15B on 40 GB, for instance, fits in bfloat16 only."""
    loads = []

    def load_model(*args: Any, **options: Any) -> Any:
        loads.append(options["dtype"])
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(executor, "load_model", load_model)
    exact = executor.ExactModel(Weights.random(MODEL.model))
    events = Events()
    attempt = ShardAttempt(job_of(plan, paths, dtype="bfloat16"), events, StopFlag())
    assert attempt._exact_rows(plan, find_pending_work(plan, paths, 0), exact) == {}
    assert loads == [torch.float32]
    # Nothing is reported as computed that is only loaded.
    assert events.names == []


class StoppingEvents(Events):
    """Sets the stop flag when `after` batches have been computed."""

    def __init__(self, stop: StopFlag, after: int) -> None:
        super().__init__()
        self._stop, self._after = stop, after

    def send(self, event: WorkerEvent) -> None:
        super().send(event)
        if self.names.count("batch") == self._after:
            self._stop.set()


def return_nan(monkeypatch: pytest.MonkeyPatch, applies: Callable[[int], bool]) -> None:
    """Have the network return NaN for sequences for whose number of tokens `applies` holds."""
    original = ESM2.forward_packed

    def forward_packed(
        self: ESM2, input_ids: Any, cu_seqlens: Any, max_seqlen: int, repr_layers: Any = None
    ) -> Any:
        output = original(self, input_ids, cu_seqlens, max_seqlen, repr_layers)
        for start, end in pairwise(cu_seqlens.tolist()):
            if applies(end - start):
                for states in output["representations"].values():
                    states[start:end] = float("nan")
        return output

    monkeypatch.setattr(ESM2, "forward_packed", forward_packed)


@pytest.fixture
def twenty_four(tmp_path: Path) -> Path:
    """Write proteins of 24 to 1 residues, in this order."""
    path = tmp_path / "in.fasta"
    path.write_text("".join(f">p{length}\n{'M' * length}\n" for length in range(24, 0, -1)))
    return path


def test_nothing_but_nan_from_a_device_ends_the_attempt(
    paths: RunPaths, twenty_four: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After 20 in a row; earlier rows are kept, and nothing is quarantined."""
    plan = make_plan(paths, [twenty_four], MODEL, num_shards=1, token_budget=26)
    return_nan(monkeypatch, lambda tokens: tokens <= 22)
    with pytest.raises(QuarantineFullError, match=r"^2\d consecutive sequences .*weights.*device"):
        ShardAttempt(job_of(plan, paths), Events(), StopFlag()).run()
    assert Quarantine.of(plan, paths).read() == []
    assert find_pending_work(plan, paths, 0).num_done == 4


def test_nan_is_quarantined_once_another_row_is_finite(
    paths: RunPaths, twenty_four: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or once nothing is left to compute. A stop before that leaves it for the next attempt."""
    plan = make_plan(paths, [twenty_four], MODEL, num_shards=1, token_budget=26)
    return_nan(monkeypatch, lambda tokens: tokens in (26, 25))
    stop = StopFlag()
    assert (
        ShardAttempt(job_of(plan, paths), StoppingEvents(stop, after=2), stop).run_in_lock()
        == ExitCode.STOPPED
    )
    assert Quarantine.of(plan, paths).read() == []
    stop = StopFlag()
    assert (
        ShardAttempt(job_of(plan, paths), StoppingEvents(stop, after=3), stop).run_in_lock()
        == ExitCode.STOPPED
    )
    assert [each.id for each in Quarantine.of(plan, paths).read()] == ["p24", "p23"]


def test_nan_in_the_last_row_is_quarantined(
    paths: RunPaths, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "in.fasta").write_text(">p\nMKVLA\n")
    plan = make_plan(paths, [tmp_path / "in.fasta"], MODEL, num_shards=1, token_budget=26)
    return_nan(monkeypatch, lambda tokens: True)
    assert ShardAttempt(job_of(plan, paths), Events(), StopFlag()).run() == ExitCode.DONE
    assert Quarantine.of(plan, paths).ordinals() == {0}


def test_nan_in_many_rows_ends_the_attempt(
    paths: RunPaths, twenty_four: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = make_plan(paths, [twenty_four], MODEL, num_shards=1, token_budget=26)
    return_nan(monkeypatch, lambda tokens: tokens % 3 == 0)
    with pytest.raises(QuarantineFullError, match="4 of 24 sequences have no finite embedding"):
        ShardAttempt(job_of(plan, paths), Events(), StopFlag()).run()
