"""The flow of one shard on another machine, started by a run with `--executor work-pool`."""

from __future__ import annotations

import asyncio
from typing import Any

from prefect import flow
from prefect.client.schemas.objects import State

from flows.device_pool import DevicePool
from flows.embed import embed_one
from flows.metrics import metrics_served
from flows.results import NOWHERE
from flows.signals import sigterm_cancels_the_flow
from vnp_lib.config import EmbedConfig
from vnp_lib.plan import RunPaths
from vnp_lib.report import RunProgress
from vnp_lib.run import attach_run
from vnp_lib.worker import send_heartbeats


@flow(name="vnp-embed-shard", retries=0, persist_result=False, result_storage=NOWHERE)
async def embed_shard_run(config: EmbedConfig, rank: int, fingerprint: str) -> State[Any]:
    """Embed one shard of a run that another machine has opened, and that waits for it.

    Args:
        config: Settings of that run; both machines can access `output_dir`.
        rank: Which shard.
        fingerprint: Fingerprint of that run: a directory that now holds another run is refused.
    """
    heartbeat = RunPaths(config.output_dir).heartbeat(rank)
    with sigterm_cancels_the_flow():
        async with send_heartbeats(heartbeat, interval_s=config.runtime.heartbeat_s):
            # In a thread, since it reads the weights, which takes minutes for the largest model.
            run = await asyncio.to_thread(attach_run, config, fingerprint)
            # Likewise: with many checkpoints it takes seconds.
            shard = await asyncio.to_thread(run.shard_progress, rank)
            ordinals = run.plan.shard_ordinals(rank)
            progress = RunProgress(
                total_sequences=ordinals.size,
                total_tokens=run.plan.num_tokens(ordinals),
                log_interval_s=config.runtime.log_interval_s,
            )
            with metrics_served(run), progress:
                progress.begin(rank, sequences=shard.num_done, tokens=shard.tokens_done)
                run.metrics.set_progress(
                    rank, num_sequences=shard.num_sequences, num_done=shard.num_done
                )
                try:
                    return await embed_one(run, shard, DevicePool(run.devices), progress)
                finally:
                    await asyncio.to_thread(run.manifest.close)
