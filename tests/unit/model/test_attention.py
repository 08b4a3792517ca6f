"""Tokens attend to their own sequence, from positions that count exactly."""

import sys
from types import SimpleNamespace

import pytest
import torch
from esm.rotary_embedding import RotaryEmbedding

from vnp_lib.model import attention
from vnp_lib.model.attention import (
    PackedLayout,
    pairs_adjacent,
    rotary_factors,
    rotate,
    varlen_attention,
)

HEADS, HEAD_DIM = 3, 8


def layout_of(seqlens: list[int], dtype: torch.dtype = torch.float32) -> PackedLayout:
    cu_seqlens = torch.tensor([0, *seqlens]).cumsum(0, dtype=torch.int32)
    return PackedLayout.of(cu_seqlens, max(seqlens), dtype)


def random_states(num_tokens: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(num_tokens, HEADS, HEAD_DIM, generator=generator) for _ in range(3)]


def attention_by_the_book(q, k, v, seqlens):
    pieces = []
    for one_q, one_k, one_v in zip(*(x.double().split(seqlens) for x in (q, k, v)), strict=True):
        scores = torch.einsum("qhd,khd->hqk", one_q, one_k) / HEAD_DIM**0.5
        pieces.append(torch.einsum("hqk,khd->qhd", scores.softmax(-1), one_v))
    return torch.cat(pieces).float()


@pytest.mark.parametrize("seqlens", [[1], [40], [9, 9, 9], [31, 7, 7, 3, 1, 1], [2, 50, 2]])
def test_packed_attention_is_attention_of_each_sequence_alone(seqlens):
    q, k, v = random_states(sum(seqlens))
    attended = varlen_attention(q, k, v, layout_of(seqlens))
    torch.testing.assert_close(attended, attention_by_the_book(q, k, v, seqlens), rtol=0, atol=2e-6)


def test_neighbours_of_equal_length_share_one_call():
    assert layout_of([31, 7, 7, 3, 3, 3]).runs == ((1, 31), (2, 7), (3, 3))


def test_varlen_kernel_is_for_cuda_half_precision_alone():
    """Whatever else is missing, the CPU and float32 never meet a kernel that cannot take them."""
    assert not attention._has_varlen_kernel(torch.device("cpu"), torch.bfloat16)
    assert not attention._has_varlen_kernel(torch.device("cuda"), torch.float32)


def test_missing_varlen_module_leaves_the_runs(monkeypatch):
    monkeypatch.setattr(attention, "_varlen_kernel", lambda: None)
    assert not attention._has_varlen_kernel(torch.device("cuda"), torch.bfloat16)


def varlen_attn(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, /):
    """A double with the parameters of both torch 2.10 and 2.13; the kernel itself needs a GPU."""
    assert cu_seq_q is cu_seq_k
    assert cu_seq_q.tolist() == [0, 5, 7]
    assert (max_q, max_k) == (5, 5)
    return attention_by_the_book(query, key, value, [5, 2])


def flash_attn_varlen_func(
    q,
    k,
    v,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q,
    max_seqlen_k,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
):
    """A stand-in with flash-attn 2's parameters, by their names."""
    assert (dropout_p, softmax_scale, causal) == (0.0, None, False)
    return varlen_attn(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)


@pytest.fixture
def varlen_kernel(monkeypatch):
    """The kernel depends on whether this build of torch has one and flash-attn is installed."""

    def found(*, in_torch: bool, flash_attn: bool):
        monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: in_torch)
        stand_in = (
            SimpleNamespace(flash_attn_varlen_func=flash_attn_varlen_func) if flash_attn else None
        )
        monkeypatch.setitem(sys.modules, "flash_attn", stand_in)
        return attention._varlen_kernel.__wrapped__()

    return found


def test_torchs_kernel_goes_before_flash_attns(varlen_kernel):
    """The torch that is tested here has it, under the requested name."""
    for flash_attn in (False, True):
        assert (
            varlen_kernel(in_torch=True, flash_attn=flash_attn).__module__
            == "torch.nn.attention.varlen"
        )
    assert varlen_kernel(in_torch=False, flash_attn=True) is flash_attn_varlen_func
    assert varlen_kernel(in_torch=False, flash_attn=False) is None


@pytest.mark.parametrize("kernel", [varlen_attn, flash_attn_varlen_func])
def test_varlen_kernels_get_the_arguments_that_all_versions_share(monkeypatch, kernel):
    monkeypatch.setattr(attention, "_varlen_kernel", lambda: kernel)
    monkeypatch.setattr(attention, "_has_varlen_kernel", lambda device, dtype: True)
    q, k, v = random_states(7)
    attended = varlen_attention(q, k, v, layout_of([5, 2]))
    torch.testing.assert_close(attended, attention_by_the_book(q, k, v, [5, 2]))


def reordered(x: torch.Tensor) -> torch.Tensor:
    """States, (T, H, D), as a projection with reordered rows gives them."""
    return pairs_adjacent(x.flatten(1).T, HEAD_DIM).T.unflatten(-1, (HEADS, HEAD_DIM)).contiguous()


@pytest.mark.parametrize("seqlens", [[6, 4, 4, 1], [3000, 2]])
def test_rotation_is_fair_esms_and_restarts_at_each_sequence(seqlens):
    q, k, _ = random_states(sum(seqlens))
    factors = rotary_factors(layout_of(seqlens), sum(seqlens), HEAD_DIM)
    ours = rotate(torch.stack([reordered(q), reordered(k)], dim=1), factors)
    fair_esm = RotaryEmbedding(dim=HEAD_DIM)
    for which, given in enumerate((q, k)):
        pieces = [one.transpose(0, 1) for one in given.split(seqlens)]
        expected = torch.cat([fair_esm(one, one)[which].transpose(0, 1) for one in pieces])
        torch.testing.assert_close(ours[:, which], reordered(expected), rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_turned_in_float32_and_rounded_once(dtype):
    """Angles made in bfloat16 are wrong by whole turns past position 256, in float16 past 2048."""
    factors = rotary_factors(layout_of([5000], dtype), 5000, HEAD_DIM)
    q = random_states(5000)[0].to(dtype)[:, None]
    exact = rotate(q.float(), factors)
    assert torch.equal(rotate(q, factors), exact.to(dtype))
