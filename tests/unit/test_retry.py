"""Each kind of failure has its own cure. (The numbers that users are promised are in test_gpu_coordinator.py.)"""

from __future__ import annotations

import pytest

from vnp_lib.config import RuntimeConfig
from vnp_lib.failures import Failure, FailureKind
from vnp_lib.retry import CircuitBreaker, RetryPolicy

POLICY = RetryPolicy.from_config(RuntimeConfig())


def failure(kind: FailureKind, *, batch_idx: int | None = None, is_permanent: bool = False) -> Failure:
    return Failure(kind=kind, message="it broke", batch_idx=batch_idx, is_permanent=is_permanent)


def test_preemption_is_retried_for_ever():
    past = [failure(FailureKind.SPOT_PREEMPTION)] * 10
    decision = POLICY.decide(past[0], past)
    assert (decision.retry, decision.delay_s) == (True, 60.0)
    assert decision.reason == "spot preemption #11, capacity will return"


@pytest.mark.parametrize("kind", [FailureKind.OOM, FailureKind.TRANSIENT])
def test_counted_failures_are_retried_with_growing_delays_and_then_given_up(kind):
    past: list[Failure] = []
    decisions = []
    for _ in range(4):
        decisions.append(POLICY.decide(failure(kind), past))
        past.append(failure(kind))
    assert [(d.retry, d.delay_s) for d in decisions] == [(True, 1.0), (True, 2.0), (True, 4.0), (False, 0.0)]
    assert "attempt 3/3" in decisions[2].reason
    assert "exhausted 3 retries" in decisions[3].reason


def test_only_failures_of_the_same_kind_count():
    past = [failure(FailureKind.TRANSIENT)] * 3 + [failure(FailureKind.SPOT_PREEMPTION)] * 5
    assert POLICY.decide(failure(FailureKind.OOM), past).retry


def test_oom_halves_the_token_budget():
    assert POLICY.decide(failure(FailureKind.OOM), []).token_budget_scale == 0.5
    assert POLICY.decide(failure(FailureKind.TRANSIENT), []).token_budget_scale == 1.0


def test_the_same_batch_twice_opens_the_circuit():
    first, other = failure(FailureKind.POISON_INPUT, batch_idx=42), failure(FailureKind.POISON_INPUT, batch_idx=7)
    assert POLICY.decide(first, []).retry
    assert POLICY.decide(other, [first]).retry
    second = POLICY.decide(first, [first, other])
    assert not second.retry
    assert second.reason.startswith("circuit breaker: batch 42 failed 2 times")


def test_what_can_only_fail_again_is_not_tried_again():
    decision = POLICY.decide(failure(FailureKind.TRANSIENT, is_permanent=True), [])
    assert not decision.retry
    assert "it broke" in decision.reason


def test_backoff_doubles_up_to_the_cap():
    assert [POLICY.backoff_s(count) for count in (0, 2, 10, 10_000)] == [1.0, 4.0, 60.0, 60.0]


def test_a_breaker_counts_each_batch_of_each_shard_alone():
    breaker = CircuitBreaker(limit=2, strikes=[(0, 5)])
    assert breaker.record(0, 5) == 2
    assert breaker.is_open(0, 5)
    assert not breaker.is_open(1, 5)
