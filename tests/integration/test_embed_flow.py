"""From FASTA to dataset, compared with fair-esm."""

from __future__ import annotations

import asyncio
import json
import shutil
from contextlib import suppress
from pathlib import Path

import dnaio
import numpy as np
import pytest
import torch
from esm.data import Alphabet
from esm.model.esm2 import ESM2 as FairESM2
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterId
from prefect.results import ResultRecord
from prefect.serializers import PickleSerializer

from flows import embed as embed_module
from flows.embed import embed, embed_one
from flows.results import is_plain_result
from flows.shard_run import embed_shard_run
from tests.helpers import EXAMPLE, assert_same_rows, flip_bit, free_port, scrape, small_config
from vnp_lib.dataset import open_dataset
from vnp_lib.errors import FingerprintMismatchError, RunDirectoryBusyError
from vnp_lib.model.esm2 import MODELS
from vnp_lib.model.weights import random_tensors
from vnp_lib.plan.paths import RunPaths
from vnp_lib.plan.plan import load_plan
from vnp_lib.run.run import Run
from vnp_lib.storage.durable import marker_path
from vnp_lib.storage.locks import FileLock

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("prefect_server")]

MODEL = "esm2_t6_8M_UR50D"


def run_flow(fasta, output_dir, **settings):
    return asyncio.run(embed(small_config(fasta, output_dir, **settings), return_state=True))


def task_states(outcome) -> dict[str, str]:
    """Return name and state of the task runs of a flow run, once the server has all events."""

    async def read():
        of_the_run = FlowRunFilter(id=FlowRunFilterId(any_=[outcome.state_details.flow_run_id]))
        async with get_client() as client, asyncio.timeout(30):
            while True:
                runs = await client.read_task_runs(flow_run_filter=of_the_run)
                if runs and all(run.state and run.state.is_final() for run in runs):
                    return {run.name: run.state_name for run in runs}
                await asyncio.sleep(0.1)

    return asyncio.run(read())


@pytest.fixture(scope="module")
def example_run(tmp_path_factory, prefect_server):
    """Embed the example file once by three shards on one CPU."""
    run_dir = tmp_path_factory.mktemp("example") / "run"
    outcome = run_flow(EXAMPLE, run_dir, shards=3)
    assert outcome.is_completed(), outcome.message
    return run_dir


@pytest.fixture(scope="module")
def whole(tmp_path_factory, prefect_server, tiny_fasta):
    """Embed the tiny input without an interruption."""
    run_dir = tmp_path_factory.mktemp("whole") / "run"
    assert run_flow(tiny_fasta, run_dir).is_completed()
    return run_dir


@pytest.fixture
def finished(whole, tmp_path):
    """Copy `whole`, so that the test can damage and resume it."""
    return Path(shutil.copytree(whole, tmp_path / "run"))


@pytest.fixture(scope="module")
def records():
    with dnaio.open(EXAMPLE) as file:
        return [(record.id, record.sequence) for record in file]


@pytest.fixture(scope="module")
def fair_esm():
    """Load fair-esm's model with the same seeded weights."""
    architecture = MODELS[MODEL]
    model = FairESM2(architecture.num_layers, architecture.embed_dim, architecture.attention_heads)
    incompatible = model.load_state_dict(dict(random_tensors(architecture)), strict=False)
    assert incompatible.unexpected_keys == []
    return model.eval()


def test_every_row_equals_that_of_fair_esm(example_run, records, fair_esm):
    """By its id and by its position."""
    dataset = open_dataset(example_run)
    assert list(dataset.ids) == [sequence_id for sequence_id, _ in records]
    to_tokens = Alphabet.from_architecture("ESM-1b").get_batch_converter()
    last = MODELS[MODEL].num_layers
    for ordinal, (sequence_id, sequence) in enumerate(records):
        with torch.inference_mode():
            states = fair_esm(to_tokens([("", sequence)])[2], repr_layers=[last])[
                "representations"
            ][last]
        expected = states[0, 1:-1].mean(dim=0).numpy()
        np.testing.assert_allclose(
            dataset[sequence_id], expected, atol=1e-4, rtol=0, err_msg=sequence_id
        )
        np.testing.assert_array_equal(dataset.row(ordinal), dataset[sequence_id])


def test_the_success_file_has_the_counts(example_run, records):
    success = json.loads((example_run / "embeddings" / "_SUCCESS.json").read_text())
    assert success["num_sequences"] == len(records)


def test_a_finished_run_computes_nothing(example_run, monkeypatch):
    """The persisted results agree with the checkpoints; another port is the same run."""
    before = (example_run / "embeddings" / "_SUCCESS.json").read_bytes()
    port, pages = free_port(), []
    monkeypatch.setattr(
        "flows.embed.emit_completion", lambda run, summary: pages.append(scrape(port))
    )
    outcome = run_flow(EXAMPLE, example_run, shards=3, metrics_port=port)
    assert outcome.is_completed()
    (page,) = pages
    plan = load_plan(RunPaths(example_run))
    for rank in range(3):
        num_sequences = plan.shard_ordinals(rank).size
        assert page[f"vnp_shard_sequences{{shard={rank}}}"] == num_sequences
        assert page[f"vnp_shard_sequences_done{{shard={rank}}}"] == num_sequences
        assert page[f"vnp_sequences_embedded_total{{shard={rank}}}"] == 0
    assert task_states(outcome) == {
        "shard-000": "Cached",
        "shard-001": "Cached",
        "shard-002": "Cached",
    }
    assert (example_run / "embeddings" / "_SUCCESS.json").read_bytes() == before


class Touch:
    """Creates a file when unpickled."""

    def __init__(self, path):
        self._path = path

    def __reduce__(self):
        return Path.touch, (self._path,)


def pickled(record, canary):
    """Return a result that names pickle as its serializer."""
    return {
        "metadata": record["metadata"] | {"serializer": {"type": "pickle"}},
        "result": PickleSerializer().dumps(Touch(canary)).decode(),
    }


def importing(record, canary):
    """Return a JSON result with an object of a class, whose module Prefect would import."""
    code = f"from pathlib import Path\nPath({str(canary)!r}).touch()\nclass Thing: pass\n"
    Path(canary.parent, "forged_module.py").write_text(code)
    return record | {"result": json.dumps({"__class__": "forged_module.Thing", "data": {}})}


@pytest.mark.parametrize("forge", [pickled, importing])
def test_a_forged_result_is_not_read(finished, tiny_fasta, tmp_path, monkeypatch, forge):
    """Prefect would execute code in it. The checkpoints of the shard are read instead."""
    monkeypatch.syspath_prepend(tmp_path)
    canary = tmp_path / "canary"
    path = min(RunPaths(finished).results_dir.iterdir())
    assert is_plain_result(path)
    forged = json.dumps(forge(json.loads(path.read_bytes()), canary), separators=(",", ":"))

    path.write_text(forged)
    outcome = run_flow(tiny_fasta, finished)

    assert outcome.is_completed()
    assert task_states(outcome) == {"shard-000": "Completed", "shard-001": "Cached"}
    assert not canary.exists()
    assert is_plain_result(path)
    with suppress(Exception):
        ResultRecord.deserialize(forged.encode())
    assert canary.exists(), "a forgery that does nothing shows nothing"


def test_the_flow_of_one_shard_serves_its_metrics(example_run, monkeypatch):
    """On a machine that runs no other shard."""
    port, pages = free_port(), []

    async def scrape_and_embed(*arguments):
        pages.append(scrape(port))
        return await embed_one(*arguments)

    monkeypatch.setattr("flows.shard_run.embed_one", scrape_and_embed)
    plan = load_plan(RunPaths(example_run))
    config = small_config(EXAMPLE, example_run, shards=3, metrics_port=port)
    asyncio.run(embed_shard_run(config, 1, plan.fingerprint))
    (page,) = pages
    num_sequences = plan.shard_ordinals(1).size
    assert {
        sample: count for sample, count in page.items() if sample.startswith("vnp_shard_sequences")
    } == {
        "vnp_shard_sequences{shard=1}": num_sequences,
        "vnp_shard_sequences_done{shard=1}": num_sequences,
    }


def test_a_lost_checkpoint_is_computed_again(finished, tiny_fasta, whole):
    """Even if Prefect has a persisted result of the shard."""
    for path in RunPaths(finished).shard_dir(1).glob("batch_*"):
        path.unlink()
    outcome = run_flow(tiny_fasta, finished)
    assert outcome.is_completed(), outcome.message
    assert task_states(outcome) == {"shard-000": "Cached", "shard-001": "Completed"}
    assert_same_rows(finished, whole)


def test_rows_with_a_flipped_bit_are_computed_again(finished, tiny_fasta, whole):
    """Markers and sizes still match, so the assembly finds it; the same flow run repairs it."""
    paths = RunPaths(finished)
    paths.success.unlink()
    flip_bit(paths.checkpoint(0, 0))
    outcome = run_flow(tiny_fasta, finished)
    assert outcome.is_completed(), outcome.message
    assert_same_rows(finished, whole)


@pytest.mark.parametrize("allow_partial", [False, True])
def test_rows_that_disappear_are_embedded_again(
    finished, tiny_fasta, whole, monkeypatch, allow_partial
):
    """After another read: files of another machine may become visible late, or never."""
    paths = RunPaths(finished)
    paths.success.unlink()
    assemble = embed_module.assemble
    looks = []

    def assemble_late(plan, paths, checkpoints, **options):
        if not looks:
            (lost, *checkpoints) = checkpoints
            lost.path.unlink()
            marker_path(lost.path).unlink()
        return assemble(plan, paths, checkpoints, **options)

    refresh_and_check_complete = Run.refresh_and_check_complete
    monkeypatch.setattr(
        Run,
        "refresh_and_check_complete",
        lambda run: looks.append(refresh_and_check_complete(run)) or looks[-1],
    )
    monkeypatch.setattr(embed_module, "assemble", assemble_late)
    monkeypatch.setattr(embed_module, "LOOKUP_DELAYS_S", (0.0, 0.0))
    outcome = run_flow(tiny_fasta, finished, allow_partial=allow_partial)
    assert outcome.is_completed(), outcome.message
    assert looks == [False, False]
    assert_same_rows(finished, whole)


@pytest.mark.parametrize("settings", [{"shards": 5}, {"shards": 1, "token_budget": 100}])
def test_other_shards_keep_what_is_done(finished, tiny_fasta, settings):
    """With more or fewer shards, or another token budget, no sequence is computed twice."""
    paths = RunPaths(finished)
    paths.success.unlink()
    files = {path: path.stat().st_mtime_ns for path in paths.checkpoints_dir.glob("*/batch_*")}
    outcome = run_flow(tiny_fasta, finished, **settings)
    assert outcome.is_completed(), outcome.message
    assert {
        path: path.stat().st_mtime_ns for path in paths.checkpoints_dir.glob("*/batch_*")
    } == files


def test_a_dataset_without_checkpoints_is_complete(finished, tiny_fasta):
    """As files.md allows: no worker process is started, and no file of the dataset changes."""
    paths = RunPaths(finished)
    shutil.rmtree(paths.checkpoints_dir)
    shutil.rmtree(paths.results_dir)
    before = {path: path.stat().st_mtime_ns for path in paths.embeddings_dir.iterdir()}
    outcome = run_flow(tiny_fasta, finished)
    assert outcome.is_completed(), outcome.message
    assert outcome.message.startswith("40 sequences embedded")
    assert not list(paths.checkpoints_dir.glob("shard_*"))
    assert {path: path.stat().st_mtime_ns for path in paths.embeddings_dir.iterdir()} == before
    assert paths.report.exists()


def test_another_model_is_refused(finished, tmp_path, tiny_fasta):
    before = {
        path: path.read_bytes()
        for path in tmp_path.rglob("*")
        if path.is_file() and path.suffix != ".lock"
    }
    outcome = run_flow(tiny_fasta, finished, dtype="bfloat16")
    assert outcome.is_failed()
    error = (
        outcome.data
        if isinstance(outcome.data, BaseException)
        else asyncio.run(outcome.aresult(False))
    )
    assert isinstance(error, FingerprintMismatchError)
    assert "float32" in str(error)
    assert "bfloat16" in str(error)
    after = {
        path: path.read_bytes()
        for path in tmp_path.rglob("*")
        if path.is_file() and path.suffix != ".lock"
    }
    assert after == before


def test_force_restart_moves_the_old_run(finished, tiny_fasta):
    outcome = run_flow(tiny_fasta, finished, dtype="bfloat16", force_restart=True)
    assert outcome.is_completed(), outcome.message
    assert open_dataset(finished).metadata["identity"]["dtype"] == "bfloat16"
    assert open_dataset(finished / "superseded_1").metadata["identity"]["dtype"] == "float32"


def test_a_directory_in_use_is_refused(tmp_path, tiny_fasta):
    (tmp_path / "run").mkdir()
    lock = FileLock(RunPaths(tmp_path / "run").run_lock, purpose="test")
    with lock.held(timeout_s=1):
        outcome = run_flow(tiny_fasta, tmp_path / "run")
    error = (
        outcome.data
        if isinstance(outcome.data, BaseException)
        else asyncio.run(outcome.aresult(False))
    )
    assert isinstance(error, RunDirectoryBusyError)
    assert "in use" in str(error)


def test_failing_storage_stops_the_run(tmp_path, tiny_fasta):
    """With four damaged checkpoints of five, no attempt is repeated, and no file is moved."""
    settings = {"shards": 1, "token_budget": 250, "runtime": {"checkpoint_seq_threshold": 5}}
    assert run_flow(tiny_fasta, tmp_path / "run", **settings).is_completed()
    paths = RunPaths(tmp_path / "run")
    checkpoints = sorted(paths.shard_dir(0).glob("batch_*.pt"))
    assert len(checkpoints) >= 5
    for path in checkpoints[:4]:
        path.write_bytes(path.read_bytes()[:-1])
    paths.success.unlink()
    outcome = run_flow(tiny_fasta, tmp_path / "run", **settings)
    assert outcome.is_failed()
    assert "the storage is failing" in outcome.message
    assert sorted(paths.shard_dir(0).glob("batch_*.pt")) == checkpoints
