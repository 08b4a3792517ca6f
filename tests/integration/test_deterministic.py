"""`--deterministic`: the same bytes, however often the run is killed."""

from __future__ import annotations

import asyncio
import json
import re
from pathlib import Path

import pytest

from flows.embed import embed
from tests.helpers import small_config
from vnp_lib.checkpoint.manifest import CheckpointManifest
from vnp_lib.errors import FingerprintMismatchError
from vnp_lib.plan.paths import RunPaths

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("prefect_server")]

KILL_DURING_RUN = """
from vnp_lib.model.esm2 import ESM2

passes = 0

def forward_packed(self, *arguments):
    global passes
    passes += 1
    if passes == 2 and attempt == 1:
        os.kill(os.getpid(), 9)
    return original(self, *arguments)

original, ESM2.forward_packed = ESM2.forward_packed, forward_packed
"""


def run_flow(fasta: Path, run_dir: Path, **settings):
    runtime = {"checkpoint_seq_threshold": 2}
    config = small_config(
        fasta, run_dir, token_budget=200, deterministic=True, runtime=runtime, **settings
    )
    return asyncio.run(embed(config, return_state=True))


def digests(run_dir: Path) -> list[str]:
    return [part["sha256"] for part in json.loads(RunPaths(run_dir).success.read_text())["parts"]]


@pytest.fixture(scope="module")
def whole(tmp_path_factory, prefect_server, tiny_fasta) -> Path:
    run_dir = tmp_path_factory.mktemp("whole") / "run"
    assert run_flow(tiny_fasta, run_dir).is_completed()
    return run_dir


def test_a_run_that_is_killed_gives_the_same_bytes(tmp_path, sabotage, tiny_fasta, whole):
    """Even on one device instead of two: the shards stay, and each worker process has one core."""
    sabotage(KILL_DURING_RUN)
    outcome = run_flow(tiny_fasta, tmp_path / "killed", devices="cpu")
    assert outcome.is_completed(), outcome.message
    manifest = CheckpointManifest(RunPaths(tmp_path / "killed").manifest)
    assert [len(manifest.failures(rank)) for rank in (0, 1)] == [1, 1]
    assert digests(tmp_path / "killed") == digests(whole)


def test_another_number_of_shards_is_refused(tiny_fasta, whole):
    before = digests(whole)
    outcome = run_flow(tiny_fasta, whole, shards=3)
    error = asyncio.run(outcome.aresult(raise_on_failure=False))
    assert isinstance(error, FingerprintMismatchError)
    assert re.search(
        "'2 shards, 200 tokens .*torch .*' there and '3 shards, 200 tokens .*torch .*' here",
        str(error),
    )
    assert digests(whole) == before
