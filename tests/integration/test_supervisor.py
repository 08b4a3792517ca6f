"""A real worker process under its supervisor: completed, stopped, killed, frozen, orphaned."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import signal
import time
from collections import Counter
from pathlib import Path

import pytest

from tests.helpers import ROOT, is_alive, small_config, wait_until, workers_of, write_foreign_code
from tests.poison import Way, patch
from vnp_lib.checkpoint.survey import survey_checkpoints
from vnp_lib.failures import FailureCause, FailureKind, ShardFailedError
from vnp_lib.plan.paths import RunPaths
from vnp_lib.plan.plan import load_plan
from vnp_lib.run.directory import open_run
from vnp_lib.run.events import BatchComputed, CheckpointSaved, LogMessage
from vnp_lib.storage.durable import make_directory, write_file
from vnp_lib.storage.locks import FileLock
from vnp_lib.worker.stop_signals import EXIT_NOW_AFTER_S
from vnp_lib.worker.supervisor import run_worker

pytestmark = pytest.mark.slow

NUM_COMPUTED = 66


@pytest.fixture
def job(tmp_path, short_fasta) -> Path:
    """Some 60 batches, a checkpoint every ten sequences."""
    return make_job(
        short_fasta, tmp_path / "run", token_budget=128, runtime={"checkpoint_seq_threshold": 10}
    )


def make_job(fasta: Path, run_dir: Path, **settings) -> Path:
    """Write the job of the only shard of a run."""
    with open_run(small_config(fasta, run_dir, devices="cpu", shards=1, **settings)) as run:
        make_directory(run.paths.shard_dir(0))
        write_file(run.paths.job(0), run.shard_job(0, "cpu").model_dump_json().encode())
        return run.paths.job(0)


async def follow(
    job: Path,
    on_event,
    *,
    startup_limit_s: float = 120.0,
    silence_limit_s: float = 60.0,
    grace_s: float = 20.0,
    log_path: Path | None = None,
):
    return await run_worker(
        job,
        device="cpu",
        log_path=log_path or job.with_name("worker.log"),
        on_event=on_event,
        startup_limit_s=startup_limit_s,
        silence_limit_s=silence_limit_s,
        grace_s=grace_s,
    )


def at_batch(count: int, act):
    """Return an event handler that calls `act` when `count` batches have been computed."""
    seen = Counter()

    async def on_event(event):
        seen[event.name] += 1
        if isinstance(event, BatchComputed) and seen["batch"] == count:
            act()

    return on_event


def the_worker(job: Path) -> int:
    (pid,) = workers_of(job.parent)
    return pid


def signal_the_worker(job: Path, signum: int):
    return lambda: os.kill(the_worker(job), signum)


def rows_on_disk(job: Path) -> int:
    paths = RunPaths(job.parents[2])
    survey = survey_checkpoints(
        paths.checkpoints_dir, load_plan(paths).fingerprint, verify_digests=True
    )
    return sum(record.rows for record in survey.valid)


def failure_of(job: Path, on_event, **limits):
    with pytest.raises(ShardFailedError) as caught:
        asyncio.run(follow(job, on_event, **limits))
    assert workers_of(job.parent) == []
    return caught.value.failure


def test_a_worker_reports_its_events_and_saves_all_rows(job):
    events = []

    async def on_event(event):
        events.append(event)

    last = asyncio.run(follow(job, on_event))
    names = [event.name for event in events if not isinstance(event, LogMessage)]
    assert names[:2] == ["started", "loaded"]
    assert last.name == names[-1] == "done"
    assert (
        sum(event.sequences for event in events if isinstance(event, BatchComputed)) == NUM_COMPUTED
    )
    assert (
        sum(event.rows for event in events if isinstance(event, CheckpointSaved))
        == NUM_COMPUTED
        == rows_on_disk(job)
    )


@pytest.mark.parametrize("log", ["/dev/full", "missing/worker.log"])
def test_an_unwritable_log_ends_no_attempt(job, tmp_path, log, caplog):
    """On a full disk, or one on which no file can be created."""
    last = asyncio.run(follow(job, at_batch(1, lambda: None), log_path=tmp_path / log))
    assert (last.name, rows_on_disk(job)) == ("done", NUM_COMPUTED)
    assert ("has no log" in caplog.text) == (log != "/dev/full")


def test_an_impossible_job_is_a_permanent_failure(job):
    write_file(job, job.read_bytes().replace(b"random:seed=0", b"another"), replace=True)
    failure = failure_of(job, at_batch(1, lambda: None))
    assert failure.is_permanent
    assert "weights of esm2_t6_8M_UR50D" in failure.message


def test_a_worker_imports_nothing_from_the_current_directory(job, tmp_path, monkeypatch):
    """Nor by an empty entry of PYTHONPATH, as in `PYTHONPATH=$PYTHONPATH:/some/where`."""
    monkeypatch.chdir(write_foreign_code(tmp_path))
    monkeypatch.setenv("PYTHONPATH", f"{os.pathsep}{tmp_path / 'nothing'}{os.pathsep}")
    assert asyncio.run(follow(job, at_batch(1, lambda: None))).name == "done"


def test_a_worker_refuses_other_code_than_its_parent(job, tmp_path, sabotage):
    """Here it has imported another `vnp_lib` before its program starts."""
    foreign = write_foreign_code(tmp_path)
    sabotage(f"sys.path.insert(0, {str(foreign)!r}); import vnp_lib; sys.path.pop(0)")
    failure = failure_of(job, at_batch(1, lambda: None))
    assert (failure.cause, rows_on_disk(job)) == (FailureCause.CONFIGURATION, 0)
    assert str(foreign / "vnp_lib") in failure.message
    assert str(ROOT / "vnp_lib") in failure.message


def test_sigterm_to_a_worker_is_a_preemption(job):
    computed = 12
    failure = failure_of(job, at_batch(computed, signal_the_worker(job, signal.SIGTERM)))
    assert (failure.kind, failure.exit_code) == (FailureKind.SPOT_PREEMPTION, 143)
    assert computed <= rows_on_disk(job) < NUM_COMPUTED


@pytest.mark.soak
def test_a_late_second_sigterm_ends_a_worker_at_once(tmp_path, sabotage):
    """In the middle of its second batch, which would take an hour; nothing more is saved."""
    fasta = tmp_path / "in.fasta"
    fasta.write_text(
        "".join(f">good_{i}\n{'ACDEFGHIKL' * 6}{'M' * i}\n" for i in range(10)) + ">bad\nWWWWHAC\n"
    )
    sabotage(patch(Way.HANG))
    job = make_job(
        fasta, tmp_path / "run", token_budget=670, runtime={"checkpoint_seq_threshold": 1}
    )
    events = Counter()

    async def on_event(event):
        events[event.name] += 1
        if (events["checkpoint"], events["computing"]) == (1, 2):
            events["checkpoint"] = 0
            os.kill(the_worker(job), signal.SIGTERM)
            await asyncio.sleep(EXIT_NOW_AFTER_S + 0.1)
            os.kill(the_worker(job), signal.SIGTERM)

    failure = failure_of(job, on_event)

    assert failure.exit_code == 143
    assert (events["batch"], events["stopped"]) == (1, 0)
    assert rows_on_disk(job) == 10


def test_a_killed_worker_is_reported_with_its_signal(job):
    failure = failure_of(job, at_batch(12, signal_the_worker(job, signal.SIGKILL)))
    assert failure.kind == FailureKind.TRANSIENT
    assert "SIGKILL" in failure.message
    assert rows_on_disk(job) >= 0


def test_a_worker_that_hangs_at_a_batch_is_killed(job, sabotage):
    sabotage("""
    import time, vnp_lib.model.esm2
    vnp_lib.model.esm2.ESM2.forward_packed = lambda *arguments: time.sleep(3600)
    """)
    failure = failure_of(job, at_batch(1, lambda: None), silence_limit_s=1.0, grace_s=1.0)
    assert failure.kind == FailureKind.TRANSIENT
    assert failure.message.startswith("no progress for ")
    assert "after 'computing' (--runtime.silence-limit-s)" in failure.message


@pytest.mark.soak
def test_a_slow_pass_is_not_silent(job, sabotage):
    """It takes longer than the limit, but each layer is a sign of life."""
    sabotage("""
    import time, vnp_lib.model.esm2
    layer, left = vnp_lib.model.esm2._TransformerLayer.forward, list(range(6))
    def slow(*arguments):
        if left:
            left.pop()
            time.sleep(1.2)
        return layer(*arguments)
    vnp_lib.model.esm2._TransformerLayer.forward = slow
    """)
    last = asyncio.run(follow(job, at_batch(1, lambda: None), silence_limit_s=5.0))
    assert last.name == "done"
    assert rows_on_disk(job) == NUM_COMPUTED


@pytest.mark.soak
def test_slow_checks_are_not_silent_while_they_read(job, sabotage):
    """As in a resume with many checkpoints on a slow disk: the limit applies to silence only."""
    asyncio.run(follow(job, at_batch(1, lambda: None)))
    sabotage("""
    import time, vnp_lib.checkpoint.survey as survey
    read_record = survey.read_record
    def slow(*arguments, **others):
        time.sleep(0.8)
        return read_record(*arguments, **others)
    survey.read_record = slow
    """)
    before = time.monotonic()
    last = asyncio.run(follow(job, at_batch(1, lambda: None), startup_limit_s=5.0))
    assert last.name == "done"
    assert time.monotonic() - before > 5.0


@pytest.mark.soak
def test_a_worker_waits_for_the_lock_up_to_the_limit(job):
    """Its holder hangs, and is named in the failure."""
    lock = FileLock(RunPaths(job.parents[2]).shard_lock(0), purpose="hang")
    with lock.held(timeout_s=0):
        failure = failure_of(job, at_batch(1, lambda: None), startup_limit_s=8.0)
    assert failure.kind == FailureKind.TRANSIENT
    assert not failure.accuses_batch
    assert f"process {os.getpid()}" in failure.message
    assert "to hang" in failure.message
    assert "--runtime.startup-limit-s" in failure.message


@pytest.mark.soak
def test_a_stopped_worker_is_not_silent(job):
    """SIGSTOP for longer than the limit, as a gang scheduler sends it, is logged."""
    seen = Counter()
    messages = []

    async def on_event(event):
        seen[event.name] += 1
        if isinstance(event, LogMessage):
            messages.append(event.message)
        if isinstance(event, BatchComputed) and seen["batch"] == 3:
            pid = the_worker(job)
            os.kill(pid, signal.SIGSTOP)
            asyncio.get_running_loop().call_later(7.0, os.kill, pid, signal.SIGCONT)

    last = asyncio.run(follow(job, on_event, silence_limit_s=5.0))
    assert last.name == "done"
    assert rows_on_disk(job) == NUM_COMPUTED
    assert sum("is stopped by a signal" in message for message in messages) == 1


def _follow_to_its_end(job: Path) -> None:
    asyncio.run(follow(job, at_batch(3, job.with_name("begun").touch), silence_limit_s=5.0))


@pytest.mark.soak
def test_time_while_the_supervisor_is_stopped_is_not_silence(job):
    """As by Ctrl-Z, gang scheduling, or a paused virtual machine, with its worker process."""
    supervisor = multiprocessing.get_context("spawn").Process(
        target=_follow_to_its_end, args=(job,)
    )
    supervisor.start()
    wait_until(lambda: job.with_name("begun").exists() or not supervisor.is_alive())
    stopped = (the_worker(job), supervisor.pid)
    for pid in stopped:
        os.kill(pid, signal.SIGSTOP)
    time.sleep(7.0)
    for pid in reversed(stopped):
        os.kill(pid, signal.SIGCONT)
    supervisor.join(timeout=120)
    assert supervisor.exitcode == 0
    assert rows_on_disk(job) == NUM_COMPUTED


def test_a_worker_that_hangs_at_exit_failed_as_it_reported(job, sabotage):
    """A driver may hang at exit after an error of the device: no batch is accused of that."""
    sabotage(
        """
        import atexit, time, vnp_lib.model.esm2
        def forward_packed(*arguments):
            atexit.register(time.sleep, 3600)
            raise RuntimeError("CUDA error: uncorrectable ECC error encountered")
        vnp_lib.model.esm2.ESM2.forward_packed = forward_packed
        """
    )
    failure = failure_of(job, at_batch(1, lambda: None), silence_limit_s=5.0, grace_s=1.0)
    assert failure.cause == FailureCause.HARDWARE
    assert not failure.accuses_batch


def test_a_supervisor_that_is_cancelled_twice_waits(job):
    """asyncio cancels more than once at exit; the worker process saves its rows first."""

    async def cancel_twice():
        reached = asyncio.Event()
        task = asyncio.create_task(follow(job, at_batch(12, reached.set)))
        await reached.wait()
        task.cancel()
        await asyncio.sleep(0.01)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        assert task.cancelled()

    asyncio.run(cancel_twice())
    assert workers_of(job.parent) == []
    assert 12 <= rows_on_disk(job) < NUM_COMPUTED


def _follow_until_killed(job: Path) -> None:
    asyncio.run(follow(job, at_batch(12, lambda: os.kill(os.getpid(), signal.SIGKILL))))


def test_a_worker_saves_and_exits_if_its_supervisor_is_killed(job):
    supervisor = multiprocessing.get_context("spawn").Process(
        target=_follow_until_killed, args=(job,)
    )
    supervisor.start()
    wait_until(lambda: bool(workers_of(job.parent)) or not supervisor.is_alive())
    pid = the_worker(job)
    supervisor.join(timeout=120)
    assert supervisor.exitcode == -signal.SIGKILL
    wait_until(lambda: not is_alive(pid), timeout_s=12)
    assert 12 <= rows_on_disk(job) < NUM_COMPUTED


def test_a_second_worker_waits_for_the_first(job):
    """Two attempts on one shard, as after a reschedule, compute no sequence twice."""
    waited = Counter()

    async def both():
        async def on_event(event):
            waited[event.name] += 1

        await asyncio.gather(follow(job, on_event), follow(job, on_event))

    asyncio.run(both())
    assert waited["done"] == 2
    assert rows_on_disk(job) == NUM_COMPUTED
