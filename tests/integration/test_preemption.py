"""Preemption with Prefect's real engine: signals, rescheduled runs, cancelled runs."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from prefect import Task, flow, task
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterId
from prefect.client.schemas.objects import State, TaskRun
from prefect.states import Cancelling

from flows.retry_hook import RetryHook
from tests.helpers import (
    ROOT,
    CommandLine,
    assert_same_rows,
    computed_ordinals,
    finished_checkpoints,
    group_of,
    is_alive,
    small_config,
    wait_until,
    workers_of,
)
from vnp_lib.plan.paths import RunPaths
from vnp_lib.worker.stop_signals import EXIT_NOW_AFTER_S

pytestmark = pytest.mark.slow

NUM_COMPUTED = 66  # of 69 sequences, of which three are duplicates
ORPHANS_LIVE_S = 12.0
AT_ONCE_S = 20.0  # two on an idle machine, for Python and Prefect's server to exit
ON_TWO_WORKERS = ("--model", "esm2_t6_8M_UR50D", "--weights", "random", "--devices", "cpu,cpu")
SMALL_CHECKPOINTS = ("--token-budget", 128, "--runtime.checkpoint-seq-threshold", 5)


class AttemptError(Exception):
    """A failed attempt of the task `fail`."""


@task(retries=1_000_000_000, retry_delay_seconds=[10.0])
async def fail(began_at: list[datetime]) -> None:
    began_at.append(datetime.now(UTC))
    raise AttemptError


def hook_that_waits(delays_s: Sequence[float]) -> RetryHook:
    """Return a retry hook that requests one delay after the other, and then no retry."""
    left = iter(delays_s)

    async def hook(task: Task[..., Any], task_run: TaskRun, state: State[Any]) -> bool:
        assert isinstance(state.data, AttemptError)
        delay_s = next(left, None)
        task.retry_delay_seconds = [60.0 if delay_s is None else delay_s]
        return delay_s is not None

    return hook


@pytest.mark.usefixtures("prefect_server")
def test_the_engine_reads_the_delay_after_the_hook_has_set_it():
    """Each failure of each copy of a task has its own delay, which Prefect does not document.

    The delay of 10 s of the task is never used, and a hook that returns False ends the task.
    """
    delays_s = {"one": (0.2, 0.7, 0.01), "two": (0.5, 0.1)}
    began_at: dict[str, list[datetime]] = {name: [] for name in delays_s}

    @flow
    async def fail_again_and_again() -> None:
        copies = {
            name: fail.with_options(task_run_name=name, retry_condition_fn=hook_that_waits(delays))
            for name, delays in delays_s.items()
        }
        await asyncio.gather(
            *(copy(began_at[name], return_state=True) for name, copy in copies.items())
        )

    outcome = asyncio.run(fail_again_and_again(return_state=True))

    histories = task_run_histories(outcome.state_details.flow_run_id)
    for name, delays in delays_s.items():
        states = histories[name]
        waits = [state for state in states if state.name == "AwaitingRetry"]
        due_at = [state.state_details.scheduled_time for state in waits]
        requested_s = [
            (due - state.timestamp).total_seconds()
            for due, state in zip(due_at, waits, strict=True)
        ]
        assert requested_s == pytest.approx(delays, abs=0.05)
        assert len(began_at[name]) == len(delays) + 1
        assert all(began >= due for began, due in zip(began_at[name][1:], due_at, strict=True))
        assert [state.name for state in states].count("Failed") == 1
        assert states[-1].name == "Failed"


def task_run_histories(flow_run_id: UUID | None) -> dict[str, list[State[Any]]]:
    """Return the states of each task run of a flow run, once the server has the final one."""
    assert flow_run_id is not None
    of_the_run = FlowRunFilter(id=FlowRunFilterId(any_=[flow_run_id]))
    with get_client(sync_client=True) as client:

        def read() -> list[TaskRun]:
            return client.read_task_runs(flow_run_filter=of_the_run)

        wait_until(
            lambda: bool(runs := read()) and all(run.state and run.state.is_final() for run in runs)
        )
        histories = {run.name: client.read_task_run_states(run.id) for run in read()}
    return {
        name: sorted(states, key=lambda state: state.timestamp)
        for name, states in histories.items()
    }


STUBBORN = """
import asyncio, signal, sys, time
from pathlib import Path

from prefect.exceptions import TerminationSignal

from flows.signals import sigterm_cancels_the_flow
from vnp_lib.worker import stop_signals
from vnp_lib.worker.supervisor import run_worker

stop_signals.EXIT_NOW_AFTER_S = 1.5

async def follow(job):
    async def on_event(event):
        job.with_name("followed").touch()

    with sigterm_cancels_the_flow():
        loop = asyncio.get_running_loop()
        {busy}
        limits = dict(startup_limit_s=600, silence_limit_s=600, grace_s=600)
        log = job.with_name("log")
        await run_worker(job, device="cpu", log_path=log, on_event=on_event, **limits)

async def work_for_ever():
    while True:
        time.sleep(0.01)
        await asyncio.sleep(0)

def call_for_ever(loop):
    loop.call_soon(call_for_ever, loop)
    time.sleep(0.01)

def terminate(*_):
    raise TerminationSignal(signal.SIGTERM)

# As Prefect does.
signal.signal(signal.SIGTERM, terminate)
job = Path(sys.argv[1])
# The job is the program of the worker process.
sys.executable = str(job)
try:
    asyncio.run(follow(job))
except (TerminationSignal, asyncio.CancelledError):
    sys.exit(143)
"""


@pytest.mark.parametrize(
    "busy",
    ["pass", "call_for_ever(loop)", "working = loop.create_task(work_for_ever())"],
    ids=["out of the selector", "in a callback", "in a task"],
)
def test_a_late_sigterm_kills_the_workers(tmp_path, busy):
    """The worker process ignores signals: the flow waits for it until the late signal."""
    worker = tmp_path / "worker"
    worker.write_text(f"""#!/bin/sh
    trap 'touch {tmp_path}/terminated' TERM
    echo $$ > {tmp_path}/pid
    echo '{{"event": "started"}}'
    while :; do sleep 0.1; done
    """)
    worker.chmod(0o755)
    process = subprocess.Popen(
        [sys.executable, "-c", STUBBORN.format(busy=busy), worker], cwd=ROOT, start_new_session=True
    )
    wait_until((tmp_path / "followed").exists)
    # Not by `workers_of`, which would find the shell's fork of `sleep`, too.
    pid = int((tmp_path / "pid").read_text())
    with nobody_left_of(process, tmp_path):
        process.send_signal(signal.SIGTERM)
        wait_until((tmp_path / "terminated").exists, timeout_s=ORPHANS_LIVE_S)
        for _ in range(5):
            time.sleep(0.1)
            process.send_signal(signal.SIGTERM)
        time.sleep(1.5)
        assert process.poll() is None
        assert is_alive(pid)

        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=AT_ONCE_S) == 143
        wait_until(lambda: not is_alive(pid), timeout_s=1.0)


@contextmanager
def nobody_left_of(process: subprocess.Popen[Any], directory: Path) -> Iterator[None]:
    """Assert that a process, its group and its workers have exited; kill any that have not."""
    try:
        yield
    finally:
        for pid in (*group_of(process.pid), *workers_of(directory)):
            os.kill(pid, signal.SIGKILL)


SEVERAL = {
    "a wrapper passes it on": [(0.05, signal.SIGTERM)],
    "three within a second": [(0.5, signal.SIGTERM), (0.5, signal.SIGTERM)],
    "a burst": [(0.002, signal.SIGTERM)] * 8,
    "over seconds": [(2.5, signal.SIGTERM)] * 2,
    "Ctrl-C before and after": [(0.1, signal.SIGINT), (0.3, signal.SIGTERM)],
}


@pytest.mark.soak
@pytest.mark.parametrize("first", [signal.SIGTERM, signal.SIGINT], ids=str)
@pytest.mark.parametrize("further", SEVERAL.values(), ids=SEVERAL)
def test_several_signals_of_one_preemption_are_one(
    served_command_line, sabotage, tmp_path, short_fasta, first, further
):
    """Nothing is in a checkpoint before, and a worker process takes two seconds to save."""
    sabotage("""
    import time
    from vnp_lib.checkpoint.writer import AsyncCheckpointWriter
    wait_all = AsyncCheckpointWriter.wait_all
    def wait_slowly(self, *arguments):
        time.sleep(2)
        return wait_all(self, *arguments)
    AsyncCheckpointWriter.wait_all = wait_slowly
    import vnp_lib.model.esm2
    original = vnp_lib.model.esm2.ESM2.forward_packed
    def slow(*arguments, **others):
        time.sleep(0.1)
        return original(*arguments, **others)
    vnp_lib.model.esm2.ESM2.forward_packed = slow
    """)
    run_dir = tmp_path / "run"
    process = served_command_line.start(
        *("--fasta", short_fasta, "--output-dir", run_dir, *ON_TWO_WORKERS, "--token-budget", 128),
        *("--runtime.checkpoint-seq-threshold", 1000),
    )
    with nobody_left_of(process, run_dir):
        histories = [RunPaths(run_dir).history(rank) for rank in (0, 1)]
        wait_until(lambda: process.poll() is not None or all(path.exists() for path in histories))
        time.sleep(2.0)
        assert finished_checkpoints(run_dir) == {}
        process.send_signal(first)
        for pause_s, number in further:
            time.sleep(pause_s)
            with suppress(ProcessLookupError):
                os.killpg(process.pid, number)
        _, err = process.communicate(timeout=60)
    assert process.returncode in (130, 143), err
    assert shards_with_checkpoints(run_dir) == {0, 1}, err
    wait_until(lambda: workers_of(run_dir) == group_of(process.pid) == [], timeout_s=1.0)


@pytest.mark.soak
def test_a_late_second_sigterm_does_not_wait(
    command_line, served_command_line, sabotage, tmp_path, short_fasta, uninterrupted
):
    """For a worker process that saves for a minute, or for one that ignores signals."""
    sabotage("""
    if attempt == 1:
        import signal, time
        # Before there are threads.
        if rank == 1:
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        from vnp_lib.checkpoint.writer import AsyncCheckpointWriter
        AsyncCheckpointWriter.wait_all = lambda self: time.sleep(60)
        if rank == 1:
            import vnp_lib.worker.attempt
            vnp_lib.worker.attempt.StopFlag.set = lambda self: None
    """)
    run_dir = tmp_path / "run"
    arguments = (
        "--fasta",
        short_fasta,
        "--output-dir",
        run_dir,
        *ON_TWO_WORKERS,
        *SMALL_CHECKPOINTS,
    )
    process = command_line.start(*arguments)
    with nobody_left_of(process, run_dir):
        wait_until(lambda: process.poll() is not None or shards_with_checkpoints(run_dir) == {0, 1})
        process.send_signal(signal.SIGTERM)
        time.sleep(EXIT_NOW_AFTER_S + 0.5)
        assert process.poll() is None
        assert len(workers_of(run_dir)) == 2
        before = finished_checkpoints(run_dir)

        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=AT_ONCE_S)
        assert process.returncode == 143, err
        wait_until(lambda: workers_of(run_dir) == group_of(process.pid) == [], timeout_s=1.0)

    ended = served_command_line.run(*arguments)

    assert ended.returncode == 0, ended.stderr
    after = finished_checkpoints(run_dir)
    assert {path: after[path] for path in before} == before
    assert_each_computed_once(run_dir)
    assert_same_rows(run_dir, uninterrupted)


@pytest.fixture(scope="module")
def deployment_id(served_command_line: CommandLine) -> UUID:
    """Create the deployment of the project as deployments/README.md describes."""
    for arguments in (
        ("work-pool", "create", "vnp-local", "--type", "process", "--overwrite"),
        ("--no-prompt", "deploy", "--name", "local"),
    ):
        process = served_command_line.start_prefect(*arguments)
        out, err = process.communicate(timeout=120)
        assert process.returncode == 0, out + err
    with get_client(sync_client=True) as client:
        return client.read_deployment_by_name("vnp-embed/local").id


def test_a_preempted_deployed_run_is_rescheduled(
    served_command_line, deployment_id, tmp_path, short_fasta, uninterrupted
):
    """As in a pod: SIGTERM to `prefect flow-run execute`, which then executes it again."""
    run_dir = tmp_path / "run"
    flow_run_id = schedule(deployment_id, short_fasta, run_dir)
    process = execute(served_command_line, flow_run_id)
    wait_until(lambda: process.poll() is not None or len(finished_checkpoints(run_dir)) >= 2)
    process.send_signal(signal.SIGTERM)
    wait_until(lambda: workers_of(run_dir) == [], timeout_s=ORPHANS_LIVE_S)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, out + err
    assert state_names(flow_run_id)[-1] == "AwaitingRetry"
    assert 10 <= len(computed_ordinals(run_dir)) < NUM_COMPUTED

    process = execute(served_command_line, flow_run_id)
    out, err = process.communicate(timeout=120)

    assert process.returncode == 0, out + err
    assert state_names(flow_run_id)[-3:] == ["AwaitingRetry", "Running", "Completed"]
    assert_each_computed_once(run_dir)
    assert_same_rows(run_dir, uninterrupted)


@pytest.fixture
def worker(
    served_command_line: CommandLine, deployment_id: UUID
) -> Iterator[subprocess.Popen[str]]:
    """Start a process worker, which runs what is scheduled."""
    process = served_command_line.start_prefect(
        *("worker", "start", "--pool", "vnp-local", "--type", "process"),
        PREFECT_WORKER_QUERY_SECONDS="1",
    )
    yield process
    process.terminate()
    process.communicate(timeout=60)


@pytest.mark.soak
def test_a_cancelled_run_stays_cancelled(
    worker, served_command_line, deployment_id, tmp_path, short_fasta, uninterrupted
):
    """As by the button in the UI: in state Cancelling, the process worker stops it."""
    run_dir = tmp_path / "run"
    flow_run_id = schedule(deployment_id, short_fasta, run_dir)
    wait_until(lambda: len(finished_checkpoints(run_dir)) >= 2)
    with get_client(sync_client=True) as client:
        client.set_flow_run_state(flow_run_id, Cancelling())
    cancelled_at = time.monotonic()
    wait_until(lambda: workers_of(run_dir) == [], timeout_s=ORPHANS_LIVE_S)
    wait_until(lambda: state_names(flow_run_id)[-1] == "Cancelled")
    time.sleep(max(0.0, cancelled_at + ORPHANS_LIVE_S - time.monotonic()))
    assert workers_of(run_dir) == []
    assert state_names(flow_run_id)[-2:] == ["Cancelling", "Cancelled"]
    assert {states[-1].name for states in task_run_histories(flow_run_id).values()} == {"Crashed"}
    assert 10 <= len(computed_ordinals(run_dir)) < NUM_COMPUTED

    again = schedule(deployment_id, short_fasta, run_dir)
    wait_until(lambda: state_names(again)[-1] == "Completed")

    assert state_names(flow_run_id)[-1] == "Cancelled"
    assert_each_computed_once(run_dir)
    assert_same_rows(run_dir, uninterrupted)


def shards_with_checkpoints(run_dir: Path) -> set[int]:
    return {int(path.parent.name.removeprefix("shard_")) for path in finished_checkpoints(run_dir)}


def schedule(deployment_id: UUID, fasta: Path, run_dir: Path) -> UUID:
    """Create a flow run with some 60 small batches on two worker processes; return its id."""
    config = small_config(fasta, run_dir, token_budget=128, runtime={"checkpoint_seq_threshold": 5})
    with get_client(sync_client=True) as client:
        return client.create_flow_run_from_deployment(
            deployment_id, parameters={"config": config.model_dump(mode="json")}
        ).id


def execute(command_line: CommandLine, flow_run_id: UUID) -> subprocess.Popen[str]:
    return command_line.start_prefect(
        "flow-run", "execute", flow_run_id, PREFECT_FLOW_RUN_EXECUTE_SIGTERM_BEHAVIOR="reschedule"
    )


def state_names(flow_run_id: UUID) -> list[str | None]:
    """Return the states of a flow run, oldest first."""
    with get_client(sync_client=True) as client:
        states = client.read_flow_run_states(flow_run_id)
    return [state.name for state in sorted(states, key=lambda state: state.timestamp)]


def assert_each_computed_once(run_dir: Path) -> None:
    ordinals = computed_ordinals(run_dir)
    assert len(ordinals) == len(set(ordinals)) == NUM_COMPUTED
