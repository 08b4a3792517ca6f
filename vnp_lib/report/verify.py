"""The state of a run directory: what in it is damaged, and what the next run would compute. Changes nothing.

It may be asked while a run is going on: a checkpoint that is being written is no damage, and counts are not compared.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from vnp_lib.checkpoint import CheckpointManifest, Quarantine, ShardRecord
from vnp_lib.dataset import EmbeddingDataset, open_dataset, verify_dataset
from vnp_lib.errors import ConfigError, StorageError
from vnp_lib.plan import RunPaths, RunPlan, load_plan
from vnp_lib.run import failure_reason, read_checkpoints, with_copies
from vnp_lib.storage import FileLock, LockHolder

if TYPE_CHECKING:  # torch takes seconds to import: what is no run directory is said before
    from vnp_lib.checkpoint import CheckpointRecord, Damage, Survey


@dataclass(frozen=True, slots=True, kw_only=True)
class RunReport:
    """What was found in a run directory."""

    run_dir: Path
    running: LockHolder | None  # the process whose run this is at the moment
    damage: tuple[str, ...]  # one line for each thing that is wrong
    notes: tuple[str, ...] = ()  # what is worth knowing, and as it should be
    num_checkpoints: int = 0  # that are whole
    num_sequences: int | None = (
        None  # to compute, each distinct one once; None: the plan cannot be read
    )
    to_compute: dict[int, int] = field(
        default_factory=dict
    )  # sequences that the next run computes, by shard
    has_dataset: bool = False  # whole, with a row for every sequence that is not in quarantine

    @property
    def is_well(self) -> bool:
        """Whether nothing is damaged; the run need not be complete."""
        return not self.damage

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"run_dir": str(self.run_dir), "is_well": self.is_well}

    def lines(self) -> Iterator[str]:
        """Say it to a person."""
        if self.running is not None:
            yield f"a run is going on here: {self.running}"
        yield from self.damage
        yield from self.notes
        yield self._resume()
        yield (
            f"{len(self.damage)} things are wrong"
            if len(self.damage) > 1
            else "1 thing is wrong"
            if self.damage
            else "all is well"
        )

    def _resume(self) -> str:
        if self.num_sequences is None:
            return "the same command as before writes the plan anew, and then computes what is in no whole checkpoint"
        count = sum(self.to_compute.values())
        if count:
            shards = ", ".join(
                f"shard {rank}: {number:,}" for rank, number in self.to_compute.items()
            )
            return f"the next run computes {count:,} of {self.num_sequences:,} sequences ({shards})"
        if self.has_dataset:
            return f"the dataset is complete: the next run computes none of {self.num_sequences:,} sequences"
        return f"the next run computes none of {self.num_sequences:,} sequences; it puts the dataset together"


def verify_run(run_dir: Path) -> RunReport:
    """Read every byte of a run: plan, markers, checkpoints, manifest, dataset.

    Raises:
        ConfigError: `run_dir` is not a run directory.
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
        return _without_plan(paths, running, str(error))
    return _with_plan(paths, running, plan)


def _with_plan(paths: RunPaths, running: LockHolder | None, plan: RunPlan) -> RunReport:
    survey = read_checkpoints(plan, paths)
    is_done = survey.done_mask(plan.num_sequences)
    quarantined, quarantine_damage = _quarantined(paths, plan)
    is_set_aside = with_copies(plan, [ordinal for ordinal in quarantined if not is_done[ordinal]])
    shards = {rank: plan.shard_ordinals(rank) for rank in range(plan.num_shards)}
    left = {
        rank: int((~is_done & ~is_set_aside)[ordinals].sum()) for rank, ordinals in shards.items()
    }
    dataset = _dataset(paths, plan, is_set_aside)
    return RunReport(
        run_dir=paths.run_dir,
        running=running,
        damage=(
            *(
                f"{damage.path}: {damage.reason}"
                for damage in survey.damaged
                if not damage.is_unfinished
            ),
            *_refusal(survey),
            *(_manifest(paths, survey.valid) if running is None else ()),
            *quarantine_damage,
            *dataset.damage,
        ),
        notes=(
            *(_unfinished(damage, running) for damage in survey.damaged if damage.is_unfinished),
            *_quarantine_notes(paths, quarantined, is_done, is_set_aside),
            *dataset.notes,
        ),
        num_checkpoints=len(survey.valid),
        num_sequences=plan.num_computed,
        to_compute={rank: count for rank, count in left.items() if count},
        has_dataset=dataset.is_complete,
    )


def _without_plan(paths: RunPaths, running: LockHolder | None, damage: str) -> RunReport:
    """The checkpoints can then be believed by their own markers only."""
    from vnp_lib.checkpoint import load_checkpoint

    found = sorted(paths.checkpoints_dir.glob("shard_*/batch_*.pt"))
    reasons = [
        reason
        for path in found
        if (reason := failure_reason(load_checkpoint, path, fingerprint=None))
    ]
    return RunReport(
        run_dir=paths.run_dir,
        running=running,
        damage=(
            damage,
            *reasons,
            *(verify_dataset(paths.run_dir) if paths.success.exists() else ()),
        ),
        num_checkpoints=len(found) - len(reasons),
    )


def _refusal(survey: Survey) -> Iterator[str]:
    try:
        survey.require_sound_storage()
    except StorageError as error:
        yield str(error).partition(". ")[0] + "; the next run will refuse to go on"


def _unfinished(damage: Damage, running: LockHolder | None) -> str:
    if running is not None:
        return f"{damage.path}: is being written, or its writer was stopped"
    return (
        f"{damage.path}: its writer was stopped before it was finished; the next run moves it aside"
    )


def _manifest(paths: RunPaths, valid: tuple[CheckpointRecord, ...]) -> Iterator[str]:
    """Compare the manifest's counts with the checkpoints."""
    manifest = CheckpointManifest(paths.manifest)
    if not valid and not manifest.exists():
        return
    found: dict[int, list[int]] = {}
    for record in valid:
        found.setdefault(record.rank, []).append(record.rows)
    try:
        shards = manifest.shards()
    except (StorageError, OSError) as error:
        yield f"{error}; the next run makes it anew"
        return
    for rank in sorted(found.keys() | shards.keys()):
        recorded = shards.get(rank, ShardRecord.new(rank))
        told = recorded.num_checkpoints, recorded.total_sequences
        rows = found.get(rank, [])
        if told != (len(rows), sum(rows)):
            yield (
                f"{paths.manifest} records {told[0]:,} checkpoints of shard {rank} with {told[1]:,} sequences, and there are "
                f"{len(rows):,} with {sum(rows):,}; the next run sets it right"
            )


def _quarantined(paths: RunPaths, plan: RunPlan) -> tuple[frozenset[int], list[str]]:
    """Ordinals, and damage: where the file is damaged its sequences count as not set aside, for they are tried again."""
    try:
        return Quarantine.of(plan, paths).ordinals(), []
    except (StorageError, OSError) as error:
        return frozenset(), [str(error)]


def _quarantine_notes(
    paths: RunPaths,
    quarantined: frozenset[int],
    is_done: NDArray[np.bool_],
    is_set_aside: NDArray[np.bool_],
) -> Iterator[str]:
    num_done = int(is_done[list(quarantined)].sum())
    if num_set_aside := len(quarantined) - num_done:
        with_their_copies = int(is_set_aside.sum())
        yield f"{paths.quarantine}: sequences in quarantine: {num_set_aside:,} ({with_their_copies:,} with their copies)"
    if num_done:
        yield f"{paths.quarantine}: sequences in quarantine and yet in a checkpoint: {num_done:,}; the next run releases them"


@dataclass(frozen=True, slots=True, kw_only=True)
class _DatasetState:
    damage: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    is_complete: bool = False


def _dataset(paths: RunPaths, plan: RunPlan, is_set_aside: NDArray[np.bool_]) -> _DatasetState:
    if not paths.success.exists():
        return _DatasetState(notes=("there is no dataset yet",))
    damage = verify_dataset(paths.run_dir)
    if damage:
        anew = f"{paths.embeddings_dir} is damaged; the next run puts it together anew"
        return _DatasetState(damage=(*damage, anew))
    dataset = open_dataset(paths.run_dir)
    if dataset.metadata["fingerprint"] != plan.fingerprint:
        return _DatasetState(
            damage=(
                f"{paths.embeddings_dir} is of another run; the next run puts it together anew",
            )
        )
    lack = _lack(dataset, plan, num_set_aside=int(is_set_aside.sum()))
    return _DatasetState(
        notes=(f"the dataset has {len(dataset):,} rows{lack}",), is_complete=not lack
    )


def _lack(dataset: EmbeddingDataset, plan: RunPlan, *, num_set_aside: int) -> str:
    """What a dataset that is whole lacks to be complete, as the end of a sentence."""
    if num_missing := dataset.metadata["num_missing"]:
        return f" and lacks {num_missing:,}; the next run completes it"
    if dataset.metadata["num_quarantined"] != num_set_aside:
        return ", but the quarantine is another now; the next run puts it together anew"
    if (stored := dataset.metadata["store_dtype"]) != plan.store_dtype:
        return f", but in {stored}, and {plan.store_dtype} is wanted; the next run puts it together anew"
    return ""
