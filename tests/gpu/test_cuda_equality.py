"""Rows on a GPU equal fair-esm's within each precision. Run with `pytest -m gpu tests/gpu`.

Needed there: torch, numpy, pyarrow, pytest and fair-esm. Weights are random and seeded.
"""

from __future__ import annotations

import random

import pytest
import torch
import torch.nn.functional as F
from esm.model.esm2 import ESM2 as FairEsm2

from vnp_lib.inference.executor import BatchExecutor
from vnp_lib.inference.token_budget import TokenBudget
from vnp_lib.model import attention
from vnp_lib.model.esm2 import MODELS
from vnp_lib.model.tokens import PackedBatch, pack_batch
from vnp_lib.model.weights import Weights, load_model, random_tensors

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU"),
]

CUDA = torch.device("cuda")
LENGTHS = [2000, 1536, 1022, 1022, 777, 512, 257, 256, 255, 200, 129, 128, 100, 64, 50]
MODEL_NAMES = ["esm2_t6_8M_UR50D", "esm2_t33_650M_UR50D"]


@pytest.fixture(autouse=True)
def _inference():
    with torch.inference_mode():
        yield


@pytest.fixture(scope="module")
def batch() -> PackedBatch:
    draw = random.Random(3)
    sequences = ["".join(draw.choices("LAGVSERTIDPKQNFYMHWC", k=length)) for length in LENGTHS]
    return pack_batch(
        sequences, [f"s{length}" for length in LENGTHS], range(len(LENGTHS)), batch_idx=0
    )


@pytest.fixture(scope="module", params=MODEL_NAMES)
def model_and_oracle(request, batch) -> tuple[str, torch.Tensor]:
    """Return a model's name, and fair-esm's means in float32 on the same GPU."""
    architecture = MODELS[request.param]
    oracle = (
        FairEsm2(architecture.num_layers, architecture.embed_dim, architecture.attention_heads)
        .eval()
        .to(CUDA)
    )
    _, unexpected = oracle.load_state_dict(dict(random_tensors(architecture)), strict=False)
    assert not unexpected
    last = architecture.num_layers
    with torch.inference_mode():
        sequences = batch.input_ids.to(CUDA).split(batch.cu_seqlens.diff().tolist())
        states = [
            oracle(tokens[None], repr_layers=[last])["representations"][last][0]
            for tokens in sequences
        ]
        return request.param, torch.stack([each[1:-1].mean(0) for each in states]).cpu()


def rows_of(model_name: str, dtype: torch.dtype, batch: PackedBatch) -> torch.Tensor:
    model = load_model(Weights.random(model_name), dtype=dtype, device=CUDA)
    executor = BatchExecutor(model, CUDA, budget=TokenBudget())
    embedded = executor.collect(executor.launch(batch))
    assert embedded.batch is batch
    return embedded.rows


@pytest.mark.parametrize(
    ("dtype", "least_cosine"),
    [(torch.float32, 0.9999999), (torch.float16, 0.99999), (torch.bfloat16, 0.9999)],
)
def test_packed_rows_are_fair_esms(model_and_oracle, batch, dtype, least_cosine):
    name, expected = model_and_oracle
    rows = rows_of(name, dtype, batch)
    assert rows.dtype == torch.float32
    assert F.cosine_similarity(rows.double(), expected.double()).min() >= least_cosine
    if dtype == torch.float32:
        assert (rows - expected).abs().max() <= 2e-5 * expected.abs().max()


def test_rows_do_not_depend_on_their_neighbours(batch):
    """Packed together and alone; each row is its own sequence's."""
    together = rows_of(MODEL_NAMES[0], torch.bfloat16, batch)
    for row, piece in enumerate(batch.split(1)):
        alone = rows_of(MODEL_NAMES[0], torch.bfloat16, piece)
        assert (
            F.cosine_similarity(alone.double(), together[row : row + 1].double()).item() >= 0.9999
        )


def test_without_the_varlen_kernel_rows_are_the_same(monkeypatch, batch):
    """SDPA stands in for it where a build of torch or a GPU has none."""
    with_kernel = rows_of(MODEL_NAMES[0], torch.bfloat16, batch)
    monkeypatch.setattr(attention, "_has_varlen_kernel", lambda device, dtype: False)
    without = rows_of(MODEL_NAMES[0], torch.bfloat16, batch)
    assert F.cosine_similarity(with_kernel.double(), without.double()).min() >= 0.9999


def test_a_batch_beyond_memory_is_computed_in_pieces(batch):
    """Real memory, made scarce: the rows are those of the whole batch."""
    whole = rows_of(MODEL_NAMES[1], torch.bfloat16, batch)
    model = load_model(Weights.random(MODEL_NAMES[1]), dtype=torch.bfloat16, device=CUDA)
    executor = BatchExecutor(model, CUDA, budget=(budget := TokenBudget()))
    torch.cuda.empty_cache()
    spare_bytes = (
        150 * 1024**2
    )  # the whole batch takes 200, its longest sequence 50 and what the allocator rounds up
    torch.cuda.set_per_process_memory_fraction(
        (torch.cuda.memory_reserved() + spare_bytes)
        / torch.cuda.get_device_properties(CUDA).total_memory
    )
    try:
        embedded = executor.collect(executor.launch(batch))
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert budget.tokens < batch.num_tokens
    assert embedded.batch is batch
    assert F.cosine_similarity(embedded.rows.double(), whole.double()).min() >= 0.9999
