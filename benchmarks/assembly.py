"""How much memory and time assembly takes: `python benchmarks/assembly.py --sequences 10000000 --dim 8`.

Writes a plan and checkpoints of made-up rows, without a model, and puts the dataset together in a process of its own,
whose peak memory is printed.
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import tempfile
import threading
import time
from pathlib import Path

import numpy as np

from vnp_lib.checkpoint import AsyncCheckpointWriter, survey_checkpoints
from vnp_lib.dataset import assemble
from vnp_lib.plan import ModelIdentity, RunPaths, load_plan, make_plan

RESIDUES = np.frombuffer(b"ACDEFGHIKLMNPQRSTVWY", dtype=np.uint8)


def write_fasta(path: Path, num_sequences: int, draw: np.random.Generator) -> None:
    """Proteins of 20 to 60 residues."""
    with path.open("wb") as file:
        for start in range(0, num_sequences, 100_000):
            lengths = draw.integers(20, 61, size=min(100_000, num_sequences - start))
            letters = RESIDUES[draw.integers(0, 20, size=lengths.sum())].tobytes()
            ends = np.cumsum(lengths)
            records = (
                b">p%d\n%b\n" % (start + i, letters[end - length : end])
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
            writer.write_checkpoint_async(paths.checkpoint(0, number), rows, plan.ids(ordinals), metadata)


class MemoryWatch:
    """Samples what this process holds: `anonymous` is its own, `mapped` are file pages that the kernel may take back."""

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


def measure_assembly(paths: RunPaths) -> None:
    """Survey and assemble, and print how long each took and the process's peak memory."""
    watch = MemoryWatch()
    plan = load_plan(paths)
    started_at = time.perf_counter()
    records = survey_checkpoints(paths.checkpoints_dir, plan.fingerprint, verify_digests=False).valid
    surveyed_at = time.perf_counter()
    summary = assemble(plan, paths, records)
    assembly_s = time.perf_counter() - surveyed_at
    peak_mib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    read_mb = sum(record.size_bytes for record in records) / 1e6
    print(f"{summary.num_rows:,} rows of {summary.dim}: {len(records):,} checkpoints of {read_mb:,.0f} MB in all")
    print(f"survey of the markers {surveyed_at - started_at:.1f} s")
    print(f"assembly {assembly_s:.1f} s, {read_mb / assembly_s:,.0f} MB/s")
    own, mapped = watch.peak_mib.values()
    print(f"peak memory {peak_mib:,.0f} MiB: {own:,.0f} MiB its own, {mapped:,.0f} MiB mapped files")


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
        process = multiprocessing.get_context("spawn").Process(target=measure_assembly, args=(paths,))
        process.start()
        process.join()


if __name__ == "__main__":
    main()
