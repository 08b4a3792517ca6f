"""Flow runs of shards: which are ended at the start of a run, and which at its end."""

from __future__ import annotations

import asyncio
import time
from typing import Any
from uuid import UUID

import pytest
from prefect import flow
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import State
from prefect.context import FlowRunContext
from prefect.states import Completed, Pending, Running, Scheduled

from flows.work_pool import cancel_shards, directory_tag, end_leftovers, run_tag
from tests.helpers import small_config
from vnp_lib.run.directory import open_run

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("prefect_server")]


@flow
def a_shard() -> None:
    """Never called: only its flow runs matter."""


async def make_shard_run(state: State[Any], *tags: str) -> UUID:
    async with get_client() as client:
        flow_run = await client.create_flow_run(a_shard, state=Scheduled(), tags=["vnp", *tags])
        await client.set_flow_run_state(flow_run.id, state, force=True)
        return flow_run.id


def state_name(flow_run_id: UUID) -> str | None:
    with get_client(sync_client=True) as client:
        return client.read_flow_run(flow_run_id).state_name


def test_flow_runs_left_in_the_same_directory_are_ended(tmp_path, tiny_fasta):
    """And no others. Without a machine, running ones are marked only after the grace."""
    config = small_config(tiny_fasta, tmp_path / "run", runtime={"grace_s": 1.0})
    elsewhere = small_config(tiny_fasta, tmp_path / "elsewhere")
    expected: dict[UUID, str] = {}

    with open_run(elsewhere) as other, open_run(config) as run:

        @flow
        async def resume() -> None:
            context = FlowRunContext.get()
            assert context is not None
            assert context.flow_run is not None
            ours, gone = run_tag(str(context.flow_run.id)), run_tag("gone")
            for state, tags, outcome in (
                (Running(), (gone, directory_tag(run)), "Cancelled"),
                (Pending(), (gone, directory_tag(run)), "Cancelled"),
                (Scheduled(), (gone, directory_tag(run)), "Cancelled"),
                (Completed(), (gone, directory_tag(run)), "Completed"),
                (Running(), (ours, directory_tag(run)), "Running"),
                (Running(), (gone, directory_tag(other)), "Running"),
            ):
                expected[await make_shard_run(state, *tags)] = outcome
            began_at = time.monotonic()
            await end_leftovers(run)
            assert time.monotonic() - began_at > 1.0

        asyncio.run(resume())

    assert {flow_run_id: state_name(flow_run_id) for flow_run_id in expected} == expected


def test_a_failed_run_cancels_its_shards(tmp_path, tiny_fasta):
    """And no others. Scheduled ones end at once; running ones are cancelled by their worker."""
    expected: dict[UUID, str] = {}

    @flow(on_failure=[cancel_shards], on_crashed=[cancel_shards])
    async def fail(config: dict[str, Any]) -> None:
        context = FlowRunContext.get()
        assert context is not None
        assert context.flow_run is not None
        ours = run_tag(str(context.flow_run.id))
        expected[await make_shard_run(Running(), ours)] = (
            "Cancelling" if "executor" in config else "Running"
        )
        expected[await make_shard_run(Scheduled(), ours)] = (
            "Cancelled" if "executor" in config else "Scheduled"
        )
        expected[await make_shard_run(Running(), run_tag("another"))] = "Running"
        raise RuntimeError

    config = {"fasta": [str(tiny_fasta)], "output_dir": str(tmp_path)}
    asyncio.run(fail(config | {"executor": "work-pool"}, return_state=True))
    asyncio.run(fail(config, return_state=True))

    assert {flow_run_id: state_name(flow_run_id) for flow_run_id in expected} == expected
