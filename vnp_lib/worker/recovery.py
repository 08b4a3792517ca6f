"""What is done about a failed attempt: judged by the policy, acted upon, and recorded for whoever comes later."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import numpy as np

from vnp_lib.checkpoint import QuarantinedSequence, ShardRecord
from vnp_lib.errors import QuarantineFullError, StorageError
from vnp_lib.failures import Failure, FailureKind, classify_exception
from vnp_lib.run import Run
from vnp_lib.worker.retry import RetryDecision, RetryPolicy


def handle_failure(run: Run, rank: int, failure: Failure, *, session: str) -> RetryDecision:
    """Decide what becomes of a shard after a failed attempt.

    Afterwards the manifest has the failure and what follows from it: sequences to be computed alone, a smaller token
    budget, or a shard that has failed for good. A sequence that failed alone too often is in quarantine.

    Args:
        session: Of this flow run: what a person may have mended since the last one does not count any more.
    """
    recorded = run.manifest.shard(rank) or ShardRecord.new(rank)
    failure = _with_batch(run, rank, failure)
    history = counted_failures(recorded.failures, session, num_done=recorded.total_sequences)
    policy = RetryPolicy.from_config(run.config.runtime)
    decision, failures = policy.decide(failure, history), [failure]
    if decision.is_circuit_open and failure.is_silence and failure.ordinal is not None:
        decision = replace(decision, reason=_silent(run, failure.ordinal, failure))
    elif decision.is_circuit_open and run.config.on_poison == "quarantine":
        try:
            decision = _isolate(run, rank, failure, decision)
        except (StorageError, OSError) as error:
            # The strike counts, so that the sequence is set aside after the next attempt; whether there is one is judged as
            # after any attempt that ends at a disk which takes nothing.
            failures.append(classify_exception(error))
            decision = policy.decide(failures[-1], history)
    if decision.token_budget_scale < 1.0 and recorded.device is not None:
        run.scale_token_budget(rank, recorded.device, decision.token_budget_scale)
    about = {
        "session": session,
        "reason": decision.reason,
        "at": datetime.now(UTC).isoformat(),
        "device": recorded.device,
        "num_done": recorded.total_sequences,
    }
    for each in failures:
        run.manifest.record_failure(rank, each.to_json() | about)
    if not decision.retry:
        run.manifest.mark_shard_failed(rank, error=decision.reason)
    return decision


def counted_failures(
    records: Sequence[dict[str, Any]], session: str, *, num_done: int
) -> list[Failure]:
    """Pick the failures of a shard that still count.

    Strikes and preemptions count for ever. Other failures count within one flow run, for a person who starts the run
    again may have mended the cause, and until a new checkpoint, for a shard that comes on is not stuck.

    Args:
        num_done: Sequences of the shard that are in checkpoints now.
    """
    return [
        failure
        for record in records
        if (failure := Failure.from_json(record)).accuses_batch
        or failure.kind == FailureKind.SPOT_PREEMPTION
        or (record["session"] == session and record.get("num_done", num_done) == num_done)
    ]


def _with_batch(run: Run, rank: int, failure: Failure) -> Failure:
    """Name an accused batch by what is in it."""
    if not failure.accuses_batch or failure.ordinal is not None:
        return failure
    assert failure.batch_idx is not None
    ordinals = run.plan.shard_batches(rank)[failure.batch_idx]
    return replace(
        failure, batch_sha256=hashlib.sha256(ordinals.astype("<i8").tobytes()).hexdigest()
    )


def _silent(run: Run, ordinal: int, failure: Failure) -> str:
    """Say at which sequence a shard stands still. It is not set aside: a slow machine looks the same."""
    sequence_id, length = run.plan.ids(np.array([ordinal]))[0], int(run.plan.lengths[ordinal])
    return (
        f"{sequence_id!r} ({length:,} residues), computed alone and last, gave no sign of life: {failure.message}. All else of "
        f"the shard is saved. Raise --runtime.silence-limit-s if this machine may be that slow; --allow-partial puts the "
        f"dataset together without this sequence"
    )


def _isolate(run: Run, rank: int, failure: Failure, decision: RetryDecision) -> RetryDecision:
    """Take an accused batch apart, or set an accused sequence aside; the shard then goes on."""
    if failure.ordinal is None:
        assert failure.batch_idx is not None
        ordinals = run.plan.shard_batches(rank)[failure.batch_idx].tolist()
        run.manifest.add_suspects(rank, ordinals)
        taken_apart = f"{decision.reason}: its sequences are computed one by one"
        return replace(decision, retry=True, reason=taken_apart)
    sequence = QuarantinedSequence.of_failure(
        run.plan, failure.ordinal, failure, attempts=run.config.runtime.max_retries_poison
    )
    try:
        run.quarantine.add(sequence)
    except QuarantineFullError as error:
        return replace(decision, retry=False, reason=str(error))
    set_aside = f"{sequence.id!r} is set aside in {run.paths.quarantine}, the others go on: {decision.reason}"
    return replace(decision, retry=True, reason=set_aside)
