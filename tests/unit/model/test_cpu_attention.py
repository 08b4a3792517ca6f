"""Attention by matrix products is attention by the book, and owns up where it cannot be."""

import math

import pytest
import torch

from vnp_lib.model import attention
from vnp_lib.model.attention import PackedLayout, varlen_attention
from vnp_lib.model.cpu_attention import attend_by_products, products_are_faster

HEADS, HEAD_DIM = 20, 16


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.inference_mode():
        yield
    torch.set_num_threads(before)


def random_states(
    count: int, seqlen: int, dtype: torch.dtype = torch.float32
) -> tuple[torch.Tensor, ...]:
    """Queries, keys and values, (B, H, L, D), with the strides of a projection of packed tokens."""
    generator = torch.Generator().manual_seed(seqlen)
    states = torch.randn(count, seqlen, 3, HEADS, HEAD_DIM, generator=generator).to(dtype)
    return states.permute(2, 0, 3, 1, 4).unbind()


def attention_by_the_book(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    scores = q.double() @ k.double().mT / math.sqrt(HEAD_DIM)
    return scores.softmax(-1) @ v.double()


@pytest.mark.parametrize(("count", "seqlen"), [(1, 1), (3, 102), (2, 257), (1, 700)])
def test_two_products_and_powers_of_two_are_attention(count, seqlen):
    """All heads at once, some at once with fewer left for the last, and one by one."""
    q, k, v = random_states(count, seqlen)
    attended = attend_by_products(q, k, v)
    torch.testing.assert_close(attended.double(), attention_by_the_book(q, k, v), rtol=0, atol=2e-6)


def test_half_precision_rounds_weights_and_values_alone():
    """In bfloat16, a score of 20 would be off by up to 0.06, and its weight by the same share."""
    q, k, v = random_states(1, 102, torch.bfloat16)
    q = 8 * q
    attended = attend_by_products(q, k, v)
    assert attended.dtype == torch.bfloat16
    torch.testing.assert_close(
        attended.double(), attention_by_the_book(q, k, v), rtol=0.01, atol=0.01
    )


@pytest.mark.parametrize("shift", [-1000.0, 1000.0, math.inf, math.nan])
def test_scores_that_are_too_large_for_powers_are_left_to_others(shift):
    """Powers would be 0, infinite or NaN, where a softmax does not mind a shift of all scores."""
    q, k, v = random_states(2, 60)
    q[1, 3, 5], k[1, 3, :, 0] = torch.tensor([shift] + [0.0] * (HEAD_DIM - 1)), 1.0
    assert attend_by_products(q, k, v) is None
    packed = [x.transpose(1, 2).flatten(0, 1) for x in (q, k, v)]
    layout = PackedLayout.of(torch.tensor([0, 60, 120], dtype=torch.int32), 60, torch.float32)
    attended = varlen_attention(*packed, layout).unflatten(0, (2, 60)).transpose(1, 2)
    expected = attention_by_the_book(q, k, v)
    torch.testing.assert_close(attended.double(), expected, rtol=0, atol=5e-6, equal_nan=True)


def test_scores_up_to_some_tens_are_not_too_large():
    q, k, v = random_states(1, 60)
    for factor in (0.0, 1.0, 4.0):
        expected = attention_by_the_book(factor * q, k, v)
        torch.testing.assert_close(
            attend_by_products(factor * q, k, v).double(), expected, rtol=0, atol=1e-5
        )


def test_products_are_for_one_thread_and_medium_lengths():
    def is_chosen(seqlen: int, dtype: torch.dtype) -> bool:
        return products_are_faster(torch.empty(1, HEADS, seqlen, HEAD_DIM, dtype=dtype))

    assert [is_chosen(seqlen, torch.float32) for seqlen in (22, 102, 1000, 5000)] == [
        False,
        True,
        False,
        False,
    ]
    assert [is_chosen(seqlen, torch.bfloat16) for seqlen in (22, 102, 1000, 5000)] == [
        False,
        True,
        True,
        False,
    ]
    assert not is_chosen(102, torch.float16)
    assert not products_are_faster(torch.empty(1, HEADS, 102, HEAD_DIM, device="meta"))
    torch.set_num_threads(2)
    assert not is_chosen(102, torch.float32)


def test_packed_sequences_are_attended_to_by_products(monkeypatch):
    monkeypatch.setattr(attention.F, "scaled_dot_product_attention", None)  # would not be called
    q, k, v = random_states(2, 102)
    packed = [x.transpose(1, 2).flatten(0, 1) for x in (q, k, v)]
    layout = PackedLayout.of(torch.tensor([0, 102, 204], dtype=torch.int32), 102, torch.float32)
    attended = varlen_attention(*packed, layout).unflatten(0, (2, 102)).transpose(1, 2)
    torch.testing.assert_close(attended.double(), attention_by_the_book(q, k, v), rtol=0, atol=2e-6)
