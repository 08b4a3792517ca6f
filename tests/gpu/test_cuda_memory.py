"""A GPU holds as many tokens as we reckon. `pytest -m gpu tests/gpu` runs this on one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import torch

pytest.importorskip("pydantic_settings")
pytest.importorskip("pynvml")

from vnp_lib.devices import free_gpu_bytes
from vnp_lib.environment import visible_gpu
from vnp_lib.inference.executor import BatchExecutor
from vnp_lib.inference.gpu_memory import choose_token_budget, pass_bytes, tokens_that_fit
from vnp_lib.inference.token_budget import TokenBudget
from vnp_lib.model.esm2 import MODELS, Architecture
from vnp_lib.model.tokens import PackedBatch, pack_batch
from vnp_lib.model.weights import Weights, load_model
from vnp_lib.plan.outputs import RowLayout

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU"),
]

CUDA = torch.device("cuda")
M8, M650 = "esm2_t6_8M_UR50D", "esm2_t33_650M_UR50D"
SHARE_FOR_THEM = 0.8  # of memory, the rest being for what the allocator cannot use


def batch_of(num_tokens: int, seqlen: int) -> PackedBatch:
    count = num_tokens // seqlen
    return pack_batch(
        ["A" * (seqlen - 2)] * count, list(map(str, range(count))), range(count), batch_idx=0
    )


def embed_whole(model_name: str, dtype: torch.dtype) -> BatchExecutor:
    """Return an executor that splits no batch, after one batch for CUDA's libraries."""
    model = load_model(Weights.random(model_name), dtype=dtype, device=CUDA)
    executor = BatchExecutor(model, CUDA, budget=TokenBudget(is_pinned=True))
    executor.collect(executor.launch(batch_of(128, 64)))
    return executor


@contextmanager
def spare_memory(num_bytes: int) -> Iterator[None]:
    """Let torch have only so much more than it has."""
    torch.cuda.empty_cache()
    most = torch.cuda.memory_reserved() + num_bytes
    torch.cuda.set_per_process_memory_fraction(
        most / torch.cuda.get_device_properties(CUDA).total_memory
    )
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def means_of(architecture: Architecture) -> RowLayout:
    return RowLayout.of_names([f"mean_{architecture.num_layers}"], embed_dim=architecture.embed_dim)


def test_nvml_tells_what_cuda_tells():
    free_bytes = free_gpu_bytes(visible_gpu("0"))
    assert free_bytes == pytest.approx(torch.cuda.mem_get_info()[0], abs=2**30)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("model_name", [M8, M650])
def test_a_token_takes_what_is_reckoned(model_name, dtype):
    executor, batch = embed_whole(model_name, dtype), batch_of(16_384, 256)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    executor.collect(executor.launch(batch))
    taken = torch.cuda.max_memory_allocated() - before
    architecture, seqlens = MODELS[model_name], np.diff(batch.cu_seqlens.numpy())
    reckoned = pass_bytes(architecture, dtype, means_of(architecture), seqlens)
    print(f"{model_name} {dtype}: {taken / reckoned:.3f} of what is reckoned")
    assert 0.8 <= taken / reckoned <= 1 / SHARE_FOR_THEM


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_as_many_tokens_as_are_said_to_fit_do(dtype):
    """Batches of many shapes fit in a GiB next to the weights and CUDA's libraries."""
    architecture, spare_bytes = MODELS[M650], 2**30
    executor = embed_whole(M650, dtype)
    weight_bytes = architecture.num_parameters * dtype.itemsize
    free_bytes = weight_bytes + 2**30 + spare_bytes
    tokens = tokens_that_fit(architecture, dtype, free_bytes, means_of(architecture))
    assert tokens >= 8192
    with spare_memory(spare_bytes):
        for seqlen, fill in ((1024, 1.0), (700, 0.97), (256, 1.0), (130, 0.99), (33, 1.0)):
            executor.collect(executor.launch(batch_of(int(fill * tokens), seqlen)))


def test_the_budget_of_this_gpu_fits_into_it():
    tokens = choose_token_budget(M650, torch.bfloat16, ["0"], means_of(MODELS[M650]))
    executor = embed_whole(M650, torch.bfloat16)
    executor.collect(executor.launch(batch_of(tokens, 512)))
