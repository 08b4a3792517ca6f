"""What people and automations see of a run: artifacts, tags and events in Prefect, and metrics."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from uuid import UUID, uuid4

import pytest
from prefect import flow, runtime, tags
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import (
    ArtifactFilter,
    ArtifactFilterFlowRunId,
    FlowRunFilter,
    FlowRunFilterId,
)
from prefect.client.schemas.objects import Artifact, FlowRun, TaskRun

from flows.artifacts import shard_table, tag_flow_run
from flows.embed import embed
from tests.helpers import free_port, scrape, small_config
from tests.poison import Way, patch, sabotage_workers, write_proteins
from vnp_lib.plan.paths import RunPaths
from vnp_lib.plan.plan import load_plan

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("prefect_server")]

MODEL = "esm2_t6_8M_UR50D"
PREEMPTED_ONCE = """
if rank == 1 and attempt == 1:
    import signal
    os.kill(os.getpid(), signal.SIGTERM)
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class WatchedRun:
    """A run of two shards, one of them preempted once, with a protein that is quarantined."""

    run_dir: Path
    flow_run: FlowRun
    task_runs: list[TaskRun]
    artifacts: list[Artifact]
    events: list[tuple[str, dict[str, Any]]]
    page: dict[str, float]  # the metrics at the end of the run

    def artifact(self, key: str) -> Artifact:
        (artifact,) = [each for each in self.artifacts if each.key == key]
        return artifact

    def metric_by_shard(self, name: str) -> list[float]:
        return [self.page[f"{name}{{shard={rank}}}"] for rank in range(2)]


@pytest.fixture(scope="module")
def watched(tmp_path_factory, prefect_server) -> WatchedRun:
    tmp_path = tmp_path_factory.mktemp("watched")
    proteins = tmp_path / "in.fasta"
    write_proteins(proteins, 8, {2: Way.NAN})
    # An id that is markup in Prefect's UI.
    proteins.write_text(proteins.read_text().replace(">nan_2", ">sp|nan_2|X"))
    port = free_port()
    events: list[tuple[str, dict[str, Any]]] = []
    pages: list[dict[str, float]] = []

    def emit_event(event, resource, payload):
        events.append((event, payload))
        if event == "vnp.run.completed":
            pages.append(scrape(port))

    with pytest.MonkeyPatch.context() as monkeypatch, tags("mine"):
        monkeypatch.setattr("flows.events.emit_event", emit_event)
        sabotage_workers(tmp_path, monkeypatch, patch(Way.NAN) + PREEMPTED_ONCE)
        config = small_config(
            proteins, tmp_path / "run", runtime={"spot_retry_poll_interval": 0.1}, metrics_port=port
        )
        outcome = asyncio.run(embed(config, return_state=True))
    assert outcome.is_completed(), outcome.message
    flow_run, task_runs, artifacts = read_flow_run(outcome.state_details.flow_run_id)
    (page,) = pages
    return WatchedRun(
        run_dir=tmp_path / "run",
        flow_run=flow_run,
        task_runs=task_runs,
        artifacts=artifacts,
        events=events,
        page=page,
    )


def read_flow_run(flow_run_id: UUID) -> tuple[FlowRun, list[TaskRun], list[Artifact]]:
    """Return a flow run, its task runs and all its artifacts, older versions included."""

    async def read():
        async with get_client() as client:
            task_runs = FlowRunFilter(id=FlowRunFilterId(any_=[flow_run_id]))
            artifacts = ArtifactFilter(flow_run_id=ArtifactFilterFlowRunId(any_=[flow_run_id]))
            return (
                await client.read_flow_run(flow_run_id),
                await client.read_task_runs(flow_run_filter=task_runs),
                await client.read_artifacts(artifact_filter=artifacts),
            )

    return asyncio.run(read())


def test_a_flow_run_is_tagged_with_model_and_failures(watched):
    """The user's own tags stay."""
    assert sorted(watched.flow_run.tags) == [MODEL, "failed:spot_preemption", "mine"]


def test_task_runs_are_named_by_shard_and_tagged(watched):
    assert {task.name: sorted(task.tags) for task in watched.task_runs} == {
        "shard-000": ["cpu", MODEL, "mine"],
        "shard-001": ["cpu", MODEL, "mine"],
    }


def test_artifacts_are_updated_and_not_added(watched):
    """One per shard for all its attempts, a table of the shards, and a summary."""
    keys = ["shard-000", "shard-001", "vnp-shards", "vnp-summary"]
    assert sorted(artifact.key for artifact in watched.artifacts) == keys
    assert watched.artifact("shard-001").data == 100.0


def test_the_table_shows_the_shards_and_their_last_failure(watched):
    first, second = json.loads(watched.artifact("vnp-shards").data)
    assert [first["shard"], second["shard"]] == ["000", "001"]
    assert [first["state"], second["state"]] == ["complete", "complete"]
    assert (first["last failure"], second["attempt"]) == ("", 2)
    assert second["last failure"].startswith("spot_preemption: spot preemption #1")


def test_the_summary_shows_counts_quarantine_and_report(watched):
    summary = watched.artifact("vnp-summary")
    report = watched.run_dir / "report.html"
    assert summary.description == "7 sequences embedded, 1 in quarantine"
    assert "| sequences embedded | 7 |" in summary.data
    assert r"| sp\|nan_2\|X |" in summary.data
    assert f"| report | [{report}]({report.as_uri()}) |" in summary.data


def test_automations_get_events(watched):
    """Of a preemption, of a sequence in quarantine, and of the end of the run."""
    assert [event for event, _ in watched.events].count("vnp.shard.preempted") == 1
    events = dict(watched.events)
    assert events["vnp.sequence.quarantined"]["id"] == "sp|nan_2|X"
    assert events["vnp.run.completed"]["num_rows"] == 7


def test_metrics_count_sequences_and_tokens(watched):
    plan = load_plan(RunPaths(watched.run_dir))
    assert watched.metric_by_shard("vnp_shard_sequences") == [4, 4]
    assert watched.metric_by_shard("vnp_shard_sequences_done") == [4, 4]
    assert sum(watched.metric_by_shard("vnp_sequences_embedded_total")) == 7
    assert sum(watched.metric_by_shard("vnp_checkpoint_sequences_total")) == 7
    num_tokens = sum(plan.lengths + 2) - (plan.lengths[2] + 2)
    assert sum(watched.metric_by_shard("vnp_tokens_embedded_total")) == num_tokens
    assert watched.metric_by_shard("vnp_batches_queued") == [0, 0]


def test_metrics_count_attempts_and_failures(watched):
    failures = {
        sample: count
        for sample, count in watched.page.items()
        if sample.startswith("vnp_failures_total") and count
    }
    assert failures == {"vnp_failures_total{kind=spot_preemption}": 1}
    assert watched.metric_by_shard("vnp_attempts_total") == [1, 2]
    assert watched.page["vnp_quarantined_sequences"] == 1


def test_metrics_time_checkpoints(watched):
    assert watched.page["vnp_checkpoint_write_seconds_count"] == 2
    assert watched.page["vnp_checkpoint_write_seconds_sum"] > 0


def test_concurrent_tags_are_all_kept():
    """An update replaces all tags: two shards that fail at once must not remove each other's.

    A tag that cannot be added does not fail the run.
    """

    @flow(name="tagged")
    async def tagged() -> None:
        flow_run_id = UUID(runtime.flow_run.id)
        failed = ("failed:oom", "failed:transient", "failed:oom")
        await asyncio.gather(*(tag_flow_run(flow_run_id, tag) for tag in failed))
        await tag_flow_run(uuid4(), "of no flow run")

    with tags("mine"):
        outcome = asyncio.run(tagged(return_state=True))
    assert outcome.is_completed(), outcome.message
    flow_run, _, _ = read_flow_run(outcome.state_details.flow_run_id)
    assert sorted(flow_run.tags) == ["failed:oom", "failed:transient", "mine"]


def test_a_slow_status_does_not_block_the_event_loop(monkeypatch):
    """It is read in a thread, with pauses ten times as long.

    Here a read takes 0.1 s: there is one in the 0.6 s of the block, and one at its end.
    """
    readers = []

    def read_slowly(plan, paths):
        readers.append(threading.current_thread())
        time.sleep(0.1)
        raise OSError("nothing to read")

    monkeypatch.setattr("flows.artifacts.read_status", read_slowly)
    config = SimpleNamespace(runtime=SimpleNamespace(artifact_interval_s=0.01))

    async def watch_for_a_while():
        async with shard_table(SimpleNamespace(config=config, plan=None, paths=None)):
            await asyncio.sleep(0.6)

    asyncio.run(watch_for_a_while())
    assert len(readers) == 2
    assert threading.main_thread() not in readers
