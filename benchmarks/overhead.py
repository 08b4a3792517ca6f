"""Measure the overhead of everything but the model: `python -m benchmarks.overhead`.

Checkpoints at the rate of ESM-2 3B on an H100, planning, tokenising, assembly, imports, and the
time from `python flows/embed.py` to the first forward pass, compared with an empty flow. Rates are
per second of processor time, which other load disturbs less; durations are wall time.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from benchmarks.figures import Figure, peak_mb, report
from tests.helpers import ROOT
from vnp_lib.plan.paths import RunPaths
from vnp_lib.plan.plan import ModelIdentity
from vnp_lib.plan.planner import make_plan

T = TypeVar("T")

MODEL = ModelIdentity(model="none", weights_digest="none", layer=0, dtype="float32")
TOKEN_BUDGET = 16_384
SHORTEST, LONGEST = 60, 240  # residues; 150 in the mean

# Run by the workers and by the empty flow as they start, in Python's `sitecustomize`.
_HOOK = """
import sys, time
if sys.orig_argv[-1].endswith("job.json"):
    import json, os
    write = os.write
    def watched(descriptor, data):
        if data.startswith(b'{"event": "computing"'):
            with open(STAMP, "x") as file:
                file.write(str(time.time()))
            os.write = write
        return write(descriptor, data)
    os.write = watched
"""
_EMPTY_FLOW = """
import sys, time
from pathlib import Path
from prefect import flow

@flow
def empty():
    Path(sys.argv[1]).write_text(str(time.time()))

empty()
"""


# Torch is imported late: the peak memory of planning is measured in a process without it.


def checkpointing(num_batches: int) -> list[Figure]:
    from benchmarks.checkpointing import measure_checkpointing

    kept, free = measure_checkpointing(num_batches)
    share = 100 * sum(kept.handovers_s[:-1]) / kept.elapsed_s
    slower = 100 * (kept.overhead_s - kept.last_write_s - free.overhead_s) / kept.elapsed_s
    p99_ms = 1000 * float(np.percentile(kept.handovers_s[:-1], 99))
    return [
        Figure.at_most(
            "checkpointing at 3B's rate: the loop is held up", share, 0.2, "% of the time"
        ),
        Figure.at_most(
            f"a checkpoint holds up the loop, p99 of {len(kept.handovers_s) - 1}",
            p99_ms,
            50.0,
            "ms",
        ),
        Figure(
            what="the loop without the model, more than without checkpoints",
            value=slower,
            unit="% of the time",
        ),
        Figure(what="the last checkpoint is waited for", value=1000 * kept.last_write_s, unit="ms"),
    ]


def planning(num_sequences: int) -> list[Figure]:
    from benchmarks.assembly import write_fasta

    with tempfile.TemporaryDirectory() as directory:
        fasta = Path(directory, "in.fasta")
        write_fasta(fasta, num_sequences, np.random.default_rng(0), SHORTEST, LONGEST)
        cpu_s, wall_s, memory_mb, libraries_mb = in_a_process(
            _plan, fasta, RunPaths(Path(directory, "run"))
        )
    return [
        Figure.at_least(
            f"planning {num_sequences:,} sequences",
            num_sequences / cpu_s,
            300_000,
            "sequences/s of CPU",
        ),
        Figure(what="the same by the clock", value=num_sequences / wall_s, unit="sequences/s"),
        Figure(what="its peak memory, libraries included", value=memory_mb, unit="MB"),
        Figure(what="the libraries alone", value=libraries_mb, unit="MB"),
    ]


def _plan(fasta: Path, paths: RunPaths) -> tuple[float, float, float, float]:
    libraries_mb = peak_mb()
    cpu_s, wall_s = time.process_time(), time.perf_counter()
    make_plan(paths, [fasta], MODEL, num_shards=4, token_budget=TOKEN_BUDGET)
    return time.process_time() - cpu_s, time.perf_counter() - wall_s, peak_mb(), libraries_mb


def tokenising(num_sequences: int) -> list[Figure]:
    from benchmarks.assembly import write_fasta

    with tempfile.TemporaryDirectory() as directory:
        fasta = Path(directory, "in.fasta")
        write_fasta(fasta, num_sequences, np.random.default_rng(0), SHORTEST, LONGEST)
        pack_s, read_s, residues = in_a_process(_tokenise, fasta, RunPaths(Path(directory, "run")))
    return [
        Figure.at_least("tokenising and packing", residues / pack_s / 1e6, 50.0, "M residues/s"),
        Figure(
            what="the same, read from the plan too",
            value=residues / (pack_s + read_s) / 1e6,
            unit="M residues/s",
        ),
    ]


def _tokenise(fasta: Path, paths: RunPaths) -> tuple[float, float, int]:
    from vnp_lib.model.tokens import pack_batch

    plan = make_plan(paths, [fasta], MODEL, num_shards=1, token_budget=TOKEN_BUDGET)
    pack_s = read_s = 0.0
    for batch_idx, ordinals in enumerate(plan.shard_batches(0)):
        begun_s = time.process_time()
        ids, sequences = plan.fetch(ordinals)
        read_at_s = time.process_time()
        pack_batch(sequences, sequence_ids=ids, ordinals=ordinals, batch_idx=batch_idx)
        pack_s += time.process_time() - read_at_s
        read_s += read_at_s - begun_s
    return pack_s, read_s, int(plan.lengths[plan.order].sum(dtype=np.int64))


def assembly(num_sequences: int, dim: int) -> list[Figure]:
    from benchmarks.assembly import assembly_figures, write_checkpoints, write_fasta

    with tempfile.TemporaryDirectory() as directory:
        fasta, paths = Path(directory, "in.fasta"), RunPaths(Path(directory, "run"))
        write_fasta(fasta, num_sequences, np.random.default_rng(0))
        make_plan(paths, [fasta], MODEL, num_shards=1, token_budget=TOKEN_BUDGET)
        write_checkpoints(paths, 10_000, dim)
        measured = in_a_process(assembly_figures, paths)
    return [
        Figure.at_least(
            f"assembly of {measured.read_mb:,.0f} MB, every digest checked",
            measured.mb_per_s,
            200.0,
            "MB/s",
        ),
        Figure(
            what="the same per second of processor time", value=measured.mb_per_cpu_s, unit="MB/s"
        ),
        Figure(what="its peak memory, mapped files included", value=measured.peak_mb, unit="MB"),
    ]


def imports(trials: int) -> list[Figure]:
    def median_s(*arguments: str) -> float:
        return statistics.median(_took_s(arguments) for _ in range(trials))

    inside = "import time; t = time.perf_counter(); import vnp_lib; print(time.perf_counter() - t)"
    library_s = statistics.median(
        float(subprocess.check_output([sys.executable, "-c", inside], cwd=ROOT))
        for _ in range(trials)
    )
    return [
        Figure.at_most("import vnp_lib", library_s, 0.1, "s"),
        Figure(what="vnp --help", value=median_s("-m", "vnp_lib", "--help"), unit="s"),
        Figure(
            what="python flows/embed.py --help",
            value=median_s("flows/embed.py", "--help"),
            unit="s",
        ),
        Figure(what="import prefect", value=median_s("-c", "import prefect"), unit="s"),
        Figure(what="import torch", value=median_s("-c", "import torch"), unit="s"),
    ]


def _took_s(arguments: tuple[str, ...]) -> float:
    begun_at = time.perf_counter()
    subprocess.run([sys.executable, *arguments], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - begun_at


@dataclass(frozen=True, slots=True, kw_only=True)
class Start:
    """How long a start took, from the command."""

    there_s: float  # to the first forward pass, or into the empty flow
    all_s: float  # to the end of the process


def starts(trials: int) -> list[Figure]:
    """Ours and the empty flow's in turn, with Prefect's embedded server and with a standing one."""
    figures = []
    with tempfile.TemporaryDirectory() as directory:
        scratch = Path(directory)
        (scratch / "in.fasta").write_text(">a\nMKVLAAGIVGLCAKAY\n>b\nMWWKVLAAGIV\n")
        for name, server in (("embedded", _embedded_server), ("standing", standing_server)):
            with server(scratch / name) as environment:
                (
                    start_ours(scratch, environment),
                    start_empty(scratch, environment),
                )  # what only a first run does
                pairs = [
                    (start_empty(scratch, environment), start_ours(scratch, environment))
                    for _ in range(trials)
                ]
            empty_s = statistics.median(empty.all_s for empty, _ in pairs)
            body_s = statistics.median(empty.there_s for empty, _ in pairs)
            ours_s = statistics.median(ours.there_s for _, ours in pairs)
            figures += [
                Figure(what=f"{name} server: an empty flow has run", value=empty_s, unit="s"),
                Figure(what=f"{name} server: an empty flow has begun", value=body_s, unit="s"),
                Figure(
                    what=f"{name} server: our first forward pass begins", value=ours_s, unit="s"
                ),
                Figure.at_most(
                    f"{name} server: later than an empty flow has run", ours_s - empty_s, 4.0, "s"
                ),
            ]
    return figures


def start_ours(scratch: Path, environment: dict[str, str]) -> Start:
    run_dir, stamp = scratch / f"run_{time.time_ns()}", scratch / f"stamp_{time.time_ns()}"
    (scratch / "sitecustomize.py").write_text(f"STAMP = {str(stamp)!r}\n{_HOOK}")
    settings = ("--model", "esm2_t6_8M_UR50D", "--weights", "random", "--devices", "cpu")
    return _start(
        [
            "flows/embed.py",
            "--fasta",
            str(scratch / "in.fasta"),
            "--output-dir",
            str(run_dir),
            *settings,
        ],
        stamp,
        environment | {"PYTHONPATH": f"{scratch}{os.pathsep}{ROOT}"},
    )


def start_empty(scratch: Path, environment: dict[str, str]) -> Start:
    stamp = scratch / f"stamp_{time.time_ns()}"
    (scratch / "empty.py").write_text(_EMPTY_FLOW)
    return _start([str(scratch / "empty.py"), str(stamp)], stamp, environment)


def _start(arguments: list[str], stamp: Path, environment: dict[str, str]) -> Start:
    begun_at = time.time()
    subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env=os.environ | environment,
        check=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    return Start(there_s=float(stamp.read_text()) - begun_at, all_s=time.time() - begun_at)


@contextmanager
def _embedded_server(home: Path) -> Iterator[dict[str, str]]:
    yield {"PREFECT_HOME": str(home)}


@contextmanager
def standing_server(home: Path) -> Iterator[dict[str, str]]:
    """A server of our own, on a free port, for as long as the block runs."""
    from prefect.server.api.server import SubprocessASGIServer

    os.environ["PREFECT_HOME"] = str(home)
    server = SubprocessASGIServer()
    server.start(timeout=120)
    try:
        yield {"PREFECT_HOME": str(home), "PREFECT_API_URL": server.api_url}
    finally:
        server.stop()


def in_a_process(function: Callable[..., T], *arguments: Any) -> T:
    """Call it in a fresh process, whose peak memory is its own."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sequences", type=int, default=1_000_000, help="to plan")
    parser.add_argument(
        "--batches", type=int, default=700, help="of 107 sequences, with and without checkpoints"
    )
    parser.add_argument("--rows", type=int, default=50_000, help="of --dim floats, to assemble")
    parser.add_argument("--dim", type=int, default=2560)
    parser.add_argument("--trials", type=int, default=5, help="starts of each kind")
    parser.add_argument(
        "--only", help="one of: checkpointing, planning, tokenising, assembly, imports, starts"
    )
    given = parser.parse_args()
    parts: dict[str, Callable[[], list[Figure]]] = {
        "checkpointing": lambda: checkpointing(given.batches),
        "planning": lambda: planning(given.sequences),
        "tokenising": lambda: tokenising(min(given.sequences, 100_000)),
        "assembly": lambda: assembly(given.rows, given.dim),
        "imports": lambda: imports(given.trials),
        "starts": lambda: starts(given.trials),
    }
    wanted = [given.only] if given.only else list(parts)
    name = f"overhead-{given.only}" if given.only else "overhead"
    report(name, (figure for part in wanted for figure in parts[part]()))


if __name__ == "__main__":
    main()
