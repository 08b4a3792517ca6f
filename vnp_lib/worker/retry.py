"""Whether and when a failed shard is tried again: a pure judgement over its failure and those before it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from vnp_lib.config import RuntimeConfig
from vnp_lib.failures import Failure, FailureKind


@dataclass(frozen=True, slots=True, kw_only=True)
class RetryDecision:
    """What to do about a failure, and why, in words for a person."""

    retry: bool
    delay_s: float
    reason: str
    token_budget_scale: float = 1.0  # factor on the next attempt's token budget
    is_circuit_open: bool = (
        False  # the accused batch, or sequence, has failed so often that it is not tried again
    )


class CircuitBreaker:
    """Counts how often a batch of a shard, or a sequence, has failed, and says when that is enough."""

    def __init__(self, *, limit: int, strikes: Iterable[tuple[object, ...]] = ()) -> None:
        """`strikes` are the earlier failures, each by its key."""
        self._limit = limit
        self._strikes = Counter(strikes)

    def record(self, *key: object) -> int:
        """Count one more failure and return their number."""
        self._strikes[key] += 1
        return self._strikes[key]

    def is_open(self, *key: object) -> bool:
        return self._strikes[key] >= self._limit


@dataclass(frozen=True, slots=True, kw_only=True)
class RetryPolicy:
    """Each kind of failure has its own cure."""

    max_retries_transient: int
    max_retries_oom: int
    max_retries_poison: int
    spot_retry_poll_interval: float  # seconds
    backoff_base_s: float
    backoff_max_s: float

    @classmethod
    def from_config(cls, runtime: RuntimeConfig) -> RetryPolicy:
        return cls(
            max_retries_transient=runtime.max_retries_transient,
            max_retries_oom=runtime.max_retries_oom,
            max_retries_poison=runtime.max_retries_poison,
            spot_retry_poll_interval=runtime.spot_retry_poll_interval,
            backoff_base_s=runtime.backoff_base_s,
            backoff_max_s=runtime.backoff_max_s,
        )

    def decide(self, failure: Failure, history: Sequence[Failure]) -> RetryDecision:
        """Judge a failure by the earlier ones of the same shard that still count (`history` does not hold it yet)."""
        if failure.is_permanent:
            return RetryDecision(
                retry=False,
                delay_s=0.0,
                reason=f"{failure.message}: another attempt would not help",
            )
        if failure.accuses_batch:
            return self._decide_accused(failure, history)
        same_kind = [
            past for past in history if past.kind == failure.kind and not past.accuses_batch
        ]
        match failure.kind:
            case FailureKind.SPOT_PREEMPTION:
                return RetryDecision(
                    retry=True,
                    delay_s=self.spot_retry_poll_interval,
                    reason=f"spot preemption #{len(same_kind) + 1}, capacity will return",
                )
            case FailureKind.POISON_INPUT:
                return self._decide_counted(failure, len(same_kind), self.max_retries_poison)
            case FailureKind.OOM:
                return self._decide_counted(
                    failure, len(same_kind), self.max_retries_oom, token_budget_scale=0.5
                )
            case FailureKind.TRANSIENT:
                return self._decide_counted(failure, len(same_kind), self.max_retries_transient)

    def backoff_s(self, retry_count: int) -> float:
        """Delay after `retry_count` earlier retries: it doubles from the base up to the cap."""
        return min(self.backoff_base_s * 2.0 ** min(retry_count, 62), self.backoff_max_s)

    def _decide_counted(
        self, failure: Failure, retry_count: int, limit: int, *, token_budget_scale: float = 1.0
    ) -> RetryDecision:
        if retry_count >= limit:
            reason = f"{failure.kind}: exhausted {limit} retries ({failure.message})"
            return RetryDecision(retry=False, delay_s=0.0, reason=reason)
        return RetryDecision(
            retry=True,
            delay_s=self.backoff_s(retry_count),
            reason=f"{failure.kind}: attempt {retry_count + 1}/{limit} ({failure.message})",
            token_budget_scale=token_budget_scale,
        )

    def _decide_accused(self, failure: Failure, history: Sequence[Failure]) -> RetryDecision:
        accused = _accused(failure)
        limit = self.max_retries_poison
        if (
            failure.is_silence and failure.ordinal is not None
        ):  # the second opinion has a longer limit
            limit = max(2, limit)
        breaker = CircuitBreaker(
            limit=limit, strikes=[_accused(past) for past in history if past.accuses_batch]
        )
        count = breaker.record(*accused)
        name = (
            f"batch {failure.batch_idx}"
            if failure.ordinal is None
            else f"sequence {failure.ordinal}"
        )
        if breaker.is_open(*accused):
            reason = f"circuit breaker: {name} failed {count} times ({failure.message})"
            return RetryDecision(
                retry=False, delay_s=self.backoff_base_s, reason=reason, is_circuit_open=True
            )
        reason = f"{name} failed {count} of {limit} times ({failure.message})"
        return RetryDecision(retry=True, delay_s=self.backoff_base_s, reason=reason)


def _accused(failure: Failure) -> tuple[object, ...]:
    """What a failure is blamed on: the sequence that was alone in the model, else the batch, by what is in it.

    With other shards, or another token budget, a batch of the same number has other sequences. Silence at a sequence counts
    by itself.
    """
    if failure.ordinal is not None:
        return "sequence", failure.ordinal, failure.is_silence
    return "batch", failure.batch_sha256 or failure.batch_idx
