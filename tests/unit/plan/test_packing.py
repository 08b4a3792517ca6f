"""Packing: contiguous batches under a token budget."""

import numpy as np
import pytest

from vnp_lib.inference.token_budget import TokenBudget
from vnp_lib.plan.packing import pack, packed_tokens


def pack_one_by_one(token_lengths: list[int], token_budget: int) -> list[int]:
    """Return the boundaries by the definition, one sequence at a time."""
    boundaries, tokens = [0], 0
    for position, length in enumerate(token_lengths):
        if tokens and tokens + length > token_budget:
            boundaries.append(position)
            tokens = 0
        tokens += length
    return [*boundaries, len(token_lengths)] if token_lengths else boundaries


@pytest.mark.parametrize(
    ("token_lengths", "token_budget", "boundaries"),
    [
        pytest.param([], 8, [0], id="nothing"),
        pytest.param([5, 3, 4], 8, [0, 2, 3], id="a batch may be exactly full"),
        pytest.param([5, 4, 4], 8, [0, 1, 3], id="a batch is never over the budget"),
        pytest.param([20, 3, 20], 8, [0, 1, 2, 3], id="a sequence over the budget stands alone"),
        pytest.param([1, 1, 1], 1, [0, 1, 2, 3], id="a budget of one token"),
        pytest.param([2, 2, 2], 100, [0, 3], id="all in one"),
    ],
)
def test_batches_are_as_full_as_the_budget_allows(
    token_lengths: list[int], token_budget: int, boundaries: list[int]
) -> None:
    packed = pack(np.array(token_lengths, dtype=np.int32), token_budget)
    assert packed.dtype == np.int64
    assert packed.tolist() == boundaries


@pytest.mark.parametrize("seed", range(200))
def test_batches_are_those_of_the_definition(seed: int) -> None:
    rng = np.random.default_rng(seed)
    token_lengths = rng.integers(1, 60, size=rng.integers(0, 80))
    token_budget = int(rng.integers(1, 200))
    assert pack(token_lengths, token_budget).tolist() == pack_one_by_one(
        token_lengths.tolist(), token_budget
    )


def test_more_tokens_than_32_bits_hold_are_counted() -> None:
    token_lengths = np.full(5, 2**30, dtype=np.int32)
    assert pack(token_lengths, 2**31).tolist() == [0, 2, 4, 5]


@pytest.mark.parametrize(
    ("token_lengths", "token_budget", "what"),
    [([3], 0, "token_budget is 0"), ([3, 0], 8, "token_lengths holds 0")],
)
def test_a_budget_or_length_below_one_is_refused(
    token_lengths: list[int], token_budget: int, what: str
) -> None:
    with pytest.raises(ValueError, match=what):
        pack(np.array(token_lengths), token_budget)


def test_a_token_budget_halves_and_grows_back_to_its_limit():
    changes = []
    budget = TokenBudget(1000, on_change=changes.append)
    budget.shrink(800)
    assert budget.tokens == 400
    for _ in range(49):
        budget.grow()
    assert budget.tokens == 400
    budget.grow()
    assert budget.tokens == 500
    for _ in range(50 * 20):
        budget.grow()
    assert budget.tokens == 1000
    assert changes == [400, 500, 625, 781, 976, 1000]


def test_a_token_budget_stays_between_one_and_its_limit():
    assert TokenBudget(1000, 300).tokens == 300
    assert TokenBudget(1000, 3000).tokens == 1000
    budget = TokenBudget(1000)
    budget.shrink(1)
    assert budget.tokens == 1


@pytest.mark.parametrize("token_lengths", [[], [5], [5, 3, 4], [20, 3, 4, 1, 8]])
def test_the_tokens_of_batches_are_those_of_their_sequences(token_lengths: list[int]) -> None:
    lengths = np.array(token_lengths, dtype=np.int32)
    batches = np.split(lengths, pack(lengths, 8)[1:-1]) if token_lengths else []
    assert packed_tokens(lengths, 8).tolist() == [batch.sum() for batch in batches]
