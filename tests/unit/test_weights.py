"""Weights are the right ones or refused, whichever file they come from."""

import hashlib
import socket
import subprocess
import sys
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from urllib.error import URLError

import esm.pretrained
import pytest
import torch
from esm.model.esm2 import ESM2 as FairEsm2

from vnp_lib.esm2 import ESM2, MODELS, Architecture
from vnp_lib.failures import WeightsError
from vnp_lib.weights import Weights, load_model, random_tensors, resolve_weights, save_weights

SMALLEST = "esm2_t6_8M_UR50D"
TINY = Architecture(num_layers=3, embed_dim=48, attention_heads=6)
RANDOM = Weights(source="random", digest="random:seed=0")
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _inference() -> Iterator[None]:
    with torch.inference_mode():
        yield


def test_random_weights_are_the_same_on_every_machine():
    """The digest was taken once; a change of it changes what `random` means."""
    hasher = hashlib.sha256()
    for name, tensor in random_tensors(TINY):
        hasher.update(name.encode() + tensor.numpy().tobytes())
    assert hasher.hexdigest() == "e1035c1e70c54e606a52ad4b45d4ecc0e6c869be30c4af45857ab7319bb446c0"


@pytest.fixture
def weights_file(tmp_path: Path) -> Path:
    path = tmp_path / "weights.pt"
    architecture = MODELS[SMALLEST]
    fair_esm = FairEsm2(architecture.num_layers, architecture.embed_dim, architecture.attention_heads)
    fair_esm.load_state_dict(dict(random_tensors(architecture)), strict=False)
    save_weights(path, SMALLEST, fair_esm.state_dict())
    return path


def test_file_in_fair_esms_format_gives_the_model_it_holds(weights_file):
    weights = resolve_weights(SMALLEST, str(weights_file))
    assert weights.source == "file"
    assert weights.path == weights_file
    assert weights.digest == hashlib.sha256(weights_file.read_bytes()).hexdigest()

    loaded = load_model(SMALLEST, weights, dtype=torch.float32, device=CPU)
    assert not loaded.training
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    expected = ESM2.from_fair_esm(MODELS[SMALLEST], random_tensors(MODELS[SMALLEST])).state_dict()
    assert loaded.state_dict().keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in loaded.state_dict().items())


def test_loaded_model_does_not_change_with_its_file(weights_file):
    loaded = load_model(SMALLEST, resolve_weights(SMALLEST, str(weights_file)), dtype=torch.float32, device=CPU)
    before = loaded.embed_tokens.weight.clone()
    with weights_file.open("r+b") as file:
        file.write(b"\xff" * weights_file.stat().st_size)
    assert torch.equal(loaded.embed_tokens.weight, before)


def test_fair_esm_reads_the_file_that_we_write(weights_file):
    with torch.serialization.safe_globals([Namespace]):
        content = torch.load(weights_file, weights_only=True)
    model, _ = esm.pretrained.load_model_and_alphabet_core(SMALLEST, content)
    for name, tensor in random_tensors(MODELS[SMALLEST]):
        assert torch.equal(model.get_parameter(name), tensor)


def test_weights_are_cast_on_the_way(weights_file):
    loaded = load_model(SMALLEST, resolve_weights(SMALLEST, str(weights_file)), dtype=torch.bfloat16, device=CPU)
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.bfloat16}


def test_file_of_another_size_is_refused(weights_file):
    with pytest.raises(WeightsError, match=r"6 layers of width 320, but esm2_t12_35M_UR50D has 12 of width 480"):
        resolve_weights("esm2_t12_35M_UR50D", str(weights_file))


def test_file_that_lacks_a_parameter_is_refused(tmp_path):
    state = dict(random_tensors(MODELS[SMALLEST]))
    del state["layers.3.fc1.bias"]
    save_weights(tmp_path / "weights.pt", SMALLEST, state)
    with pytest.raises(WeightsError, match=r"1 are missing, unexpected or of another shape \(layers.3.fc1.bias"):
        resolve_weights(SMALLEST, str(tmp_path / "weights.pt"))


def test_file_with_a_parameter_too_many_is_refused(tmp_path):
    state = dict(random_tensors(MODELS[SMALLEST])) | {"layers.3.fc3.bias": torch.zeros(3)}
    save_weights(tmp_path / "weights.pt", SMALLEST, state)
    with pytest.raises(WeightsError, match=r"\(layers.3.fc3.bias is the first\): get the file from https://dl.fbai"):
        resolve_weights(SMALLEST, str(tmp_path / "weights.pt"))


def cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1000])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def not_torch(path: Path) -> None:
    path.write_bytes(b">s1\nMKV\n" * 100)


def no_model_inside(path: Path) -> None:
    torch.save([1, 2], path)


def code_inside(path: Path) -> None:
    torch.save({"model": Path("/")}, path)


@pytest.mark.parametrize("damage", [cut_short, empty, not_torch, no_model_inside, code_inside])
def test_damaged_file_is_refused(weights_file, damage):
    damage(weights_file)
    with pytest.raises(WeightsError, match=r"weights.pt is damaged or no file of fair-esm's .*: remove it and get it"):
        resolve_weights(SMALLEST, str(weights_file))


def test_file_without_parameters_is_refused(tmp_path):
    torch.save({"model": {"x": 1, "embed_tokens.weight": torch.zeros(())}}, tmp_path / "weights.pt")
    with pytest.raises(WeightsError, match="does not hold the parameters"):
        resolve_weights(SMALLEST, str(tmp_path / "weights.pt"))


@pytest.mark.parametrize(("name", "reason"), [("absent.pt", "No such file"), (".", "it is a directory without")])
def test_path_without_a_file_is_refused(tmp_path, name, reason):
    with pytest.raises(WeightsError, match=rf"cannot read the weights at {tmp_path}.*{reason}.*: give the path of"):
        resolve_weights(SMALLEST, str(tmp_path / name))


def test_a_model_is_loaded_without_torchs_compiler():
    """To import that takes seconds, and every child loads a model."""
    code = f"""
import sys, torch
from vnp_lib.weights import load_model, resolve_weights
load_model({SMALLEST!r}, resolve_weights({SMALLEST!r}, "random"), dtype=torch.float32, device=torch.device("cpu"))
print("torch._dynamo" in sys.modules)
"""
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ended.stdout == "False\n"


def test_random_weights_need_no_file():
    assert resolve_weights(SMALLEST, "random") == RANDOM


def test_auto_takes_fair_esms_file_from_the_hub_cache(tmp_path, monkeypatch, weights_file):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    (tmp_path / "hub/checkpoints").mkdir(parents=True)
    cached = weights_file.rename(tmp_path / f"hub/checkpoints/{SMALLEST}.pt")
    assert resolve_weights(SMALLEST, "auto").path == cached


def test_auto_downloads_what_the_cache_has_not(tmp_path, monkeypatch, weights_file):
    """From fair-esm's address, to where fair-esm itself finds it, and never waiting for ever."""
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))

    def download(url, dst, progress):
        assert url == f"https://dl.fbaipublicfiles.com/fair-esm/models/{SMALLEST}.pt"
        assert socket.getdefaulttimeout() == 30
        weights_file.rename(dst)

    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    assert resolve_weights(SMALLEST, "auto").path == tmp_path / f"hub/checkpoints/{SMALLEST}.pt"
    assert socket.getdefaulttimeout() is None


def test_auto_without_network_says_where_to_put_the_file(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))

    def download(url, dst, progress):
        raise URLError("network is unreachable")

    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    with pytest.raises(
        WeightsError, match=rf"not at {tmp_path}/hub/checkpoints/{SMALLEST}.pt .*unreachable.*put the file"
    ):
        resolve_weights(SMALLEST, "auto")
