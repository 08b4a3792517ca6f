"""Launching a batch does not wait for the GPU. Run with `pytest -m gpu tests/gpu`."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F

from vnp_lib.inference.executor import BatchExecutor
from vnp_lib.inference.token_budget import TokenBudget
from vnp_lib.model.tokens import PackedBatch, pack_batch
from vnp_lib.model.weights import Weights, load_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU"),
]

CUDA = torch.device("cuda")
ONE_SECOND = 2 * 10**9  # cycles, or a little more


@pytest.fixture(scope="module")
def batch() -> PackedBatch:
    sequences = ["MKVLAT" * repeats for repeats in (100, 60, 60, 7)]
    return pack_batch(sequences, list("abcd"), range(4), batch_idx=0)


@pytest.fixture(scope="module")
def executor(batch: PackedBatch) -> BatchExecutor:
    """One that has had such a batch: tables are on the GPU, and memory has been taken."""
    weights = Weights.random("esm2_t6_8M_UR50D")
    model = load_model(weights, dtype=torch.bfloat16, device=CUDA)
    executor = BatchExecutor(model, CUDA, budget=TokenBudget())
    executor.collect(executor.launch(batch))
    return executor


@pytest.fixture
def synchronising_is_an_error() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    yield
    torch.cuda.set_sync_debug_mode("default")


def test_nothing_on_the_way_to_the_gpu_synchronises(executor, batch, synchronising_is_an_error):
    executor.launch(batch)


def test_a_batch_is_launched_while_the_gpu_is_at_other_work(executor, batch):
    """And its rows are right all the same: each copy keeps its place in the stream."""
    expected = executor.collect(executor.launch(batch)).rows
    torch.cuda._sleep(ONE_SECOND)
    woken = torch.cuda.Event()
    woken.record()
    launched = [executor.launch(batch) for _ in range(3)]
    assert not woken.query()
    for one in launched:
        rows = executor.collect(one).rows
        assert F.cosine_similarity(rows.double(), expected.double()).min() >= 0.99999
