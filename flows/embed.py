"""The flow: plan, embed the shards, assemble the dataset. `python flows/embed.py` runs it here."""

from __future__ import annotations

import sys

from flows.program import main

# Before Prefect is imported, the program prepares its settings and its server.
if __name__ == "__main__":
    sys.exit(main(program="python flows/embed.py"))

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Awaitable, Sequence
from typing import Any, cast
from uuid import UUID

from prefect import flow, get_run_logger
from prefect.client.schemas.objects import State
from prefect.runtime import flow_run
from prefect.states import Completed, Failed

from flows.artifacts import ShardArtifact, shard_table, show_summary, tag_flow_run, tags_of_shard
from flows.device_pool import DevicePool
from flows.events import emit_completion
from flows.lost_server import is_lost_server, note_ending, try_without_prefect
from flows.metrics import metrics_served
from flows.results import NOWHERE
from flows.retry_hook import make_failure_handler, make_retry_hook
from flows.shard import embed_shard, has_plain_result
from flows.signals import sigterm_cancels_the_flow
from flows.work_pool import cancel_shards, end_leftovers
from vnp_lib.checkpoint import LOOKUP_DELAYS_S, ShardStatus
from vnp_lib.config import EmbedConfig
from vnp_lib.errors import CheckpointError, IncompleteDatasetError
from vnp_lib.inputs import describe_left_out
from vnp_lib.plan import describe_input
from vnp_lib.report import RunProgress, write_report
from vnp_lib.run import DatasetSummary, Run, ShardProgress, assemble, open_run
from vnp_lib.software import describe_software, is_mixed

_MAX_ROUNDS = 3


@flow(
    name="vnp-embed",
    # Whatever the settings of a team say for its other flows: a run retries shard by shard.
    retries=0,
    persist_result=False,
    result_storage=NOWHERE,
    on_cancellation=[cancel_shards],
    on_crashed=[cancel_shards],
    on_failure=[cancel_shards],
)
async def embed(config: EmbedConfig) -> State[Any]:
    """Embed the proteins of FASTA files with ESM-2, shard by shard, and resume an earlier run."""
    started_at = time.monotonic()
    with sigterm_cancels_the_flow(), open_run(config) as run:
        log_input(run)
        await tag_flow_run(UUID(flow_run.id), config.model)
        if config.executor == "work-pool":
            # Before the metrics, whose port one of them may use.
            await end_leftovers(run)
        with metrics_served(run):
            return note_ending(await embed_in_rounds(run, started_at))


def log_input(run: Run) -> None:
    """Log files that were left out, and records that were skipped, cut, changed or duplicates."""
    for message in describe_left_out(run.config.fasta):
        get_run_logger().warning(message)
    if description := describe_input(run.plan.counts, run.paths):
        level = logging.WARNING if run.plan.counts.is_altered else logging.INFO
        get_run_logger().log(level, "input: %s", description)


async def embed_in_rounds(run: Run, started_at: float) -> State[Any]:
    """Embed what is pending and assemble the dataset; repeat if a checkpoint is damaged."""
    num_tokens = 0
    missing: IncompleteDatasetError | None = None
    for _ in range(_MAX_ROUNDS):
        shards = run.all_shard_progress()
        if (
            not all(shard.is_complete for shard in shards)
            and (kept := run.complete_dataset()) is not None
        ):
            await report_dataset(run, kept, started_at, num_tokens)
            return Completed(
                message=f"{kept.describe()}: the dataset is complete, and its checkpoints are gone"
            )
        num_tokens += run.num_tokens_left(shards)
        async with shard_table(run):
            states = await embed_shards(run, shards)
        if not run.config.allow_partial and not all(state.is_completed() for state in states):
            return Failed(message=f"{run.describe_progress()}; {describe_shards(run, states)}")
        try:
            summary = assemble_dataset(
                run, is_complete=missing is None and all(state.is_completed() for state in states)
            )
        except CheckpointError as error:
            get_run_logger().warning("%s: it is computed again", error)
            run.move_damaged_checkpoints()
        except IncompleteDatasetError as error:
            if str(error) == str(missing):
                raise
            missing = error
            get_run_logger().warning("%s, although all shards are embedded: reading again", error)
            await wait_until_visible(run)
        else:
            await report_dataset(run, summary, started_at, num_tokens)
            return Completed(message=f"{summary.describe()}, {describe_shards(run, states)}")
    return Failed(
        message=f"checkpoints were damaged in {_MAX_ROUNDS} rounds: the storage is failing"
    )


async def report_dataset(
    run: Run, summary: DatasetSummary, started_at: float, num_tokens: int
) -> None:
    """Report the dataset: in the log, in `report.html` and in Prefect."""
    warn_of_poor_precision(summary)
    warn_of_mixed_software(summary)
    write_html_report(run)
    await show_summary(run, summary, elapsed_s=time.monotonic() - started_at, num_tokens=num_tokens)
    emit_completion(run, summary)


async def wait_until_visible(run: Run) -> None:
    """Wait until all that the workers have saved is visible here, a minute at most.

    Over a network file system that takes a while if they are on other machines. What is not visible
    then is lost, and the next round embeds it again.
    """
    for delay_s in LOOKUP_DELAYS_S:
        if await asyncio.to_thread(run.refresh_and_check_complete):
            return
        await asyncio.sleep(delay_s)


async def embed_shards(run: Run, shards: Sequence[ShardProgress]) -> list[State[Any]]:
    """Run the task of every shard, one per device at a time, and return their final states."""
    devices = DevicePool(run.devices)
    with RunProgress(
        total_sequences=run.plan.num_computed,
        total_tokens=run.plan.num_tokens(run.plan.order),
        log_interval_s=run.config.runtime.log_interval_s,
    ) as progress:
        for shard in shards:
            progress.begin(shard.rank, sequences=shard.num_done, tokens=shard.tokens_done)
            run.metrics.set_progress(
                shard.rank, num_sequences=shard.num_sequences, num_done=shard.num_done
            )
        async with asyncio.TaskGroup() as group:
            tasks = [
                group.create_task(embed_one(run, shard, devices, progress)) for shard in shards
            ]
    return [task.result() for task in tasks]


async def embed_one(
    run: Run, shard: ShardProgress, devices: DevicePool, progress: RunProgress
) -> State[Any]:
    """Run a shard's task, with its own retry hook, until it has completed or failed permanently.

    If Prefect's server is gone, the shard is embedded without the task.
    """
    artifact = ShardArtifact(shard.rank, interval_s=run.config.runtime.artifact_interval_s)
    handle_attempt_failure = make_failure_handler(run, shard.rank, devices, artifact)
    task = embed_shard.with_options(
        tags=tags_of_shard(run),
        retry_condition_fn=make_retry_hook(run, handle_attempt_failure),
        result_storage=run.paths.results_dir,
        # A cached result counts only if the checkpoints on disk confirm it.
        refresh_cache=not (shard.is_complete and has_plain_result(run, shard.rank)),
    )
    try:
        # According to Prefect's types an async task returns State, too.
        state = await cast(
            Awaitable[State[Any]], task(run, shard, devices, progress, artifact, return_state=True)
        )
        error: object = state.data if state.is_failed() else None
    except Exception as raised:
        error = raised
        if not is_lost_server(raised):
            raise
    if run.config.executor != "local" or not is_lost_server(error):
        recorded = run.manifest.shard(shard.rank)
        if state.is_completed() and (recorded is None or recorded.status != ShardStatus.COMPLETE):
            # A cached result runs no task, and the manifest may be a new one.
            run.manifest.mark_shard_complete(shard.rank)
        return state
    get_run_logger().warning(
        "shard %d: continuing without Prefect's server, which is gone: %r", shard.rank, error
    )
    flow_run_id = UUID(flow_run.id)
    return await try_without_prefect(
        lambda: embed_shard.fn(run, run.shard_progress(shard.rank), devices, progress, artifact),
        lambda failure: handle_attempt_failure(failure, flow_run_id),
    )


def assemble_dataset(run: Run, *, is_complete: bool) -> DatasetSummary:
    """Assemble the dataset from the checkpoints; if `is_complete`, nothing may be missing."""
    get_run_logger().info("all shards are embedded: assembling the dataset")
    return assemble(
        run.plan,
        run.paths,
        run.checkpoints().valid,
        quarantined=run.quarantine.ordinals(),
        allow_missing=run.config.allow_partial and not is_complete,
    )


def warn_of_poor_precision(summary: DatasetSummary) -> None:
    """Warn if half precision has changed the embeddings more than people expect."""
    if summary.precision and summary.precision.is_poor:
        get_run_logger().warning(
            "%s: that is low for half precision; use --dtype float32 for exact embeddings",
            summary.precision.describe(),
        )


def warn_of_mixed_software(summary: DatasetSummary) -> None:
    """Warn if an upgrade during the run has left rows of two versions."""
    if is_mixed(summary.software):
        get_run_logger().warning(
            "the dataset was computed by several versions (%s): their rows differ by rounding; "
            "use --force-restart to compute all with one",
            describe_software(summary.software),
        )


def write_html_report(run: Run) -> None:
    """Write `report.html`; log any error, such as a plotting library's about its fonts."""
    try:
        write_report(run.plan, run.paths)
    except Exception as error:
        get_run_logger().warning("cannot write the report: %s", error)


def describe_shards(run: Run, states: Sequence[State[Any]]) -> str:
    """Describe how the shards ended (`2 Completed, 1 Cached`), and why some are not embedded."""
    counts = Counter(state.name for state in states)
    summary = "shards: " + ", ".join(
        f"{count} {name}" for name, count in sorted(counts.items(), key=str)
    )
    failed = [rank for rank, state in enumerate(states) if not state.is_completed()]
    if not failed:
        return summary
    recorded = run.manifest.shards()
    reasons = "; ".join(
        f"shard {rank}: {recorded[rank].error or states[rank].message}" for rank in failed[:5]
    )
    return f"{summary}; not embedded: {failed} ({reasons})"
