"""Complete programs, from FASTA and weights to embeddings on disk, imports included."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from benchmarks.hardware import timed
from benchmarks.networks import FAIR_ESM_ENVIRONMENT
from vnp_lib.dataset import open_dataset

ROOT = Path(__file__).parents[1]

ProgramName = Literal["extract.py", "vnp without Prefect", "flows/embed.py"]
PROGRAMS: tuple[ProgramName, ...] = ("extract.py", "vnp without Prefect", "flows/embed.py")


@dataclass(frozen=True, slots=True, kw_only=True)
class ProgramFiles:
    """What a program is given, and where it writes."""

    model: str
    weights: Path
    fasta: Path
    output_dir: Path


def run_program(
    name: ProgramName, files: ProgramFiles, *, prefect_home: Path, extract_script: Path | None
) -> float:
    """Run one from start to end, with as many threads or workers as there are cores; seconds.

    Raises:
        subprocess.CalledProcessError: It failed; its output is on standard error.
    """
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("PREFECT_", "VNP_"))}
    environment = inherited | FAIR_ESM_ENVIRONMENT | {"PREFECT_HOME": str(prefect_home)}
    command = [sys.executable, *_arguments(name, files, extract_script)]
    seconds, ended = timed(
        lambda: subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
        )
    )
    if ended.returncode:
        print(ended.stdout, ended.stderr, file=sys.stderr)
        ended.check_returncode()
    return seconds


def read_rows(name: ProgramName, output_dir: Path) -> np.ndarray:
    """The embeddings that a program has left, (N, D), in the order of the FASTA file."""
    if name != "extract.py":
        dataset = open_dataset(output_dir)
        return np.concatenate([rows for _, rows in dataset.batches(10_000)])
    files = sorted(output_dir.glob("*.pt"), key=lambda path: int(path.stem.removeprefix("p")))
    return torch.stack(
        [next(iter(torch.load(path)["mean_representations"].values())) for path in files]
    ).numpy()


def _arguments(name: ProgramName, files: ProgramFiles, extract_script: Path | None) -> list[str]:
    model, weights, fasta, out = (
        files.model,
        str(files.weights),
        str(files.fasta),
        str(files.output_dir),
    )
    if name == "extract.py":
        program = (
            [str(extract_script.resolve())] if extract_script else ["-m", "benchmarks.extract"]
        )
        return [*program, weights, fasta, out, "--include", "mean", "--nogpu"]
    if name == "vnp without Prefect":
        return ["-m", "benchmarks.without_prefect", model, weights, fasta, out]
    devices = ",".join("cpu" for _ in os.sched_getaffinity(0))
    options = {
        "fasta": fasta,
        "output-dir": out,
        "model": model,
        "weights": weights,
        "devices": devices,
    }
    return [
        "flows/embed.py",
        *(part for name, value in options.items() for part in (f"--{name}", value)),
    ]
