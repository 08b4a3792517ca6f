"""Tests of `vnp verify`: damage is reported, the work of the next run is counted."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.helpers import flip_bit
from vnp_lib.checkpoint.manifest import CheckpointManifest
from vnp_lib.checkpoint.quarantine import Quarantine, QuarantinedSequence
from vnp_lib.checkpoint.survey import survey_checkpoints
from vnp_lib.checkpoint.writer import AsyncCheckpointWriter
from vnp_lib.cli import main
from vnp_lib.errors import ConfigError
from vnp_lib.failures import Failure, FailureCause
from vnp_lib.plan.paths import RunPaths
from vnp_lib.plan.plan import ModelIdentity, RunPlan, load_plan
from vnp_lib.plan.planner import make_plan
from vnp_lib.report.verify import verify_run
from vnp_lib.run.assembly import assemble
from vnp_lib.storage.durable import (
    digest_file,
    marker_path,
    read_sealed_json,
    write_marker,
    write_sealed_json,
)
from vnp_lib.storage.locks import FileLock

MODEL = ModelIdentity(model="m", weights_digest="w", layer=6, dtype="float32")
NUM_CHECKPOINTS = 3  # per shard, with 6 or 7 sequences each


@pytest.fixture(scope="module")
def template(tmp_path_factory) -> Path:
    """Make a complete run of 40 distinct sequences in two shards."""
    directory = tmp_path_factory.mktemp("verify")
    fasta = directory / "in.fasta"
    fasta.write_text(
        "".join(f">p{number}\n{'MKVLA' * (number % 5 + 1)}{'A' * number}\n" for number in range(40))
    )
    paths = RunPaths(directory / "run")
    plan = make_plan(paths, [fasta], MODEL, num_shards=2, token_budget=200)
    manifest = CheckpointManifest(paths.manifest)
    manifest.initialize(2, plan.fingerprint, "w")
    for rank in range(2):
        write_shard(plan, paths, manifest, rank)
    assemble(
        plan,
        paths,
        survey_checkpoints(paths.checkpoints_dir, plan.fingerprint, verify_digests=True).valid,
    )
    return paths.run_dir


def write_shard(plan: RunPlan, paths: RunPaths, manifest: CheckpointManifest, rank: int) -> None:
    ordinals = plan.shard_ordinals(rank)
    with AsyncCheckpointWriter(manifest=manifest, rank=rank) as writer:
        for number in range(NUM_CHECKPOINTS):
            own = ordinals[number::NUM_CHECKPOINTS]
            writer.write_checkpoint_async(
                paths.checkpoint(rank, number),
                torch.from_numpy(own).float()[:, None] + torch.arange(4),
                plan.ids(own),
                {"ordinals": own.tolist(), "fingerprint": plan.fingerprint},
            )


@pytest.fixture
def paths(template, tmp_path) -> RunPaths:
    shutil.copytree(template, tmp_path / "run")
    return RunPaths(tmp_path / "run")


def tree(directory: Path) -> dict[str, tuple[int, bytes]]:
    return {
        str(path.relative_to(directory)): (
            path.stat().st_mtime_ns,
            path.read_bytes() if path.is_file() else b"",
        )
        for path in sorted(directory.rglob("*"))
    }


def test_an_intact_run_has_no_problems(paths, capsys):
    before = tree(paths.run_dir)
    report = verify_run(paths.run_dir)
    assert report.is_well
    assert (report.num_checkpoints, report.num_sequences, report.to_compute) == (6, 40, {})
    assert report.has_dataset
    assert report.running is None
    assert main(["verify", str(paths.run_dir)]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "the dataset has 40 rows",
        "the dataset is complete: the next run computes none of 40 sequences",
        "no problems found",
    ]
    assert tree(paths.run_dir) == before


DAMAGE: list[tuple[str, Callable[[RunPaths], object], str, dict[int, int]]] = [
    (
        "a flipped bit in a checkpoint",
        lambda paths: flip_bit(paths.checkpoint(0, 1)),
        "batch_00001.pt: its sha256",
        {0: 7},
    ),
    (
        "a cut checkpoint",
        lambda paths: os.truncate(paths.checkpoint(1, 2), 99),
        "batch_00002.pt: the file has 99 bytes",
        {1: 6},
    ),
    (
        "a checkpoint that is gone",
        lambda paths: paths.checkpoint(0, 0).unlink(),
        "batch_00000.pt: the file is missing",
        {0: 7},
    ),
    (
        "a flipped bit in a marker",
        lambda paths: flip_bit(marker_path(paths.checkpoint(0, 0))),
        "00000.pt.done is",
        {0: 7},
    ),
    (
        "an empty marker",
        lambda paths: os.truncate(marker_path(paths.checkpoint(0, 0)), 0),
        "torn or damaged",
        {0: 7},
    ),
    (
        "a manifest that is torn",
        lambda paths: os.truncate(paths.manifest, 9),
        "torn or damaged",
        {},
    ),
    (
        "a manifest that is gone",
        lambda paths: paths.manifest.unlink(),
        "manifest.json is missing",
        {},
    ),
    (
        "a manifest that is behind",
        lambda paths: forget(paths),
        "records 0 checkpoints of shard 1 with 0 sequences, and",
        {},
    ),
    (
        "a flipped bit in the dataset",
        lambda paths: flip_bit(paths.embeddings_dir / "part-00000.parquet"),
        "is damaged: its sha256",
        {},
    ),
    (
        "a part that is gone",
        lambda paths: (paths.embeddings_dir / "part-00000.parquet").unlink(),
        "has 0 bytes",
        {},
    ),
    (
        "a flipped bit in _SUCCESS.json",
        lambda paths: flip_bit(paths.success),
        "_SUCCESS.json is",
        {},
    ),
    (
        "a dataset of another run",
        lambda paths: replace_fingerprint(paths),
        "belongs to another run",
        {},
    ),
    (
        "rows with other ids",
        lambda paths: rewrite(paths, ids=True),
        "gives its rows other ids than the plan",
        {0: 7},
    ),
    (
        "rows that the plan has not",
        lambda paths: rewrite(paths, ids=False),
        "ordinals that the plan does not compute",
        {0: 7},
    ),
    (
        "a quarantine that is torn",
        lambda paths: paths.quarantine.write_bytes(b"{"),
        "quarantine.jsonl is damaged in line 1",
        {},
    ),
    ("a forged checkpoint", lambda paths: forge(paths), "batch_00000.pt: failed to load", {0: 7}),
]


def forget(paths: RunPaths) -> None:
    CheckpointManifest(paths.manifest).reconcile([], rank=1)


def replace_fingerprint(paths: RunPaths) -> None:
    success = json.loads(paths.success.read_bytes())
    success.pop("seal")
    write_sealed_json(paths.success, success | {"fingerprint": "0" * 64}, replace=True)


def rewrite(paths: RunPaths, *, ids: bool) -> None:
    """Replace the first checkpoint by another valid one."""
    plan, path = load_plan(paths), paths.checkpoint(0, 0)
    own = plan.shard_ordinals(0)[0::NUM_CHECKPOINTS]
    path.unlink()
    marker_path(path).unlink()
    ordinals = own.tolist() if ids else (own + 1000).tolist()
    with AsyncCheckpointWriter() as writer:
        content = {"ordinals": ordinals, "fingerprint": plan.fingerprint}
        writer.write_checkpoint_async(
            path, torch.ones(len(own), 4), [f"x{each}" for each in ordinals], content
        )


def forge(paths: RunPaths) -> None:
    """Replace the first checkpoint by a file that is not one, with a matching marker."""
    plan, path = load_plan(paths), paths.checkpoint(0, 0)
    own = plan.shard_ordinals(0)[0::NUM_CHECKPOINTS].tolist()
    path.write_bytes(b"cos\nsystem\n(S'true'\ntR.")
    marker_path(path).unlink()
    fields = {"ordinals": own, "fingerprint": plan.fingerprint}
    write_marker(path, digest_file(path), rows=len(own), width=4, dtype="float32", **fields)


@pytest.mark.parametrize(
    ("do", "expected", "to_compute"),
    [each[1:] for each in DAMAGE],
    ids=[each[0] for each in DAMAGE],
)
def test_damage_and_its_cost_are_reported(paths, capsys, do, expected, to_compute):
    do(paths)
    before = tree(paths.run_dir)
    report = verify_run(paths.run_dir)
    assert any(expected in line for line in report.damage), report.damage
    assert not report.is_well
    assert report.to_compute == to_compute
    assert main(["verify", str(paths.run_dir)]) == 1
    out = capsys.readouterr().out
    assert expected in out
    if to_compute:
        ((rank, count),) = to_compute.items()
        assert f"the next run computes {count} of 40 sequences (shard {rank}: {count})" in out
    assert tree(paths.run_dir) == before


@pytest.mark.parametrize("name", ["plan.json", "sequences.arrow", "representatives.npy"])
@pytest.mark.parametrize("is_gone", [True, False])
def test_checkpoints_are_validated_without_a_plan(paths, name, is_gone):
    path = paths.plan_dir / name
    path.unlink() if is_gone else flip_bit(path)
    flip_bit(paths.checkpoint(1, 0))
    report = verify_run(paths.run_dir)
    assert len(report.damage) == 2
    assert name in report.damage[0]
    assert "batch_00000.pt" in report.damage[1]
    assert (report.num_checkpoints, report.num_sequences) == (5, None)
    assert "rewrites the plan" in list(report.lines())[-2]


def test_failing_storage_is_reported(paths):
    for number in range(NUM_CHECKPOINTS):
        flip_bit(paths.checkpoint(0, number))
        flip_bit(paths.checkpoint(1, number))
    report = verify_run(paths.run_dir)
    assert any(
        "the storage is failing; the next run will not start" in line for line in report.damage
    )
    assert report.to_compute == {0: 20, 1: 20}


def test_a_stopped_run_has_no_damage(paths, capsys):
    """A checkpoint without a marker is what a kill leaves behind: the disk has lost nothing."""
    shutil.rmtree(paths.embeddings_dir)
    marker_path(paths.checkpoint(1, 2)).unlink()
    plan = load_plan(paths)
    records = survey_checkpoints(
        paths.checkpoints_dir, plan.fingerprint, verify_digests=False
    ).valid
    CheckpointManifest(paths.manifest).reconcile(records)
    report = verify_run(paths.run_dir)
    assert report.is_well
    assert report.to_compute == {1: 6}
    assert not report.has_dataset
    assert main(["verify", str(paths.run_dir)]) == 0
    out = capsys.readouterr().out
    assert "its writer was stopped before it was finished" in out
    assert "there is no dataset yet" in out


def test_a_running_run_is_reported_and_not_disturbed(paths, capsys):
    """The counts of its manifest are not compared: for a moment they are behind the checkpoints."""
    forget(paths)
    lock = FileLock(paths.run_lock, purpose="run on this directory")
    with lock.held(timeout_s=0):
        report = verify_run(paths.run_dir)
        assert report.running is not None
        assert report.running.pid == os.getpid()
        assert report.is_well
        assert main(["verify", str(paths.run_dir)]) == 0
        assert f"running: process {os.getpid()} on" in capsys.readouterr().out
    assert verify_run(paths.run_dir).running is None


def test_a_dead_lock_holder_is_not_running(paths):
    code = "import sys, os; from pathlib import Path; from vnp_lib.storage.locks import FileLock\n"
    code += "FileLock(Path(sys.argv[1]), purpose='die').acquire(0); os._exit(0)"
    subprocess.run([sys.executable, "-c", code, str(paths.run_lock)], check=True, timeout=60)
    assert FileLock(paths.run_lock, purpose="look").holder() is not None
    assert verify_run(paths.run_dir).running is None


def test_json_has_the_same_findings(paths, capsys):
    flip_bit(paths.checkpoint(0, 1))
    assert main(["verify", "--json", str(paths.run_dir)]) == 1
    report = json.loads(capsys.readouterr().out)
    assert report["run_dir"] == str(paths.run_dir)
    assert report["is_well"] is False
    assert report["to_compute"] == {"0": 7}
    assert "batch_00001.pt" in report["damage"][0]


@pytest.fixture
def unfinished(tmp_path) -> RunPaths:
    """Make a run of 12 sequences, the odd ones copies of 0, with 0 and 4 not computed yet."""
    fasta = tmp_path / "in.fasta"
    fasta.write_text(
        "".join(f">p{number}\nMKVLA{'' if number % 2 else 'L' * number}\n" for number in range(12))
    )
    paths = RunPaths(tmp_path / "unfinished")
    plan = make_plan(paths, [fasta], MODEL, num_shards=1, token_budget=200)
    assert sorted(plan.order.tolist()) == [0, 2, 4, 6, 8, 10]
    CheckpointManifest(paths.manifest).initialize(1, plan.fingerprint, "w")
    compute(paths, 0, [2, 6, 8, 10])
    return paths


def compute(paths: RunPaths, batch_idx: int, ordinals: list[int]) -> None:
    plan = load_plan(paths)
    with AsyncCheckpointWriter(manifest=CheckpointManifest(paths.manifest), rank=0) as writer:
        content = {"ordinals": ordinals, "fingerprint": plan.fingerprint}
        rows = torch.tensor(ordinals).float()[:, None] + torch.arange(4)
        writer.write_checkpoint_async(
            paths.checkpoint(0, batch_idx), rows, plan.ids(np.array(ordinals)), content
        )


def assemble_unfinished(paths: RunPaths, *, allow_missing: bool = False) -> None:
    plan = load_plan(paths)
    records = survey_checkpoints(paths.checkpoints_dir, plan.fingerprint, verify_digests=True).valid
    quarantined = Quarantine.of(plan, paths).ordinals()
    assemble(plan, paths, records, quarantined=quarantined, allow_missing=allow_missing)


def quarantine(paths: RunPaths, *ordinals: int) -> None:
    plan = load_plan(paths)
    failure = Failure(cause=FailureCause.NATIVE_CRASH, message="m")
    Quarantine.of(plan, paths).add(
        *(
            QuarantinedSequence.of_failure(plan, ordinal, failure, attempts=3)
            for ordinal in ordinals
        )
    )


def lines_of(paths: RunPaths) -> list[str]:
    report = verify_run(paths.run_dir)
    assert report.is_well, report.damage
    return list(report.lines())


def test_quarantined_sequences_are_counted_with_their_copies(unfinished):
    quarantine(unfinished, 0, 4)
    note = f"{unfinished.quarantine}: sequences in quarantine: 2 (8 with their copies)"
    assert lines_of(unfinished) == [
        note,
        "there is no dataset yet",
        "the next run computes none of 6 sequences; it assembles the dataset",
        "no problems found",
    ]
    assemble_unfinished(unfinished)
    assert lines_of(unfinished) == [
        note,
        "the dataset has 4 rows",
        "the dataset is complete: the next run computes none of 6 sequences",
        "no problems found",
    ]


def test_a_damaged_quarantine_is_tried_again(unfinished):
    """Its sequences are to compute, and the dataset is not complete."""
    quarantine(unfinished, 0, 4)
    assemble_unfinished(unfinished)
    flip_bit(unfinished.quarantine)
    before = tree(unfinished.run_dir)
    report = verify_run(unfinished.run_dir)
    assert [
        line for line in report.damage if "damaged in line" in line and "move the file away" in line
    ]
    assert report.to_compute == {0: 2}
    assert not report.has_dataset
    assert tree(unfinished.run_dir) == before


def test_a_computed_sequence_is_released_from_quarantine(unfinished):
    compute(unfinished, 1, [0])
    quarantine(unfinished, 2, 4)
    lines = lines_of(unfinished)
    assert lines[0].endswith("sequences in quarantine: 1 (1 with their copies)")
    assert lines[1].endswith(
        "sequences in quarantine that are also in a checkpoint: 1; the next run releases them"
    )


def test_a_partial_dataset_is_no_damage(unfinished):
    quarantine(unfinished, 4)
    assemble_unfinished(unfinished, allow_missing=True)
    assert lines_of(unfinished)[1:] == [
        "the dataset has 4 rows and lacks 7; the next run completes it",
        "the next run computes 1 of 6 sequences (shard 0: 1)",
        "no problems found",
    ]
    compute(unfinished, 1, [0])
    report = verify_run(unfinished.run_dir)
    assert (report.to_compute, report.has_dataset) == ({}, False)
    assert "it assembles the dataset" in lines_of(unfinished)[2]


def test_a_dataset_of_an_earlier_quarantine_is_incomplete(unfinished):
    quarantine(unfinished, 0, 4)
    assemble_unfinished(unfinished)
    compute(unfinished, 1, [4])
    note = "the dataset has 4 rows, but the quarantine has changed since; "
    assert note + "the next run assembles it again" in lines_of(unfinished)
    assert not verify_run(unfinished.run_dir).has_dataset


def test_a_dataset_of_another_dtype_is_incomplete(paths, tmp_path):
    """A run with another --store-dtype was stopped before it assembled the dataset."""
    plan = load_plan(paths)
    fields = read_sealed_json(paths.plan_json)
    write_sealed_json(paths.plan_json, fields | {"store_dtype": "float16"}, replace=True)
    note = "the dataset has 40 rows, but in float32 instead of float16; "
    assert note + "the next run assembles it again" in lines_of(paths)
    assert not verify_run(paths.run_dir).has_dataset
    records = survey_checkpoints(paths.checkpoints_dir, plan.fingerprint, verify_digests=True).valid
    assemble(load_plan(paths), paths, records)
    assert verify_run(paths.run_dir).has_dataset


@pytest.mark.parametrize("name", ["nothing", "empty", "file"])
def test_a_path_without_a_run_is_refused_in_one_line(tmp_path, capsys, name):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError):
        verify_run(tmp_path / name)
    assert main(["verify", str(tmp_path / name)]) == 2
    assert "is not a run directory" in capsys.readouterr().err


def test_the_module_is_a_command(paths):
    ended = subprocess.run(
        [sys.executable, "-m", "vnp_lib", "verify", str(paths.run_dir)],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (ended.returncode, ended.stdout.splitlines()[-1]) == (0, "no problems found")
