"""Counters of a run, from 0 at the start of this process.

The flow's one thread adds to them. Readers, in any thread, take copies: nobody waits.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass, field

from vnp_lib.failures import FailureKind
from vnp_lib.run.events import (
    AttemptStarted,
    BatchComputed,
    CheckpointSaved,
    Event,
    SequenceQuarantined,
)

_WRITE_BOUNDS_S = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)


@dataclass(slots=True, kw_only=True)
class ShardCounts:
    """The progress of a shard, and the work of this process's workers on it."""

    num_sequences: int = 0  # to compute
    num_done: int = 0  # of these, computed or quarantined, by any process
    sequences_embedded: int = 0  # twice if an attempt was lost before its checkpoint
    tokens_embedded: int = 0
    sequences_in_checkpoints: int = 0
    batches_queued: int = 0
    attempts: int = 0


@dataclass(slots=True, kw_only=True)
class Histogram:
    """Counts of values by upper bound."""

    bounds: tuple[float, ...]  # ascending
    # Values between two bounds, the upper one included; the last counts those above all bounds.
    counts: list[int] = field(init=False)
    sum: float = 0.0

    def __post_init__(self) -> None:
        self.counts = [0] * (len(self.bounds) + 1)

    def observe(self, value: float) -> None:
        self.counts[bisect_left(self.bounds, value)] += 1
        self.sum += value


class RunMetrics:
    """The counters of a run."""

    def __init__(self) -> None:
        self.shards: dict[int, ShardCounts] = {}
        self.failures = dict.fromkeys(FailureKind, 0)
        self.checkpoint_write_s = Histogram(bounds=_WRITE_BOUNDS_S)

    def set_progress(self, rank: int, *, num_sequences: int, num_done: int) -> None:
        """Set the progress of a shard."""
        shard = self._shard(rank)
        shard.num_sequences, shard.num_done = num_sequences, num_done

    def attempt(self, rank: int) -> None:
        """Count a worker process that is started for a shard."""
        self._shard(rank).attempts += 1

    def failed(self, rank: int, kind: FailureKind) -> None:
        """Count a failed attempt; its queue is empty then."""
        self.failures[kind] += 1
        self._shard(rank).batches_queued = 0

    def on_event(self, rank: int, event: Event) -> None:
        """Count what a worker process reports."""
        shard = self._shard(rank)
        match event:
            case AttemptStarted(pending=pending, done=done):
                self.set_progress(rank, num_sequences=pending + done, num_done=done)
            case BatchComputed(sequences=sequences, tokens=tokens, queued=queued):
                shard.num_done += sequences
                shard.sequences_embedded += sequences
                shard.tokens_embedded += tokens
                shard.batches_queued = queued
            case SequenceQuarantined():
                shard.num_done += 1
            case CheckpointSaved(rows=rows, seconds=seconds):
                shard.sequences_in_checkpoints += rows
                self.checkpoint_write_s.observe(seconds)

    def _shard(self, rank: int) -> ShardCounts:
        return self.shards.setdefault(rank, ShardCounts())
