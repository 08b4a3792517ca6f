"""Find the work left of a run: the plan minus the valid checkpoints minus the quarantine."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from vnp_lib.checkpoint import CommittedRows, Quarantine, heal_shard
from vnp_lib.plan import RunPaths, RunPlan


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardProgress:
    """How much of a shard is done."""

    rank: int
    num_sequences: int
    num_done: int  # computed or quarantined
    tokens_done: int

    @property
    def num_left(self) -> int:
        return self.num_sequences - self.num_done

    @property
    def is_complete(self) -> bool:
        return self.num_left == 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Coverage:
    """Which sequences of a plan are in valid checkpoints, and which are in quarantine.

    Only one of several identical sequences is computed; the others are its copies.
    """

    plan: RunPlan
    is_computed: NDArray[np.bool_]  # (N,), copies excluded
    is_quarantined: NDArray[np.bool_]  # (N,), copies included

    @classmethod
    def of(
        cls, plan: RunPlan, is_computed: NDArray[np.bool_], quarantined: Collection[int]
    ) -> Self:
        """Combine the rows of checkpoints with the ordinals in the quarantine."""
        return cls(
            plan=plan, is_computed=is_computed, is_quarantined=with_copies(plan, quarantined)
        )

    @property
    def is_done(self) -> NDArray[np.bool_]:
        """Sequences that need not be computed, (N,)."""
        return self.is_computed | self.is_quarantined

    @property
    def has_embedding(self) -> NDArray[np.bool_]:
        """Sequences whose embedding is in a checkpoint, copies included, (N,)."""
        has_embedding: NDArray[np.bool_] = self.is_computed[self.plan.representatives]
        return has_embedding

    @property
    def is_missing(self) -> NDArray[np.bool_]:
        """Sequences that have neither an embedding nor a place in the quarantine, (N,)."""
        return ~self.has_embedding & ~self.is_quarantined

    def progress(self, rank: int) -> ShardProgress:
        """Return how much of a shard is done."""
        ordinals = self.plan.shard_ordinals(rank)
        done = ordinals[self.is_done[ordinals]]
        return ShardProgress(
            rank=rank,
            num_sequences=ordinals.size,
            num_done=done.size,
            tokens_done=self.plan.num_tokens(done),
        )


def read_coverage(
    plan: RunPlan, paths: RunPaths, committed: CommittedRows | None = None
) -> Coverage:
    """Read the coverage of a plan from the markers of all checkpoints and the quarantine.

    Args:
        plan: The plan of the run.
        paths: The paths of the run.
        committed: Markers that were read before, for repeated calls.
    """
    committed = committed or CommittedRows(
        paths.checkpoints_dir, plan.fingerprint, plan.num_sequences
    )
    return Coverage.of(plan, committed.done_mask(), Quarantine.of(plan, paths).ordinals())


@dataclass(frozen=True, slots=True, kw_only=True)
class PendingWork:
    """The work that is left of a shard."""

    batches: list[tuple[int, NDArray[Any]]]  # (batch_idx, ordinals), in the plan's order
    num_done: int
    tokens_done: int
    tokens_left: int
    next_checkpoint: int

    @property
    def num_sequences(self) -> int:
        return sum(len(ordinals) for _, ordinals in self.batches)


def find_pending_work(
    plan: RunPlan,
    paths: RunPaths,
    rank: int,
    *,
    suspects: Sequence[int] = (),
    deferred: Sequence[int] = (),
) -> PendingWork:
    """Subtract from a shard what valid checkpoints of any shard, or the quarantine, hold.

    The shard's own checkpoints are read completely. A damaged one is moved to `damaged/`, and only
    its own rows are computed again.

    Args:
        plan: The plan of the run.
        paths: The paths of the run.
        rank: The shard.
        suspects: Ordinals to compute first, one by one, in this order.
        deferred: Ordinals to compute last, one by one, in this order.
    """
    next_checkpoint = heal_shard(paths.checkpoints_dir, rank, plan.fingerprint)
    coverage = read_coverage(plan, paths)
    progress = coverage.progress(rank)
    left = [
        (batch_idx, batch[~coverage.is_done[batch]])
        for batch_idx, batch in enumerate(plan.shard_batches(rank))
    ]
    return PendingWork(
        batches=_ordered(left, plan.num_sequences, suspects, deferred),
        num_done=progress.num_done,
        tokens_done=progress.tokens_done,
        tokens_left=plan.num_tokens(plan.shard_ordinals(rank)) - progress.tokens_done,
        next_checkpoint=next_checkpoint,
    )


def with_copies(plan: RunPlan, ordinals: Collection[int]) -> NDArray[np.bool_]:
    """Return which sequences are among `ordinals` or a copy of one of them, (N,)."""
    is_meant = np.zeros(plan.num_sequences, dtype=bool)
    is_meant[list(ordinals)] = True
    return is_meant | is_meant[plan.representatives]


def _ordered(
    left: Sequence[tuple[int, NDArray[np.int64]]],
    num_sequences: int,
    suspects: Sequence[int],
    deferred: Sequence[int],
) -> list[tuple[int, NDArray[np.int64]]]:
    """Put suspects first and deferred sequences last, each in a batch of its own."""
    is_suspect = np.zeros(num_sequences, dtype=bool)
    is_suspect[[*suspects, *deferred]] = True
    batch_of = {
        ordinal: batch_idx
        for batch_idx, batch in left
        for ordinal in batch[is_suspect[batch]].tolist()
    }
    first, last = (
        [(batch_of[ordinal], np.array([ordinal])) for ordinal in alone if ordinal in batch_of]
        for alone in ([each for each in suspects if each not in deferred], deferred)
    )
    rest = [(batch_idx, batch[~is_suspect[batch]]) for batch_idx, batch in left]
    return first + [(batch_idx, batch) for batch_idx, batch in rest if batch.size] + last
