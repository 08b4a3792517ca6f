"""Weights are the right ones or refused, whichever file they come from."""

import hashlib
import re
import socket
import subprocess
import sys
from argparse import Namespace
from dataclasses import replace
from itertools import chain
from pathlib import Path
from urllib.error import URLError

import esm.pretrained
import pytest
import torch
from safetensors.torch import save_file

from tests.networks import CPU, RANDOM, SMALLEST, TINY
from vnp_lib.errors import WeightsError
from vnp_lib.model.esm2 import ESM2, MODELS
from vnp_lib.model.reference import fair_esm_network
from vnp_lib.model.weight_files import name_in_transformers
from vnp_lib.model.weights import (
    OFFICIAL_DIGESTS,
    OFFICIAL_REGRESSION_DIGESTS,
    Weights,
    is_official,
    load_contact_regression,
    load_model,
    random_tensors,
    resolve_weights,
    save_weights,
)

pytestmark = pytest.mark.usefixtures("inference_mode")


def test_random_weights_are_the_same_on_every_machine():
    """The digest was taken once; a change of it changes what `random` means."""
    hasher = hashlib.sha256()
    for name, tensor in random_tensors(TINY):
        hasher.update(name.encode() + tensor.numpy().tobytes())
    assert hasher.hexdigest() == "e1035c1e70c54e606a52ad4b45d4ecc0e6c869be30c4af45857ab7319bb446c0"


def fair_esm_state() -> dict[str, torch.Tensor]:
    return fair_esm_network(MODELS[SMALLEST], dict(random_tensors(MODELS[SMALLEST]))).state_dict()


@pytest.fixture
def weights_file(tmp_path: Path) -> Path:
    path = tmp_path / "weights.pt"
    save_weights(path, SMALLEST, fair_esm_state())
    return path


def save_random(path: Path, model: str) -> None:
    """As fair-esm or Hugging Face has it, by the suffix."""
    state = dict(random_tensors(MODELS[model]))
    if path.suffix == ".pt":
        save_weights(path, model, state)
    else:
        save_file({name_in_transformers(name): tensor for name, tensor in state.items()}, path)


def test_file_in_fair_esms_format_gives_the_model_it_holds(weights_file):
    weights = resolve_weights(SMALLEST, str(weights_file))
    assert weights.source == "file"
    assert weights.path == weights_file
    assert weights.digest == hashlib.sha256(weights_file.read_bytes()).hexdigest()

    loaded = load_model(weights, dtype=torch.float32, device=CPU)
    assert not loaded.training
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    expected = ESM2.from_fair_esm(MODELS[SMALLEST], random_tensors(MODELS[SMALLEST])).state_dict()
    assert loaded.state_dict().keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in loaded.state_dict().items())


def test_loaded_model_does_not_change_with_its_file(weights_file):
    loaded = load_model(
        resolve_weights(SMALLEST, str(weights_file)), dtype=torch.float32, device=CPU
    )
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
    loaded = load_model(
        resolve_weights(SMALLEST, str(weights_file)), dtype=torch.bfloat16, device=CPU
    )
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize(
    "name", ["embed_tokens.weight", "layers.3.self_attn.q_proj.weight", "layers.5.fc2.bias"]
)
def test_non_finite_weights_are_refused_with_the_parameter(tmp_path, name, value):
    """One value suffices, in the row of one residue: most embeddings would not be finite."""
    state = dict(random_tensors(MODELS[SMALLEST]))
    state[name].view(-1)[-3] = value
    save_weights(tmp_path / "weights.pt", SMALLEST, state)
    weights = resolve_weights(SMALLEST, str(tmp_path / "weights.pt"))
    with pytest.raises(
        WeightsError, match=rf"weights\.pt: the parameter {re.escape(name)} holds NaN or infinity"
    ):
        load_model(weights, dtype=torch.bfloat16, device=CPU)


def test_weights_beyond_half_precision_are_refused_only_in_it(tmp_path):
    state = dict(random_tensors(MODELS[SMALLEST]))
    state["layers.0.fc1.bias"][7] = -70_000
    save_weights(tmp_path / "weights.pt", SMALLEST, state)
    weights = resolve_weights(SMALLEST, str(tmp_path / "weights.pt"))
    with pytest.raises(
        WeightsError,
        match=r"layers\.0\.fc1\.bias holds 70000, and float16 ends at 65504; .* float32",
    ):
        load_model(weights, dtype=torch.float16, device=CPU)
    load_model(weights, dtype=torch.bfloat16, device=CPU)


def test_file_of_another_size_is_refused(weights_file):
    with pytest.raises(
        WeightsError, match=r"6 layers of width 320, but esm2_t12_35M_UR50D has 12 of width 480"
    ):
        resolve_weights("esm2_t12_35M_UR50D", str(weights_file))


def test_file_that_lacks_a_parameter_is_refused(tmp_path):
    state = dict(random_tensors(MODELS[SMALLEST]))
    del state["layers.3.fc1.bias"]
    save_weights(tmp_path / "weights.pt", SMALLEST, state)
    with pytest.raises(
        WeightsError, match=r"1 are missing, unexpected or of another shape \(layers.3.fc1.bias"
    ):
        resolve_weights(SMALLEST, str(tmp_path / "weights.pt"))


def test_file_with_a_parameter_too_many_is_refused(tmp_path):
    state = dict(random_tensors(MODELS[SMALLEST])) | {"layers.3.fc3.bias": torch.zeros(3)}
    save_weights(tmp_path / "weights.pt", SMALLEST, state)
    with pytest.raises(
        WeightsError, match=r"\(layers.3.fc3.bias is the first\): get the file from https://dl.fbai"
    ):
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
    with pytest.raises(
        WeightsError,
        match=r"weights.pt is damaged or not a file of fair-esm .*: remove it and get it",
    ):
        resolve_weights(SMALLEST, str(weights_file))


def test_file_without_parameters_is_refused(tmp_path):
    torch.save({"model": {"x": 1, "embed_tokens.weight": torch.zeros(())}}, tmp_path / "weights.pt")
    with pytest.raises(WeightsError, match="does not hold the parameters"):
        resolve_weights(SMALLEST, str(tmp_path / "weights.pt"))


@pytest.mark.parametrize(
    ("name", "reason"), [("absent.pt", "No such file"), (".", "it is a directory without")]
)
def test_path_without_a_file_is_refused(tmp_path, name, reason):
    with pytest.raises(
        WeightsError, match=rf"cannot read the weights at {tmp_path}.*{reason}.*: give the path of"
    ):
        resolve_weights(SMALLEST, str(tmp_path / name))


def test_a_model_is_loaded_without_torchs_compiler(tmp_path):
    """To import that takes seconds, and every worker process loads a model."""
    paths = [str(tmp_path / f"weights{suffix}") for suffix in (".pt", ".safetensors")]
    for path in paths:
        save_random(Path(path), SMALLEST)
    code = f"""
import sys, torch
from vnp_lib.model.weights import load_model, resolve_weights
for path, dtype in zip({paths!r}, (torch.float32, torch.bfloat16)):
    load_model(resolve_weights({SMALLEST!r}, path), dtype=dtype, device=torch.device("cpu"))
print({{"torch._dynamo", "sympy"}} & {{*sys.modules}})
"""
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ended.stdout == "set()\n"


_PEAK_OF_A_LOAD = """
import sys, threading, torch
from pathlib import Path
from vnp_lib.model.weights import load_model, resolve_weights

def anonymous_bytes():
    lines = Path("/proc/self/status").read_text().splitlines()
    line = next(line for line in lines if line.startswith("RssAnon"))
    return int(line.split()[1]) * 1024

def sample():
    while not is_done.wait(0.001):
        samples.append(anonymous_bytes())

model, path, is_done, samples = *sys.argv[1:], threading.Event(), []
torch.rand(512, 512).to(torch.bfloat16)  # torch's threads and their memory are there before
before = anonymous_bytes()
sampler = threading.Thread(target=sample)
sampler.start()
network = load_model(resolve_weights(model, path), dtype=torch.bfloat16, device=torch.device("cpu"))
is_done.set()
sampler.join()
size = sum(parameter.numel() * parameter.element_size() for parameter in network.parameters())
print((max(samples) - before) / size)
"""


@pytest.mark.slow
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_a_model_takes_its_size_in_memory_once_when_it_is_loaded(tmp_path, suffix):
    """In half precision, from a float32 file, whose mapped pages the system can release."""
    model, path = "esm2_t30_150M_UR50D", tmp_path / f"weights{suffix}"
    save_random(path, model)
    command = [sys.executable, "-c", _PEAK_OF_A_LOAD, model, str(path)]
    ended = subprocess.run(command, capture_output=True, text=True, check=True)
    assert 0.9 < float(ended.stdout) < 1.3


def test_random_weights_need_no_file():
    assert resolve_weights(SMALLEST, "random") == RANDOM


@pytest.fixture
def any_may_be_published(monkeypatch) -> None:
    """Our files are drawn from a seed."""
    monkeypatch.delitem(OFFICIAL_DIGESTS, SMALLEST)
    monkeypatch.delitem(OFFICIAL_REGRESSION_DIGESTS, SMALLEST)


@pytest.fixture
def in_hub_cache(tmp_path, monkeypatch, weights_file, any_may_be_published) -> Path:
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    (tmp_path / "hub/checkpoints").mkdir(parents=True)
    return weights_file.rename(tmp_path / f"hub/checkpoints/{SMALLEST}.pt")


def test_auto_takes_fair_esms_file_from_the_hub_cache(in_hub_cache):
    assert resolve_weights(SMALLEST, "auto").path == in_hub_cache


def test_auto_downloads_what_the_cache_has_not(
    tmp_path, monkeypatch, weights_file, any_may_be_published
):
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
        WeightsError,
        match=rf"not at {tmp_path}/hub/checkpoints/{SMALLEST}.pt .*unreachable.*put the file",
    ):
        resolve_weights(SMALLEST, "auto")


def test_weights_are_official_where_their_digest_is_known(monkeypatch, weights_file):
    found = resolve_weights(SMALLEST, str(weights_file))
    assert is_official(found) is False
    assert is_official(replace(found, model="esm2_t48_15B_UR50D")) is None
    assert is_official(RANDOM) is False
    monkeypatch.setitem(OFFICIAL_DIGESTS, SMALLEST, frozenset({"0" * 64, found.digest}))
    assert is_official(found) is True
    monkeypatch.setitem(OFFICIAL_DIGESTS, SMALLEST, frozenset({"0" * 64}))
    assert is_official(found) is False


def test_a_file_in_the_cache_that_is_not_official_is_refused(in_hub_cache, monkeypatch):
    monkeypatch.setitem(OFFICIAL_DIGESTS, SMALLEST, frozenset({"0" * 64}))
    with pytest.raises(
        WeightsError, match=f"{in_hub_cache} is not the file that fair-esm publishes .*: remove it"
    ):
        resolve_weights(SMALLEST, "auto")
    assert resolve_weights(SMALLEST, str(in_hub_cache)).path == in_hub_cache


def without_contact_head(path: Path) -> None:
    """As fair-esm publishes a model: its contact regression is a file of its own."""
    save_weights(path, SMALLEST, dict(random_tensors(MODELS[SMALLEST])))


def write_contact_regression(path: Path, *, num_heads: int) -> tuple[torch.Tensor, torch.Tensor]:
    weight, bias = torch.rand(1, num_heads), torch.rand(1)
    content = {"contact_head.regression.weight": weight, "contact_head.regression.bias": bias}
    torch.save({"model": content}, path)
    return weight, bias


def test_contact_regression_is_read_as_fair_esm_reads_it(tmp_path):
    path = tmp_path / f"{SMALLEST}.pt"
    without_contact_head(path)
    own_file = tmp_path / f"{SMALLEST}-contact-regression.pt"
    write_contact_regression(own_file, num_heads=120)
    weight, bias = load_contact_regression(resolve_weights(SMALLEST, str(path)))

    with torch.serialization.safe_globals([Namespace]):
        content, regression = (torch.load(file, weights_only=True) for file in (path, own_file))
    rest = {
        name: tensor
        for name, tensor in fair_esm_state().items()
        if name.startswith("lm_head") or "rot_emb" in name
    }
    content["model"] |= {f"encoder.{name}": tensor for name, tensor in rest.items()}
    model, _ = esm.pretrained.load_model_and_alphabet_core(SMALLEST, content, regression)
    assert torch.equal(weight, model.contact_head.regression.weight)
    assert torch.equal(bias, model.contact_head.regression.bias)


def test_contact_regression_is_found_among_hugging_faces_parameters(tmp_path):
    state = {
        name_in_transformers(name): tensor for name, tensor in random_tensors(MODELS[SMALLEST])
    }
    state |= {
        "contact_head.regression.weight": torch.rand(1, 120),
        "contact_head.regression.bias": torch.rand(1),
    }
    save_file(
        {f"esm.{name}": tensor for name, tensor in state.items()}, tmp_path / "model.safetensors"
    )
    weight, bias = load_contact_regression(resolve_weights(SMALLEST, str(tmp_path)))
    assert torch.equal(weight, state["contact_head.regression.weight"])
    assert torch.equal(bias, state["contact_head.regression.bias"])


def test_an_absent_or_other_contact_regression_is_refused(tmp_path):
    path = tmp_path / f"{SMALLEST}.pt"
    without_contact_head(path)
    found = resolve_weights(SMALLEST, str(path))
    own_file = tmp_path / f"{SMALLEST}-contact-regression.pt"
    url = f"https://dl.fbaipublicfiles.com/fair-esm/regression/{SMALLEST}-contact-regression.pt"
    with pytest.raises(WeightsError, match=f"{own_file} does not exist: get it from {url}"):
        load_contact_regression(found)
    write_contact_regression(own_file, num_heads=240)
    with pytest.raises(
        WeightsError, match=f"{own_file} belongs to another model: get it from {url}"
    ):
        load_contact_regression(found)


def test_contact_regression_of_a_downloaded_model_is_downloaded(in_hub_cache, monkeypatch):
    without_contact_head(in_hub_cache)
    written = []

    def download(url, dst, progress):
        assert (
            url
            == f"https://dl.fbaipublicfiles.com/fair-esm/regression/{SMALLEST}-contact-regression.pt"
        )
        assert Path(dst) == in_hub_cache.with_name(f"{SMALLEST}-contact-regression.pt")
        written.extend(write_contact_regression(Path(dst), num_heads=120))

    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    found = resolve_weights(SMALLEST, "auto")
    assert not written
    for _ in range(2):
        assert all(map(torch.equal, load_contact_regression(found), written))
    assert len(written) == 2


def test_an_unpublished_contact_regression_in_the_cache_is_refused(in_hub_cache, monkeypatch):
    without_contact_head(in_hub_cache)
    own_file = in_hub_cache.with_name(f"{SMALLEST}-contact-regression.pt")
    write_contact_regression(own_file, num_heads=120)
    monkeypatch.setitem(OFFICIAL_REGRESSION_DIGESTS, SMALLEST, "0" * 64)
    with pytest.raises(
        WeightsError, match=f"{own_file} is not the file that fair-esm publishes .*: remove it"
    ):
        load_contact_regression(resolve_weights(SMALLEST, "auto"))


def test_every_known_digest_is_of_one_file_alone():
    known = [*OFFICIAL_REGRESSION_DIGESTS.values(), *chain.from_iterable(OFFICIAL_DIGESTS.values())]
    assert len(set(known)) == len(known)
    assert all(re.fullmatch("[0-9a-f]{64}", digest) for digest in known)
    assert OFFICIAL_REGRESSION_DIGESTS.keys() <= OFFICIAL_DIGESTS.keys() <= MODELS.keys()


def test_random_contact_regression_fits_and_is_always_the_same():
    weight, bias = load_contact_regression(Weights.random("esm2_t33_650M_UR50D"))
    assert (weight.shape, bias.shape) == ((1, 33 * 20), (1,))
    assert torch.equal(weight, load_contact_regression(Weights.random("esm2_t33_650M_UR50D"))[0])
