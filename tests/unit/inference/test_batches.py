"""Batches are formed alike for sequences in memory and for those of a plan."""

from __future__ import annotations

import numpy as np
import pytest

from vnp_lib.inference.batches import divide_into_batches, pack_batches
from vnp_lib.plan.packing import split_batches

LENGTHS = np.array([3, 9, 1, 9, 4])
SEQUENCES = ["MKV", "MKVMKVMKV", "M", "WWWWWWWWW", "ACDE"]


def as_lists(batches: list[np.ndarray]) -> list[list[int]]:
    return [batch.tolist() for batch in batches]


def test_the_longest_come_first_within_the_budget() -> None:
    """Tokens are 11, 11, 6, 5 and 3: BOS and EOS count."""
    assert as_lists(divide_into_batches(LENGTHS, 22)) == [[1, 3], [4, 0, 2]]
    assert as_lists(divide_into_batches(LENGTHS, 21)) == [[1], [3, 4], [0, 2]]


def test_duplicates_are_in_no_batch() -> None:
    """Sequences 3 and 2 have the same residues as 1 and 0."""
    representatives = np.array([0, 1, 0, 1, 4])
    assert as_lists(divide_into_batches(LENGTHS, 100, representatives)) == [[1, 4, 0]]


def test_no_sequences_are_no_batches() -> None:
    nothing = np.empty(0, dtype=np.int64)
    assert divide_into_batches(nothing, 100) == []
    assert split_batches(nothing, nothing, 100) == []


def test_a_budget_below_one_is_refused() -> None:
    with pytest.raises(ValueError, match="token_budget is 0"):
        divide_into_batches(LENGTHS, 0)


def test_packed_batches_hold_what_is_fetched_for_their_ordinals() -> None:
    def fetch(ordinals: np.ndarray) -> tuple[list[str], list[str]]:
        return [f"p{each}" for each in ordinals], [SEQUENCES[each] for each in ordinals]

    batches = divide_into_batches(LENGTHS, 22)
    packed = list(pack_batches(enumerate(batches, start=5), fetch))
    assert [batch.batch_idx for batch in packed] == [5, 6]
    assert [batch.sequence_ids for batch in packed] == [("p1", "p3"), ("p4", "p0", "p2")]
    assert [batch.ordinals.tolist() for batch in packed] == as_lists(batches)
    assert [batch.lengths.tolist() for batch in packed] == [[9, 9], [4, 3, 1]]
