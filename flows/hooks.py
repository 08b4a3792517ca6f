"""The retry hook of a shard's task: it judges a failed attempt and says when the next one may begin."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from typing import Any

from prefect import Task, get_run_logger
from prefect.client.schemas.objects import State, TaskRun

from flows.artifacts import ShardArtifact
from vnp_lib.failures import Failure, FailureCause, FailureKind, ShardFailedError, classify_exception
from vnp_lib.retry import RetryPolicy
from vnp_lib.run import Run

RetryHook = Callable[[Task[..., Any], TaskRun, State[Any]], Awaitable[bool]]


def make_retry_hook(run: Run, rank: int) -> RetryHook:
    """Make the hook of one shard's own copy of the task.

    A plain function: Prefect 3.8 takes a partial, a bound method or a callable object for "never retry". The engine reads
    the task's `retry_delay_seconds` after the hook has returned, so each failure gets a delay of its own.
    """
    policy = RetryPolicy.from_config(run.config.runtime)

    async def retry_hook(task: Task[..., Any], task_run: TaskRun, state: State[Any]) -> bool:
        failure = failure_of(state.data)
        session = str(task_run.flow_run_id)
        decision = policy.decide(failure, counted_failures(run.manifest.failures(rank), session))
        run.manifest.record_failure(
            rank,
            failure.to_json() | {"session": session, "reason": decision.reason, "at": datetime.now(UTC).isoformat()},
        )
        task.retry_delay_seconds = [decision.delay_s]
        get_run_logger().warning("shard %d: %s", rank, decision.reason)
        if not decision.retry:
            run.manifest.mark_shard_failed(rank, error=decision.reason)
        await ShardArtifact(rank, interval_s=0.0).show(percent_done(run, rank), decision.reason)
        return decision.retry

    return retry_hook


def percent_done(run: Run, rank: int) -> float:
    """How much of a shard is in checkpoints of its own, as the manifest has it."""
    recorded = run.manifest.get_shard_status(rank) or {"total_sequences": 0}
    return float(min(100.0, 100.0 * recorded["total_sequences"] / max(run.plan.shard_ordinals(rank).size, 1)))


def failure_of(error: object) -> Failure:
    """Take the failure that an attempt reported, or judge what else ended it."""
    if isinstance(error, ShardFailedError):
        return error.failure
    if isinstance(error, BaseException):
        return classify_exception(error)
    return Failure(cause=FailureCause.UNKNOWN, message=f"the attempt ended in an unknown way: {error!r}")


def counted_failures(records: list[dict[str, Any]], session: str) -> list[Failure]:
    """Pick the failures of a shard that still count.

    A batch's strikes and preemptions count for ever. Other failures count within one flow run: a person who starts the
    run again may have mended the cause.
    """
    failures = [(record["session"], Failure.from_json(record)) for record in records]
    return [
        failure
        for their_session, failure in failures
        if failure.accuses_batch or failure.kind == FailureKind.SPOT_PREEMPTION or their_session == session
    ]
