"""The job that a worker process is given: one attempt on one shard."""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field

from vnp_lib.software import Package, package_in_use


class ShardJob(BaseModel):
    """One attempt on one shard, as the parent writes it for the child."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    run_dir: Path
    rank: int
    fingerprint: str
    model: str
    weights: str  # a path, or "random"
    weights_digest: str
    dtype: str
    device: str  # "cpu" or "cuda": a child sees one GPU at most
    num_threads: int | None  # None: as many as torch thinks right
    is_deterministic: bool = False  # the same bits at every attempt
    token_budget: int  # of a forward pass, where memory did not suffice for the plan's
    suspects: tuple[int, ...] = ()  # ordinals to run alone and first, in this order
    deferred: tuple[
        int, ...
    ] = ()  # ordinals at which an attempt gave no sign of life: to run alone and last
    is_careful: bool = False  # one batch at a time, so that a failure is its own
    quarantines: bool = True  # sets aside what has no finite row; else that ends the attempt
    checkpoint_seq_threshold: int
    checkpoint_time_threshold: float
    package: Package = Field(
        default_factory=package_in_use
    )  # of the parent: the worker refuses to be another
