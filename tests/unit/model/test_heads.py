"""Contacts and logits are fair-esm's, and cost nothing where nobody asks for them."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import vnp_lib.model.heads
from tests.fair_esm import FairEsm, assert_close
from tests.networks import CPU, SMALLEST
from vnp_lib.errors import WeightsError
from vnp_lib.inference.executor import BatchExecutor, ExactModel
from vnp_lib.inference.token_budget import TokenBudget
from vnp_lib.model.esm2 import ESM2, MODELS
from vnp_lib.model.heads import HeadedModel, check_heads, with_heads
from vnp_lib.model.tokens import RESIDUES, PackedBatch, pack_batch
from vnp_lib.model.weights import Weights, load_model, random_tensors, resolve_weights, save_weights
from vnp_lib.plan.outputs import OutputKind, RowLayout

pytestmark = pytest.mark.usefixtures("inference_mode")

ARCHITECTURE = MODELS[SMALLEST]
LENGTHS = [60, 60, 60, 33, 33, 9, 2, 1, 1]
LAYOUT = RowLayout.of_names(
    ["mean_6", "per_tok_3", "contacts", "logits"], embed_dim=ARCHITECTURE.embed_dim
)
BOTH = (OutputKind.CONTACTS, OutputKind.LOGITS)


def draw(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


@cache
def state() -> dict[str, Tensor]:
    """All parameters of fair-esm, such that contacts are not all near a half."""
    dim, maps = ARCHITECTURE.embed_dim, ARCHITECTURE.num_layers * ARCHITECTURE.attention_heads
    return dict(random_tensors(ARCHITECTURE, seed=7)) | {
        "lm_head.dense.weight": draw((dim, dim), 1) / 10,
        "lm_head.dense.bias": draw((dim,), 2),
        "lm_head.layer_norm.weight": draw((dim,), 3) + 1,
        "lm_head.layer_norm.bias": draw((dim,), 4),
        "lm_head.bias": draw((33,), 5),
        "contact_head.regression.weight": draw((1, maps), 6) * 30,
        "contact_head.regression.bias": draw((1,), 7),
    }


@cache
def expected(sequence: str) -> dict[str, np.ndarray]:
    return FairEsm(ARCHITECTURE, state()).outputs(sequence, [3, 6])


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Weights:
    path = tmp_path_factory.mktemp("weights") / "model.pt"
    save_weights(path, SMALLEST, state())
    return resolve_weights(SMALLEST, str(path))


def proteins(lengths: list[int]) -> list[str]:
    generator = np.random.default_rng(5)
    return ["".join(generator.choice(list(RESIDUES), size=length)) for length in lengths]


def batch_of(sequences: list[str]) -> PackedBatch:
    return pack_batch(
        sequences, [f"s{i}" for i in range(len(sequences))], range(len(sequences)), batch_idx=0
    )


def network_of(weights: Weights, kinds: tuple[OutputKind, ...], dtype: torch.dtype = torch.float32):
    return with_heads(load_model(weights, dtype=dtype, device=CPU), weights, kinds)


def outputs_in(
    rows: Tensor, lengths: list[int], layout: RowLayout = LAYOUT
) -> list[dict[str, np.ndarray]]:
    values = iter(
        np.split(rows.numpy(), np.cumsum([int(np.prod(s)) for s in shapes(lengths, layout)])[:-1])
    )
    return [
        {
            output.name: next(values).reshape(output.shape(length, ARCHITECTURE.embed_dim))
            for output in layout.outputs
        }
        for length in lengths
    ]


def shapes(lengths: list[int], layout: RowLayout) -> list[tuple[int, ...]]:
    return [
        output.shape(length, ARCHITECTURE.embed_dim)
        for length in lengths
        for output in layout.outputs
    ]


@pytest.mark.parametrize("tokens", [10**9, 70], ids=["whole", "in-pieces"])
@pytest.mark.parametrize(
    "map_values", [2**20, 2 * 62**2, 1], ids=["all-maps", "two-maps", "one-map"]
)
def test_contacts_and_logits_equal_fair_esms_per_sequence(weights, monkeypatch, tokens, map_values):
    monkeypatch.setattr(vnp_lib.model.heads, "MAP_VALUES", map_values)
    sequences = proteins(LENGTHS)
    executor = BatchExecutor(
        network_of(weights, BOTH), CPU, budget=TokenBudget(tokens), layout=LAYOUT
    )
    found = outputs_in(executor.collect(executor.launch(batch_of(sequences))).rows, LENGTHS)
    for sequence, outputs in zip(sequences, found, strict=True):
        for name, values in outputs.items():
            assert_close(values, expected(sequence)[name], what=f"{name}, {len(sequence)} residues")


def test_the_contacts_of_these_tests_are_not_all_alike():
    """Else the test above would hold for a head that forgets half of its work."""
    contacts = expected(proteins(LENGTHS)[0])["contacts"]
    assert contacts.min() < 0.2
    assert contacts.max() > 0.8


def test_half_precision_stays_close():
    """The maps are summed up in float32 whatever the network is."""
    weights = Weights.random(SMALLEST)
    batch = batch_of(proteins([100, 12]))
    exact = network_of(weights, BOTH).forward_packed(
        batch.input_ids, batch.cu_seqlens, batch.max_seqlen
    )
    half = network_of(weights, BOTH, torch.bfloat16).forward_packed(
        batch.input_ids, batch.cu_seqlens, batch.max_seqlen
    )
    assert half["contacts"][0].dtype == torch.float32
    for ours, theirs in zip(half["contacts"], exact["contacts"], strict=True):
        assert (ours - theirs).abs().max() < 0.01
    assert (
        torch.nn.functional.cosine_similarity(half["logits"].float(), exact["logits"]).min() > 0.999
    )


def test_a_network_without_heads_stays_as_it_is(weights):
    network = load_model(weights, dtype=torch.float32, device=CPU)
    assert with_heads(network, weights, ()) is network
    assert check_heads(weights, ()) is None
    only_logits = network_of(weights, (OutputKind.LOGITS,))
    assert isinstance(only_logits, HeadedModel)
    batch = batch_of(["MKV"])
    assert only_logits.forward_packed(
        batch.input_ids, batch.cu_seqlens, batch.max_seqlen
    ).keys() == {
        "representations",
        "logits",
    }


def test_the_model_for_exact_rows_has_the_heads_too(weights):
    sequences = proteins([5])
    [found] = outputs_in(ExactModel(weights, layout=LAYOUT)(batch_of(sequences)), [5])
    assert_close(found["contacts"], expected(sequences[0])["contacts"], what="contacts")
    assert_close(found["logits"], expected(sequences[0])["logits"], what="logits")


def without(*prefixes: str) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in state().items() if not name.startswith(prefixes)}


def test_the_contact_regression_is_read_next_to_the_model(tmp_path: Path):
    """It has a digest of its own, since the model's file does not know it."""
    path = tmp_path / "mine.pt"
    save_weights(path, SMALLEST, without("contact_head."))
    regression = {
        name: tensor for name, tensor in state().items() if name.startswith("contact_head.")
    }
    torch.save({"model": regression}, tmp_path / "mine-contact-regression.pt")
    weights = resolve_weights(SMALLEST, str(path))
    batch = batch_of(proteins([9]))
    given = network_of(weights, BOTH).forward_packed(
        batch.input_ids, batch.cu_seqlens, batch.max_seqlen
    )
    assert_close(
        given["contacts"][0].numpy(), expected(proteins([9])[0])["contacts"], what="contacts"
    )

    digest = check_heads(weights, BOTH)
    regression["contact_head.regression.bias"] = torch.ones(1)
    torch.save({"model": regression}, tmp_path / "mine-contact-regression.pt")
    assert resolve_weights(SMALLEST, str(path)) == weights
    assert check_heads(weights, BOTH) not in (digest, None)


def test_weights_without_a_head_are_refused_for_it_alone(tmp_path: Path):
    save_weights(tmp_path / "trunk.pt", SMALLEST, without("contact_head.", "lm_head."))
    weights = resolve_weights(SMALLEST, str(tmp_path / "trunk.pt"))
    with pytest.raises(
        WeightsError,
        match=r"contacts of esm2_t6_8M_UR50D need its contact regression, and .*trunk-contact",
    ):
        check_heads(weights, (OutputKind.CONTACTS,))
    with pytest.raises(
        WeightsError,
        match=r"logits need the head .*trunk.pt does not hold .*\(lm_head.dense.weight is",
    ):
        check_heads(weights, (OutputKind.LOGITS,))
    assert isinstance(network_of(weights, ()), ESM2)


@pytest.mark.parametrize(
    ("name", "head"),
    [
        ("contact_head.regression.bias", OutputKind.CONTACTS),
        ("lm_head.layer_norm.weight", OutputKind.LOGITS),
    ],
)
def test_a_head_that_is_not_finite_is_refused_for_it_alone(
    tmp_path: Path, name: str, head: OutputKind
):
    broken = state() | {name: torch.full_like(state()[name], float("nan"))}
    save_weights(tmp_path / "model.pt", SMALLEST, broken)
    weights = resolve_weights(SMALLEST, str(tmp_path / "model.pt"))
    with pytest.raises(WeightsError, match=f"{name} holds NaN"):
        check_heads(weights, (head,))
    assert isinstance(network_of(weights, ()), ESM2)


def test_random_heads_are_the_same_every_time():
    weights = Weights.random(SMALLEST)
    batch = batch_of(["MKVLWAALLG"])
    one, two = (
        network_of(weights, BOTH).forward_packed(
            batch.input_ids, batch.cu_seqlens, batch.max_seqlen
        )
        for _ in range(2)
    )
    assert torch.equal(one["logits"], two["logits"])
    assert torch.equal(one["contacts"][0], two["contacts"][0])
    assert one["logits"].std() > 0.1
