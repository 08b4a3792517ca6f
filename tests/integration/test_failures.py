"""Each kind of failure, with real worker processes and Prefect, costs only what is named."""

from __future__ import annotations

import asyncio
import json
import re
from pathlib import Path

import pytest

from flows.embed import embed
from tests.helpers import assert_same_rows, embed_alone, small_config, workers_of
from tests.poison import Way, patch, write_proteins
from vnp_lib.checkpoint.manifest import CheckpointManifest
from vnp_lib.checkpoint.quarantine import Quarantine
from vnp_lib.dataset import open_dataset
from vnp_lib.plan.paths import RunPaths
from vnp_lib.plan.plan import load_plan
from vnp_lib.report.verify import verify_run
from vnp_lib.run import record
from vnp_lib.storage.locks import FileLock

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("prefect_server")]

ONE_SHARD = {"devices": "cpu", "shards": 1}
QUICK = {"backoff_base_s": 0.01, "spot_retry_poll_interval": 0.01, "checkpoint_seq_threshold": 5}


def run_flow(fasta: Path, run_dir: Path, *, runtime: dict | None = None, **settings):
    config = small_config(fasta, run_dir, runtime=QUICK | (runtime or {}), **settings)
    return asyncio.run(embed(config, return_state=True))


def quarantined(run_dir: Path) -> list[str]:
    paths = RunPaths(run_dir)
    held = Quarantine.of(load_plan(paths), paths).read()
    return sorted(sequence.id for sequence in held)


def failures(run_dir: Path, rank: int = 0) -> list[dict]:
    return CheckpointManifest(RunPaths(run_dir).manifest).failures(rank)


MARKED = {
    3: Way.EXCEPTION,
    4: Way.EXIT,
    17: Way.NAN,
    18: Way.NAN,
    5: Way.MEMORY,
    20: Way.MEMORY,
    23: Way.TOO_LARGE,
}


@pytest.fixture(scope="module")
def proteins(tmp_path_factory) -> Path:
    """Write twenty-four proteins, some of which crash a patched worker process."""
    path = tmp_path_factory.mktemp("proteins") / "in.fasta"
    write_proteins(path, 24, MARKED)
    return path


@pytest.fixture(scope="module")
def oracle(tmp_path_factory, proteins) -> Path:
    """Embed the same proteins without a patch."""
    return embed_alone(proteins, tmp_path_factory.mktemp("oracle") / "run")


def assert_all_but(run_dir: Path, oracle_dir: Path, bad: list[str]) -> None:
    """Compare all rows except those of `bad` by id and position."""
    ours, whole = open_dataset(run_dir), open_dataset(oracle_dir)
    assert ours.ids == [sequence_id for sequence_id in whole.ids if sequence_id not in bad]
    for ordinal, sequence_id in enumerate(whole.ids):
        if sequence_id not in bad:
            assert abs(ours[sequence_id] - whole[sequence_id]).max() < 1e-5
            assert (ours.row(ordinal) == ours[sequence_id]).all()


def test_bad_proteins_are_quarantined(tmp_path, sabotage, proteins, oracle):
    """One crashes the process and two have no finite row: exactly these are quarantined."""
    sabotage(patch(Way.EXIT, Way.NAN))
    outcome = run_flow(proteins, tmp_path / "run", token_budget=300, **ONE_SHARD)
    assert outcome.is_completed(), outcome.message
    assert quarantined(tmp_path / "run") == ["exit_4", "nan_17", "nan_18"]
    assert_all_but(tmp_path / "run", oracle, ["exit_4", "nan_17", "nan_18"])
    assert outcome.message.startswith("21 sequences embedded, 3 in quarantine")
    success = json.loads(RunPaths(tmp_path / "run").success.read_text())
    assert (success["num_quarantined"], success["num_missing"]) == (3, 0)
    assert [record["ordinal"] for record in failures(tmp_path / "run")] == [None, None, 4, 4]
    assert workers_of(tmp_path) == []


def test_too_few_finite_rows_fail_the_run(tmp_path, sabotage):
    """A second run fails as well, since the count is on disk."""
    write_proteins(tmp_path / "in.fasta", 12, dict.fromkeys(range(1, 12, 2), Way.NAN))
    sabotage(patch(Way.NAN))
    for _ in range(2):
        outcome = run_flow(tmp_path / "in.fasta", tmp_path / "run", token_budget=80)
        assert outcome.is_failed()
        assert re.search(
            "[4-6] of 12 sequences have no finite embedding, in float32 neither: so many",
            outcome.message,
        )
        assert len(quarantined(tmp_path / "run")) <= 3
    assert {failure["cause"] for failure in failures(tmp_path / "run")} <= {"quarantine_full"}


def test_out_of_memory_reduces_the_batches(tmp_path, sabotage, proteins, oracle):
    """In the same worker process, and the smaller budget is recorded."""
    sabotage(patch(Way.MEMORY))
    outcome = run_flow(proteins, tmp_path / "run", token_budget=300, **ONE_SHARD)
    assert outcome.is_completed(), outcome.message
    assert_same_rows(tmp_path / "run", oracle)
    manifest = CheckpointManifest(RunPaths(tmp_path / "run").manifest)
    assert failures(tmp_path / "run") == []
    assert manifest.token_budget(0, "cpu") < 80


def test_a_sequence_too_large_for_memory_is_named(tmp_path, sabotage, proteins):
    sabotage(patch(Way.TOO_LARGE))
    runtime = {"max_retries_oom": 1}
    outcome = run_flow(proteins, tmp_path / "run", token_budget=300, runtime=runtime, **ONE_SHARD)
    assert outcome.is_failed()
    assert {record["kind"] for record in failures(tmp_path / "run")} == {"oom"}
    assert "'too_large_23'" in outcome.message
    assert "residues" in outcome.message
    assert outcome.message.startswith("23 of 24 distinct sequences are embedded")


def test_on_poison_fail_ends_only_the_shard(tmp_path, sabotage, proteins, oracle):
    """--allow-partial assembles the rest; a later run computes only what failed."""
    paths = RunPaths(tmp_path / "run")
    sabotage(patch(Way.EXCEPTION))
    outcome = run_flow(proteins, paths.run_dir, on_poison="fail")
    assert outcome.is_failed()
    assert "1 Completed, 1 Failed" in outcome.message
    assert "circuit breaker" in outcome.message
    assert not paths.success.exists()
    assert quarantined(paths.run_dir) == []

    outcome = run_flow(proteins, paths.run_dir, on_poison="fail", allow_partial=True)
    assert outcome.is_completed(), outcome.message
    missing = json.loads(paths.success.read_text())["num_missing"]
    assert f"{24 - missing} sequences embedded, {missing} missing" in outcome.message
    lacking = set(open_dataset(oracle).ids) - set(open_dataset(paths.run_dir).ids)
    assert len(lacking) == missing >= 1
    assert_all_but(paths.run_dir, oracle, list(lacking))

    before = {path: path.stat().st_mtime_ns for path in paths.checkpoints_dir.glob("*/batch_*")}
    outcome = run_flow(proteins, paths.run_dir)
    assert outcome.is_completed(), outcome.message
    assert "1 Cached, 1 Completed" in outcome.message
    assert quarantined(paths.run_dir) == ["exception_3"]
    assert_all_but(paths.run_dir, oracle, ["exception_3"])
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_a_broken_device_is_excluded(tmp_path, tiny_fasta, sabotage):
    """Of two devices the first one is lost: the other one computes all three shards."""
    sabotage(
        """
        if rank == 0 and attempt == 1:
            import vnp_lib.model.weights
            def load_model(*arguments, **options):
                raise RuntimeError("CUDA error: uncorrectable ECC error encountered")
            vnp_lib.model.weights.load_model = load_model
        """
    )
    outcome = run_flow(tiny_fasta, tmp_path / "run", shards=3)
    assert outcome.is_completed(), outcome.message
    manifest = CheckpointManifest(RunPaths(tmp_path / "run").manifest)
    assert [record["cause"] for record in failures(tmp_path / "run", 0)] == ["hardware"]
    assert manifest.get_redistributed_shards() == {0: 1}


def test_a_kill_between_checkpoint_and_manifest_loses_nothing(tmp_path, sabotage, proteins, oracle):
    """The next worker process finds the checkpoint, and the manifest counts it."""
    sabotage(
        """
        if attempt == 1:
            import signal, vnp_lib.checkpoint.manifest
            def update_shard_checkpoint(*arguments, **options):
                os.kill(os.getpid(), signal.SIGKILL)
            manifest = vnp_lib.checkpoint.manifest.CheckpointManifest
            manifest.update_shard_checkpoint = update_shard_checkpoint
        """
    )
    outcome = run_flow(proteins, tmp_path / "run", token_budget=300, **ONE_SHARD)
    assert outcome.is_completed(), outcome.message
    assert_same_rows(tmp_path / "run", oracle)
    assert verify_run(tmp_path / "run").is_well


@pytest.mark.soak
def test_a_manifest_lock_that_is_never_released_costs_no_row(
    tmp_path, tiny_fasta, monkeypatch, caplog
):
    """Its holder is named, no attempt fails, and the next run completes the manifest."""
    monkeypatch.setattr(record, "LOCK_TIMEOUT_S", 0.5)
    run_dir = tmp_path / "run"
    manifest = RunPaths(run_dir).manifest
    manifest.parent.mkdir(parents=True)
    with FileLock(manifest.with_suffix(".lock"), purpose="hang").held(timeout_s=0):
        assert run_flow(tiny_fasta, run_dir, **ONE_SHARD).is_completed()
    assert "to hang; waited" in caplog.text
    assert_same_rows(run_dir, embed_alone(tiny_fasta, tmp_path / "alone"))
    assert run_flow(tiny_fasta, run_dir, **ONE_SHARD).is_completed()
    assert CheckpointManifest(manifest).get_completed_shards() == [0]
    assert verify_run(run_dir).is_well
