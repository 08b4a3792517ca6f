"""An attempt on a shard, without its model: what is left to do, whose turn it is, and how it is stopped."""

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
from vnp_lib.worker.attempt import ShardAttempt, SignsOfLife, StopFlag, slowest_s

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
    """Keeps the names of what it is told."""

    def __init__(self) -> None:
        self.names: list[str] = []

    def send(self, event: WorkerEvent) -> None:
        self.names.append(event.name)


def test_what_any_shards_valid_checkpoints_hold_is_not_computed_again(
    plan: RunPlan, paths: RunPaths
) -> None:
    """In the order of the plan; a damaged checkpoint costs its own rows, and its number is not used again."""
    ours = plan.shard_ordinals(0)
    commit(plan, paths.checkpoint(0, 0), ours[:3])
    commit(plan, paths.checkpoint(0, 1), ours[3:6])
    commit(plan, paths.checkpoint(7, 0), ours[8:10])  # of an earlier division into more shards
    paths.checkpoint(0, 0).write_bytes(b"damaged")
    work = find_pending_work(plan, paths, 0)
    left = np.concatenate([ordinals for _, ordinals in work.batches])
    assert left.tolist() == [*ours[:3], *ours[6:8], *ours[10:]]
    assert (work.num_sequences, work.num_done) == (ours.size - 5, 5)
    assert work.tokens_left == plan.num_tokens(left)
    assert work.next_checkpoint == 2


def test_a_job_of_another_run_than_the_plan_is_refused(plan: RunPlan, paths: RunPaths) -> None:
    attempt = ShardAttempt(job_of(plan, paths, fingerprint="0" * 64), Events(), StopFlag())
    with pytest.raises(InputError, match="is of another run by now"):
        attempt.run()


def test_an_attempt_waits_while_another_has_the_shard(
    plan: RunPlan, paths: RunPaths, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The one before it may still be saving: what is left is looked at only afterwards."""
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
    """Run code in a process that has a StopFlag installed, whose clock it sets by `now[0] = ...`."""
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
def test_sigterms_are_one_request_for_eight_seconds_and_then_they_hurry(
    seconds_later: float, end: str
) -> None:
    """However many they are: of a service manager, of wrappers that pass theirs on, and of the parent."""
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


@pytest.mark.parametrize("told", ["stop.set()", "pass"], ids=["heard", "not read yet"])
def test_a_late_sigterm_of_the_parent_does_not_hurry(told: str) -> None:
    """The service manager's came long before; the parent had been busy, and wrote its word first."""
    code = f"""
os.kill(os.getpid(), signal.SIGTERM)
now[0] = 60.0
{told}
os.kill(os.getpid(), signal.SIGTERM)
print("saves")
"""
    with open_pipe() as (read_end, write_end):
        if told == "pass":
            os.write(write_end, b"stop\n")
        process = run_signalled(code, stdin=read_end)
    assert (process.stdout, process.returncode) == ("saves\n", 0)


@contextmanager
def open_pipe() -> Iterator[tuple[int, int]]:
    """A pipe that stays open, by its two ends."""
    ends = os.pipe()
    try:
        yield ends
    finally:
        for end in ends:
            os.close(end)


def test_the_parents_word_stops_a_child_that_never_sees_its_sigterm() -> None:
    code = """
import threading, time
from vnp_lib.worker.attempt import _heed_the_parent
threading.Thread(target=_heed_the_parent, args=(stop,), daemon=True).start()
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


def test_a_child_that_hangs_when_its_parent_is_gone_does_not_stay_for_ever() -> None:
    """It hangs where no flag is asked for, as in native code."""
    code = """
import time
from vnp_lib.worker import attempt as worker
from vnp_lib.inference import executor
worker._ORPHAN_LIMIT_S = 1
stop = worker.StopFlag()
stop.install()
worker.threading.Thread(target=worker._heed_the_parent, args=(stop,), daemon=True).start()
time.sleep(300)
"""
    process = subprocess.run([sys.executable, "-c", code], stdin=subprocess.DEVNULL, timeout=60)
    assert process.returncode == ExitCode.STOPPED


def test_suspects_come_first_and_alone_and_what_is_in_quarantine_not_at_all(
    plan: RunPlan, paths: RunPaths
) -> None:
    """Suspects of other shards, and those that are done, are not this attempt's."""
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


def test_what_an_attempt_was_silent_at_comes_last_and_alone(plan: RunPlan, paths: RunPaths) -> None:
    """Also where it is a suspect: all else is saved before it may hold up the attempt again."""
    ours, others = plan.shard_ordinals(0).tolist(), plan.shard_ordinals(1).tolist()
    work = find_pending_work(
        plan, paths, 0, suspects=[ours[3], ours[5]], deferred=[ours[5], others[0], ours[0]]
    )
    batches = [ordinals.tolist() for _, ordinals in work.batches]
    assert (batches[0], batches[-2:]) == ([ours[3]], [[ours[5]], [ours[0]]])
    assert sorted(ordinal for batch in batches for ordinal in batch) == sorted(ours)


def test_a_pass_gives_signs_of_life_at_its_layers_once_a_second_at_most() -> None:
    now = [0.0]
    times = iter([0.0, 0.4, 0.9, 1.0, 1.1, 2.5, 2.6, 3.4, 3.5])
    events = Events()
    signs = SignsOfLife(events, clock=lambda: next(times, now[0]))
    network = ESM2(Architecture(num_layers=8, embed_dim=32, attention_heads=2))
    signs.watch(network)
    network.forward_packed(torch.tensor([0, 5, 2]), torch.tensor([0, 3], dtype=torch.int32), 3)
    assert events.names == ["alive"] * 3  # at 1.0, 2.5 and 3.5


def test_the_time_to_the_next_sign_of_life_grows_with_the_work() -> None:
    """By the operations of a layer on a CPU, of the whole pass on a GPU; 16,000 residues take attention's square."""
    short, long = np.array([32] * 8), np.array([16_002])
    assert slowest_s("esm2_t6_8M_UR50D", short, device="cpu") < 2.0
    assert 500 < slowest_s("esm2_t6_8M_UR50D", long, device="cpu") < 1000
    assert slowest_s("esm2_t36_3B_UR50D", np.array([1024] * 16), device="cuda") < 600
    assert slowest_s("esm2_t36_3B_UR50D", np.array([34_352]), device="cuda") > 600


def test_an_attempt_goes_down_in_history(plan: RunPlan, paths: RunPaths) -> None:
    commit(plan, paths.checkpoint(0, 0), plan.shard_ordinals(0))
    history = AttemptHistory(paths, 0)
    history.started(device="cpu", pending=20)
    attempt._Reporter(job_of(plan, paths), plan, Events(), StopFlag(), history).on_checkpoint(
        0, 20, 0.5
    )
    ShardAttempt(job_of(plan, paths), Events(), StopFlag()).run()
    first, second = read_attempts(paths, 0)
    assert [(each.number, each.rows) for each in first.checkpoints] == [(0, 20)]
    assert (second.pending, second.device, second.ending) == (0, "cpu", Ending.DONE)


def test_a_float32_model_that_does_not_fit_is_loaded_once_and_the_run_goes_on_without(
    plan: RunPlan, paths: RunPaths, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As 15B on 40 GB: in bfloat16 it has room there."""
    loads = []

    def load_model(*args: Any, **options: Any) -> Any:
        loads.append(options["dtype"])
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(executor, "load_model", load_model)
    exact = executor.ExactModel(MODEL.model, Weights(source="random", digest=MODEL.weights_digest))
    events = Events()
    attempt = ShardAttempt(job_of(plan, paths, dtype="bfloat16"), events, StopFlag())
    assert attempt._exact_rows(plan, find_pending_work(plan, paths, 0), exact) == {}
    assert loads == [torch.float32]
    assert events.names == []  # nothing is announced as computed that is only loaded


class Stopped(Events):
    """Sets the stop flag when so many batches have been computed."""

    def __init__(self, stop: StopFlag, after: int) -> None:
        super().__init__()
        self._stop, self._after = stop, after

    def send(self, event: WorkerEvent) -> None:
        super().send(event)
        if self.names.count("batch") == self._after:
            self._stop.set()


def give_no_finite_row(monkeypatch: pytest.MonkeyPatch, to: Callable[[int], bool]) -> None:
    """Have the network give NaN for each sequence of so many tokens that `to` says yes."""
    original = ESM2.forward_packed

    def forward_packed(
        self: ESM2, input_ids: Any, cu_seqlens: Any, max_seqlen: int, repr_layers: Any = None
    ) -> Any:
        output = original(self, input_ids, cu_seqlens, max_seqlen, repr_layers)
        for start, end in pairwise(cu_seqlens.tolist()):
            if to(end - start):
                for states in output["representations"].values():
                    states[start:end] = float("nan")
        return output

    monkeypatch.setattr(ESM2, "forward_packed", forward_packed)


@pytest.fixture
def twenty_four(tmp_path: Path) -> Path:
    """Proteins of 24 to 1 residues, in this order."""
    path = tmp_path / "in.fasta"
    path.write_text("".join(f">p{length}\n{'M' * length}\n" for length in range(24, 0, -1)))
    return path


def test_a_device_that_gives_no_finite_row_any_more_ends_the_attempt_and_blames_no_protein(
    paths: RunPaths, twenty_four: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After 20 in a row; what was computed before is kept."""
    plan = make_plan(paths, [twenty_four], MODEL, num_shards=1, token_budget=26)
    give_no_finite_row(monkeypatch, lambda tokens: tokens <= 22)
    with pytest.raises(
        QuarantineFullError, match=r"^2\d sequences one after the other .*weights.*device"
    ):
        ShardAttempt(job_of(plan, paths), Events(), StopFlag()).run()
    assert Quarantine.of(plan, paths).read() == []
    assert find_pending_work(plan, paths, 0).num_done == 4


def test_a_protein_without_a_finite_row_is_set_aside_once_another_has_one(
    paths: RunPaths, twenty_four: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or once nothing is left to compute. A stop before that leaves it for the next attempt."""
    plan = make_plan(paths, [twenty_four], MODEL, num_shards=1, token_budget=26)
    give_no_finite_row(monkeypatch, lambda tokens: tokens in (26, 25))
    stop = StopFlag()
    assert (
        ShardAttempt(job_of(plan, paths), Stopped(stop, after=2), stop).run_in_lock()
        == ExitCode.STOPPED
    )
    assert Quarantine.of(plan, paths).read() == []
    stop = StopFlag()
    assert (
        ShardAttempt(job_of(plan, paths), Stopped(stop, after=3), stop).run_in_lock()
        == ExitCode.STOPPED
    )
    assert [each.id for each in Quarantine.of(plan, paths).read()] == ["p24", "p23"]


def test_the_last_of_all_is_set_aside_without_another_after_it(
    paths: RunPaths, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "in.fasta").write_text(">p\nMKVLA\n")
    plan = make_plan(paths, [tmp_path / "in.fasta"], MODEL, num_shards=1, token_budget=26)
    give_no_finite_row(monkeypatch, lambda tokens: True)
    assert ShardAttempt(job_of(plan, paths), Events(), StopFlag()).run() == ExitCode.DONE
    assert Quarantine.of(plan, paths).ordinals() == {0}


def test_many_without_a_finite_row_among_others_end_the_attempt(
    paths: RunPaths, twenty_four: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = make_plan(paths, [twenty_four], MODEL, num_shards=1, token_budget=26)
    give_no_finite_row(monkeypatch, lambda tokens: tokens % 3 == 0)
    with pytest.raises(QuarantineFullError, match="4 of 24 sequences have no finite embedding"):
        ShardAttempt(job_of(plan, paths), Events(), StopFlag()).run()
