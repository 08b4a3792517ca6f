"""The retry hook of a shard's task: whether and when a failed attempt is repeated."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any
from uuid import UUID

import numpy as np
from prefect import Task, get_run_logger
from prefect.client.schemas.objects import State, TaskRun

from flows.artifacts import ShardArtifact, tag_flow_run
from flows.device_pool import DevicePool
from flows.events import emit_preemption, emit_quarantine
from flows.lost_server import is_lost_server
from vnp_lib.checkpoint import ShardRecord
from vnp_lib.failures import (
    Failure,
    FailureCause,
    FailureKind,
    ShardFailedError,
    classify_exception,
)
from vnp_lib.run import Run
from vnp_lib.worker import RetryDecision, handle_failure

FailureHandler = Callable[[object, UUID | None], Awaitable[RetryDecision]]
RetryHook = Callable[[Task[..., Any], TaskRun, State[Any]], Awaitable[bool]]


def make_failure_handler(
    run: Run, rank: int, devices: DevicePool, artifact: ShardArtifact
) -> FailureHandler:
    """Return the function that handles a failed attempt on a shard, and reports the decision."""

    async def handle_attempt_failure(error: object, flow_run_id: UUID | None) -> RetryDecision:
        failure = failure_of(error)
        run.metrics.failed(rank, failure.kind)
        decision = handle_failure(run, rank, failure, session=str(flow_run_id))
        logger = get_run_logger()
        logger.warning("shard %d: %s", rank, decision.reason)
        if failure.kind == FailureKind.SPOT_PREEMPTION:
            emit_preemption(run, rank, failure)
        if failure.ordinal is not None and decision.is_circuit_open and decision.retry:
            emit_quarantine(run, run.plan.ids(np.array([failure.ordinal]))[0], failure.message)
        if failure.cause == FailureCause.HARDWARE and devices.exclude(rank):
            logger.warning("the device of shard %d is excluded for the rest of this run", rank)
        await artifact.show(percent_done(run, rank), decision.reason, now=True)
        if flow_run_id is not None:
            await tag_flow_run(flow_run_id, f"failed:{failure.kind}")
        return decision

    return handle_attempt_failure


def make_retry_hook(run: Run, handle_attempt_failure: FailureHandler) -> RetryHook:
    """Return the hook for one shard's own copy of the task.

    It is a plain function: Prefect 3.8 treats a partial, a bound method or a callable object as
    "never retry". The engine reads the task's `retry_delay_seconds` after the hook has returned, so
    each failure gets its own delay. A failed request to Prefect's server is not a failure of a
    shard that is embedded here: the flow continues with it without Prefect.
    """

    async def retry_hook(task: Task[..., Any], task_run: TaskRun, state: State[Any]) -> bool:
        if run.config.executor == "local" and is_lost_server(state.data):
            return False
        decision = await handle_attempt_failure(state.data, task_run.flow_run_id)
        task.retry_delay_seconds = [decision.delay_s]
        return decision.retry

    return retry_hook


def percent_done(run: Run, rank: int) -> float:
    """How much of a shard is in checkpoints of its own, as the manifest has it."""
    recorded = run.manifest.shard(rank) or ShardRecord.new(rank)
    return float(
        min(100.0, 100.0 * recorded.total_sequences / max(run.plan.shard_ordinals(rank).size, 1))
    )


def failure_of(error: object) -> Failure:
    """Return the failure that an attempt reported, or classify what else ended it."""
    if isinstance(error, ShardFailedError):
        return error.failure
    if isinstance(error, BaseException):
        return classify_exception(error)
    return Failure(
        cause=FailureCause.UNKNOWN, message=f"the attempt ended in an unknown way: {error!r}"
    )
