"""Runs with several outputs, by real worker processes and Prefect, compared with fair-esm."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import dnaio
import numpy as np
import pytest
import torch

from flows.embed import embed
from tests.fair_esm import FairEsm, assert_close
from tests.helpers import finished_checkpoints, small_config
from vnp_lib.checkpoint.manifest import CheckpointManifest
from vnp_lib.dataset import open_dataset
from vnp_lib.model.esm2 import MODELS
from vnp_lib.model.weights import random_tensors, save_weights
from vnp_lib.plan.outputs import OutputKind
from vnp_lib.plan.paths import RunPaths
from vnp_lib.report.verify import verify_run

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("prefect_server")]

SMALLEST = "esm2_t6_8M_UR50D"
ARCHITECTURE = MODELS[SMALLEST]


@pytest.fixture(scope="module")
def oracle() -> FairEsm:
    return FairEsm(ARCHITECTURE, dict(random_tensors(ARCHITECTURE, seed=7)))


@pytest.fixture(scope="module")
def weights_file(tmp_path_factory: pytest.TempPathFactory, oracle: FairEsm) -> Path:
    """Load fair-esm's network as it was saved, with both heads."""
    path = tmp_path_factory.mktemp("weights") / "model.pt"
    save_weights(path, SMALLEST, oracle.state())
    return path


def run_flow(fasta: Path, run_dir: Path, **settings: Any) -> Any:
    runtime = {"checkpoint_seq_threshold": 5}
    config = small_config(
        fasta, run_dir, runtime=runtime, devices="cpu", shards=1, token_budget=300, **settings
    )
    return asyncio.run(embed(config, return_state=True))


KILLED_AT_THE_THIRD = """
if attempt == 1:
    import signal
    from vnp_lib.checkpoint.manifest import CheckpointManifest
    update = CheckpointManifest.update_shard_checkpoint
    def killed_at_the_third(self, rank, batch_idx, *arguments):
        if batch_idx == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return update(self, rank, batch_idx, *arguments)
    CheckpointManifest.update_shard_checkpoint = killed_at_the_third
"""


def test_arrays_of_every_shape_survive_a_kill(tmp_path, sabotage, tiny_fasta, weights_file, oracle):
    """The rows of the killed worker process and of the next one form one dataset."""
    sabotage(KILLED_AT_THE_THIRD)
    outcome = run_flow(
        tiny_fasta,
        tmp_path / "run",
        include=tuple(map(str, OutputKind)),
        repr_layers=(3, -1),
        weights=str(weights_file),
    )
    assert outcome.is_completed(), outcome.message
    [failure] = CheckpointManifest(RunPaths(tmp_path / "run").manifest).failures(0)
    assert "SIGKILL" in failure["message"]
    assert verify_run(tmp_path / "run").is_well

    dataset = open_dataset(tmp_path / "run")
    with dnaio.open(tiny_fasta) as records:
        sequences = {record.name.split()[0]: record.sequence for record in records}
    assert dataset.ids == list(sequences)
    for sequence_id, sequence in sequences.items():
        expected = oracle.outputs(sequence, [3, 6])
        assert dataset[sequence_id].keys() == expected.keys()
        for name, values in dataset[sequence_id].items():
            assert_close(values, expected[name], what=f"{name} of {sequence_id}")

    again = run_flow(tiny_fasta, tmp_path / "run", include=("mean",), weights=str(weights_file))
    assert again.is_failed()
    assert "belongs to another run" in again.message


def test_contacts_without_their_regression_are_refused(tmp_path, tiny_fasta, oracle):
    trunk = {
        name: tensor
        for name, tensor in oracle.state().items()
        if not name.startswith("contact_head.")
    }
    save_weights(tmp_path / "trunk.pt", SMALLEST, trunk)
    outcome = run_flow(
        tiny_fasta, tmp_path / "run", include=("contacts",), weights=str(tmp_path / "trunk.pt")
    )
    assert outcome.is_failed()
    assert "trunk-contact-regression.pt" in outcome.message
    assert not (tmp_path / "run").exists()


def test_a_run_with_windows_in_half_precision(tmp_path, tiny_fasta, weights_file, oracle):
    """The certificate includes windows; the rows are stored in float16."""
    outcome = run_flow(
        tiny_fasta,
        tmp_path / "run",
        long="window",
        max_length=20,
        dtype="bfloat16",
        store_dtype="float16",
        weights=str(weights_file),
    )
    assert outcome.is_completed(), outcome.message
    success = json.loads(RunPaths(tmp_path / "run").success.read_text())
    assert success["identity"]["long_policy"] == "window:20:5"
    assert success["store_dtype"] == "float16"
    assert success["precision"]["num_compared"] == 40
    assert success["precision"]["lowest_cosine"] > 0.999
    with dnaio.open(tiny_fasta) as records:
        short = next(record for record in records if len(record) <= 20)
    found = torch.from_numpy(open_dataset(tmp_path / "run")[short.name.split()[0]])
    expected = torch.from_numpy(np.array(oracle.outputs(short.sequence, [6])["mean_6"]))
    assert torch.nn.functional.cosine_similarity(found, expected, dim=0) > 0.999


def test_a_value_beyond_float16_ends_the_run(tmp_path, tiny_fasta, oracle):
    """With a last norm of a million times the weights; the next run computes nothing."""
    state = oracle.state()
    state["emb_layer_norm_after.weight"] = state["emb_layer_norm_after.weight"] * 1e6
    save_weights(tmp_path / "loud.pt", SMALLEST, state)
    run_dir = tmp_path / "run"
    outcome = run_flow(
        tiny_fasta, run_dir, store_dtype="float16", weights=str(tmp_path / "loud.pt")
    )
    assert outcome.is_failed()
    assert (
        "start the run again with --store-dtype float32: nothing is computed twice"
        in outcome.message
    )
    checkpoints = finished_checkpoints(run_dir)
    assert not RunPaths(run_dir).success.exists()

    outcome = run_flow(
        tiny_fasta, run_dir, store_dtype="float32", weights=str(tmp_path / "loud.pt")
    )
    assert outcome.is_completed(), outcome.message
    assert finished_checkpoints(run_dir) == checkpoints
    assert np.abs(open_dataset(run_dir).to_numpy()[1]).max() > 65_504
