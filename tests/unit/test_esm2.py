"""The network is fair-esm's to the last digits that count, and weights are the right ones or refused."""

import hashlib
import socket
import subprocess
import sys
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from urllib.error import URLError

import esm.pretrained
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from esm.model.esm2 import ESM2 as FairEsm2

from vnp_lib import attention
from vnp_lib.embedder import embed_batch
from vnp_lib.esm2 import (
    ESM2,
    MODELS,
    Architecture,
    Weights,
    architecture_of,
    load_model,
    mean_pool,
    random_tensors,
    resolve_weights,
    save_weights,
)
from vnp_lib.failures import ConfigError, WeightsError
from vnp_lib.tokens import LETTERS, PackedBatch, pack_batch

SMALLEST = "esm2_t6_8M_UR50D"
TINY = Architecture(num_layers=3, embed_dim=48, attention_heads=6)
RANDOM = Weights(source="random", digest="random:seed=0")
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _inference() -> Iterator[None]:
    with torch.inference_mode():
        yield


def fair_esm_model(architecture: Architecture, state: dict[str, torch.Tensor]) -> FairEsm2:
    oracle = FairEsm2(architecture.num_layers, architecture.embed_dim, architecture.attention_heads).eval()
    missing, unexpected = oracle.load_state_dict(state, strict=False)
    assert not unexpected
    assert all(name.startswith(("lm_head.", "contact_head.")) or "rot_emb" in name for name in missing)
    return oracle


def our_model(architecture: Architecture, state: dict[str, torch.Tensor]) -> ESM2:
    return ESM2.from_fair_esm(architecture, state.items())


def random_batch(lengths: list[int]) -> PackedBatch:
    letters = np.random.default_rng(5).choice(list(LETTERS), size=sum(lengths))
    sequences = ["".join(part) for part in np.split(letters, np.cumsum(lengths)[:-1])]
    return pack_batch(sequences, [f"s{i}" for i in range(len(lengths))], range(len(lengths)), batch_idx=0)


def packed_states(network: ESM2, batch: PackedBatch, repr_layers: list[int] | None = None) -> dict[int, torch.Tensor]:
    return network.forward_packed(batch.input_ids, batch.cu_seqlens, batch.max_seqlen, repr_layers)["representations"]


def states_one_by_one(oracle: FairEsm2, batch: PackedBatch, repr_layers: list[int]) -> list[dict[int, torch.Tensor]]:
    sequences = batch.input_ids.split(batch.cu_seqlens.diff().tolist())
    outputs = [oracle(tokens[None], repr_layers=repr_layers)["representations"] for tokens in sequences]
    return [{layer: states[0] for layer, states in output.items()} for output in outputs]


@pytest.mark.parametrize(
    ("architecture", "lengths"),
    [
        pytest.param(MODELS[SMALLEST], [2000, 1022, 1022, 300, 64, 64, 64, 17, 2, 1, 1], id="8M"),
        pytest.param(TINY, [2000, *range(1022, 0, -31), 700, *range(64, 0, -1), 1, 1], id="tiny"),
    ],
)
def test_every_layer_equals_fair_esm_one_sequence_at_a_time(architecture, lengths):
    state = dict(random_tensors(architecture, seed=7))
    layers = list(range(architecture.num_layers + 1))
    batch = random_batch(lengths)
    ours = packed_states(our_model(architecture, state), batch, layers)
    theirs = states_one_by_one(fair_esm_model(architecture, state), batch, layers)

    for layer in layers:
        expected = torch.cat([states[layer] for states in theirs])
        assert (ours[layer] - expected).abs().max() <= 2e-5 * expected.abs().max(), f"layer {layer}"
        means = torch.stack([states[layer][1:-1].mean(dim=0) for states in theirs])
        cosines = F.cosine_similarity(mean_pool(ours[layer], batch.cu_seqlens).double(), means.double())
        assert cosines.min() >= 0.999999, f"layer {layer}"


def test_last_layer_is_the_default_and_layers_do_not_depend_on_each_other():
    network = our_model(TINY, dict(random_tensors(TINY)))
    batch = random_batch([9, 4])
    every = packed_states(network, batch, [0, 1, 2, 3])
    assert packed_states(network, batch).keys() == {3}
    assert torch.equal(packed_states(network, batch)[3], every[3])
    assert torch.equal(packed_states(network, batch, [1])[1], every[1])


@pytest.mark.parametrize("layer", [-1, 4])
def test_layer_that_the_model_has_not_is_refused(layer):
    network = our_model(TINY, dict(random_tensors(TINY)))
    batch = random_batch([3])
    with pytest.raises(ValueError, match="this model has layers 0 to 3"):
        packed_states(network, batch, [layer])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_close_at_length_1022(dtype):
    """Rotary angles made in the weights' precision would be off by whole turns here."""
    batch = random_batch([1022, 5])
    exact = packed_states(load_model(SMALLEST, RANDOM, dtype=torch.float32, device=CPU), batch)[6]
    half = packed_states(load_model(SMALLEST, RANDOM, dtype=dtype, device=CPU), batch)[6]
    assert half.dtype == dtype
    assert F.cosine_similarity(half.float(), exact).min() >= 0.999
    assert F.cosine_similarity(mean_pool(half, batch.cu_seqlens), mean_pool(exact, batch.cu_seqlens)).min() >= 0.9999


def test_mean_leaves_out_bos_and_eos_and_is_taken_in_float32():
    """Ones among huge BOS and EOS states; 300 ones sum to 256 in bfloat16, float32 counts them all."""
    seqlens = torch.tensor([302, 3, 7])
    cu_seqlens = F.pad(seqlens.cumsum(0), (1, 0)).int()
    hidden = torch.ones(312, 4, dtype=torch.bfloat16)
    hidden[cu_seqlens[:-1].long()] = hidden[cu_seqlens[1:].long() - 1] = 1e30
    pooled = mean_pool(hidden, cu_seqlens)
    assert pooled.dtype == torch.float32
    assert torch.equal(pooled, torch.ones(3, 4))


def test_random_weights_are_the_same_on_every_machine():
    """The digest was taken once; a change of it changes what `random` means."""
    hasher = hashlib.sha256()
    for name, tensor in random_tensors(TINY):
        hasher.update(name.encode() + tensor.numpy().tobytes())
    assert hasher.hexdigest() == "e1035c1e70c54e606a52ad4b45d4ecc0e6c869be30c4af45857ab7319bb446c0"


def test_random_weights_keep_deep_networks_sane():
    deep = Architecture(num_layers=48, embed_dim=64, attention_heads=4)
    batch = random_batch([100, 20])
    states = packed_states(our_model(deep, dict(random_tensors(deep))), batch, [0, 24, 47])
    assert all(0.5 < layer.std() < 3 for layer in states.values())


def test_unknown_model_is_refused_with_the_six_names():
    with pytest.raises(ConfigError, match=r"no model 'esm2'; choose one of esm2_t6_8M_UR50D, .*, esm2_t48_15B_UR50D$"):
        architecture_of("esm2")


def test_architectures_are_the_published_ones():
    """The name says the number of layers and, roughly, of parameters."""
    published = {"8M": 8e6, "35M": 35e6, "150M": 150e6, "650M": 650e6, "3B": 2.84e9, "15B": 15.1e9}
    for model, architecture in MODELS.items():
        _, layers, size, _ = model.split("_")
        with torch.device("meta"):
            parameters = sum(parameter.numel() for parameter in ESM2(architecture).parameters())
        assert layers == f"t{architecture.num_layers}"
        assert parameters == pytest.approx(published[size], rel=0.08)
    assert [MODELS[model].head_dim for model in MODELS] == [16, 24, 32, 64, 64, 128]


@pytest.fixture
def weights_file(tmp_path: Path) -> Path:
    path = tmp_path / "weights.pt"
    save_weights(path, SMALLEST, fair_esm_model(MODELS[SMALLEST], dict(random_tensors(MODELS[SMALLEST]))).state_dict())
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


@pytest.mark.parametrize(("name", "reason"), [("absent.pt", "No such file"), (".", "Is a directory")])
def test_path_without_a_file_is_refused(tmp_path, name, reason):
    with pytest.raises(WeightsError, match=f"cannot read the weights at {tmp_path}.*{reason}"):
        resolve_weights(SMALLEST, str(tmp_path / name))


def test_a_model_is_loaded_without_torchs_compiler():
    """To import that takes seconds, and every child loads a model."""
    code = f"""
import sys, torch
from vnp_lib.esm2 import load_model, resolve_weights
load_model({SMALLEST!r}, resolve_weights({SMALLEST!r}, "random"), dtype=torch.float32, device=torch.device("cpu"))
print("torch._dynamo" in sys.modules)
"""
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ended.stdout == "False\n"


def test_all_layers_are_one_graph_whatever_the_batch(monkeypatch):
    """Where a kernel takes the boundaries as they are: else torch's compiler would begin anew at each batch."""

    def kernel(q, k, v, cu_seq_q, cu_seq_k, max_q, max_k):
        heads_first = (x.transpose(0, 1) for x in (q, k, v))
        return F.scaled_dot_product_attention(*heads_first).transpose(0, 1)

    monkeypatch.setattr(attention, "_varlen_kernel", lambda: kernel)
    monkeypatch.setattr(attention, "_has_varlen_kernel", lambda device, dtype: True)
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph

    network = our_model(TINY, dict(random_tensors(TINY)))
    batches = [random_batch(lengths) for lengths in ([40, 30, 9], [39, 28, 7, 5], [38, 2])]
    expected = [embed_batch(network, batch) for batch in batches]
    for layer in network.layers:
        layer.compile(dynamic=True, fullgraph=True, backend=count)
    for batch, rows in zip(batches, expected, strict=True):
        torch.testing.assert_close(embed_batch(network, batch), rows, rtol=0, atol=1e-5)
    assert len(graphs) == 1


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
