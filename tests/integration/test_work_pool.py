"""Shards as flow runs of their own: a server, a process pool, two workers, and machines that vanish."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import WorkPoolCreate
from prefect.settings import PREFECT_API_URL

from flows.embed import embed
from flows.shard_run import embed_shard_run
from tests.support import (
    ROOT,
    assert_same_rows,
    computed_ordinals,
    descendants_of,
    free_port,
    is_alive,
    scrape,
    small_config,
)
from vnp_lib.config import EmbedConfig
from vnp_lib.manifest import CheckpointManifest
from vnp_lib.plan import RunPaths, load_plan

pytestmark = [pytest.mark.soak, pytest.mark.usefixtures("prefect_server")]

POOL = "machines"
NUM_SHARDS = 4


@pytest.fixture(scope="module")
def deployment(prefect_server) -> str:
    """The flow of one shard, deployed to a process pool."""

    async def deploy() -> None:
        async with get_client() as client:
            await client.create_work_pool(WorkPoolCreate(name=POOL, type="process"))
        from_here = await embed_shard_run.from_source(source=str(ROOT), entrypoint="flows/shard_run.py:embed_shard_run")
        await from_here.deploy(name="test", work_pool_name=POOL, print_next_steps=False)

    asyncio.run(deploy())
    return "vnp-embed-shard/test"


@pytest.fixture
def start_machine(tmp_path) -> Iterator[Callable[[str], subprocess.Popen[bytes]]]:
    """Start a worker that takes one shard at a time, as a machine with one GPU would."""
    started: list[subprocess.Popen[bytes]] = []

    def start(name: str) -> subprocess.Popen[bytes]:
        settings = {
            "PREFECT_API_URL": PREFECT_API_URL.value(),
            "PREFECT_HOME": str(tmp_path / name),
            "PREFECT_WORKER_QUERY_SECONDS": "1",
            "OMP_NUM_THREADS": "1",
        }
        command = [sys.executable, "-m", "prefect", "worker", "start", "--pool", POOL, "--name", name, "--limit", "1"]
        with (tmp_path / f"{name}.log").open("wb") as log:
            started.append(
                subprocess.Popen(
                    command, env=os.environ | settings, stdout=log, stderr=log, cwd=tmp_path, start_new_session=True
                )
            )
        return started[-1]

    yield start
    for machine in started:
        switch_off(machine)


def switch_off(machine: subprocess.Popen[bytes]) -> None:
    """End all of its processes at once, as when a spot machine is gone."""
    for pid in [*descendants_of(machine.pid), machine.pid]:
        if is_alive(pid):
            os.kill(pid, signal.SIGKILL)
    machine.wait()


def settings(fasta: Path, run_dir: Path, deployment: str, *, metrics_port: int) -> EmbedConfig:
    return small_config(
        fasta,
        run_dir,
        devices="cpu",
        shards=NUM_SHARDS,
        token_budget=128,
        executor="work-pool",
        shard_deployment=deployment,
        metrics_port=metrics_port,
        runtime={
            "checkpoint_seq_threshold": 2,
            "heartbeat_s": 0.5,
            "lost_after_s": 15.0,
            "spot_retry_poll_interval": 0.1,
        },
    )


def test_a_machine_that_vanishes_costs_time_only(
    tmp_path, short_fasta, deployment, start_machine, uninterrupted, monkeypatch
):
    """Two machines, four shards; the one that is at work is switched off, and another takes its shard.

    All want the port for metrics that the waiting run has: theirs are not to be had, and nothing else is amiss.
    """
    run_dir = tmp_path / "run"
    port, pages = free_port(), []
    monkeypatch.setattr("flows.embed.tell_of_completion", lambda run, summary: pages.append(scrape(port)))

    async def lose_a_machine() -> None:
        first = start_machine("first")
        while len(computed_ordinals(run_dir)) < 6:  # a file system has no event to wait for
            await asyncio.sleep(0.05)
        await asyncio.to_thread(switch_off, first)
        start_machine("second")
        start_machine("third")

    async def run():
        outcome, _ = await asyncio.gather(
            embed(settings(short_fasta, run_dir, deployment, metrics_port=port), return_state=True), lose_a_machine()
        )
        return outcome

    outcome = asyncio.run(run())
    assert outcome.is_completed(), outcome.message
    manifest = CheckpointManifest(RunPaths(run_dir).manifest)
    causes = [failure["cause"] for rank in range(NUM_SHARDS) for failure in manifest.failures(rank)]
    assert causes == ["preempted"]
    assert set(Counter(computed_ordinals(run_dir)).values()) == {1}
    assert_same_rows(run_dir, uninterrupted[0])

    (page,) = pages
    plan = load_plan(RunPaths(run_dir))
    for rank in range(NUM_SHARDS):
        num_sequences = plan.shard_ordinals(rank).size
        assert page[f"vnp_shard_sequences{{shard={rank}}}"] == num_sequences
        assert page[f"vnp_shard_sequences_done{{shard={rank}}}"] == num_sequences
        assert page[f"vnp_sequences_embedded_total{{shard={rank}}}"] == 0  # not here
    assert page["vnp_failures_total{kind=spot_preemption}"] == 1
