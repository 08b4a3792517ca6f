"""The precision certificate: who is compared, and what the comparisons come to."""

from __future__ import annotations

import resource
import signal
import tracemalloc

import numpy as np
import pytest

from vnp_lib.inference.precision import (
    Certificate,
    Comparison,
    ExactRows,
    compare,
    from_metadata,
    sampled_ordinals,
    to_metadata,
)
from vnp_lib.plan.paths import RunPaths
from vnp_lib.plan.plan import ModelIdentity
from vnp_lib.plan.planner import make_plan

MODEL = ModelIdentity(
    model="esm2_t6_8M_UR50D", weights_digest="random:seed=0", layer=6, dtype="bfloat16"
)


def plan_of(tmp_path, lengths, *, num_shards=1):
    fasta = tmp_path / "in.fasta"
    alphabet = "ACDEFGHIKLMNPQRSTVWY"
    sequences = [
        "".join(alphabet[(i + k * (i % 7 + 1)) % 20] for k in range(n))
        for i, n in enumerate(lengths)
    ]
    fasta.write_text("".join(f">p{i}\n{sequence}\n" for i, sequence in enumerate(sequences)))
    return make_plan(
        RunPaths(tmp_path / "run"), [fasta], MODEL, num_shards=num_shards, token_budget=100
    )


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
    assert (
        compare(
            np.array([0]), np.ones((1, 2), np.float32), {0: np.array([np.nan, 1.0], np.float32)}
        )
        == []
    )


def test_exact_rows_are_compared_in_the_memory_of_one(tmp_path):
    """As they would be from memory; the file that they are in has no name."""
    draw = np.random.default_rng(1)
    rows = [
        draw.standard_normal(size, dtype=np.float32) for size in (300_000, 7, 1_500_000, 200_000)
    ]
    exact = {
        ordinal: row + draw.normal(0, 1e-3, row.size).astype(np.float32)
        for ordinal, row in enumerate(rows)
    }
    kept = ExactRows(tmp_path)
    for ordinal, row in exact.items():
        kept.keep(ordinal, row)
    assert not list(tmp_path.iterdir())
    assert kept.keys() == exact.keys()
    assert all(np.array_equal(kept[ordinal], row) for ordinal, row in exact.items())
    tracemalloc.start()
    try:
        compared = compare(np.arange(4), rows, kept)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < rows[2].nbytes + 4 * 2**20 * 8 + 2**16
    assert compared == compare(np.arange(4), rows, exact)
    for ordinal, row in enumerate(rows):
        ours, theirs = row.astype(np.float64), exact[ordinal].astype(np.float64)
        assert compared[ordinal].max_abs_difference == np.abs(ours - theirs).max()
        cosine = ours @ theirs / np.linalg.norm(ours) / np.linalg.norm(theirs)
        assert compared[ordinal].cosine == pytest.approx(cosine, abs=1e-12)


def test_a_row_that_does_not_fit_on_the_disk_is_absent(tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    kept = ExactRows(tmp_path)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        kept.keep(0, np.ones(200, np.float32))
        with pytest.raises(OSError, match="do not fit"):
            kept.keep(1, np.ones(100, np.float32))
        kept.keep(2, np.ones(50, np.float32))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert {ordinal: row.sum() for ordinal, row in kept.items()} == {0: 200, 2: 50}


def test_a_certificate_is_the_worst_of_all():
    certificate = Certificate.of(
        [comparison(1, 0.5, 0.9999), comparison(2, 0.1, 0.9), comparison(1, 0.5, 0.9999)]
    )
    assert certificate == Certificate(num_compared=2, max_abs_difference=0.5, lowest_cosine=0.9)
    assert certificate.is_poor
    assert not Certificate.of([comparison(1, 0.5, 0.9999)]).is_poor
    assert Certificate.of([]) is None


def test_a_checkpoint_gives_back_what_it_was_given():
    comparisons = [comparison(1, 0.5, 0.9999), comparison(2, 0.1, 0.9)]
    assert from_metadata(to_metadata(comparisons)) == comparisons
    assert to_metadata([]) == {}
    assert from_metadata({"ordinals": [1]}) == []
