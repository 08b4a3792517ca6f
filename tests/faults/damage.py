"""Run directories with one damaged file, and assertions about them."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

from tests.faults.compare import Outcome, assert_recovers, committed_files, committed_ordinals
from tests.faults.trials import call
from tests.faults.workload import run_to_the_end, write_fasta
from vnp_lib.checkpoint.file import load_checkpoint
from vnp_lib.checkpoint.manifest import CheckpointManifest
from vnp_lib.checkpoint.resume import validate_checkpoint_pt
from vnp_lib.checkpoint.survey import survey_checkpoints
from vnp_lib.dataset.reader import open_dataset, verify_dataset
from vnp_lib.errors import CheckpointError, StorageError
from vnp_lib.plan.paths import RunPaths
from vnp_lib.plan.plan import load_plan
from vnp_lib.storage.durable import marker_path

KINDS = (
    "checkpoint",
    "marker",
    "manifest.json",
    "plan.json",
    "sequences.arrow",
    "representatives.npy",
    "part",
    "_SUCCESS.json",
)


def whole_run(directory: Path, template: Path) -> None:
    """Make a complete run in `template`, to be copied."""
    template.parent.mkdir(exist_ok=True)
    write_fasta(template.parent)
    ended = call(run_to_the_end, template)
    assert ended.value, ended.error


def copy_of(template: Path, directory: Path, *, with_dataset: bool) -> Path:
    """Copy the run of the template into a new directory."""
    run_dir = directory / "run"
    write_fasta(directory)
    shutil.copytree(template, run_dir)
    if not with_dataset:
        shutil.rmtree(RunPaths(run_dir).embeddings_dir)
    return run_dir


def file_of(kind: str, run_dir: Path, draw: random.Random) -> Path:
    """Return a random file of a kind."""
    paths = RunPaths(run_dir)
    checkpoint = draw.choice(sorted(paths.checkpoints_dir.glob("shard_*/batch_*.pt")))
    return {
        "checkpoint": checkpoint,
        "marker": marker_path(checkpoint),
        "manifest.json": paths.manifest,
        "plan.json": paths.plan_json,
        "sequences.arrow": paths.sequences,
        "representatives.npy": paths.representatives,
        "part": draw.choice(sorted(paths.embeddings_dir.glob("part-*")) or [paths.success]),
        "_SUCCESS.json": paths.success,
    }[kind]


def assert_repaired(run_dir: Path, kind: str, template: Path, oracle: Outcome) -> None:
    """Assert that the next run computes what the damaged file held, and nothing else."""
    before = committed_files(run_dir, oracle)
    lost = committed_ordinals(template, oracle) - committed_ordinals(run_dir, oracle)
    assert (lost == set()) == (kind not in ("checkpoint", "marker")), (
        f"damage to a {kind} has cost {lost}"
    )
    assert_recovers(run_dir, oracle)
    records = survey_checkpoints(
        RunPaths(run_dir).checkpoints_dir, oracle.fingerprint, verify_digests=True
    ).valid
    computed = [record.ordinals.tolist() for record in records if record.path not in before]
    assert {ordinal for ordinals in computed for ordinal in ordinals} == lost


def assert_refused(run_dir: Path, kind: str, path: Path, oracle: Outcome) -> None:
    """Assert that the readers of `path` report the damage.

    Call it in a separate process: it may start threads, or crash.
    """
    paths = RunPaths(run_dir)
    if kind in ("checkpoint", "marker"):
        checkpoint = path.with_name(path.name.removesuffix(".done"))
        assert _refuses(
            load_checkpoint, checkpoint, fingerprint=oracle.fingerprint, error=CheckpointError
        )
        assert not validate_checkpoint_pt(checkpoint)[0]
        survey = survey_checkpoints(paths.checkpoints_dir, oracle.fingerprint, verify_digests=True)
        assert [damage.path for damage in survey.damaged] == [checkpoint]
    elif kind == "manifest.json":
        assert _refuses(CheckpointManifest(path).get_global_progress, error=StorageError)
    elif kind in ("part", "_SUCCESS.json"):
        assert verify_dataset(run_dir)
        assert_no_wrong_row(run_dir, oracle)
    else:
        assert _refuses(load_plan, paths, error=StorageError)


def assert_no_wrong_row(run_dir: Path, oracle: Outcome) -> None:
    """Assert that a reader that does not verify the dataset gets the right rows, or an error."""
    try:
        dataset = open_dataset(run_dir)
        rows = [
            (sequence_id, row.tobytes())
            for ids, block in dataset.batches(16)
            for sequence_id, row in zip(ids, block, strict=True)
        ]
    except StorageError:
        return
    assert rows == oracle.rows


def _refuses(read, *arguments, error: type[Exception], **keywords) -> bool:
    try:
        read(*arguments, **keywords)
    except error:
        return True
    return False
