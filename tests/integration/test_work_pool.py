"""Shards as flow runs: a server, a process pool, and machines with a GPU each that fail."""

from __future__ import annotations

import signal
import subprocess
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from uuid import UUID

import pytest
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterTags
from prefect.client.schemas.objects import FlowRun
from prefect.client.schemas.sorting import FlowRunSort
from prefect.states import Cancelled, Cancelling

from tests.helpers import (
    assert_same_rows,
    computed_ordinals,
    finished_checkpoints,
    free_port,
    scrape,
    small_config,
    wait_until,
    workers_of,
)
from tests.prefect_cluster import PATIENCE_S, Cluster, switch_off
from vnp_lib.checkpoint.manifest import CheckpointManifest
from vnp_lib.config import EmbedConfig
from vnp_lib.plan.paths import RunPaths

pytestmark = [pytest.mark.soak, pytest.mark.timeout(1200)]

NUM_SHARDS = 4
NUM_COMPUTED = 66  # of 69 sequences, of which three are duplicates
GRACE_S = 10.0
# It takes 7 to 25 s on two cores: Prefect's worker imports the flow to find its hooks.
CANCELLED_WITHIN_S = 90.0
SLOW_GPU = """
import fcntl, time
from vnp_lib.model.esm2 import ESM2

gpus = pathlib.Path({gpus!r})
gpu = (gpus / os.environ["GPU"]).open("a")
try:
    fcntl.flock(gpu, fcntl.LOCK_EX | fcntl.LOCK_NB)
except OSError:
    (gpus / "used_twice").touch()
print(rank, file=gpu, flush=True)
forward = ESM2.forward_packed

def forward_in_time(*arguments, **named):
    until = time.monotonic() + 3.0
    while (gpus / "slow").exists() and time.monotonic() < until:
        time.sleep(0.05)
    return forward(*arguments, **named)

ESM2.forward_packed = forward_in_time
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpus:
    """The GPUs of the machines: which shards used them, and how fast they are."""

    directory: Path

    def make_slow(self) -> None:
        (self.directory / "slow").touch()

    def make_fast(self) -> None:
        (self.directory / "slow").unlink()

    def shards_on(self, machine: str) -> list[int]:
        """Return the shards that a machine's GPU has computed, in order."""
        log = self.directory / machine
        return [int(rank) for rank in log.read_text().split()] if log.exists() else []

    @property
    def was_used_twice(self) -> bool:
        """Whether two worker processes used one GPU at the same time."""
        return (self.directory / "used_twice").exists()


@dataclass(frozen=True, slots=True, kw_only=True)
class Story:
    """A run in a work pool, and its observable state."""

    cluster: Cluster
    config: EmbedConfig
    gpus: Gpus

    @property
    def run_dir(self) -> Path:
        return self.config.output_dir

    @contextmanager
    def running(self) -> Iterator[subprocess.Popen[str]]:
        """Start the command, which needs no GPU; it ends with the block."""
        run = self.cluster.command_line.start(*self._options())
        try:
            yield run
        finally:
            switch_off(run)
            run.communicate()

    def schedule(self) -> UUID:
        """Start the same as a flow run of the deployment."""
        with self.cluster.client() as client:
            deployment = client.read_deployment_by_name("vnp-embed/local")
            parameters = {"config": self.config.model_dump(mode="json")}
            return client.create_flow_run_from_deployment(deployment.id, parameters=parameters).id

    def wait_until_at_work(self, *machines: str) -> None:
        """Wait until each of these machines has a checkpoint of its shard on disk."""
        wait_until(
            lambda: all(
                any(map(self.has_checkpoint, self.gpus.shards_on(machine))) for machine in machines
            ),
            timeout_s=PATIENCE_S,
        )

    def wait_until_complete(self, run: subprocess.Popen[str]) -> None:
        out, err = run.communicate(timeout=PATIENCE_S)
        assert run.returncode == 0, out + err

    def shard_runs(self) -> list[FlowRun]:
        """Return the flow runs of its shards, oldest first."""
        ours = FlowRunFilter(tags=FlowRunFilterTags(all_=[f"vnp-dir:{self.run_dir}"]))
        with self.cluster.client() as client:
            return client.read_flow_runs(
                flow_run_filter=ours, sort=FlowRunSort.EXPECTED_START_TIME_ASC
            )

    def give_up(self) -> None:
        """End what a failed test left running, so that it holds no slots of the next test."""
        with self.cluster.client() as client:
            for run in self.shard_runs():
                if run.state and not run.state.is_final():
                    client.set_flow_run_state(run.id, Cancelled(), force=True)

    def has_checkpoint(self, rank: int) -> bool:
        shard_dir = RunPaths(self.run_dir).shard_dir(rank)
        return any(path.parent == shard_dir for path in finished_checkpoints(self.run_dir))

    def causes_of_failures(self) -> list[str]:
        manifest = CheckpointManifest(RunPaths(self.run_dir).manifest)
        return [
            failure["cause"] for rank in range(NUM_SHARDS) for failure in manifest.failures(rank)
        ]

    def assert_right(self, oracle_dir: Path, *, kept: dict[Path, bytes]) -> None:
        """Assert that every row is right and was computed once, and that no process is left.

        The checkpoints in `kept` were not computed again, and no GPU was shared.
        """
        after = finished_checkpoints(self.run_dir)
        assert {path: after[path] for path in kept} == kept
        ordinals = computed_ordinals(self.run_dir)
        assert len(ordinals) == len(set(ordinals)) == NUM_COMPUTED
        assert_same_rows(self.run_dir, oracle_dir)
        assert workers_of(self.run_dir) == []
        assert not self.gpus.was_used_twice

    def _options(self) -> list[object]:
        given = self.config.model_dump(mode="json", exclude_unset=True)
        runtime = {f"runtime.{name}": value for name, value in given.pop("runtime").items()}
        given = given | runtime | {"fasta": given["fasta"][0]}
        return [
            word for name, value in given.items() for word in (f"--{name.replace('_', '-')}", value)
        ]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory) -> Iterator[Cluster]:
    """Start a server with the deployments of `prefect.yaml`, and no machine."""
    cluster = Cluster(directory=tmp_path_factory.mktemp("cluster"), port=free_port())
    try:
        cluster.start_server()
        cluster.deploy()
        yield cluster
    finally:
        cluster.switch_everything_off()


@pytest.fixture
def gpus(tmp_path, sabotage) -> Gpus:
    directory = tmp_path / "gpus"
    directory.mkdir()
    sabotage(SLOW_GPU.format(gpus=str(directory)))
    gpus = Gpus(directory=directory)
    gpus.make_slow()
    return gpus


@pytest.fixture
def start_machine(cluster):
    """Return a function that starts a machine with a GPU; at the end all are killed."""
    started: list[subprocess.Popen[str]] = []

    def start(name: str) -> subprocess.Popen[str]:
        started.append(cluster.start_machine(name))
        return started[-1]

    yield start
    switch_off(*started)


@pytest.fixture
def story(tmp_path, cluster, gpus, short_fasta) -> Iterator[Story]:
    config = small_config(
        short_fasta,
        tmp_path / "run",
        devices="cpu",
        shards=NUM_SHARDS,
        token_budget=128,
        executor="work-pool",
        shard_deployment="vnp-embed-shard/local",
        # The flow runs of the shards find it in use, and run without metrics.
        metrics_port=free_port(),
        runtime={
            "checkpoint_seq_threshold": 2,
            "heartbeat_s": 0.5,
            "lost_after_s": 20.0,
            "grace_s": GRACE_S,
            "spot_retry_poll_interval": 0.1,
        },
    )
    story = Story(cluster=cluster, config=config, gpus=gpus)
    yield story
    story.give_up()


def test_a_machine_that_vanishes_costs_time_only(story, start_machine, uninterrupted):
    """One of two machines is killed during its shard; the other one computes the rest."""
    first = start_machine("first")
    start_machine("second")
    with story.running() as run:
        story.wait_until_at_work("first", "second")
        switch_off(first)
        (lost,) = story.gpus.shards_on("first")
        page = scrape(story.config.metrics_port)
        assert (
            sum(page[f"vnp_shard_sequences{{shard={rank}}}"] for rank in range(NUM_SHARDS))
            == NUM_COMPUTED
        )
        before = finished_checkpoints(story.run_dir)
        assert (
            CheckpointManifest(RunPaths(story.run_dir).manifest).shards()[lost].status
            == "in_progress"
        )
        story.gpus.make_fast()
        story.wait_until_complete(run)

    assert sorted(story.gpus.shards_on("second")) == [0, 1, 2, 3]
    assert story.causes_of_failures() == ["preempted"]
    story.assert_right(uninterrupted, kept=before)


def test_the_same_command_resumes_after_a_power_failure(
    story, cluster, start_machine, uninterrupted
):
    """Flow runs that Prefect considers running hold every slot of the concurrency limit."""
    machines = [start_machine("first"), start_machine("second")]
    with story.running() as run:
        story.wait_until_at_work("first", "second")
        switch_off(run, *machines, cluster.server)
    before = finished_checkpoints(story.run_dir)
    cluster.start_server()
    dead = story.shard_runs()
    assert Counter(run.state.type for run in dead) == {"RUNNING": 2, "SCHEDULED": 2}
    assert cluster.used_slots() == 2

    story.gpus.make_fast()
    start_machine("third")
    start_machine("fourth")
    with story.running() as run:
        story.wait_until_complete(run)

    states = {run.id: run.state_name for run in story.shard_runs()}
    assert [states.pop(run.id) for run in dead] == ["Cancelled"] * NUM_SHARDS
    assert list(states.values()) == ["Completed"] * NUM_SHARDS
    assert cluster.used_slots() == 0
    assert story.gpus.shards_on("third")
    assert story.gpus.shards_on("fourth")
    story.assert_right(uninterrupted, kept=before)


def test_shards_of_a_killed_run_do_no_harm(story, start_machine, uninterrupted):
    """Its machines are not killed: they compute further shards until the run is started again."""
    start_machine("first")
    start_machine("second")
    with story.running() as run:
        story.wait_until_at_work("first", "second")
        switch_off(run)
    story.gpus.make_fast()
    wait_until(
        lambda: len(story.gpus.shards_on("first") + story.gpus.shards_on("second")) > 2,
        timeout_s=PATIENCE_S,
    )
    story.gpus.make_slow()

    with story.running() as run:
        wait_until(
            lambda: len(story.shard_runs()) > NUM_SHARDS or run.poll() is not None,
            timeout_s=PATIENCE_S,
        )
        story.gpus.make_fast()
        story.wait_until_complete(run)

    assert {run.state_name for run in story.shard_runs()} <= {"Completed", "Cancelled"}
    story.assert_right(uninterrupted, kept={})


@pytest.mark.parametrize("how", ["Ctrl-C", "SIGTERM", "the button in the UI"])
def test_a_cancelled_run_cancels_its_shards(story, cluster, start_machine, uninterrupted, how):
    """Otherwise other machines would compute for hours. They save, and the next run resumes."""
    if how == "the button in the UI":
        start_machine("head")
        flow_run_id = story.schedule()
        wait_until(lambda: len(story.shard_runs()) == NUM_SHARDS, timeout_s=PATIENCE_S)
        start_machine("first")
        start_machine("second")
        story.wait_until_at_work("first", "second")
        with cluster.client() as client:
            client.set_flow_run_state(flow_run_id, Cancelling())
    else:
        start_machine("first")
        start_machine("second")
        with story.running() as run:
            story.wait_until_at_work("first", "second")
            run.send_signal(signal.SIGINT if how == "Ctrl-C" else signal.SIGTERM)
            assert run.wait(timeout=PATIENCE_S) == (130 if how == "Ctrl-C" else 143)
    cancelled_at = time.monotonic()
    wait_until(
        lambda: {run.state_name for run in story.shard_runs()} == {"Cancelled"},
        timeout_s=CANCELLED_WITHIN_S,
    )
    wait_until(lambda: workers_of(story.run_dir) == [], timeout_s=GRACE_S)
    print(f"{how}: all shards have ended after {time.monotonic() - cancelled_at:.1f} s")
    before = finished_checkpoints(story.run_dir)
    assert 0 < len(computed_ordinals(story.run_dir)) < NUM_COMPUTED
    assert cluster.used_slots() == 0

    story.gpus.make_fast()
    with story.running() as run:
        story.wait_until_complete(run)

    story.assert_right(uninterrupted, kept=before)


def test_the_shards_of_a_rescheduled_run_continue(story, cluster, start_machine, uninterrupted):
    """As in a preempted pod: SIGTERM, and the same flow run is executed again and finds them."""
    flow_run_id = story.schedule()
    parent = cluster.command_line.start_prefect(
        "flow-run", "execute", flow_run_id, PREFECT_FLOW_RUN_EXECUTE_SIGTERM_BEHAVIOR="reschedule"
    )
    wait_until(lambda: len(story.shard_runs()) == NUM_SHARDS, timeout_s=PATIENCE_S)
    start_machine("first")
    start_machine("second")
    story.wait_until_at_work("first", "second")
    parent.send_signal(signal.SIGTERM)
    out, err = parent.communicate(timeout=PATIENCE_S)
    assert parent.returncode == 0, out + err
    assert Counter(run.state.type for run in story.shard_runs()) == {"RUNNING": 2, "SCHEDULED": 2}

    start_machine("head")
    with cluster.client() as client:
        wait_until(lambda: client.read_flow_run(flow_run_id).run_count == 2, timeout_s=PATIENCE_S)
        story.gpus.make_fast()
        wait_until(lambda: client.read_flow_run(flow_run_id).state.is_final(), timeout_s=PATIENCE_S)
        assert client.read_flow_run(flow_run_id).state_name == "Completed"

    assert [run.state_name for run in story.shard_runs()] == ["Completed"] * NUM_SHARDS
    story.assert_right(uninterrupted, kept={})
