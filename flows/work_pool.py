"""Shards on other machines: run each as a flow run of a deployment, and wait for it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable
from typing import Any
from uuid import UUID, uuid4

from prefect import get_run_logger
from prefect.client.orchestration import PrefectClient, get_client
from prefect.client.schemas.filters import (
    FlowRunFilter,
    FlowRunFilterName,
    FlowRunFilterState,
    FlowRunFilterStateType,
    FlowRunFilterTags,
)
from prefect.client.schemas.objects import TERMINAL_STATES, FlowRun, State
from prefect.client.schemas.sorting import FlowRunSort
from prefect.context import FlowRunContext
from prefect.deployments import arun_deployment
from prefect.exceptions import ObjectNotFound
from prefect.states import Cancelled, Cancelling, Crashed

from vnp_lib.config import EmbedConfig
from vnp_lib.errors import ConfigError
from vnp_lib.failures import Failure, FailureCause, ShardFailedError
from vnp_lib.report import RunProgress
from vnp_lib.run import Run, ShardProgress
from vnp_lib.worker import HeartbeatWatch

_POLL_S = 2.0
_PAGE = 200  # flow runs per response of the API


async def end_leftovers(run: Run) -> None:
    """End the flow runs of shards that earlier runs in this directory left running or scheduled.

    This run holds the directory, so nobody waits for them. What they have computed is kept. Those
    that cannot exit, because their machine is gone, are marked as cancelled after the grace that a
    worker process has to save its work: otherwise each would keep its slot in the concurrency limit
    of the deployment, permanently if Prefect's server was killed too.
    """
    async with get_client() as client:
        ours = run_tag(_flow_run_id())
        leftovers = [
            left
            for left in await _unfinished(client, [directory_tag(run)])
            if ours not in left.tags
        ]
        if not leftovers:
            return
        get_run_logger().warning(
            "ending %d flow runs that an earlier run left behind", len(leftovers)
        )
        await _cancel(client, leftovers, "the run that it was part of is gone")
        deadline = time.monotonic() + run.config.runtime.grace_s
        for left in leftovers:
            while (
                not (state := await _state(client, left.id)).is_final()
                and time.monotonic() < deadline
            ):
                await asyncio.sleep(_POLL_S)
            if not state.is_final():
                await client.set_flow_run_state(
                    left.id, Cancelled(message="its machine did not end it"), force=True
                )


async def cancel_shards(flow: object, flow_run: FlowRun, state: State[Any]) -> None:
    """Cancel the flow runs of the shards, which save their work, if the flow did not complete.

    This is a hook of the flow. A flow run that is rescheduled has not ended: no hook is called, and
    its shards continue.
    """
    if EmbedConfig.model_validate(flow_run.parameters["config"]).executor == "local":
        return
    async with get_client() as client:
        shards = await _unfinished(client, [run_tag(str(flow_run.id))])
        await _cancel(client, shards, f"the run that it is part of is {state.name}")


async def delegate_shard(run: Run, rank: int, progress: RunProgress) -> None:
    """Embed a shard by a separate flow run, on any machine of the work pool, and wait for it.

    Raises:
        ConfigError: There is no such deployment.
        ShardFailedError: The flow run has failed, or its machine is gone.
    """
    # Its heartbeats are written there from the start.
    run.prepare_shard(rank)
    async with get_client() as client:
        # An earlier process of this flow run may have started it, before that process was lost.
        started = await _unfinished(client, [run_tag(_flow_run_id())], name=_name(rank))
        running = [each.id for each in started if each.state and not each.state.is_cancelling()]
        flow_run_id = running[0] if running else await _start(run, rank, client)
        get_run_logger().info("flow run %s embeds shard %d", flow_run_id, rank)
        await _follow(run, rank, client, flow_run_id, progress)


def run_tag(flow_run_id: str) -> str:
    """Return the tag of the flow runs of a run's shards."""
    return f"vnp-run:{flow_run_id}"


def directory_tag(run: Run) -> str:
    """Return the tag by which a later run in the same directory finds them."""
    return f"vnp-dir:{run.paths.run_dir.resolve()}"


async def _start(run: Run, rank: int, client: PrefectClient) -> UUID:
    config = run.config.model_copy(
        update={"output_dir": run.paths.run_dir.resolve(), "executor": "local"}
    )
    try:
        flow_run = await arun_deployment(
            run.config.shard_deployment,
            client=client,
            parameters={
                "config": config.model_dump(mode="json"),
                "rank": rank,
                "fingerprint": run.plan.fingerprint,
            },
            timeout=0,
            flow_run_name=_name(rank),
            tags=["vnp", run.config.model, run_tag(_flow_run_id()), directory_tag(run)],
            # The client repeats a request that got no answer.
            idempotency_key=str(uuid4()),
        )
    except ObjectNotFound:
        raise ConfigError(
            f"there is no deployment {run.config.shard_deployment!r}: create those of prefect.yaml "
            f"with `prefect deploy --all`, or name another one with --shard-deployment"
        ) from None
    return flow_run.id


def _name(rank: int) -> str:
    return f"shard-{rank:03d}"


def _flow_run_id() -> str:
    context = FlowRunContext.get()
    assert context is not None
    assert context.flow_run is not None
    return str(context.flow_run.id)


async def _follow(
    run: Run, rank: int, client: PrefectClient, flow_run_id: UUID, progress: RunProgress
) -> None:
    watch = HeartbeatWatch(run.paths.heartbeat(rank))
    lost_after_s = run.config.runtime.lost_after_s
    shown = _ShownProgress(run, await asyncio.to_thread(run.shard_progress, rank), progress)
    while not (state := await _state(client, flow_run_id)).is_final():
        if not state.is_running():
            # It waits for a machine, or for its next attempt.
            watch.reset()
        elif watch.silent_for_s() > lost_after_s:
            message = f"its machine has sent no heartbeat for {lost_after_s:g} s"
            await client.set_flow_run_state(flow_run_id, Crashed(message=message), force=True)
            raise ShardFailedError(Failure(cause=FailureCause.PREEMPTED, message=message))
        else:
            shown.update()
        await asyncio.sleep(_POLL_S)
    if not state.is_completed():
        cause = FailureCause.KILLED if state.is_crashed() else FailureCause.GIVEN_UP
        raise ShardFailedError(
            Failure(cause=cause, message=f"flow run {flow_run_id} {state.name}: {state.message}")
        )
    shown.complete()


class _ShownProgress:
    """Shows how much of a shard is in checkpoints; only its machine knows what is pending."""

    def __init__(self, run: Run, begun: ShardProgress, progress: RunProgress) -> None:
        self._run = run
        self._rank = rank = begun.rank
        self._progress = progress
        self._ordinals = run.plan.shard_ordinals(rank)
        self._begun = begun
        self._recorded_before = self._recorded()
        progress.begin(rank, sequences=self._begun.num_done, tokens=self._begun.tokens_done)

    def update(self) -> None:
        """Read the number of rows from the manifest, a small file, and not the checkpoints."""
        before = self._begun.num_done
        now = min(
            before + max(0, self._recorded() - self._recorded_before), self._begun.num_sequences
        )
        # The longest sequences are computed first.
        num_tokens = self._run.plan.num_tokens(self._ordinals[before:now])
        self._observe(num_done=now, tokens_done=self._begun.tokens_done + num_tokens)

    def complete(self) -> None:
        self._observe(
            num_done=self._begun.num_sequences,
            tokens_done=self._run.plan.num_tokens(self._ordinals),
        )

    def _observe(self, *, num_done: int, tokens_done: int) -> None:
        self._progress.observe(self._rank, sequences=num_done, tokens=tokens_done)
        self._run.metrics.set_progress(
            self._rank, num_sequences=self._begun.num_sequences, num_done=num_done
        )

    def _recorded(self) -> int:
        recorded = self._run.manifest.shard(self._rank)
        return recorded.total_sequences if recorded else 0


async def _unfinished(
    client: PrefectClient, tags: list[str], *, name: str | None = None
) -> list[FlowRun]:
    """Return all flow runs with these tags that have not ended."""
    wanted = FlowRunFilter(
        tags=FlowRunFilterTags(all_=tags),
        state=FlowRunFilterState(type=FlowRunFilterStateType(not_any_=list(TERMINAL_STATES))),
        name=FlowRunFilterName(any_=[name]) if name else None,
    )
    found: list[FlowRun] = []
    while page := await client.read_flow_runs(
        flow_run_filter=wanted, sort=FlowRunSort.ID_DESC, limit=_PAGE, offset=len(found)
    ):
        found += page
    return found


async def _cancel(client: PrefectClient, flow_runs: Iterable[FlowRun], reason: str) -> None:
    """Cancel flow runs: scheduled ones at once, running ones through their worker."""
    for flow_run in flow_runs:
        is_waiting = flow_run.state is None or flow_run.state.is_scheduled()
        await client.set_flow_run_state(
            flow_run.id, (Cancelled if is_waiting else Cancelling)(message=reason)
        )


async def _state(client: PrefectClient, flow_run_id: UUID) -> State[Any]:
    state = (await client.read_flow_run(flow_run_id)).state
    assert state is not None
    return state
