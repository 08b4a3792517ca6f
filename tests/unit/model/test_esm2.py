"""The network is fair-esm's to the last digits that count."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.networks import CPU, RANDOM, SMALLEST, TINY
from vnp_lib.errors import ConfigError
from vnp_lib.inference.executor import embed_batch
from vnp_lib.model import attention
from vnp_lib.model.esm2 import ESM2, MODELS, Architecture, architecture_of
from vnp_lib.model.pooling import mean_pool
from vnp_lib.model.reference import fair_esm_network
from vnp_lib.model.tokens import RESIDUES, PackedBatch, pack_batch
from vnp_lib.model.weights import load_model, random_tensors

pytestmark = pytest.mark.usefixtures("inference_mode")


def our_model(architecture: Architecture, state: dict[str, torch.Tensor]) -> ESM2:
    return ESM2.from_fair_esm(architecture, state.items())


def random_batch(lengths: list[int]) -> PackedBatch:
    residues = np.random.default_rng(5).choice(list(RESIDUES), size=sum(lengths))
    sequences = ["".join(part) for part in np.split(residues, np.cumsum(lengths)[:-1])]
    return pack_batch(
        sequences, [f"s{i}" for i in range(len(lengths))], range(len(lengths)), batch_idx=0
    )


def packed_states(
    network: ESM2, batch: PackedBatch, repr_layers: list[int] | None = None
) -> dict[int, torch.Tensor]:
    return network.forward_packed(batch.input_ids, batch.cu_seqlens, batch.max_seqlen, repr_layers)[
        "representations"
    ]


def states_one_by_one(
    oracle: nn.Module, batch: PackedBatch, repr_layers: list[int]
) -> list[dict[int, torch.Tensor]]:
    sequences = batch.input_ids.split(batch.cu_seqlens.diff().tolist())
    outputs = [
        oracle(tokens[None], repr_layers=repr_layers)["representations"] for tokens in sequences
    ]
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
    theirs = states_one_by_one(fair_esm_network(architecture, state), batch, layers)

    for layer in layers:
        expected = torch.cat([states[layer] for states in theirs])
        assert (ours[layer] - expected).abs().max() <= 2e-5 * expected.abs().max(), f"layer {layer}"
        means = torch.stack([states[layer][1:-1].mean(dim=0) for states in theirs])
        cosines = F.cosine_similarity(
            mean_pool(ours[layer], batch.cu_seqlens).double(), means.double()
        )
        assert cosines.min() >= 0.999999, f"layer {layer}"


def test_one_thread_equals_fair_esm_too():
    """Its attention is another: `cpu_attention`."""
    state = dict(random_tensors(MODELS[SMALLEST], seed=7))
    batch = random_batch([400, 256, 102, 102, 48, 20])
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        ours = packed_states(our_model(MODELS[SMALLEST], state), batch, [6])[6]
    finally:
        torch.set_num_threads(before)
    theirs = states_one_by_one(fair_esm_network(MODELS[SMALLEST], state), batch, [6])
    expected = torch.cat([states[6] for states in theirs])
    assert (ours - expected).abs().max() <= 2e-5 * expected.abs().max()


def test_the_last_layer_is_the_default_and_layers_are_independent():
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
    exact = packed_states(load_model(RANDOM, dtype=torch.float32, device=CPU), batch)[6]
    half = packed_states(load_model(RANDOM, dtype=dtype, device=CPU), batch)[6]
    assert half.dtype == dtype
    assert F.cosine_similarity(half.float(), exact).min() >= 0.999
    assert (
        F.cosine_similarity(
            mean_pool(half, batch.cu_seqlens), mean_pool(exact, batch.cu_seqlens)
        ).min()
        >= 0.9999
    )


def test_mean_leaves_out_bos_and_eos_and_is_taken_in_float32():
    """Ones among huge BOS and EOS states: 300 ones sum to 256 in bfloat16, to 300 in float32."""
    seqlens = torch.tensor([302, 3, 7])
    cu_seqlens = F.pad(seqlens.cumsum(0), (1, 0)).int()
    hidden = torch.ones(312, 4, dtype=torch.bfloat16)
    hidden[cu_seqlens[:-1].long()] = hidden[cu_seqlens[1:].long() - 1] = 1e30
    pooled = mean_pool(hidden, cu_seqlens)
    assert pooled.dtype == torch.float32
    assert torch.equal(pooled, torch.ones(3, 4))


def test_random_weights_keep_deep_networks_sane():
    deep = Architecture(num_layers=48, embed_dim=64, attention_heads=4)
    batch = random_batch([100, 20])
    states = packed_states(our_model(deep, dict(random_tensors(deep))), batch, [0, 24, 47])
    assert all(0.5 < layer.std() < 3 for layer in states.values())


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"layers.1.fc1.bias": None}, "there are no parameters layers.1.fc1.bias"),
        ({"layers.1.fc3.bias": torch.zeros(48)}, r"layers.1.fc3.bias, \(48,\), does not fit"),
        (
            {"layers.1.fc1.bias": torch.zeros(1)},
            r"layers.1.fc1.bias, \(1,\), does not fit",
        ),  # it would be copied to all 192
    ],
)
def test_parameters_that_are_not_the_networks_are_refused(change, said):
    state = {
        name: tensor
        for name, tensor in (dict(random_tensors(TINY)) | change).items()
        if tensor is not None
    }
    with pytest.raises(ValueError, match=said):
        our_model(TINY, state)


def test_unknown_model_is_refused_with_the_six_names():
    with pytest.raises(
        ConfigError,
        match=r"no model 'esm2'; choose one of esm2_t6_8M_UR50D, .*, esm2_t48_15B_UR50D$",
    ):
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


def test_all_layers_are_one_graph_whatever_the_batch(monkeypatch):
    """If a kernel takes the boundaries; otherwise torch would compile again for each batch."""

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
