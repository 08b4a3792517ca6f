"""The retry policy: whether and when a failed shard is tried again, as a pure function."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from vnp_lib.config import RuntimeConfig
from vnp_lib.failures import Failure, FailureKind


@dataclass(frozen=True, slots=True, kw_only=True)
class RetryDecision:
    """What to do about a failure, and the reason, for people."""

    retry: bool
    delay_s: float
    reason: str
    token_budget_scale: float = 1.0  # factor on the next attempt's token budget
    # The accused batch, or sequence, has failed so often that it is not tried again.
    is_circuit_open: bool = False


class CircuitBreaker:
    """Counts how often a batch of a shard, or a sequence, has failed, up to a limit."""

    def __init__(self, *, limit: int, strikes: Iterable[tuple[object, ...]] = ()) -> None:
        """Start from the earlier failures, `strikes`, each by its key."""
        self._limit = limit
        self._strikes = Counter(strikes)

    def record(self, *key: object) -> int:
        """Count one more failure and return the number of all."""
        self._strikes[key] += 1
        return self._strikes[key]

    def is_open(self, *key: object) -> bool:
        return self._strikes[key] >= self._limit


@dataclass(frozen=True, slots=True, kw_only=True)
class RetryPolicy:
    """Limits and delays for each kind of failure."""

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
        """Decide about a failure.

        Args:
            failure: The latest of the shard.
            history: The earlier ones that still count, without this one.
        """
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
        """Return the delay after `retry_count` earlier retries, doubled each time up to the cap."""
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
        # A second attempt at a silent sequence gets more time, so there is always one.
        if failure.is_silence and failure.ordinal is not None:
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
    """Return the key of what a failure accuses: the only sequence in the model, else the batch.

    A batch is identified by its content: with other shards, or another token budget, a batch of the
    same number holds other sequences. Silence at a sequence is counted separately.
    """
    if failure.ordinal is not None:
        return "sequence", failure.ordinal, failure.is_silence
    return "batch", failure.batch_sha256 or failure.batch_idx
