"""A run in half precision reports its difference from float32, compared with a float32 run."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import numpy as np
import pytest

from flows.embed import embed
from tests.helpers import embed_alone, small_config
from tests.poison import Way, patch, write_proteins
from vnp_lib.checkpoint.manifest import CheckpointManifest
from vnp_lib.checkpoint.quarantine import Quarantine
from vnp_lib.dataset import open_dataset
from vnp_lib.plan.paths import RunPaths
from vnp_lib.plan.plan import load_plan
from vnp_lib.report.status import open_status

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("prefect_server")]

WORSE_THAN_HALF_PRECISION = """
import torch
from vnp_lib.model.esm2 import ESM2

def forward_packed(self, *arguments):
    output = original(self, *arguments)
    for states in output["representations"].values():
        if states.dtype == torch.bfloat16:
            states[:, 0] += 3.0
    return output

original, ESM2.forward_packed = ESM2.forward_packed, forward_packed
"""

KILLED_AFTER_A_CHECKPOINT = """
import torch
from vnp_lib.model.esm2 import ESM2

passes = 0

def forward_packed(self, *arguments):
    global passes
    passes += self.embed_tokens.weight.dtype == torch.bfloat16
    if attempt == 1 and passes == 3:
        # For the checkpoint of the first two batches.
        time.sleep(1.0)
        os.kill(os.getpid(), 9)
    return original(self, *arguments)

import time
original, ESM2.forward_packed = ESM2.forward_packed, forward_packed
"""


def run_flow(fasta: Path, run_dir: Path, **settings):
    quick = {"spot_retry_poll_interval": 0.01, "checkpoint_seq_threshold": 5}
    config = small_config(
        fasta, run_dir, **{"dtype": "bfloat16", "runtime": quick, "token_budget": 300} | settings
    )
    return asyncio.run(embed(config, return_state=True))


def precision(run_dir: Path) -> dict:
    return json.loads(RunPaths(run_dir).success.read_text())["precision"]


@pytest.fixture(scope="module")
def exact(tmp_path_factory, tiny_fasta) -> Path:
    return embed_alone(tiny_fasta, tmp_path_factory.mktemp("exact") / "run")


def test_the_certificate_is_what_a_float32_run_shows(tmp_path, sabotage, tiny_fasta, exact):
    """Even after a kill: what the worker process has compared is in its checkpoints."""
    sabotage(KILLED_AFTER_A_CHECKPOINT)
    outcome = run_flow(tiny_fasta, tmp_path / "run")
    assert outcome.is_completed(), outcome.message
    causes = [
        each["cause"]
        for rank in (0, 1)
        for each in CheckpointManifest(RunPaths(tmp_path / "run").manifest).failures(rank)
    ]
    assert causes == ["killed", "killed"]
    ours, theirs = open_dataset(tmp_path / "run"), open_dataset(exact)
    pairs = [(ours[each].astype(float), theirs[each].astype(float)) for each in theirs.ids]
    cosines = [a @ b / np.linalg.norm(a) / np.linalg.norm(b) for a, b in pairs]
    certificate = precision(tmp_path / "run")
    assert certificate["num_compared"] == len(theirs) == 40
    assert certificate["lowest_cosine"] == pytest.approx(min(cosines), abs=1e-9)
    assert certificate["max_abs_difference"] == pytest.approx(
        max(abs(a - b).max() for a, b in pairs), rel=1e-3
    )
    assert 0.999 < certificate["lowest_cosine"] < 1.0
    assert precision(exact) is None
    shown = f"cosine at least {certificate['lowest_cosine']:.6f}"
    assert shown in open_status(tmp_path / "run")().dataset
    assert shown in RunPaths(tmp_path / "run").report.read_text()


def test_low_precision_is_reported(tmp_path, sabotage, tiny_fasta, caplog):
    sabotage(WORSE_THAN_HALF_PRECISION)
    assert run_flow(tiny_fasta, tmp_path / "run", devices="cpu", shards=1).is_completed()
    assert precision(tmp_path / "run")["lowest_cosine"] < 0.999
    assert "that is low for half precision; use --dtype float32 for exact embeddings" in caplog.text


@pytest.mark.soak
def test_the_comparison_changes_no_result(tmp_path, sabotage):
    """A protein without a finite row in float32 is quarantined; all others have rows."""
    write_proteins(
        tmp_path / "in.fasta", 24, {4: Way.EXIT, 9: Way.EXCEPTION, 17: Way.NAN, 20: Way.TOO_LARGE}
    )
    sabotage(patch(Way.EXIT, Way.EXCEPTION, Way.NAN))
    outcome = run_flow(tmp_path / "in.fasta", tmp_path / "run")
    assert outcome.is_completed(), outcome.message
    paths = RunPaths(tmp_path / "run")
    held = Quarantine.of(load_plan(paths), paths).read()
    assert sorted(each.id for each in held) == ["exception_9", "exit_4", "nan_17"]
    assert precision(tmp_path / "run")["num_compared"] == len(open_dataset(tmp_path / "run")) == 21
