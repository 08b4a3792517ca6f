"""A run without Prefect: `python -m benchmarks.without_prefect model weights.pt in.fasta run_dir`.

Plan, one single-threaded worker per core, checkpoints, the dataset: what `python flows/embed.py`
does, without the flow, its server
and its report. Nothing is tried again.
"""

from __future__ import annotations

import asyncio
import os
import sys
from pathlib import Path

from vnp_lib.config import EmbedConfig
from vnp_lib.run.assembly import assemble
from vnp_lib.run.directory import open_run
from vnp_lib.run.events import Event
from vnp_lib.run.run import Run
from vnp_lib.storage.durable import make_directory, write_file
from vnp_lib.worker.supervisor import run_worker


def main(model: str, weights: str, fasta: str, output_dir: str) -> None:
    config = EmbedConfig(
        fasta=(Path(fasta),),
        output_dir=Path(output_dir),
        model=model,
        weights=weights,
        devices=",".join("cpu" for _ in os.sched_getaffinity(0)),
    )
    with open_run(config) as run:
        asyncio.run(_embed_shards(run))
        assemble(run.plan, run.paths, run.checkpoints().valid)


async def _embed_shards(run: Run) -> None:
    async with asyncio.TaskGroup() as group:
        for rank in range(run.plan.num_shards):
            group.create_task(_embed_shard(run, rank))


async def _embed_shard(run: Run, rank: int) -> None:
    make_directory(run.paths.shard_dir(rank))
    write_file(run.paths.job(rank), run.shard_job(rank, "cpu").model_dump_json().encode())
    await run_worker(
        run.paths.job(rank),
        device="cpu",
        log_path=run.paths.worker_log(rank),
        on_event=_ignore,
        startup_limit_s=300.0,
        silence_limit_s=300.0,
        grace_s=60.0,
    )


async def _ignore(event: Event) -> None:
    pass


if __name__ == "__main__":
    main(*sys.argv[1:])
