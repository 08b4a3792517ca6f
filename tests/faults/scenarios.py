"""States of a run directory at the start of a run."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

from tests.faults.ops import CountingOps, install
from tests.faults.trials import call
from tests.faults.workload import run_to_the_end, write_fasta
from tests.helpers import flip_bit
from vnp_lib.checkpoint.file import load_checkpoint
from vnp_lib.plan.paths import RunPaths


def new_directory(run_dir: Path) -> None:
    """Make an empty directory."""
    run_dir.mkdir()


def half_a_run(run_dir: Path) -> None:
    """Make a run of one shard that was killed after it had reported its third checkpoint."""
    acknowledged: list[list[int]] = []

    def acknowledge(ordinals: list[int]) -> None:
        acknowledged.append(ordinals)
        if len(acknowledged) == 3:
            os.kill(os.getpid(), signal.SIGKILL)

    assert call(run_to_the_end, run_dir, shards=1, acknowledge=acknowledge).was_killed


def damage_in_the_middle(run_dir: Path) -> None:
    """Make half a run with a flipped bit in its middle checkpoint."""
    half_a_run(run_dir)
    _damage_a_row(RunPaths(run_dir).checkpoint(0, 1))


def damage_in_the_end(run_dir: Path) -> None:
    """Make a run without its dataset, with a flipped bit in a checkpoint."""
    all_but_the_dataset(run_dir)
    _damage_a_row(RunPaths(run_dir).checkpoint(0, 1))


def no_manifest(run_dir: Path) -> None:
    """Make half a run without its manifest."""
    half_a_run(run_dir)
    RunPaths(run_dir).manifest.unlink()


def torn_manifest(run_dir: Path) -> None:
    """Make half a run with half of its manifest."""
    half_a_run(run_dir)
    manifest = RunPaths(run_dir).manifest
    os.truncate(manifest, manifest.stat().st_size // 2)


def all_but_the_dataset(run_dir: Path) -> None:
    """Make a run that only has to assemble its dataset."""
    _whole_run(run_dir)
    shutil.rmtree(RunPaths(run_dir).embeddings_dir)


def damaged_dataset(run_dir: Path) -> None:
    """Make a complete run with a flipped bit in a part of its dataset."""
    _whole_run(run_dir)
    part = RunPaths(run_dir).embeddings_dir / "part-00001.parquet"
    flip_bit(part)


SCENARIOS = (
    new_directory,
    half_a_run,
    damage_in_the_middle,
    damage_in_the_end,
    no_manifest,
    torn_manifest,
    all_but_the_dataset,
    damaged_dataset,
)


def prepare(directory: Path, scenario: Callable[[Path], None], template: Path) -> list[str]:
    """Make `scenario` in `template`, and return the names of the operations of the next run."""
    write_fasta(directory)
    write_fasta(template.parent)
    scenario(template)
    shutil.copytree(template, directory / "run")
    ended = call(_operations, directory / "run")
    assert not ended.error, ended.error
    return ended.value


def _operations(run_dir: Path) -> list[str]:
    ops = CountingOps()
    install(ops)
    run_to_the_end(run_dir)
    return ops.names


def copy_of(template: Path, directory: Path) -> Path:
    """Copy `template` into `directory`, with the input next to it."""
    write_fasta(directory)
    shutil.copytree(template, directory / "run")
    return directory / "run"


def _whole_run(run_dir: Path) -> None:
    ended = call(run_to_the_end, run_dir)
    assert ended.value, ended.error


def _damage_a_row(checkpoint: Path) -> None:
    """Flip a bit that only the digest reveals: the file still loads, with finite values."""
    rows = load_checkpoint(checkpoint, fingerprint=None).embeddings.tobytes()
    flip_bit(checkpoint, 8 * checkpoint.read_bytes().index(rows))
