"""Runner and checkpoints together, with a stub instead of the model."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest
import torch

from flows.embed import embed
from tests.helpers import small_config
from vnp_lib.checkpoint.file import load_checkpoint
from vnp_lib.checkpoint.manifest import CheckpointManifest
from vnp_lib.dataset import open_dataset
from vnp_lib.errors import BatchFailedError, NumericalInstabilityError, StorageError
from vnp_lib.inference.runner import RESUMED, AsyncInferenceRunner
from vnp_lib.plan.paths import RunPaths
from vnp_lib.storage.durable import marker_path

pytestmark = pytest.mark.slow

WIDTH = 5120
LENGTH = 12


class StubModel:
    """Returns the state `token + position in WIDTH` for each token: a row shows its sequence."""

    def __init__(self) -> None:
        self.num_batches = 0

    def forward_packed(self, input_ids, cu_seqlens, max_seqlen):
        self.num_batches += 1
        return {
            "representations": {36: input_ids[:, None] + torch.arange(WIDTH, dtype=torch.float32)}
        }

    def forward(self, input_ids):
        return {
            "representations": {36: input_ids[..., None] + torch.arange(WIDTH, dtype=torch.float32)}
        }


def sequence_ids(num_batches: int, batch_size: int = 10) -> list[str]:
    return [f"seq_{i}" for i in range(num_batches * batch_size)]


def expected_row(sequence_id: str) -> np.ndarray:
    """Sequence i has the tokens BOS, 5 + i, 5 + i, ..., EOS: its mean is 5 + i."""
    return np.arange(WIDTH, dtype=np.float32) + 5 + int(sequence_id.removeprefix("seq_"))


def tokens(sequence_id: str) -> list[int]:
    return [0] + [5 + int(sequence_id.removeprefix("seq_"))] * (LENGTH - 2) + [2]


def padded_loader(num_batches: int, batch_size: int = 10) -> list[dict]:
    ids = sequence_ids(num_batches, batch_size)
    batches = [ids[start : start + batch_size] for start in range(0, len(ids), batch_size)]
    return [
        {"input_ids": torch.tensor([tokens(i) for i in batch]), "sequence_ids": batch}
        for batch in batches
    ]


def packed_loader(num_batches: int, batch_size: int = 10) -> list[dict]:
    return [
        {
            "input_ids": batch["input_ids"].flatten(),
            "sequence_ids": batch["sequence_ids"],
            "cu_seqlens": torch.arange(0, batch_size + 1, dtype=torch.int32) * LENGTH,
            "max_seqlen": LENGTH,
        }
        for batch in padded_loader(num_batches, batch_size)
    ]


def run(tmp_path, loader, *, threshold, model=None, force_restart=False):
    runner = AsyncInferenceRunner(
        model or StubModel(), "cpu", checkpoint_dir=tmp_path, checkpoint_seq_threshold=threshold
    )
    return list(runner.run(loader, force_restart=force_restart))


def assert_rows_belong_to_their_ids(ids, rows):
    for sequence_id, row in zip(ids, np.asarray(rows), strict=True):
        np.testing.assert_array_equal(row, expected_row(sequence_id), err_msg=sequence_id)


def checkpoints(tmp_path):
    return sorted((tmp_path / "shard_0").glob("batch_*.pt"))


def test_runner_creates_checkpoints_during_inference(tmp_path):
    """A threshold of 20 and five batches of 10 give two full checkpoints and a final one."""
    results = run(tmp_path, padded_loader(5), threshold=20)
    assert [path.name for path in checkpoints(tmp_path)] == [
        "batch_00000.pt",
        "batch_00001.pt",
        "batch_00002.pt",
    ]
    assert all(marker_path(path).exists() for path in checkpoints(tmp_path))
    for result in results:
        assert_rows_belong_to_their_ids(result.sequence_ids, result.embeddings)


def test_runner_resume_skips_completed_work(tmp_path):
    """A second runner returns the rows of the first one, and writes none a second time."""
    run(tmp_path, padded_loader(5)[:3], threshold=20)
    model = StubModel()
    results = run(tmp_path, padded_loader(5), threshold=20, model=model)
    resumed = [result for result in results if result.batch_idx == RESUMED]
    assert [len(result.sequence_ids) for result in resumed] == [30]
    assert model.num_batches == 2
    ids = [sequence_id for result in results for sequence_id in result.sequence_ids]
    assert sorted(ids) == sorted(sequence_ids(5))
    for result in results:
        assert_rows_belong_to_their_ids(result.sequence_ids, result.embeddings)
    on_disk = [
        i
        for path in checkpoints(tmp_path)
        for i in load_checkpoint(path, fingerprint="").sequence_ids
    ]
    assert sorted(on_disk) == sorted(sequence_ids(5))


def test_runner_force_restart_ignores_checkpoints(tmp_path):
    run(tmp_path, padded_loader(3), threshold=10)
    model = StubModel()
    results = run(tmp_path, padded_loader(3), threshold=10, model=model, force_restart=True)
    assert [result.batch_idx for result in results] == [0, 1, 2]
    assert model.num_batches == 3
    assert len(checkpoints(tmp_path)) == 3


def test_runner_final_checkpoint_captures_remaining(tmp_path):
    run(tmp_path, padded_loader(3), threshold=100)
    (path,) = checkpoints(tmp_path)
    checkpoint = load_checkpoint(path, fingerprint="")
    assert checkpoint.sequence_ids == sequence_ids(3)
    assert checkpoint.metadata["reason"] == "final"
    assert_rows_belong_to_their_ids(checkpoint.sequence_ids, checkpoint.embeddings)


def test_runner_checkpoint_at_batch_boundary_only(tmp_path):
    """A threshold below the batch size still gives whole batches."""
    run(tmp_path, packed_loader(3), threshold=5)
    held = [load_checkpoint(path, fingerprint="").sequence_ids for path in checkpoints(tmp_path)]
    assert held == [batch["sequence_ids"] for batch in packed_loader(3)]


def damage_the_second_of_three(tmp_path):
    run(tmp_path, padded_loader(3), threshold=10)
    path = checkpoints(tmp_path)[1]
    path.write_bytes(path.read_bytes()[:10])
    return path


def test_resume_skips_corrupted_checkpoint(tmp_path):
    """Only what precedes the damage is resumed; the rest is computed again."""
    damage_the_second_of_three(tmp_path)
    results = run(tmp_path, padded_loader(3), threshold=10)
    assert results[0].batch_idx == RESUMED
    assert list(results[0].sequence_ids) == sequence_ids(1)
    assert [result.batch_idx for result in results[1:]] == [1, 2]
    for result in results:
        assert_rows_belong_to_their_ids(result.sequence_ids, result.embeddings)
    on_disk = [
        i
        for path in checkpoints(tmp_path)
        for i in load_checkpoint(path, fingerprint="").sequence_ids
    ]
    assert on_disk == sequence_ids(3)


def test_resume_removes_done_marker_on_corruption(tmp_path):
    path = damage_the_second_of_three(tmp_path)
    before = marker_path(path).read_bytes()
    runner = AsyncInferenceRunner(StubModel(), "cpu", checkpoint_dir=tmp_path)
    next(iter(runner.run(padded_loader(3))))
    assert not marker_path(path).exists() or marker_path(path).read_bytes() != before


def test_five_resumes_write_every_row_once(tmp_path):
    """Resumed rows are not written into the next checkpoint."""
    for num_batches in range(1, 6):
        run(tmp_path, padded_loader(5)[:num_batches], threshold=10)
    on_disk = [
        i
        for path in checkpoints(tmp_path)
        for i in load_checkpoint(path, fingerprint="").sequence_ids
    ]
    assert on_disk == sequence_ids(5)


def test_rows_before_a_failure_are_kept(tmp_path):
    """The loader fails after two batches: both are in a checkpoint."""

    def loader():
        yield from padded_loader(2)
        raise OSError("the disk is gone")

    with pytest.raises(OSError, match="the disk is gone"):
        run(tmp_path, loader(), threshold=100)
    (path,) = checkpoints(tmp_path)
    assert load_checkpoint(path, fingerprint="").sequence_ids == sequence_ids(2)


def test_a_row_that_is_not_finite_is_named(tmp_path):
    class Broken(StubModel):
        def forward_packed(self, input_ids, cu_seqlens, max_seqlen):
            output = super().forward_packed(input_ids, cu_seqlens, max_seqlen)
            states = output["representations"][36]
            # A token of the second sequence, in its batch and alone.
            states[(LENGTH + 1) % len(states), 0] = torch.nan
            return output

    with pytest.raises(BatchFailedError) as caught:
        run(tmp_path, padded_loader(1), threshold=100, model=Broken())
    assert isinstance(caught.value.__cause__, NumericalInstabilityError)
    assert str(caught.value.__cause__).endswith("not finite in batch 0: seq_1")
    assert checkpoints(tmp_path) == []


def run_flow(fasta, run_dir, **runtime):
    return asyncio.run(embed(small_config(fasta, run_dir, runtime=runtime), return_state=True))


@pytest.mark.usefixtures("prefect_server")
def test_coordinator_retries_failed_worker(tmp_path, tiny_fasta, sabotage):
    """The worker process of rank 1 fails once: both shards complete."""
    sabotage("if rank == 1 and attempt == 1: os._exit(9)")
    outcome = run_flow(tiny_fasta, tmp_path / "run")
    assert outcome.is_completed(), outcome.message
    manifest = CheckpointManifest(RunPaths(tmp_path / "run").manifest)
    assert manifest.get_completed_shards() == [0, 1]
    assert [manifest.get_shard_status(rank)["attempts"] for rank in (0, 1)] == [1, 2]
    assert len(open_dataset(tmp_path / "run")) == 40


@pytest.mark.usefixtures("prefect_server")
def test_coordinator_gives_up_after_max_retries(tmp_path, tiny_fasta, sabotage):
    """One worker process always fails: its shard fails after two retries, the other completes."""
    sabotage("if rank == 1: os._exit(9)")
    outcome = run_flow(tiny_fasta, tmp_path / "run", max_retries_transient=2)
    assert outcome.is_failed()
    assert "not embedded: [1]" in outcome.message
    manifest = CheckpointManifest(RunPaths(tmp_path / "run").manifest)
    assert manifest.get_completed_shards() == [0]
    assert manifest.get_shard_status(1)["attempts"] == 3
    with pytest.raises(StorageError, match="no complete dataset"):
        open_dataset(tmp_path / "run")


@pytest.mark.usefixtures("prefect_server")
def test_manifest_updated_on_completion(tmp_path, tiny_fasta, sabotage):
    """The manifest shows which shard is complete, which has failed, and why."""
    sabotage("if rank == 1: os._exit(9)")
    run_flow(tiny_fasta, tmp_path / "run", max_retries_transient=0)
    manifest = CheckpointManifest(RunPaths(tmp_path / "run").manifest)
    complete, failed = manifest.get_shard_status(0), manifest.get_shard_status(1)
    assert (complete["status"], complete["error"], complete["total_sequences"]) == (
        "complete",
        None,
        20,
    )
    assert failed["status"] == "failed"
    assert "exit code 9" in failed["error"]
    assert failed["failures"][0]["kind"] == "transient"
