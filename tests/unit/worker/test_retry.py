"""The retry policy. The limits that users are promised are in test_gpu_coordinator.py."""

from __future__ import annotations

from dataclasses import replace

import pytest

from vnp_lib.config import RuntimeConfig
from vnp_lib.failures import Failure, FailureCause
from vnp_lib.worker.retry import CircuitBreaker, RetryPolicy

POLICY = RetryPolicy.from_config(RuntimeConfig())


def failure(cause: FailureCause, *, batch_idx: int | None = None) -> Failure:
    return Failure(cause=cause, message="it broke", batch_idx=batch_idx)


def test_preemption_is_always_retried():
    past = [failure(FailureCause.PREEMPTED)] * 10
    decision = POLICY.decide(past[0], past)
    assert (decision.retry, decision.delay_s) == (True, 60.0)
    assert decision.reason == "spot preemption #11, capacity will return"


@pytest.mark.parametrize("cause", [FailureCause.GPU_OOM, FailureCause.HARDWARE])
def test_other_failures_are_retried_with_growing_delays(cause):
    """After three retries the shard has failed."""
    past: list[Failure] = []
    decisions = []
    for _ in range(4):
        decisions.append(POLICY.decide(failure(cause), past))
        past.append(failure(cause))
    assert [(d.retry, d.delay_s) for d in decisions] == [
        (True, 1.0),
        (True, 2.0),
        (True, 4.0),
        (False, 0.0),
    ]
    assert "attempt 3/3" in decisions[2].reason
    assert "exhausted 3 retries" in decisions[3].reason


def test_only_failures_of_the_same_kind_count():
    past = [failure(FailureCause.UNKNOWN)] * 3 + [failure(FailureCause.PREEMPTED)] * 5
    assert POLICY.decide(failure(FailureCause.GPU_OOM), past).retry


def test_oom_halves_the_token_budget():
    assert POLICY.decide(failure(FailureCause.GPU_OOM), []).token_budget_scale == 0.5
    assert POLICY.decide(failure(FailureCause.UNKNOWN), []).token_budget_scale == 1.0


def test_the_same_batch_twice_opens_the_circuit():
    first, other = (
        failure(FailureCause.DEVICE_ASSERT, batch_idx=42),
        failure(FailureCause.DEVICE_ASSERT, batch_idx=7),
    )
    assert POLICY.decide(first, []).retry
    assert POLICY.decide(other, [first]).retry
    second = POLICY.decide(first, [first, other])
    assert not second.retry
    assert second.reason.startswith("circuit breaker: batch 42 failed 2 times")


def test_silence_and_a_crash_at_a_sequence_do_not_add_up():
    """Silence is always tried twice, even if one strike is enough for anything else."""
    causes = FailureCause.NATIVE_CRASH, FailureCause.HANG
    crash, silence = (replace(failure(cause, batch_idx=3), ordinal=7) for cause in causes)
    assert POLICY.decide(crash, [silence]).retry
    assert POLICY.decide(silence, [crash]).retry
    assert POLICY.decide(silence, [silence]).is_circuit_open
    strict = RetryPolicy.from_config(RuntimeConfig(max_retries_poison=1))
    assert not strict.decide(crash, []).retry
    assert strict.decide(silence, []).retry


def test_a_crash_and_a_hang_at_a_batch_add_up():
    """A segmentation fault, a hang, a silent exit: any two of them at the same batch are enough."""
    crash = failure(FailureCause.NATIVE_CRASH, batch_idx=3)
    assert POLICY.decide(crash, []).retry
    assert not POLICY.decide(failure(FailureCause.HANG, batch_idx=3), [crash]).retry


def test_hardware_never_strikes_a_batch():
    past = [failure(FailureCause.HARDWARE, batch_idx=3), failure(FailureCause.KILLED, batch_idx=3)]
    assert POLICY.decide(failure(FailureCause.DEVICE_ASSERT, batch_idx=3), past).retry


def test_a_permanent_failure_is_not_retried():
    decision = POLICY.decide(failure(FailureCause.BUG), [])
    assert not decision.retry
    assert "it broke" in decision.reason


def test_backoff_doubles_up_to_the_cap():
    assert [POLICY.backoff_s(count) for count in (0, 2, 10, 10_000)] == [1.0, 4.0, 60.0, 60.0]


def test_a_breaker_counts_each_batch_of_each_shard():
    breaker = CircuitBreaker(limit=2, strikes=[(0, 5)])
    assert breaker.record(0, 5) == 2
    assert breaker.is_open(0, 5)
    assert not breaker.is_open(1, 5)
