"""The job of a worker process: one attempt on one shard."""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field

from vnp_lib.software import Package, package_in_use


class ShardJob(BaseModel):
    """One attempt on one shard, as the parent process writes it for the worker process."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    run_dir: Path
    rank: int
    fingerprint: str
    model: str
    weights: str  # a path, or "random"
    weights_digest: str
    dtype: str
    device: str  # "cpu" or "cuda": a worker sees one GPU at most
    num_threads: int | None  # None: the default of torch
    is_deterministic: bool = False  # the same bits at every attempt
    token_budget: int  # per forward pass; at most the plan's
    suspects: tuple[int, ...] = ()  # ordinals to run alone and first, in this order
    # Ordinals at which an attempt gave no sign of life, to run alone and last.
    deferred: tuple[int, ...] = ()
    is_careful: bool = False  # one batch at a time, so that a failure is its own
    quarantines: bool = True  # sequences without a finite row; else they end the attempt
    checkpoint_seq_threshold: int
    checkpoint_time_threshold: float
    # That of the parent process: a worker with another package refuses the job.
    package: Package = Field(default_factory=package_in_use)
