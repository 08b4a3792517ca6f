"""The precision certificate: who is compared, and what the comparisons come to."""

from __future__ import annotations

import numpy as np
import pytest

from vnp_lib.plan import ModelIdentity, RunPaths, make_plan
from vnp_lib.precision import Certificate, Comparison, compare, from_metadata, sampled_ordinals, to_metadata

MODEL = ModelIdentity(model="esm2_t6_8M_UR50D", weights_digest="random:seed=0", layer=6, dtype="bfloat16")


def plan_of(tmp_path, lengths, *, num_shards=1):
    fasta = tmp_path / "in.fasta"
    alphabet = "ACDEFGHIKLMNPQRSTVWY"
    sequences = ["".join(alphabet[(i + k * (i % 7 + 1)) % 20] for k in range(n)) for i, n in enumerate(lengths)]
    fasta.write_text("".join(f">p{i}\n{sequence}\n" for i, sequence in enumerate(sequences)))
    return make_plan(RunPaths(tmp_path / "run"), [fasta], MODEL, num_shards=num_shards, token_budget=100)


def comparison(ordinal: int, difference: float, cosine: float) -> Comparison:
    return Comparison(ordinal=ordinal, max_abs_difference=difference, cosine=cosine)


def test_sixty_four_are_compared_from_the_longest_to_the_shortest(tmp_path):
    plan = plan_of(tmp_path, range(5, 205))
    lengths = plan.lengths[sampled_ordinals(plan)]
    assert (lengths.size, lengths[0], lengths[-1]) == (64, 204, 5)
    assert set(np.diff(lengths)) <= {-3, -4}


def test_a_small_input_is_compared_whole(tmp_path):
    plan = plan_of(tmp_path, range(5, 15))
    assert sorted(sampled_ordinals(plan)) == list(range(10))


def test_the_longest_are_not_compared(tmp_path):
    """In float32 they may not fit, or take for ever."""
    assert sampled_ordinals(plan_of(tmp_path, [30, 1022, 1023, 4000])).tolist() == [1, 0]
    other = tmp_path / "other"
    other.mkdir()
    assert sampled_ordinals(plan_of(other, [1023])).size == 0


def test_rows_are_compared_with_those_of_their_own_ordinals():
    exact = {7: np.array([3.0, 4.0], np.float32), 5: np.array([1.0, 0.0], np.float32)}
    rows = np.array([[9.0, 9.0], [3.0, 4.5], [0.0, 1.0]], np.float32)
    seven, five = compare(np.array([2, 7, 5]), rows, exact)
    assert (seven.ordinal, seven.max_abs_difference) == (7, 0.5)
    assert seven.cosine == pytest.approx((9 + 18) / (5 * np.hypot(3, 4.5)))
    assert five == comparison(5, 1.0, 0.0)


def test_an_exact_row_that_is_not_finite_compares_with_nothing():
    assert compare(np.array([0]), np.ones((1, 2), np.float32), {0: np.array([np.nan, 1.0], np.float32)}) == []


def test_a_certificate_is_the_worst_of_all():
    certificate = Certificate.of([comparison(1, 0.5, 0.9999), comparison(2, 0.1, 0.9), comparison(1, 0.5, 0.9999)])
    assert certificate == Certificate(num_compared=2, max_abs_difference=0.5, lowest_cosine=0.9)
    assert certificate.is_poor
    assert not Certificate.of([comparison(1, 0.5, 0.9999)]).is_poor
    assert Certificate.of([]) is None


def test_a_checkpoint_gives_back_what_it_was_given():
    told = [comparison(1, 0.5, 0.9999), comparison(2, 0.1, 0.9)]
    assert from_metadata(to_metadata(told)) == told
    assert to_metadata([]) == {}
    assert from_metadata({"ordinals": [1]}) == []
