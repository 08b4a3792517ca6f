"""The coordinator: classify failures, decide about retries, stop and resume shards."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import subprocess
import sys

import pytest
import torch

from flows.embed import embed
from flows.retry_hook import failure_of
from tests.helpers import small_config, workers_of
from vnp_lib.checkpoint.manifest import CheckpointManifest
from vnp_lib.checkpoint.survey import heal_shard
from vnp_lib.checkpoint.writer import AsyncCheckpointWriter
from vnp_lib.config import RuntimeConfig
from vnp_lib.errors import CircuitBreakerOpenError, NumericalInstabilityError
from vnp_lib.failures import Failure, FailureCause, FailureKind, classify_exception, classify_exit
from vnp_lib.plan.paths import RunPaths
from vnp_lib.run.directory import open_run
from vnp_lib.run.events import BatchComputed
from vnp_lib.storage.durable import make_directory, marker_path, remove_orphaned_temporaries
from vnp_lib.worker.attempt import StopFlag
from vnp_lib.worker.recovery import counted_failures
from vnp_lib.worker.retry import RetryPolicy
from vnp_lib.worker.supervisor import run_worker

POLICY = RetryPolicy.from_config(RuntimeConfig())


def failure(cause: FailureCause, batch_idx: int | None = None) -> Failure:
    return Failure(cause=cause, message="it broke", batch_idx=batch_idx)


def after(cause: FailureCause, retry_count: int):
    """Return the decision after the same failure has been retried `retry_count` times."""
    return POLICY.decide(failure(cause), [failure(cause)] * retry_count)


def test_classify_error_spot_preemption_exitcode():
    assert classify_exit(143).kind == classify_exit(-15).kind == FailureKind.SPOT_PREEMPTION


def test_classify_error_spot_preemption_message():
    assert (
        classify_exception(RuntimeError("Received SIGTERM from the node")).kind
        == FailureKind.SPOT_PREEMPTION
    )


def test_classify_error_oom():
    by_type, by_message = (
        torch.OutOfMemoryError("no room"),
        RuntimeError("CUDA out of memory. Tried to allocate"),
    )
    assert (
        classify_exception(by_type).kind == classify_exception(by_message).kind == FailureKind.OOM
    )


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("CUDA error: device-side assert triggered"),
        RuntimeError("CUDA error: an illegal memory access was encountered"),
        NumericalInstabilityError("2 rows are not finite"),
        CircuitBreakerOpenError("batch 42"),
    ],
)
def test_classify_error_poison_input(error):
    assert classify_exception(error).kind == FailureKind.POISON_INPUT


def test_classify_error_transient_fallback():
    assert classify_exception(ConnectionResetError("peer")).kind == FailureKind.TRANSIENT
    assert classify_exit(-signal.SIGKILL).kind == FailureKind.TRANSIENT
    assert failure_of("no exception at all").kind == FailureKind.TRANSIENT


def test_should_retry_spot_preemption_infinite():
    decision = after(FailureCause.PREEMPTED, 10)
    assert decision.retry
    assert decision.reason == "spot preemption #11, capacity will return"


def test_should_retry_poison_input_circuit_breaker(tmp_path):
    """The same batch is retried once; a later process reads that from the manifest."""
    CheckpointManifest(tmp_path / "manifest.json").initialize(1, "", "")
    decisions = []
    for session in ("first process", "second process"):
        manifest = CheckpointManifest(tmp_path / "manifest.json")
        strike = failure(FailureCause.DEVICE_ASSERT, batch_idx=42)
        decisions.append(
            POLICY.decide(strike, counted_failures(manifest.failures(0), session, num_done=0))
        )
        manifest.record_failure(0, strike.to_json() | {"session": session})
    assert [decision.retry for decision in decisions] == [True, False]
    assert decisions[1].reason.startswith("circuit breaker: batch 42 failed 2 times")


def test_should_retry_oom_exponential_backoff():
    assert after(FailureCause.GPU_OOM, 2).retry
    assert "attempt 3/3" in after(FailureCause.GPU_OOM, 2).reason
    assert not after(FailureCause.GPU_OOM, 3).retry
    assert "exhausted 3 retries" in after(FailureCause.GPU_OOM, 3).reason


def test_should_retry_transient_max_retries():
    assert after(FailureCause.KILLED, 2).retry
    assert "attempt 3/3" in after(FailureCause.KILLED, 2).reason
    assert not after(FailureCause.KILLED, 3).retry
    assert "exhausted 3 retries" in after(FailureCause.KILLED, 3).reason


@pytest.fixture
def shard_dir(tmp_path):
    """Write a shard with three checkpoints."""
    with AsyncCheckpointWriter() as writer:
        for number in range(3):
            metadata = {"fingerprint": "f", "ordinals": [2 * number, 2 * number + 1]}
            path = tmp_path / "shard_0" / f"batch_{number:05d}.pt"
            writer.write_checkpoint_async(
                path, torch.full((2, 4), float(number)), ["a", "b"], metadata
            )
    return tmp_path / "shard_0"


def test_validate_checkpoint_dir_removes_orphaned_tmp_files(shard_dir):
    """Those of dead writers are removed; checkpoints and files of running writers stay."""
    died = subprocess.Popen([sys.executable, "-c", ""])
    died.wait()
    host = os.uname().nodename
    orphan = shard_dir / f".tmp-batch_00003.pt-{host}-{died.pid}-00000000"
    living = shard_dir / f".tmp-batch_00004.pt-{host}-{os.getpid()}-00000000"
    orphan.touch()
    living.touch()
    assert remove_orphaned_temporaries(shard_dir) == [orphan]
    assert living.exists()
    assert len(list(shard_dir.glob("batch_*.pt"))) == 3


def test_validate_checkpoint_dir_done_marker_mismatch_warning(shard_dir, caplog):
    """With three files and two markers the attempt continues, with a warning."""
    marker_path(shard_dir / "batch_00001.pt").unlink()
    with caplog.at_level(logging.WARNING):
        assert heal_shard(shard_dir.parent, 0, "f") == 3
    assert "batch_00001.pt" in caplog.text
    assert [path.name for path in sorted(shard_dir.glob("batch_*.pt"))] == [
        "batch_00000.pt",
        "batch_00002.pt",
    ]


def test_validate_checkpoint_dir_fresh_start(tmp_path):
    assert heal_shard(tmp_path, 0, "f") == 0


def test_retry_worker_spot_preemption_delay():
    assert after(FailureCause.PREEMPTED, 0).delay_s == 60.0
    assert (
        RetryPolicy.from_config(RuntimeConfig(spot_retry_poll_interval=5.0))
        .decide(failure(FailureCause.PREEMPTED), [])
        .delay_s
        == 5.0
    )


def test_retry_worker_oom_exponential_backoff():
    unlimited = RetryPolicy.from_config(RuntimeConfig(max_retries_oom=99, max_retries_transient=99))
    for cause in (FailureCause.GPU_OOM, FailureCause.UNKNOWN):
        delays = [
            unlimited.decide(failure(cause), [failure(cause)] * count).delay_s
            for count in (0, 2, 10)
        ]
        assert delays == [1.0, 4.0, 60.0]
    assert POLICY.decide(failure(FailureCause.DEVICE_ASSERT, batch_idx=1), []).delay_s == 1.0


def settings(fasta, run_dir):
    """Return settings with many small batches and checkpoints."""
    return small_config(fasta, run_dir, token_budget=128, runtime={"checkpoint_seq_threshold": 5})


@pytest.mark.slow
@pytest.mark.usefixtures("prefect_server")
def test_retry_worker_validates_checkpoint_before_respawn(tmp_path, tiny_fasta):
    """A file is in place of the shard's directory: no worker process is started."""
    paths = RunPaths(tmp_path / "run")
    make_directory(paths.checkpoints_dir)
    paths.shard_dir(1).write_text("not a directory")
    outcome = asyncio.run(embed(settings(tiny_fasta, paths.run_dir), return_state=True))
    assert outcome.is_failed()
    manifest = CheckpointManifest(paths.manifest)
    assert manifest.get_completed_shards() == [0]
    assert "shard_1 cannot be made" in manifest.get_shard_status(1)["error"]
    assert paths.shard_dir(1).read_text() == "not a directory"


def test_sigterm_handler_sets_shutdown_flag():
    """The handler only sets the flag that the loop reads between two batches."""
    before = signal.getsignal(signal.SIGTERM)
    stop = StopFlag()
    stop.install()
    try:
        assert not stop.is_set()
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.is_set()
    finally:
        signal.signal(signal.SIGTERM, before)


async def stop_when_computing(config, rank, *, grace_s):
    """Cancel the supervisor of a worker process at its first batch; return the seconds it took."""
    with open_run(config) as run:
        run.prepare_shard(rank)
        run.paths.job(rank).write_text(run.shard_job(rank, "cpu").model_dump_json())
        computing = asyncio.Event()

        async def on_event(event):
            if isinstance(event, BatchComputed):
                computing.set()

        supervisor = asyncio.create_task(
            run_worker(
                run.paths.job(rank),
                device="cpu",
                log_path=run.paths.worker_log(rank),
                on_event=on_event,
                startup_limit_s=120,
                silence_limit_s=120,
                grace_s=grace_s,
            )
        )
        await computing.wait()
        started_at = asyncio.get_running_loop().time()
        supervisor.cancel()
        await asyncio.gather(supervisor, return_exceptions=True)
        return asyncio.get_running_loop().time() - started_at


@pytest.mark.slow
def test_sigterm_handler_waits_for_checkpoints(tmp_path, short_fasta):
    """A stopped worker process saves its rows, and is awaited no longer than that takes."""
    config = settings(short_fasta, tmp_path / "run")
    waited_s = asyncio.run(stop_when_computing(config, 0, grace_s=60.0))
    assert waited_s < 30.0
    assert workers_of(tmp_path) == []
    assert list(RunPaths(tmp_path / "run").shard_dir(0).glob("batch_*.pt.done"))


@pytest.mark.slow
def test_a_worker_that_ignores_sigterm_is_killed(tmp_path, short_fasta, sabotage):
    sabotage("""
    import signal
    signal.signal = lambda *_: None
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    import vnp_lib.worker.attempt
    vnp_lib.worker.attempt.StopFlag.set = lambda self: None
    """)
    waited_s = asyncio.run(
        stop_when_computing(settings(short_fasta, tmp_path / "run"), 0, grace_s=1.0)
    )
    assert waited_s >= 1.0
    assert workers_of(tmp_path) == []
