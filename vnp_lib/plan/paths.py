"""Paths in a run directory."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class RunPaths:
    """All paths of a run."""

    run_dir: Path

    @property
    def plan_dir(self) -> Path:
        return self.run_dir / "plan"

    @property
    def plan_json(self) -> Path:
        return self.plan_dir / "plan.json"

    @property
    def sequences(self) -> Path:
        return self.plan_dir / "sequences.arrow"

    @property
    def representatives(self) -> Path:
        return self.plan_dir / "representatives.npy"

    @property
    def skipped(self) -> Path:
        return self.plan_dir / "skipped.jsonl"

    @property
    def stdin(self) -> Path:
        return self.plan_dir / "stdin"

    @property
    def run_lock(self) -> Path:
        return self.run_dir / "run.lock"

    @property
    def checkpoints_dir(self) -> Path:
        return self.run_dir / "checkpoints"

    @property
    def manifest(self) -> Path:
        return self.checkpoints_dir / "manifest.json"

    def shard_dir(self, rank: int) -> Path:
        return shard_dir(self.checkpoints_dir, rank)

    def shard_lock(self, rank: int) -> Path:
        return self.shard_dir(rank) / "shard.lock"

    def job(self, rank: int) -> Path:
        return self.shard_dir(rank) / "job.json"

    def worker_log(self, rank: int) -> Path:
        return self.shard_dir(rank) / "worker.log"

    def heartbeat(self, rank: int) -> Path:
        return self.shard_dir(rank) / "heartbeat"

    def history(self, rank: int) -> Path:
        return self.shard_dir(rank) / "history.jsonl"

    def checkpoint(self, rank: int, batch_idx: int) -> Path:
        return checkpoint_path(self.checkpoints_dir, rank, batch_idx)

    @property
    def results_dir(self) -> Path:
        return self.run_dir / "results"

    @property
    def quarantine(self) -> Path:
        return self.run_dir / "quarantine.jsonl"

    @property
    def superseded_quarantine(self) -> Path:
        """Quarantined sequences of an earlier run in this directory."""
        return self.run_dir / "quarantine.superseded.jsonl"

    @property
    def embeddings_dir(self) -> Path:
        return self.run_dir / "embeddings"

    @property
    def success(self) -> Path:
        return self.embeddings_dir / "_SUCCESS.json"

    @property
    def assembly_dir(self) -> Path:
        return self.run_dir / ".assembly"

    @property
    def new_dataset(self) -> Path:
        """The dataset being written, before it replaces `embeddings_dir`."""
        return self.assembly_dir / "new"

    @property
    def replaced_dataset(self) -> Path:
        """The previous or the next `embeddings_dir`, for the moment of the exchange."""
        return self.assembly_dir / "replaced"

    @property
    def report(self) -> Path:
        return self.run_dir / "report.html"


def shard_dir(checkpoints_dir: Path, rank: int) -> Path:
    return checkpoints_dir / f"shard_{rank}"


def checkpoint_path(checkpoints_dir: Path, rank: int, batch_idx: int) -> Path:
    return shard_dir(checkpoints_dir, rank) / f"batch_{batch_idx:05d}.pt"
