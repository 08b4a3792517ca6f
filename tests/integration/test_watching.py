"""What people and automations see of a run in Prefect, and Prometheus on its page."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from types import SimpleNamespace
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
from tests.poison import Way, patch, write_proteins
from vnp_lib.plan.paths import RunPaths
from vnp_lib.plan.plan import load_plan

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("prefect_server")]

MODEL = "esm2_t6_8M_UR50D"


def look_at(flow_run_id: UUID) -> tuple[FlowRun, list[TaskRun], list[Artifact]]:
    """A flow run, its task runs and all its artifacts, the newest and the older ones."""

    async def read():
        async with get_client() as client:
            of_the_run = ArtifactFilter(flow_run_id=ArtifactFilterFlowRunId(any_=[flow_run_id]))
            return (
                await client.read_flow_run(flow_run_id),
                await client.read_task_runs(
                    flow_run_filter=FlowRunFilter(id=FlowRunFilterId(any_=[flow_run_id]))
                ),
                await client.read_artifacts(artifact_filter=of_the_run),
            )

    return asyncio.run(read())


def test_a_run_with_a_bad_protein_shows_its_shards_its_summary_its_events_and_its_metrics(
    tmp_path, sabotage, monkeypatch
):
    """A table with the last failure of each shard, a bar for each, a summary, tags, events for automations, and a page."""
    port = free_port()
    emitted, pages = [], []

    def emit_event(event, resource, payload):
        emitted.append((event, payload))
        if event == "vnp.run.completed":
            pages.append(scrape(port))

    monkeypatch.setattr("flows.events.emit_event", emit_event)
    proteins = tmp_path / "in.fasta"
    write_proteins(proteins, 8, {2: Way.NAN})
    proteins.write_text(proteins.read_text().replace(">nan_2", ">sp|nan_2|X"))
    sabotage(
        patch(Way.NAN)
        + "\nif rank == 1 and attempt == 1:\n    import signal\n    os.kill(os.getpid(), signal.SIGTERM)\n"
    )
    config = small_config(
        proteins, tmp_path / "run", runtime={"spot_retry_poll_interval": 0.1}, metrics_port=port
    )
    with tags("mine"):
        outcome = asyncio.run(embed(config, return_state=True))
    assert outcome.is_completed(), outcome.message

    flow_run, task_runs, artifacts = look_at(outcome.state_details.flow_run_id)
    assert sorted(flow_run.tags) == [MODEL, "failed:spot_preemption", "mine"]
    assert {task.name: sorted(task.tags) for task in task_runs} == {
        "shard-000": ["cpu", MODEL, "mine"],
        "shard-001": ["cpu", MODEL, "mine"],
    }
    assert sorted(artifact.key for artifact in artifacts) == [
        "shard-000",
        "shard-001",
        "vnp-shards",
        "vnp-summary",
    ]
    shown = {artifact.key: artifact for artifact in artifacts}
    assert shown["shard-001"].data == 100.0
    first, second = json.loads(shown["vnp-shards"].data)
    assert (first["shard"], first["state"], second["shard"], second["state"]) == (
        "000",
        "complete",
        "001",
        "complete",
    )
    assert (first["last failure"], second["attempt"]) == ("", 2)
    assert second["last failure"].startswith("spot_preemption: spot preemption #1")
    summary = shown["vnp-summary"].data
    assert shown["vnp-summary"].description == "7 sequences embedded, 1 in quarantine"
    assert "| sequences embedded | 7 |" in summary
    assert r"| sp\|nan_2\|X |" in summary
    report = tmp_path / "run" / "report.html"
    assert f"| report | [{report}]({report.as_uri()}) |" in summary
    assert [event for event, _ in emitted].count("vnp.shard.preempted") == 1
    events = dict(emitted)
    assert events["vnp.sequence.quarantined"]["id"] == "sp|nan_2|X"
    assert events["vnp.run.completed"]["num_rows"] == 7

    (page,) = pages
    plan = load_plan(RunPaths(tmp_path / "run"))
    assert (
        of_the_shards(page, "vnp_shard_sequences")
        == of_the_shards(page, "vnp_shard_sequences_done")
        == [4, 4]
    )
    assert sum(of_the_shards(page, "vnp_sequences_embedded_total")) == 7
    assert sum(of_the_shards(page, "vnp_checkpoint_sequences_total")) == 7
    assert sum(of_the_shards(page, "vnp_tokens_embedded_total")) == sum(plan.lengths + 2) - (
        plan.lengths[2] + 2
    )
    assert of_the_shards(page, "vnp_batches_queued") == [0, 0]
    assert of_the_shards(page, "vnp_attempts_total") == [1, 2]
    assert {
        sample: count
        for sample, count in page.items()
        if sample.startswith("vnp_failures_total") and count
    } == {"vnp_failures_total{kind=spot_preemption}": 1}
    assert page["vnp_checkpoint_write_seconds_count"] == 2
    assert page["vnp_checkpoint_write_seconds_sum"] > 0
    assert page["vnp_quarantined_sequences"] == 1


def of_the_shards(page: dict[str, float], name: str) -> list[float]:
    """The values of a metric, by shard."""
    return [page[f"{name}{{shard={rank}}}"] for rank in range(2)]


def test_tags_that_come_at_once_are_all_kept_and_none_harms_the_run():
    """An update replaces all tags: two shards that fail at once must not take each other's away."""

    @flow(name="tagged")
    async def tagged() -> None:
        flow_run_id = UUID(runtime.flow_run.id)
        await asyncio.gather(
            *(
                tag_flow_run(flow_run_id, tag)
                for tag in ("failed:oom", "failed:transient", "failed:oom")
            )
        )
        await tag_flow_run(uuid4(), "of no flow run")

    with tags("mine"):
        outcome = asyncio.run(tagged(return_state=True))
    assert outcome.is_completed(), outcome.message
    flow_run, _, _ = look_at(outcome.state_details.flow_run_id)
    assert sorted(flow_run.tags) == ["failed:oom", "failed:transient", "mine"]


def test_a_reading_that_takes_long_holds_nothing_up_and_rests_ten_times_as_long(monkeypatch):
    """Readings block for 0.1 s each: beside the event loop, one in the 0.6 s that this takes, and one at the end."""
    readers = []

    def read_slowly(plan, paths):
        readers.append(threading.current_thread())
        time.sleep(0.1)
        raise OSError("nothing to be read")

    monkeypatch.setattr("flows.artifacts.read_status", read_slowly)
    config = SimpleNamespace(runtime=SimpleNamespace(artifact_interval_s=0.01))

    async def watch_for_a_while():
        async with shard_table(SimpleNamespace(config=config, plan=None, paths=None)):
            await asyncio.sleep(0.6)

    asyncio.run(watch_for_a_while())
    assert len(readers) == 2
    assert threading.main_thread() not in readers
