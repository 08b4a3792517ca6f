"""Handle a failed attempt: apply the retry policy and record the outcome in the manifest."""

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
    """Decide whether and how a shard continues after a failed attempt.

    Afterwards the manifest holds the failure and its consequence: sequences to compute alone, a
    smaller token budget, or a shard that has failed permanently. A sequence that failed alone too
    often is in quarantine.

    Args:
        run: The run of the shard.
        rank: Which shard.
        failure: What ended the attempt.
        session: Id of this flow run. Failures of earlier ones count only in part, since a person
            may have fixed the cause in between.
    """
    recorded = run.manifest.shard(rank) or ShardRecord.new(rank)
    if failure.accuses_batch and failure.ordinal is None:
        # An accused batch is identified by its content.
        assert failure.batch_idx is not None
        ordinals = run.plan.shard_batches(rank)[failure.batch_idx]
        digest = hashlib.sha256(ordinals.astype("<i8").tobytes())
        failure = replace(failure, batch_sha256=digest.hexdigest())
    history = counted_failures(recorded.failures, session, num_done=recorded.total_sequences)
    policy = RetryPolicy.from_config(run.config.runtime)
    decision, failures = policy.decide(failure, history), [failure]
    if decision.is_circuit_open and failure.is_silence and failure.ordinal is not None:
        decision = replace(decision, reason=_silence_reason(run, failure.ordinal, failure))
    elif decision.is_circuit_open and run.config.on_poison == "quarantine":
        try:
            decision = _isolate(run, rank, failure, decision)
        except (StorageError, OSError) as error:
            # The strike counts, so that the sequence is quarantined after the next attempt. Whether
            # there is one is decided as after any attempt that cannot write to its disk.
            failures.append(classify_exception(error))
            decision = policy.decide(failures[-1], history)
    if decision.token_budget_scale < 1.0 and recorded.device is not None:
        run.scale_token_budget(rank, recorded.device, decision.token_budget_scale)
    context = {
        "session": session,
        "reason": decision.reason,
        "at": datetime.now(UTC).isoformat(),
        "device": recorded.device,
        "num_done": recorded.total_sequences,
    }
    for each in failures:
        run.manifest.record_failure(rank, each.to_json() | context)
    if not decision.retry:
        run.manifest.mark_shard_failed(rank, error=decision.reason)
    return decision


def counted_failures(
    records: Sequence[dict[str, Any]], session: str, *, num_done: int
) -> list[Failure]:
    """Return the failures of a shard that still count.

    Strikes and preemptions always count. Other failures count within one flow run, since a person
    who starts the run again may have fixed the cause, and until a new checkpoint, since a shard
    that makes progress is not stuck.

    Args:
        records: The failures as the manifest has them, oldest first.
        session: Id of this flow run.
        num_done: Sequences of the shard that are in checkpoints now.
    """
    return [
        failure
        for record in records
        if (failure := Failure.from_json(record)).accuses_batch
        or failure.kind == FailureKind.SPOT_PREEMPTION
        or (record["session"] == session and record.get("num_done", num_done) == num_done)
    ]


def _silence_reason(run: Run, ordinal: int, failure: Failure) -> str:
    """Describe at which sequence a shard makes no progress.

    The sequence is not quarantined: a slow machine looks the same.
    """
    sequence_id, length = run.plan.ids(np.array([ordinal]))[0], int(run.plan.lengths[ordinal])
    return (
        f"{sequence_id!r} ({length:,} residues), computed alone and last, gave no sign of life: "
        f"{failure.message}. The rest of the shard is saved. Raise --runtime.silence-limit-s if "
        f"this machine may be that slow, or assemble the dataset without this sequence "
        f"(--allow-partial)"
    )


def _isolate(run: Run, rank: int, failure: Failure, decision: RetryDecision) -> RetryDecision:
    """Split an accused batch, or quarantine an accused sequence, so that the shard can continue."""
    if failure.ordinal is None:
        assert failure.batch_idx is not None
        ordinals = run.plan.shard_batches(rank)[failure.batch_idx].tolist()
        run.manifest.add_suspects(rank, ordinals)
        reason = f"{decision.reason}: its sequences are computed one by one"
        return replace(decision, retry=True, reason=reason)
    sequence = QuarantinedSequence.of_failure(
        run.plan, failure.ordinal, failure, attempts=run.config.runtime.max_retries_poison
    )
    try:
        run.quarantine.add(sequence)
    except QuarantineFullError as error:
        return replace(decision, retry=False, reason=str(error))
    reason = (
        f"{sequence.id!r} is quarantined in {run.paths.quarantine}, and the shard continues "
        f"without it: {decision.reason}"
    )
    return replace(decision, retry=True, reason=reason)
