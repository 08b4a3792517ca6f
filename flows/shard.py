"""The Prefect task of one shard: each attempt is one worker process on one device."""

from __future__ import annotations

import time
from typing import Any

from prefect import get_run_logger, task
from prefect.cache_policies import CacheKeyFnPolicy
from prefect.context import TaskRunContext

from flows.artifacts import ShardArtifact
from flows.device_pool import DevicePool
from flows.events import emit_quarantine
from flows.results import is_plain_result
from flows.work_pool import delegate_shard
from vnp_lib.report import RunProgress
from vnp_lib.run import (
    AttemptStarted,
    BatchComputed,
    CheckpointSaved,
    Event,
    LogMessage,
    Run,
    SequenceQuarantined,
    ShardProgress,
    TokenBudgetChanged,
    WaitingForShard,
)
from vnp_lib.storage import write_file
from vnp_lib.worker import run_worker

_REMIND_EVERY_S = 300.0
# The retry hook ends a failing shard, not the number of retries.
_UNLIMITED_RETRIES = 1_000_000_000


def result_key(context: TaskRunContext, parameters: dict[str, Any]) -> str:
    """Name a shard's persisted result by its run, and the number of shards of that."""
    return _result_name(parameters["run"], parameters["shard"].rank)


def has_plain_result(run: Run, rank: int) -> bool:
    """Whether a shard has a persisted result that is safe for Prefect to read."""
    return is_plain_result(run.paths.results_dir / _result_name(run, rank))


def _result_name(run: Run, rank: int) -> str:
    return f"{run.plan.fingerprint}-{rank:05d}-of-{run.plan.num_shards:05d}"


@task(
    name="embed-shard",
    task_run_name="shard-{shard.rank:03d}",
    retries=_UNLIMITED_RETRIES,
    persist_result=True,
    result_serializer="json",
    cache_policy=CacheKeyFnPolicy(cache_key_fn=result_key),
)
async def embed_shard(
    run: Run,
    shard: ShardProgress,
    devices: DevicePool,
    progress: RunProgress,
    artifact: ShardArtifact,
) -> dict[str, Any]:
    """Make one attempt on a shard, and return its counts once all is in checkpoints or quarantine.

    `shard` is its progress when the flow started; an attempt reads the checkpoints again.

    Raises:
        ShardFailedError: The attempt failed; the retry hook handles it.
    """
    if not shard.is_complete:
        if run.config.executor == "work-pool":
            await delegate_shard(run, shard.rank, progress)
        else:
            await _attempt_here(run, shard.rank, devices, progress, artifact)
    # A worker process may crash before it records its last checkpoint.
    run.manifest.reconcile(run.checkpoints(rank=shard.rank).valid, rank=shard.rank)
    run.manifest.mark_shard_complete(shard.rank)
    run.metrics.set_progress(
        shard.rank, num_sequences=shard.num_sequences, num_done=shard.num_sequences
    )
    num_quarantined = run.num_quarantined(shard.rank)
    return {
        "rank": shard.rank,
        "sequences": shard.num_sequences - num_quarantined,
        "quarantined": num_quarantined,
        "attempts": run.manifest.shards()[shard.rank].attempts,
    }


async def _attempt_here(
    run: Run, rank: int, devices: DevicePool, progress: RunProgress, artifact: ShardArtifact
) -> None:
    runtime = run.config.runtime
    must_move = devices.must_move(rank)
    async with devices.acquire(rank) as device:
        if must_move:
            run.manifest.record_redistribution(rank, device.index)
        attempt = run.manifest.start_attempt(rank, device=device.name)
        run.prepare_shard(rank)
        job = run.shard_job(rank, device.name).model_dump_json(indent=1)
        write_file(run.paths.job(rank), job.encode(), replace=True)
        reporter = _AttemptReporter(run, rank, attempt, device.name, progress, artifact)
        run.metrics.attempt(rank)
        await run_worker(
            run.paths.job(rank),
            device=device.name,
            log_path=run.paths.worker_log(rank),
            on_event=reporter.on_event,
            startup_limit_s=runtime.startup_limit_s,
            silence_limit_s=runtime.silence_limit_s,
            grace_s=runtime.grace_s,
        )
    num_quarantined = run.num_quarantined(rank)
    quarantined = f", {num_quarantined:,} in quarantine" if num_quarantined else ""
    await artifact.show(100.0, f"complete after attempt {attempt}{quarantined}", now=True)


class _AttemptReporter:
    """Forwards the events of an attempt to the task run's log, progress bar and artifact."""

    def __init__(
        self,
        run: Run,
        rank: int,
        attempt: int,
        device: str,
        progress: RunProgress,
        artifact: ShardArtifact,
    ) -> None:
        self._run = run
        self._rank = rank
        self._attempt = attempt
        self._device = device
        self._progress = progress
        self._artifact = artifact
        self._logger = get_run_logger()
        self._sequences = self._total = 0
        self._next_reminder_at = 0.0

    async def on_event(self, event: Event) -> None:
        self._run.metrics.on_event(self._rank, event)
        match event:
            case LogMessage(level=level, message=message):
                self._logger.log(level, message)
            case WaitingForShard(message=message):
                self._logger.info("waiting for an earlier attempt: %s", message)
                if time.monotonic() >= self._next_reminder_at:
                    self._next_reminder_at = time.monotonic() + _REMIND_EVERY_S
                    self._progress.print_line(
                        f"shard {self._rank} waits for another process to release it: {message}"
                    )
            case AttemptStarted(pending=pending, done=done, tokens_done=tokens):
                self._sequences, self._total = done, done + pending
                self._progress.begin(self._rank, sequences=done, tokens=tokens)
                self._logger.info(
                    "attempt %d on device %s: %d sequences to embed, %d in checkpoints",
                    self._attempt,
                    self._device,
                    pending,
                    done,
                )
            case BatchComputed(sequences=sequences, tokens=tokens):
                self._sequences += sequences
                self._progress.advance(self._rank, sequences=sequences, tokens=tokens)
                await self._show()
            case TokenBudgetChanged(tokens=tokens):
                self._run.manifest.remember_token_budget(self._rank, self._device, tokens)
                self._logger.warning("%d tokens in one forward pass from now on", tokens)
            case SequenceQuarantined(id=sequence_id, message=message):
                self._logger.warning(
                    "%r is quarantined in %s: %s", sequence_id, self._run.paths.quarantine, message
                )
                emit_quarantine(self._run, sequence_id, message)
            case CheckpointSaved(number=number, rows=rows):
                self._logger.debug("checkpoint %d is on disk: %d rows", number, rows)

    async def _show(self) -> None:
        percent = 100.0 * self._sequences / max(self._total, 1)
        await self._artifact.show(
            percent,
            f"{self._sequences} of {self._total} sequences, "
            f"attempt {self._attempt} on {self._device}",
        )
