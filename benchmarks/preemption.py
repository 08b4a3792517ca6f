"""Measure how long a preempted run takes to save and exit.

Run it with `python -m benchmarks.preemption --trials 10`. It embeds fake proteins with the 8M model
and random weights on two CPU workers, and sends SIGTERM at a random moment: first to a worker,
then to `python flows/embed.py`. It counts lost rows and those that the next run computes again.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tests.helpers import ROOT, group_of, wait_until, workers_of
from vnp_lib.checkpoint.survey import survey_checkpoints
from vnp_lib.config import EmbedConfig, RuntimeConfig
from vnp_lib.failures import ShardFailedError
from vnp_lib.plan.paths import RunPaths
from vnp_lib.plan.plan import load_plan
from vnp_lib.run.directory import open_run
from vnp_lib.run.events import BatchComputed, Event
from vnp_lib.run.resume import find_pending_work
from vnp_lib.storage.durable import make_directory, write_file
from vnp_lib.worker.supervisor import run_worker

RESIDUES = "ACDEFGHIKLMNPQRSTVWY"
NUM_SEQUENCES = 4_000  # some minutes of work: no trial comes to its end
ROWS_PER_CHECKPOINT = 50


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """One preemption."""

    workers_s: float  # from the signal until all workers have exited
    all_s: float  # until the flow and its server have exited too
    rows_lost: int  # that were in finished checkpoints at the signal and are in none afterwards
    rows_repeated: int  # that had been through the model and are to go through it again


def write_fasta(path: Path, draw: random.Random) -> None:
    """Proteins of 50 to 600 residues."""
    lengths = (draw.randint(50, 600) for _ in range(NUM_SEQUENCES))
    path.write_text(
        "".join(f">p{i}\n{''.join(draw.choices(RESIDUES, k=k))}\n" for i, k in enumerate(lengths))
    )


def preempt_worker(fasta: Path, run_dir: Path, delay_s: float) -> Trial:
    """SIGTERM to the worker of a shard, `delay_s` after its first batch."""
    config = EmbedConfig(
        fasta=(fasta,),
        output_dir=run_dir,
        model="esm2_t6_8M_UR50D",
        weights="random",
        devices="cpu",
        shards=1,
        runtime=RuntimeConfig(checkpoint_seq_threshold=ROWS_PER_CHECKPOINT),
    )
    with open_run(config) as run:
        make_directory(run.paths.shard_dir(0))
        write_file(run.paths.job(0), run.shard_job(0, "cpu").model_dump_json().encode())
        return asyncio.run(_preempt_worker(run.paths, delay_s))


async def _preempt_worker(paths: RunPaths, delay_s: float) -> Trial:
    plan = load_plan(paths)
    batches = dict(enumerate(plan.shard_batches(0)))
    computed: list[int] = []
    acknowledged = np.empty(0, dtype=np.int64)
    signalled_at = 0.0

    def send_sigterm() -> None:
        nonlocal signalled_at, acknowledged
        acknowledged, signalled_at = (
            committed_ordinals(paths, verify_digests=False),
            time.monotonic(),
        )
        for pid in workers_of(paths.run_dir):
            os.kill(pid, signal.SIGTERM)

    async def on_event(event: Event) -> None:
        if isinstance(event, BatchComputed):
            if not computed:
                asyncio.get_running_loop().call_later(delay_s, send_sigterm)
            computed.extend(batches[event.batch_idx].tolist())

    with suppress(ShardFailedError):
        await run_worker(
            paths.job(0),
            device="cpu",
            log_path=paths.worker_log(0),
            on_event=on_event,
            startup_limit_s=300.0,
            silence_limit_s=300.0,
            grace_s=60.0,
        )
    left_s = time.monotonic() - signalled_at
    pending = [
        ordinal
        for _, ordinals in find_pending_work(plan, paths, 0).batches
        for ordinal in ordinals.tolist()
    ]
    return Trial(
        workers_s=left_s,
        all_s=left_s,
        rows_lost=len(np.setdiff1d(acknowledged, committed_ordinals(paths, verify_digests=True))),
        rows_repeated=len(set(computed) & set(pending)),
    )


def preempt_flow(fasta: Path, run_dir: Path, delay_s: float, home: Path) -> Trial:
    """Send SIGTERM to `python flows/embed.py` `delay_s` after its first checkpoint."""
    arguments = {
        "fasta": fasta,
        "output-dir": run_dir,
        "model": "esm2_t6_8M_UR50D",
        "weights": "random",
        "devices": "cpu,cpu",
        "runtime.checkpoint-seq-threshold": ROWS_PER_CHECKPOINT,
    }
    process = subprocess.Popen(
        [
            sys.executable,
            "flows/embed.py",
            *(str(part) for k, v in arguments.items() for part in (f"--{k}", v)),
        ],
        cwd=ROOT,
        env=os.environ | {"PREFECT_HOME": str(home)},
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    paths = RunPaths(run_dir)
    wait_until(lambda: any(paths.checkpoints_dir.glob("shard_*/*.done")), timeout_s=600.0)
    time.sleep(delay_s)
    acknowledged = committed_ordinals(paths, verify_digests=False)
    process.send_signal(signal.SIGTERM)
    signalled_at = time.monotonic()
    wait_until(lambda: not workers_of(run_dir))
    workers_s = time.monotonic() - signalled_at
    wait_until(lambda: process.poll() is not None and not group_of(process.pid))
    return Trial(
        workers_s=workers_s,
        all_s=time.monotonic() - signalled_at,
        rows_lost=len(np.setdiff1d(acknowledged, committed_ordinals(paths, verify_digests=True))),
        rows_repeated=0,  # only counted by the trials with a worker alone
    )


def committed_ordinals(paths: RunPaths, *, verify_digests: bool) -> NDArray[np.int64]:
    """The rows that finished checkpoints hold, by their markers or by every byte of them."""
    survey = survey_checkpoints(
        paths.checkpoints_dir, load_plan(paths).fingerprint, verify_digests=verify_digests
    )
    return np.concatenate(
        [np.empty(0, dtype=np.int64), *(record.ordinals for record in survey.valid)]
    )


def report(what: str, seconds: list[float], goal_s: float) -> None:
    print(
        f"{what}: median {statistics.median(seconds):.2f} s, max {max(seconds):.2f} s "
        f"(goal {goal_s:g} s)"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trials", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--longest-delay-s", type=float, default=5.0)
    given = parser.parse_args()
    draw = random.Random(given.seed)
    delays_s = [draw.uniform(0.0, given.longest_delay_s) for _ in range(given.trials)]
    with tempfile.TemporaryDirectory() as directory:
        scratch = Path(directory)
        fasta = scratch / "in.fasta"
        write_fasta(fasta, draw)
        alone = [
            preempt_worker(fasta, scratch / f"worker_{i}", delay_s)
            for i, delay_s in enumerate(delays_s)
        ]
        flows = [
            preempt_flow(fasta, scratch / f"flow_{i}", delay_s, scratch / "prefect")
            for i, delay_s in enumerate(delays_s)
        ]
    report("SIGTERM to a worker: it has exited", [trial.workers_s for trial in alone], 8.0)
    report(
        "SIGTERM to the flow: its workers have exited", [trial.workers_s for trial in flows], 8.0
    )
    report("SIGTERM to the flow: everything has left", [trial.all_s for trial in flows], 10.0)
    print(f"rows lost: {sum(trial.rows_lost for trial in alone + flows)}")
    print(
        f"rows computed again: {sum(trial.rows_repeated for trial in alone)} of {len(alone)} "
        "workers alone"
    )


if __name__ == "__main__":
    main()
