"""Hugging Face's files of ESM-2 equal fair-esm's, or are refused with advice."""

from __future__ import annotations

import hashlib
import importlib
import json
import shutil
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from benchmarks.networks import transformers_network
from tests.helpers import flip_bit
from tests.networks import CPU
from vnp_lib.errors import WeightsError
from vnp_lib.model.esm2 import MODELS
from vnp_lib.model.tokens import RESIDUES, pack_batch
from vnp_lib.model.weights import Weights, load_model, random_tensors, resolve_weights, save_weights

MODEL = "esm2_t6_8M_UR50D"
REVISION = "c731040fcd8d73dceaa04b0a8e6329b345b0f5df"

pytestmark = pytest.mark.usefixtures("inference_mode")


@pytest.fixture(scope="module")
def in_one_file(tmp_path_factory) -> Path:
    """As `hf download --local-dir` makes it."""
    directory = tmp_path_factory.mktemp("hub") / MODEL
    transformers_network(MODELS[MODEL], dict(random_tensors(MODELS[MODEL]))).save_pretrained(
        directory
    )
    return directory


@pytest.fixture(scope="module")
def in_several_files(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("hub") / MODEL
    network = transformers_network(MODELS[MODEL], dict(random_tensors(MODELS[MODEL])))
    network.save_pretrained(directory, max_shard_size="12MB")
    return directory


@pytest.fixture
def cached(tmp_path, in_one_file) -> Path:
    """As the cache of Hugging Face's hub has it: large files by their sha256, and links to them."""
    cached = tmp_path / f"models--facebook--{MODEL}"
    content = (in_one_file / "model.safetensors").read_bytes()
    blob = cached / "blobs" / hashlib.sha256(content).hexdigest()
    snapshot = cached / "snapshots" / REVISION
    for directory in (blob.parent, snapshot, cached / "refs"):
        directory.mkdir(parents=True)
    blob.write_bytes(content)
    (snapshot / "model.safetensors").symlink_to(f"../../blobs/{blob.name}")
    (cached / "refs/main").write_text(REVISION)
    return cached


def parameters_at(path: Path) -> dict[str, torch.Tensor]:
    weights = resolve_weights(MODEL, str(path))
    return load_model(weights, dtype=torch.float32, device=CPU).state_dict()


def assert_are_the_random_ones(parameters: dict[str, torch.Tensor]) -> None:
    random = Weights.random(MODEL)
    expected = load_model(random, dtype=torch.float32, device=CPU).state_dict()
    assert parameters.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in parameters.items())


def test_a_directory_or_its_file_equals_fair_esms_format(tmp_path, in_one_file):
    save_weights(tmp_path / "weights.pt", MODEL, dict(random_tensors(MODELS[MODEL])))
    assert_are_the_random_ones(parameters_at(tmp_path / "weights.pt"))
    assert_are_the_random_ones(parameters_at(in_one_file))
    assert_are_the_random_ones(parameters_at(in_one_file / "model.safetensors"))


def test_several_files_or_their_index_give_the_same_bits(in_several_files):
    assert len(list(in_several_files.glob("*.safetensors"))) > 2
    assert_are_the_random_ones(parameters_at(in_several_files))
    assert_are_the_random_ones(parameters_at(in_several_files / "model.safetensors.index.json"))


def test_a_model_in_the_hubs_cache_is_taken_at_its_main_revision(cached):
    other = cached / "snapshots" / "0000"
    other.mkdir()
    assert_are_the_random_ones(parameters_at(cached))
    assert_are_the_random_ones(parameters_at(cached / "snapshots" / REVISION))
    assert (
        resolve_weights(MODEL, str(cached)).path
        == cached / "snapshots" / REVISION / "model.safetensors"
    )
    shutil.rmtree(cached / "refs")
    with pytest.raises(
        WeightsError, match="holds 2 revisions, and none is main: give the path of one of them"
    ):
        resolve_weights(MODEL, str(cached))
    other.rmdir()
    assert_are_the_random_ones(parameters_at(cached))


@pytest.mark.parametrize("network_class", ["EsmModel", "EsmForMaskedLM"])
def test_every_layer_is_what_transformers_computes_with_the_file(tmp_path, network_class):
    """Their own initial parameters, saved by themselves: no mapping of ours is on their side."""
    torch.manual_seed(3)
    network = getattr(transformers(), network_class)(hugging_face_config()).eval()
    for parameter in network.parameters():
        parameter.add_(
            torch.rand_like(parameter).sub_(0.5).mul_(0.1)
        )  # biases and norms begin as zeros and ones
    network.save_pretrained(tmp_path)

    batch = pack_batch([RESIDUES, "MKTAYIAKQR" * 20], ["every letter", "long"], [0, 1], batch_idx=0)
    weights = resolve_weights(MODEL, str(tmp_path))
    ours = load_model(weights, dtype=torch.float32, device=CPU).forward_packed(
        batch.input_ids, batch.cu_seqlens, batch.max_seqlen, range(7)
    )["representations"]
    sequences = batch.input_ids.split(batch.cu_seqlens.diff().tolist())
    outputs = [
        network(tokens[None], output_hidden_states=True).hidden_states for tokens in sequences
    ]
    for layer in range(7):
        expected = torch.cat([states[layer][0] for states in outputs])
        assert (ours[layer] - expected).abs().max() <= 2e-5 * expected.abs().max(), f"layer {layer}"


def transformers() -> ModuleType:
    """Hugging Face's library. It takes seconds to import: for those who ask for it."""
    return importlib.import_module("transformers")


def hugging_face_config() -> Any:
    """What the config.json of facebook/esm2_t6_8M_UR50D says."""
    return transformers().EsmConfig(
        vocab_size=33,
        mask_token_id=32,
        pad_token_id=1,
        hidden_size=320,
        num_hidden_layers=6,
        num_attention_heads=20,
        intermediate_size=1280,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        max_position_embeddings=1026,
        layer_norm_eps=1e-5,
        position_embedding_type="rotary",
        emb_layer_norm_before=False,
        token_dropout=True,
    )


def as_older_versions_wrote_it(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """As in transformers 4: with an unused table of positions, and frequencies in every layer."""
    old = {
        f"esm.{name}": tensor for name, tensor in tensors.items() if "encoder.layer.*" not in name
    }
    old = {
        name.replace("gamma", "weight").replace("beta", "bias"): tensor
        for name, tensor in old.items()
    }
    old["esm.embeddings.position_ids"] = torch.arange(1026)[None]
    old["esm.embeddings.position_embeddings.weight"] = torch.zeros(1026, 320)
    for layer in range(6):
        old[f"esm.encoder.layer.{layer}.attention.self.rotary_embeddings.inv_freq"] = torch.zeros(8)
    return old


def test_files_of_older_versions_are_read(tmp_path, in_one_file):
    old = as_older_versions_wrote_it(load_file(in_one_file / "model.safetensors"))
    assert "esm.encoder.layer.0.attention.LayerNorm.weight" in old
    save_file(old, tmp_path / "model.safetensors")
    assert_are_the_random_ones(parameters_at(tmp_path))


def test_a_model_with_absolute_positions_is_refused(tmp_path, in_one_file):
    """ESM-1v has the shapes of ESM-2, and would give other vectors."""
    old = as_older_versions_wrote_it(load_file(in_one_file / "model.safetensors"))
    save_file(
        {name: old[name] for name in old if "rotary" not in name}, tmp_path / "model.safetensors"
    )
    with pytest.raises(
        WeightsError, match=r"\(embeddings.position_embeddings.weight is the first\)"
    ):
        resolve_weights(MODEL, str(tmp_path))


def test_file_of_another_size_is_refused(in_one_file):
    with pytest.raises(
        WeightsError, match="6 layers of width 320, but esm2_t12_35M_UR50D has 12 of width 480"
    ):
        resolve_weights("esm2_t12_35M_UR50D", str(in_one_file))


def test_digest_is_that_of_the_file_or_of_the_files_digests(in_one_file, in_several_files):
    content = (in_one_file / "model.safetensors").read_bytes()
    assert resolve_weights(MODEL, str(in_one_file)).digest == hashlib.sha256(content).hexdigest()
    digests = [
        hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(in_several_files.glob("*.safetensors"))
    ]
    expected = hashlib.sha256("".join(digests).encode()).hexdigest()
    assert resolve_weights(MODEL, str(in_several_files)).digest == expected


def test_a_file_that_is_not_what_the_hub_named_it_by_is_refused(cached):
    blob = next((cached / "blobs").iterdir())
    flip_bit(blob)
    with pytest.raises(
        WeightsError,
        match=rf"is damaged: its sha256 is .*, not the one in the name of {blob}; download",
    ):
        resolve_weights(MODEL, str(cached))


def test_a_file_that_is_missing_next_to_its_index_is_named(tmp_path, in_several_files):
    shutil.copytree(in_several_files, tmp_path / "copy")
    sorted((tmp_path / "copy").glob("*.safetensors"))[1].unlink()
    with pytest.raises(
        WeightsError, match=r"1 are not in its directory \(model-00002-of-.*: download them again"
    ):
        resolve_weights(MODEL, str(tmp_path / "copy"))


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        "{}",
        json.dumps({"weight_map": {}}),
        json.dumps({"weight_map": {"x": "../x.safetensors"}}),
    ],
)
def test_an_index_that_names_nothing_or_files_elsewhere_is_refused(tmp_path, content):
    (tmp_path / "model.safetensors.index.json").write_text(content)
    with pytest.raises(
        WeightsError,
        match=r"index.json is damaged or not a file of Hugging Face .*: remove it and get",
    ):
        resolve_weights(MODEL, str(tmp_path))


@pytest.mark.parametrize("kept", [0, 4, 100, -1000])
def test_a_file_that_is_cut_short_is_refused(tmp_path, in_one_file, kept):
    path = tmp_path / "model.safetensors"
    path.write_bytes((in_one_file / "model.safetensors").read_bytes()[:kept])
    with pytest.raises(
        WeightsError,
        match=r"model.safetensors is damaged or not a file of Hugging Face .*: remove it",
    ):
        resolve_weights(MODEL, str(path))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "pytorch_model-00001-of-00002.bin"])
@pytest.mark.parametrize("is_named", [True, False])
def test_pickles_of_hugging_faces_are_not_read(tmp_path, name, is_named):
    path = tmp_path / name
    path.write_bytes(np.zeros(10).tobytes())
    with pytest.raises(
        WeightsError,
        match=rf"{path} is a pickle of Hugging Face, .* use fair-esm's .pt file, or",
    ):
        resolve_weights(MODEL, str(path if is_named else tmp_path))
