"""Shards on other machines: each is a flow run of its own, of a deployment, and this machine waits for it."""

from __future__ import annotations

import asyncio
from typing import Any
from uuid import UUID

from prefect import get_run_logger
from prefect.client.orchestration import PrefectClient, get_client
from prefect.client.schemas.objects import State
from prefect.context import FlowRunContext
from prefect.deployments import arun_deployment
from prefect.exceptions import ObjectNotFound
from prefect.states import Crashed

from vnp_lib.failures import ConfigError, Failure, FailureCause, ShardFailedError
from vnp_lib.heartbeat import HeartbeatWatch
from vnp_lib.progress import RunProgress
from vnp_lib.run import Run

_POLL_S = 2.0
_ENDED_WITHOUT_RESULT = (FailureCause.PREEMPTED, FailureCause.KILLED)


async def delegate_shard(run: Run, rank: int, progress: RunProgress) -> None:
    """Have a flow run of its own embed a shard, on whatever machine takes it, and wait for that.

    Raises:
        ConfigError: There is no such deployment.
        ShardFailedError: The flow run has given up, or its machine is gone.
    """
    async with get_client() as client:
        flow_run_id = await _start(run, rank, client)
        await _follow(run, rank, client, flow_run_id, progress)


async def _start(run: Run, rank: int, client: PrefectClient) -> UUID:
    """Start the shard's flow run, or find the one that an earlier process of this flow run has started."""
    context = FlowRunContext.get()
    assert context is not None
    assert context.flow_run is not None
    parent = str(context.flow_run.id)
    config = run.config.model_copy(update={"output_dir": run.paths.run_dir.resolve(), "executor": "local"})
    try:
        flow_run = await arun_deployment(
            run.config.shard_deployment,
            client=client,
            parameters={"config": config.model_dump(mode="json"), "rank": rank, "fingerprint": run.plan.fingerprint},
            timeout=0,
            flow_run_name=f"shard-{rank:03d}",
            tags=["vnp", run.config.model, shard_tag(parent)],
            idempotency_key=f"{parent}-{rank}-{_num_lost(run, rank, parent)}",
        )
    except ObjectNotFound:
        raise ConfigError(
            f"there is no deployment {run.config.shard_deployment!r}: `prefect deploy --all` makes those of prefect.yaml, "
            f"and --shard-deployment names another"
        ) from None
    get_run_logger().info("flow run %s embeds shard %d", flow_run.id, rank)
    return flow_run.id


def shard_tag(parent_flow_run_id: str) -> str:
    """The tag by which the flow runs of a run's shards are found."""
    return f"vnp-run:{parent_flow_run_id}"


def _num_lost(run: Run, rank: int, parent: str) -> int:
    """How many flow runs this one has lost: each needs a successor, which must be no copy of it."""
    records = [record for record in run.manifest.failures(rank) if record["session"] == parent]
    return sum(record["cause"] in _ENDED_WITHOUT_RESULT for record in records)


async def _follow(run: Run, rank: int, client: PrefectClient, flow_run_id: UUID, progress: RunProgress) -> None:
    watch = HeartbeatWatch(run.paths.heartbeat(rank))
    lost_after_s = run.config.runtime.lost_after_s
    while not (state := await _state(client, flow_run_id)).is_final():
        _show(run, rank, progress)
        if not state.is_running():
            watch.reset()  # it waits for a machine, or for its next attempt
        elif watch.silent_for_s() > lost_after_s:
            told = f"its machine has given no sign of life for {lost_after_s:g} s"
            await client.set_flow_run_state(flow_run_id, Crashed(message=told), force=True)
            raise ShardFailedError(Failure(cause=FailureCause.PREEMPTED, message=told))
        await asyncio.sleep(_POLL_S)
    if not state.is_completed():
        cause = FailureCause.KILLED if state.is_crashed() else FailureCause.GIVEN_UP
        raise ShardFailedError(Failure(cause=cause, message=f"flow run {flow_run_id} {state.name}: {state.message}"))


async def _state(client: PrefectClient, flow_run_id: UUID) -> State[Any]:
    state = (await client.read_flow_run(flow_run_id)).state
    assert state is not None
    return state


def _show(run: Run, rank: int, progress: RunProgress) -> None:
    """What is in checkpoints: what is on its way to one, only that machine knows."""
    recorded = run.manifest.get_shard_status(rank)
    ordinals = run.plan.shard_ordinals(rank)
    num_done = min(recorded["total_sequences"] if recorded else 0, ordinals.size)
    progress.begin(rank, sequences=num_done, tokens=run.plan.num_tokens(ordinals) * num_done // max(ordinals.size, 1))
    run.metrics.set_progress(rank, num_sequences=ordinals.size, num_done=num_done)
