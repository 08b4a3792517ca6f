"""The flow: plan, embed the shards, put the dataset together. `python flows/embed.py --help` runs it on this machine."""

from __future__ import annotations

import sys

from flows.program import main

if (
    __name__ == "__main__"
):  # before Prefect is imported: the program sees to its settings and its server first
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

_MOST_ROUNDS = 3


@flow(
    name="vnp-embed",
    retries=0,  # whatever a team's settings say of its other flows: a run retries shard by shard
    persist_result=False,
    result_storage=NOWHERE,
    on_cancellation=[cancel_shards],
    on_crashed=[cancel_shards],
    on_failure=[cancel_shards],
)
async def embed(config: EmbedConfig) -> State[Any]:
    """Embed the proteins of FASTA files with ESM-2, shard by shard, and go on where an earlier run ended."""
    started_at = time.monotonic()
    with sigterm_cancels_the_flow(), open_run(config) as run:
        tell_of_input(run)
        await tag_flow_run(UUID(flow_run.id), config.model)
        if config.executor == "work-pool":
            await end_leftovers(run)  # before the metrics, whose port one of them may have
        with metrics_served(run):
            return note_ending(await embed_in_rounds(run, started_at))


def tell_of_input(run: Run) -> None:
    """Say it where files were left out, or records were skipped, cut or changed, or are the same."""
    for told in describe_left_out(run.config.fasta):
        get_run_logger().warning(told)
    if told := describe_input(run.plan.counts, run.paths):
        level = logging.WARNING if run.plan.counts.is_altered else logging.INFO
        get_run_logger().log(level, "input: %s", told)


async def embed_in_rounds(run: Run, started_at: float) -> State[Any]:
    """Embed what is left and put the dataset together, again where a checkpoint turns out to be damaged."""
    num_tokens = 0
    missing: IncompleteDatasetError | None = None
    for _ in range(_MOST_ROUNDS):
        shards = run.all_shard_progress()
        if (
            not all(shard.is_complete for shard in shards)
            and (kept := run.complete_dataset()) is not None
        ):
            await tell_of_dataset(run, kept, started_at, num_tokens)
            return Completed(
                message=f"{kept.describe()}: the dataset is whole, and its checkpoints are gone"
            )
        num_tokens += run.num_tokens_left(shards)
        async with shard_table(run):
            states = await embed_shards(run, shards)
        if not run.config.allow_partial and not all(state.is_completed() for state in states):
            return Failed(message=f"{run.describe_progress()}; {describe(run, states)}")
        try:
            summary = assemble_dataset(
                run, is_whole=missing is None and all(state.is_completed() for state in states)
            )
        except CheckpointError as error:
            get_run_logger().warning("%s: it is computed again", error)
            run.move_damaged_checkpoints()
        except IncompleteDatasetError as error:
            if str(error) == str(missing):
                raise
            missing = error
            get_run_logger().warning("%s, though all shards are embedded: looking again", error)
            await wait_until_seen(run)
        else:
            await tell_of_dataset(run, summary, started_at, num_tokens)
            return Completed(message=f"{summary.describe()}, {describe(run, states)}")
    return Failed(
        message=f"checkpoints were damaged {_MOST_ROUNDS} times over: the storage is failing"
    )


async def tell_of_dataset(
    run: Run, summary: DatasetSummary, started_at: float, num_tokens: int
) -> None:
    """Say what there is now: in the log, on a page, in Prefect."""
    warn_of_poor_precision(summary)
    warn_of_mixed_software(summary)
    write_page(run)
    await show_summary(run, summary, elapsed_s=time.monotonic() - started_at, num_tokens=num_tokens)
    emit_completion(run, summary)


async def wait_until_seen(run: Run) -> None:
    """Wait until all that the workers have saved is seen from here, a minute at most.

    Over a network file system that takes a while where they are on other machines. What is not seen then is lost, and the
    next round embeds it again.
    """
    for delay_s in LOOKUP_DELAYS_S:
        if await asyncio.to_thread(run.refresh_and_check_complete):
            return
        await asyncio.sleep(delay_s)


async def embed_shards(run: Run, shards: Sequence[ShardProgress]) -> list[State[Any]]:
    """Run every shard's task, as many at a time as there are devices, and return how each ended."""
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
    """Run a shard's task, with a retry hook of its own, until it has completed or failed for good.

    Where Prefect's server is gone, the shard is embedded without the task.
    """
    artifact = ShardArtifact(shard.rank, interval_s=run.config.runtime.artifact_interval_s)
    handle_attempt_failure = make_failure_handler(run, shard.rank, devices, artifact)
    task = embed_shard.with_options(
        tags=tags_of_shard(run),
        retry_condition_fn=make_retry_hook(run, handle_attempt_failure),
        result_storage=run.paths.results_dir,
        refresh_cache=not (
            shard.is_complete and has_plain_result(run, shard.rank)
        ),  # it counts for no more than the disk
    )
    try:
        # Prefect's types say State, for async tasks too.
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
        "shard %d is embedded without Prefect's server, which is gone: %r", shard.rank, error
    )
    flow_run_id = UUID(flow_run.id)
    return await try_without_prefect(
        lambda: embed_shard.fn(run, run.shard_progress(shard.rank), devices, progress, artifact),
        lambda failure: handle_attempt_failure(failure, flow_run_id),
    )


def assemble_dataset(run: Run, *, is_whole: bool) -> DatasetSummary:
    """Put the dataset together from the checkpoints, every digest verified; `is_whole` where nothing should be missing."""
    get_run_logger().info("all shards are embedded: putting the dataset together")
    return assemble(
        run.plan,
        run.paths,
        run.checkpoints().valid,
        quarantined=run.quarantine.ordinals(),
        allow_missing=run.config.allow_partial and not is_whole,
    )


def warn_of_poor_precision(summary: DatasetSummary) -> None:
    """Say it where half precision has moved the embeddings further than people expect."""
    if summary.precision and summary.precision.is_poor:
        get_run_logger().warning(
            "%s: that is poor for half precision; --dtype float32 is exact",
            summary.precision.describe(),
        )


def warn_of_mixed_software(summary: DatasetSummary) -> None:
    """Say it where an upgrade in the middle of the run has left rows of two versions."""
    if is_mixed(summary.software):
        get_run_logger().warning(
            "the dataset was computed by several versions (%s): their rows differ by rounding; --force-restart computes all "
            "with one",
            describe_software(summary.software),
        )


def write_page(run: Run) -> None:
    """Write `report.html`. A run does not fail for want of it, whatever a drawing library says about its caches or fonts."""
    try:
        write_report(run.plan, run.paths)
    except Exception as error:
        get_run_logger().warning("no report is written: %s", error)


def describe(run: Run, states: Sequence[State[Any]]) -> str:
    """Say how the shards ended: `2 Completed, 1 Cached`; and which have not been embedded, and why."""
    counts = Counter(state.name for state in states)
    described = "shards: " + ", ".join(
        f"{count} {name}" for name, count in sorted(counts.items(), key=str)
    )
    failed = [rank for rank, state in enumerate(states) if not state.is_completed()]
    if not failed:
        return described
    recorded = run.manifest.shards()
    reasons = "; ".join(
        f"shard {rank}: {recorded[rank].error or states[rank].message}" for rank in failed[:5]
    )
    return f"{described}; not embedded: {failed} ({reasons})"
