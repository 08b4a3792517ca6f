"""Measure memory and time of assembly: `python -m benchmarks.assembly --sequences 1000000`.

Writes a plan and checkpoints of fake rows, without a model, and assembles the dataset in a process
of its own,
whose peak memory is printed.
"""

from __future__ import annotations

import argparse
import multiprocessing
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks.figures import peak_mb
from vnp_lib.checkpoint.survey import survey_checkpoints
from vnp_lib.checkpoint.writer import AsyncCheckpointWriter
from vnp_lib.plan.paths import RunPaths
from vnp_lib.plan.plan import ModelIdentity, load_plan
from vnp_lib.plan.planner import make_plan
from vnp_lib.run.assembly import DatasetSummary, assemble

RESIDUES = np.frombuffer(b"ACDEFGHIKLMNPQRSTVWY", dtype=np.uint8)


def write_fasta(
    path: Path, num_sequences: int, draw: np.random.Generator, shortest: int = 20, longest: int = 60
) -> None:
    """Proteins of so many residues."""
    with path.open("wb") as file:
        for start in range(0, num_sequences, 100_000):
            lengths = draw.integers(shortest, longest + 1, size=min(100_000, num_sequences - start))
            residues = RESIDUES[draw.integers(0, 20, size=lengths.sum())].tobytes()
            ends = np.cumsum(lengths)
            records = (
                b">p%d\n%b\n" % (start + i, residues[end - length : end])
                for i, (end, length) in enumerate(zip(ends.tolist(), lengths.tolist(), strict=True))
            )
            file.write(b"".join(records))


def write_checkpoints(paths: RunPaths, rows_per_checkpoint: int, dim: int) -> None:
    """Rows that begin with their ordinal, in the plan's order."""
    plan = load_plan(paths)
    with AsyncCheckpointWriter() as writer:
        for number, start in enumerate(range(0, plan.num_computed, rows_per_checkpoint)):
            ordinals = plan.order[start : start + rows_per_checkpoint]
            rows = np.repeat(ordinals[:, None].astype(np.float32), dim, axis=1)
            metadata = {"fingerprint": plan.fingerprint, "ordinals": ordinals.tolist()}
            writer.write_checkpoint_async(
                paths.checkpoint(0, number), rows, plan.ids(ordinals), metadata
            )


class MemoryWatch:
    """Sample this process's memory: `anonymous`, and `mapped` file pages, which are reclaimable."""

    def __init__(self) -> None:
        self.peak_mib = {"RssAnon": 0.0, "RssFile": 0.0}
        threading.Thread(target=self._sample, daemon=True).start()

    def _sample(self) -> None:
        while True:
            lines = Path("/proc/self/status").read_text().splitlines()
            for name, value in (line.split(":", 1) for line in lines):
                if name in self.peak_mib:
                    self.peak_mib[name] = max(self.peak_mib[name], int(value.split()[0]) / 1024)
            time.sleep(0.05)


@dataclass(frozen=True, slots=True, kw_only=True)
class AssemblyFigures:
    """One assembly, in a process of its own."""

    summary: DatasetSummary
    num_checkpoints: int
    read_mb: float
    survey_s: float  # of the markers
    assembly_s: float
    cpu_s: float  # of the assembly, all threads
    peak_mb: float  # mapped files included
    own_mib: float
    mapped_mib: float

    @property
    def mb_per_s(self) -> float:
        return self.read_mb / self.assembly_s

    @property
    def mb_per_cpu_s(self) -> float:
        return self.read_mb / self.cpu_s


def assembly_figures(paths: RunPaths) -> AssemblyFigures:
    """Survey and assemble, and say how long each took and what this process's peak memory was."""
    watch = MemoryWatch()
    plan = load_plan(paths)
    started_at = time.perf_counter()
    records = survey_checkpoints(
        paths.checkpoints_dir, plan.fingerprint, verify_digests=False
    ).valid
    surveyed_at, cpu_at = time.perf_counter(), time.process_time()
    summary = assemble(plan, paths, records)
    return AssemblyFigures(
        summary=summary,
        num_checkpoints=len(records),
        read_mb=sum(record.size_bytes for record in records) / 1e6,
        survey_s=surveyed_at - started_at,
        assembly_s=time.perf_counter() - surveyed_at,
        cpu_s=time.process_time() - cpu_at,
        peak_mb=peak_mb(),
        own_mib=watch.peak_mib["RssAnon"],
        mapped_mib=watch.peak_mib["RssFile"],
    )


def measure_assembly(paths: RunPaths) -> None:
    """Print how long each part took and the process's peak memory."""
    seen = assembly_figures(paths)
    summary = seen.summary
    print(
        f"{summary.num_rows:,} rows of {summary.dim}: {seen.num_checkpoints:,} checkpoints "
        f"of {seen.read_mb:,.0f} MB in all"
    )
    print(f"survey of the markers {seen.survey_s:.1f} s")
    print(f"assembly {seen.assembly_s:.1f} s, {seen.mb_per_s:,.0f} MB/s")
    print(
        f"peak memory {seen.peak_mb:,.0f} MB: {seen.own_mib:,.0f} MiB its own, "
        f"{seen.mapped_mib:,.0f} MiB mapped files"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sequences", type=int, default=1_000_000)
    parser.add_argument("--dim", type=int, default=8)
    parser.add_argument("--rows-per-checkpoint", type=int, default=10_000)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        fasta, paths = Path(directory, "in.fasta"), RunPaths(Path(directory, "run"))
        write_fasta(fasta, given.sequences, np.random.default_rng(0))
        identity = ModelIdentity(model="none", weights_digest="none", layer=0, dtype="float32")
        make_plan(paths, [fasta], identity, num_shards=1, token_budget=16_384)
        write_checkpoints(paths, given.rows_per_checkpoint, given.dim)
        process = multiprocessing.get_context("spawn").Process(
            target=measure_assembly, args=(paths,)
        )
        process.start()
        process.join()


if __name__ == "__main__":
    main()
