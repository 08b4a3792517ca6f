"""Run a million sequences through the complete program: `python -m benchmarks.scale`.

`python flows/embed.py` runs with Prefect's embedded server and normal workers, on two CPU devices,
with a stub model that costs next to nothing. At half of the checkpoints everything is killed with
SIGKILL, and the same command resumes. The same is done with a tenth of the sequences, to see what
grows with them. Every row is compared with what
its sequence should have.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import subprocess
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.assembly import write_checkpoints, write_fasta
from benchmarks.figures import Figure, report
from tests.helpers import ROOT, CommandLine, descendants_of
from tests.prefect_cluster import switch_off
from vnp_lib.checkpoint.survey import survey_checkpoints
from vnp_lib.dataset import open_dataset
from vnp_lib.plan.paths import RunPaths
from vnp_lib.plan.plan import load_plan
from vnp_lib.run.history import read_attempts
from vnp_lib.run.resume import find_pending_work

SHARDS = 4
WIDTH = 64
TOKEN_BUDGET = 16_384
MOST_GROWTH = 12.0  # of the time, for ten times the input
MOST_MEMORY_MB = 1000.0
MOST_SCAN_S = 60.0
MOST_DATABASE_GROWTH = 1.1
CHECKPOINTS_OF_THE_SCAN = 1_000

# Run by the flow and its workers as they start, in Python's `sitecustomize`: both record times, and
# the workers get the stub.
_HOOK = """
import os, sys, time
is_worker, is_flow = sys.orig_argv[-1].endswith("job.json"), "flows/embed.py" in sys.orig_argv
if is_worker or is_flow:
    import json
    import torch
    import vnp_lib.inference.executor, vnp_lib.model.weights
    import vnp_lib.run, vnp_lib.run.resolve, vnp_lib.run.resume, vnp_lib.run.run

    def noted(module, name):
        function = getattr(module, name)
        def wrapped(*arguments, **options):
            begun, cpu_begun = time.time(), time.process_time()
            result = function(*arguments, **options)
            note(name, took=time.time() - begun, cpu=time.process_time() - cpu_begun)
            return result
        setattr(module, name, wrapped)

    def note(name, **seconds):
        line = json.dumps({"name": name, "is_worker": is_worker, "seconds": seconds})
        descriptor = os.open(JOURNAL, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        os.write(descriptor, line.encode() + b"\\n")
        os.close(descriptor)

    # In the modules that call them: names are bound at import.
    noted(vnp_lib.run.resolve, "make_plan")
    noted(vnp_lib.run, "assemble")
    noted(vnp_lib.run.resume, "heal_shard")
    noted(vnp_lib.run.run, "survey_checkpoints")

if is_worker:
    def embed_batch(model, batch, layout=None):
        rows = torch.repeat_interleave(torch.arange(batch.num_sequences), batch.cu_seqlens.diff())
        zeros = torch.zeros(batch.num_sequences, dtype=torch.int64)
        sums = zeros.index_add_(0, rows, batch.input_ids)
        return (sums[:, None] + torch.arange(WIDTH)).float()

    vnp_lib.inference.executor.embed_batch = embed_batch
    vnp_lib.model.weights.load_model = lambda *arguments, **options: None
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunFigures:
    """A run that was killed once, and ended well."""

    num_sequences: int
    phases_s: dict[str, float]  # without the start of any process; those of workers are summed up
    cpu_s: dict[str, float]  # of the phases whose processor time is noted
    first_run_s: float  # until SIGKILL
    second_run_s: float
    peak_mb: dict[str, float]  # by kind of process, the largest of each
    database_mb: float  # of Prefect

    @property
    def total_s(self) -> float:
        return sum(self.phases_s.values())


class MemoryWatch:
    """The peak memory of a process and its descendants, by the kernel, mapped files included."""

    def __init__(self) -> None:
        self.peak_mb: dict[str, float] = {}

    def look(self, leader: int) -> None:
        for pid in (leader, *descendants_of(leader)):
            with suppress(OSError, StopIteration):  # it has gone, or is waited for
                command = Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ")
                status = Path(f"/proc/{pid}/status").read_text()
                peak = next(
                    int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM")
                )
                name = _kind_of_process(command)
                self.peak_mb[name] = max(self.peak_mb.get(name, 0.0), peak * 1024 / 1e6)


def _kind_of_process(command: str) -> str:
    kinds = {
        "vnp_lib/worker/__main__.py": "a worker",
        "flows/embed.py": "the flow",
        "uvicorn": "Prefect's server",
    }
    return next((kind for part, kind in kinds.items() if part in command), "any other")


@dataclass(frozen=True, slots=True, kw_only=True)
class Program:
    """`python flows/embed.py` on fake proteins with the stub, with all files in one directory."""

    directory: Path
    num_sequences: int
    memory: MemoryWatch = field(default_factory=MemoryWatch)

    @property
    def paths(self) -> RunPaths:
        return RunPaths(self.directory / "run")

    @property
    def rows_of_a_checkpoint(self) -> int:
        return min(10_000, self.num_sequences // (10 * SHARDS))

    def prepare(self) -> None:
        """Write the proteins, and the code that installs the stub in the workers."""
        write_fasta(self.directory / "in.fasta", self.num_sequences, np.random.default_rng(0))
        settings = f"JOURNAL = {str(self._journal)!r}\nWIDTH = {WIDTH}\n"
        (self.directory / "sitecustomize.py").write_text(settings + _HOOK)

    def run(self, *, until: Callable[[], bool] = lambda: False) -> float:
        """Run until it exits, or kill it like a power failure; return the seconds."""
        begun_at = time.time()
        flow = self._start()
        while flow.poll() is None and not until():
            self.memory.look(flow.pid)
            time.sleep(0.1)
        took_s = time.time() - begun_at
        if flow.poll():
            raise RuntimeError(
                f"the flow left with {flow.returncode}: {self._log.read_text()[-2000:]}"
            )
        switch_off(flow)
        return took_s

    def num_checkpoints(self) -> int:
        return sum(1 for _ in self.paths.checkpoints_dir.glob("shard_*/*.done"))

    def notes(self) -> list[dict[str, Any]]:
        """What the processes have noted so far."""
        return [json.loads(line) for line in self._journal.read_text().splitlines()]

    def database_mb(self) -> float:
        return sum(path.stat().st_size for path in self._prefect_home.glob("prefect.db*")) / 1e6

    @property
    def _journal(self) -> Path:
        return self.directory / "journal"

    @property
    def _log(self) -> Path:
        return self.directory / "log"

    @property
    def _prefect_home(self) -> Path:
        return self.directory / "prefect"

    def _start(self) -> subprocess.Popen[str]:
        settings = {
            "fasta": self.directory / "in.fasta",
            "output-dir": self.paths.run_dir,
            "model": "esm2_t6_8M_UR50D",
            "weights": "random",
            "devices": "cpu,cpu",
            "shards": SHARDS,
            "token-budget": TOKEN_BUDGET,
            "runtime.checkpoint-seq-threshold": self.rows_of_a_checkpoint,
        }
        arguments = [part for name, value in settings.items() for part in (f"--{name}", value)]
        python_path = f"{self.directory}{os.pathsep}{ROOT}"
        return CommandLine(prefect_home=self._prefect_home).start(
            *arguments, log=self._log, PYTHONPATH=python_path
        )


def run_and_kill_once(directory: Path, num_sequences: int) -> RunFigures:
    """Embed so many made-up sequences, killed at half of the checkpoints, and check every row."""
    program = Program(directory=directory, num_sequences=num_sequences)
    program.prepare()
    half = num_sequences // program.rows_of_a_checkpoint // 2
    first_run_s = program.run(until=lambda: program.num_checkpoints() >= half)
    first = program.notes()
    second_run_s = program.run()
    second = program.notes()[len(first) :]
    check_rows(program.paths)
    return RunFigures(
        num_sequences=num_sequences,
        phases_s=_phases(first, second, "took")
        | {"batches and checkpoints": _batches_s(program.paths)},
        cpu_s=_phases(first, second, "cpu"),
        first_run_s=first_run_s,
        second_run_s=second_run_s,
        peak_mb=program.memory.peak_mb,
        database_mb=program.database_mb(),
    )


def _phases(
    first: list[dict[str, Any]], second: list[dict[str, Any]], kind: str
) -> dict[str, float]:
    """Return the duration of each phase of two runs: `took` is wall time, `cpu` processor time."""

    def seconds(notes: list[dict[str, Any]], *names: str, is_worker: bool) -> float:
        return sum(
            n["seconds"][kind] for n in notes if n["name"] in names and n["is_worker"] == is_worker
        )

    return {
        "plan": seconds(first, "make_plan", is_worker=False),
        "plan again, after SIGKILL": seconds(second, "make_plan", is_worker=False),
        "resume scans, all shards": seconds(
            second, "heal_shard", "survey_checkpoints", is_worker=True
        ),
        "assembly": seconds(second, "assemble", is_worker=False),
    }


def _batches_s(paths: RunPaths) -> float:
    """How long batches and checkpoints took, by the shards' histories."""
    attempts = (attempt for rank in range(SHARDS) for attempt in read_attempts(paths, rank))
    return sum(entry.seconds for attempt in attempts for entry in attempt.checkpoints)


def check_rows(paths: RunPaths) -> None:
    """Compare every row with what the stub makes of its sequence."""
    plan, dataset = load_plan(paths), open_dataset(paths.run_dir)
    start = 0
    for ids, rows in dataset.batches(10_000):
        records = plan.records(start, start + len(ids))
        assert ids == records.column("id").to_pylist()
        expected = np.array(
            [_sum_of_tokens(sequence) for sequence in records.column("sequence").to_pylist()]
        )
        assert np.array_equal(rows, expected[:, None] + np.arange(WIDTH, dtype=np.float32))
        start += len(ids)
    assert start == plan.num_sequences


def _sum_of_tokens(sequence: str) -> int:
    from vnp_lib.model.tokens import EOS, FIRST_RESIDUE, RESIDUES

    return EOS + sum(
        sequence.count(letter) * (FIRST_RESIDUE + place) for place, letter in enumerate(RESIDUES)
    )


def scan(paths: RunPaths) -> dict[str, float]:
    """Time the scan before a resume: a shard's checkpoints, and all markers of the run."""
    plan = load_plan(paths)
    begun_at = time.perf_counter()
    work = find_pending_work(plan, paths, 0)
    whole_s = time.perf_counter() - begun_at
    assert work.num_sequences == 0
    begun_at = time.perf_counter()
    records = survey_checkpoints(
        paths.checkpoints_dir, plan.fingerprint, verify_digests=False
    ).valid
    markers_s = time.perf_counter() - begun_at
    size_mb = sum(record.size_bytes for record in records) / 1e6
    return {
        "checkpoints": len(records),
        "whole_s": whole_s,
        "markers_s": markers_s,
        "size_mb": size_mb,
    }


def measure_scan(directory: Path, num_sequences: int, dim: int) -> dict[str, float]:
    """The scan of a thousand checkpoints of one shard, in a process of its own."""
    from vnp_lib.plan.plan import ModelIdentity
    from vnp_lib.plan.planner import make_plan

    paths, fasta = RunPaths(directory / "scan"), directory / "scan.fasta"
    write_fasta(fasta, num_sequences, np.random.default_rng(1))
    identity = ModelIdentity(model="none", weights_digest="none", layer=0, dtype="float32")
    plan = make_plan(paths, [fasta], identity, num_shards=1, token_budget=TOKEN_BUDGET)
    write_checkpoints(paths, -(-plan.num_computed // CHECKPOINTS_OF_THE_SCAN), dim)
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(scan, paths).result()


def print_runs(small: RunFigures, large: RunFigures) -> None:
    print(f"{'':30}{small.num_sequences:>14,}{large.num_sequences:>14,}{'times':>8}")
    for phase in large.phases_s:
        before, after = small.phases_s[phase], large.phases_s[phase]
        print(f"{phase:30}{before:>12.2f} s{after:>12.2f} s{after / before:>8.1f}")
    print(
        f"{'all phases':30}{small.total_s:>12.2f} s{large.total_s:>12.2f} s"
        f"{large.total_s / small.total_s:>8.1f}"
    )
    for phase in large.cpu_s:
        before, after = small.cpu_s[phase], large.cpu_s[phase]
        print(f"{phase + ', CPU':30}{before:>12.2f} s{after:>12.2f} s{after / before:>8.1f}")
    for name in ("first_run_s", "second_run_s"):
        before, after = getattr(small, name), getattr(large, name)
        print(
            f"{name.replace('_', ' ')[:-2] + ', start included':30}{before:>12.2f} s"
            f"{after:>12.2f} s{after / before:>8.1f}"
        )
    for kind in sorted(large.peak_mb):
        before, after = small.peak_mb.get(kind, 0.0), large.peak_mb[kind]
        print(f"{'peak memory of ' + kind:30}{before:>11.0f} MB{after:>11.0f} MB")
    print(f"{'database of Prefect':30}{small.database_mb:>11.2f} MB{large.database_mb:>11.2f} MB")


def figures_of(small: RunFigures, large: RunFigures, scanned: dict[str, float]) -> list[Figure]:
    growth = large.total_s / small.total_s
    kind, peak_mb = max(large.peak_mb.items(), key=lambda item: item[1])
    database = large.database_mb / small.database_mb
    return [
        Figure.at_most("time for ten times the input", growth, MOST_GROWTH, "times"),
        Figure.at_most(f"peak memory of any process ({kind})", peak_mb, MOST_MEMORY_MB, "MB"),
        Figure.at_most(
            f"resume scan of {scanned['checkpoints']:,.0f} checkpoints, "
            f"{scanned['size_mb']:,.0f} MB",
            scanned["whole_s"],
            MOST_SCAN_S,
            "s",
        ),
        Figure.at_most("the same, markers only", scanned["markers_s"], MOST_SCAN_S, "s"),
        Figure.at_most(
            "Prefect's database for ten times the input", database, MOST_DATABASE_GROWTH, "times"
        ),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sequences", type=int, default=1_000_000)
    parser.add_argument("--scan-sequences", type=int, default=1_000_000)
    parser.add_argument("--scan-dim", type=int, default=64)
    given = parser.parse_args()
    runs = []
    for num_sequences in (given.sequences // 10, given.sequences):
        with tempfile.TemporaryDirectory() as directory:
            runs.append(run_and_kill_once(Path(directory), num_sequences))
    with tempfile.TemporaryDirectory() as directory:
        scanned = measure_scan(Path(directory), given.scan_sequences, given.scan_dim)
    print_runs(*runs)
    report("scale", figures_of(*runs, scanned))


if __name__ == "__main__":
    main()
