"""Verify a run directory: list the damage and what the next run would compute, change nothing.

It may be called during a run: a checkpoint that is being written is not damage, and the counts of
the manifest are not compared.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from vnp_lib.checkpoint import ShardRecord
from vnp_lib.dataset import open_dataset, verify_dataset
from vnp_lib.errors import ConfigError, StorageError
from vnp_lib.plan import RunPaths, RunPlan, load_plan
from vnp_lib.report.readers import read_quarantine, read_shards
from vnp_lib.run import Coverage, failure_reason, read_checkpoints
from vnp_lib.storage import FileLock, LockHolder

# Torch takes seconds to import: a wrong path is reported before that.
if TYPE_CHECKING:
    from vnp_lib.checkpoint import CheckpointRecord


@dataclass(frozen=True, slots=True, kw_only=True)
class RunReport:
    """The findings in a run directory."""

    run_dir: Path
    running: LockHolder | None  # the process that runs on it now
    damage: tuple[str, ...]  # one line per problem
    notes: tuple[str, ...] = ()  # worth knowing, but not damage
    num_checkpoints: int = 0  # intact ones
    # Distinct sequences of the plan; None if the plan cannot be read.
    num_sequences: int | None = None
    # Sequences that the next run computes, by shard.
    to_compute: dict[int, int] = field(default_factory=dict)
    # Whether the dataset is intact, with a row for every sequence that is not in quarantine.
    has_dataset: bool = False

    @property
    def is_well(self) -> bool:
        """Whether nothing is damaged. The run need not be complete."""
        return not self.damage

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"run_dir": str(self.run_dir), "is_well": self.is_well}

    def lines(self) -> Iterator[str]:
        """Yield the report for people, line by line."""
        if self.running is not None:
            yield f"running: {self.running}"
        yield from self.damage
        yield from self.notes
        count = sum(self.to_compute.values())
        if self.num_sequences is None:
            yield (
                "the same command as before rewrites the plan, and then computes what is not in an "
                "intact checkpoint"
            )
        elif count:
            shards = ", ".join(
                f"shard {rank}: {number:,}" for rank, number in self.to_compute.items()
            )
            yield f"the next run computes {count:,} of {self.num_sequences:,} sequences ({shards})"
        elif self.has_dataset:
            yield (
                f"the dataset is complete: the next run computes none of {self.num_sequences:,} "
                "sequences"
            )
        else:
            yield (
                f"the next run computes none of {self.num_sequences:,} sequences; it assembles the "
                "dataset"
            )
        problems = "problem" if len(self.damage) == 1 else "problems"
        yield f"{len(self.damage) or 'no'} {problems} found"


def verify_run(run_dir: Path) -> RunReport:
    """Read every byte of a run: plan, markers, checkpoints, manifest, dataset.

    Raises:
        ConfigError: If `run_dir` is not a run directory.
    """
    paths = RunPaths(run_dir)
    if not paths.plan_dir.is_dir() and not paths.checkpoints_dir.is_dir():
        raise ConfigError(
            f"{run_dir} is not a run directory: it has neither plan/ nor checkpoints/"
        )
    running = FileLock(paths.run_lock, purpose="verify").presumed_holder()
    try:
        plan = load_plan(paths)
    except (StorageError, OSError) as error:
        from vnp_lib.checkpoint import load_checkpoint

        # The checkpoints are validated by their own markers only.
        found = sorted(paths.checkpoints_dir.glob("shard_*/batch_*.pt"))
        reasons = [
            reason
            for path in found
            if (reason := failure_reason(load_checkpoint, path, fingerprint=None))
        ]
        return RunReport(
            run_dir=run_dir,
            running=running,
            damage=(
                str(error),
                *reasons,
                *(verify_dataset(run_dir) if paths.success.exists() else ()),
            ),
            num_checkpoints=len(found) - len(reasons),
        )
    return _with_plan(paths, running, plan)


def _with_plan(paths: RunPaths, running: LockHolder | None, plan: RunPlan) -> RunReport:
    survey = read_checkpoints(plan, paths)
    is_done = survey.done_mask(plan.num_sequences)
    # The next run tries the sequences of a damaged quarantine again: they count as not quarantined.
    sequences, quarantine_error = read_quarantine(plan, paths)
    quarantined = frozenset(sequence.ordinal for sequence in sequences or ())
    coverage = Coverage.of(plan, is_done, [each for each in quarantined if not is_done[each]])
    left = {rank: coverage.progress(rank).num_left for rank in range(plan.num_shards)}
    dataset = _DatasetState.of(paths, plan, coverage.is_quarantined)
    damage = [
        f"{damaged.path}: {damaged.reason}"
        for damaged in survey.damaged
        if not damaged.is_unfinished
    ]
    try:
        survey.require_sound_storage()
    except StorageError as error:
        damage.append(str(error).partition(". ")[0] + "; the next run will not start")
    if running is None:
        damage += _compare_manifest(paths, survey.valid)
    if quarantine_error:
        damage.append(quarantine_error)
    unfinished = (
        "its writer was stopped before it was finished; the next run moves it to damaged/"
        if running is None
        else "is being written, or its writer was stopped"
    )
    return RunReport(
        run_dir=paths.run_dir,
        running=running,
        damage=(*damage, *dataset.damage),
        notes=(
            *(f"{file.path}: {unfinished}" for file in survey.damaged if file.is_unfinished),
            *_quarantine_notes(paths, quarantined, is_done, coverage.is_quarantined),
            *dataset.notes,
        ),
        num_checkpoints=len(survey.valid),
        num_sequences=plan.num_computed,
        to_compute={rank: count for rank, count in left.items() if count},
        has_dataset=dataset.is_complete,
    )


def _compare_manifest(paths: RunPaths, valid: tuple[CheckpointRecord, ...]) -> Iterator[str]:
    """Compare the manifest's counts with the checkpoints on disk."""
    if not valid and not paths.manifest.exists():
        return
    found: dict[int, list[int]] = {}
    for record in valid:
        found.setdefault(record.rank, []).append(record.rows)
    shards, error = read_shards(paths)
    if error:
        yield f"{error}; the next run rebuilds it"
        return
    for rank in sorted(found.keys() | shards.keys()):
        shard = shards.get(rank, ShardRecord.new(rank))
        num_checkpoints, num_sequences = shard.num_checkpoints, shard.total_sequences
        rows = found.get(rank, [])
        if (num_checkpoints, num_sequences) != (len(rows), sum(rows)):
            yield (
                f"{paths.manifest} records {num_checkpoints:,} checkpoints of shard {rank} with "
                f"{num_sequences:,} sequences, and there are {len(rows):,} with {sum(rows):,}; the "
                "next run corrects it"
            )


def _quarantine_notes(
    paths: RunPaths,
    quarantined: frozenset[int],
    is_done: NDArray[np.bool_],
    is_quarantined: NDArray[np.bool_],
) -> Iterator[str]:
    num_done = int(is_done[list(quarantined)].sum())
    if num_left := len(quarantined) - num_done:
        yield (
            f"{paths.quarantine}: sequences in quarantine: {num_left:,} "
            f"({int(is_quarantined.sum()):,} with their copies)"
        )
    if num_done:
        yield (
            f"{paths.quarantine}: sequences in quarantine that are also in a checkpoint: "
            f"{num_done:,}; the next run releases them"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class _DatasetState:
    damage: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    is_complete: bool = False

    @classmethod
    def of(cls, paths: RunPaths, plan: RunPlan, is_quarantined: NDArray[np.bool_]) -> _DatasetState:
        if not paths.success.exists():
            return cls(notes=("there is no dataset yet",))
        again = "the next run assembles it again"
        if damage := verify_dataset(paths.run_dir):
            return cls(damage=(*damage, f"{paths.embeddings_dir} is damaged; {again}"))
        dataset = open_dataset(paths.run_dir)
        metadata = dataset.metadata
        if metadata["fingerprint"] != plan.fingerprint:
            return cls(damage=(f"{paths.embeddings_dir} belongs to another run; {again}",))
        lack = ""
        if metadata["num_missing"]:
            lack = f" and lacks {metadata['num_missing']:,}; the next run completes it"
        elif metadata["num_quarantined"] != int(is_quarantined.sum()):
            lack = f", but the quarantine has changed since; {again}"
        elif metadata["store_dtype"] != plan.store_dtype:
            lack = f", but in {metadata['store_dtype']} instead of {plan.store_dtype}; {again}"
        return cls(notes=(f"the dataset has {len(dataset):,} rows{lack}",), is_complete=not lack)
