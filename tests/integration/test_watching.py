"""What people and automations see of a run in Prefect."""

from __future__ import annotations

import asyncio
import json

import pytest
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterFlowRunId

from flows.embed import embed
from tests.poison import Way, patch, write_proteins
from tests.support import small_config

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("prefect_server")]


def artifacts_of(flow_run_id) -> dict[str, object]:
    """Type and data of the newest artifacts of a flow run, by key."""

    async def read():
        async with get_client() as client:
            of_the_run = ArtifactFilter(flow_run_id=ArtifactFilterFlowRunId(any_=[flow_run_id]))
            return await client.read_artifacts(artifact_filter=of_the_run)

    return {artifact.key: artifact for artifact in asyncio.run(read())}


def test_a_run_with_a_bad_protein_shows_its_shards_its_summary_and_its_events(tmp_path, sabotage, monkeypatch):
    """A table with the last failure of each shard, a summary with the quarantine, and events for automations."""
    emitted = []
    monkeypatch.setattr("flows.events.emit_event", lambda event, resource, payload: emitted.append((event, payload)))
    write_proteins(tmp_path / "in.fasta", 8, {2: Way.NAN})
    sabotage(
        patch(Way.NAN)
        + "\nif rank == 1 and attempt == 1:\n    import signal\n    os.kill(os.getpid(), signal.SIGTERM)\n"
    )
    config = small_config(tmp_path / "in.fasta", tmp_path / "run", runtime={"spot_retry_poll_interval": 0.1})
    outcome = asyncio.run(embed(config, return_state=True))
    assert outcome.is_completed(), outcome.message

    shown = artifacts_of(outcome.state_details.flow_run_id)
    first, second = json.loads(shown["vnp-shards"].data)
    assert (first["shard"], first["state"], second["shard"], second["state"]) == ("000", "complete", "001", "complete")
    assert (first["last failure"], second["attempt"]) == ("", 2)
    assert second["last failure"].startswith("spot_preemption: spot preemption #1")
    summary = shown["vnp-summary"].data
    assert "| sequences embedded | 7 |" in summary
    assert "nan_2" in summary
    assert str(tmp_path / "run") in summary
    assert [event for event, _ in emitted].count("vnp.shard.preempted") == 1
    events = dict(emitted)
    assert events["vnp.sequence.quarantined"]["id"] == "nan_2"
    assert events["vnp.run.completed"]["num_rows"] == 7
