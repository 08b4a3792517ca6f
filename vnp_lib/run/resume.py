"""Find the work that is left of a run: the plan minus the valid checkpoints and the quarantine."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from vnp_lib.checkpoint import Quarantine
from vnp_lib.errors import CheckpointError, StorageError
from vnp_lib.plan import RowLayout, RunPaths, RunPlan, offsets_of

if (
    TYPE_CHECKING
):  # torch takes seconds to import, and a child that waits for its shard does without
    from vnp_lib.checkpoint import Checkpoint, CheckpointRecord, CommittedRows, Survey


@dataclass(frozen=True, slots=True, kw_only=True)
class PendingWork:
    """What is left to do of a shard."""

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
    """Subtract from a shard's sequences those that valid checkpoints hold, in whatever shard's folder, or the quarantine.

    This shard's own checkpoints are read whole. A damaged one is moved aside and costs its own rows only. Of what is
    left, suspects come first, in their order, each as a batch of its own, and what is deferred comes last likewise.
    """
    from vnp_lib.checkpoint import heal_shard

    next_checkpoint = heal_shard(paths.checkpoints_dir, rank, plan.fingerprint)
    is_done = done_or_quarantined(plan, paths)
    ordinals_of_shard = plan.shard_ordinals(rank)
    done = ordinals_of_shard[is_done[ordinals_of_shard]]
    tokens_done = plan.num_tokens(done)
    return PendingWork(
        batches=_left(plan.shard_batches(rank), is_done, suspects, deferred),
        num_done=done.size,
        tokens_done=tokens_done,
        tokens_left=plan.num_tokens(ordinals_of_shard) - tokens_done,
        next_checkpoint=next_checkpoint,
    )


def done_or_quarantined(
    plan: RunPlan, paths: RunPaths, committed: CommittedRows | None = None
) -> NDArray[np.bool_]:
    """Which ordinals are in valid checkpoints, by their markers, or in quarantine, (N,): nobody has to compute them.

    Args:
        committed: Of who looks again and again.
    """
    from vnp_lib.checkpoint import CommittedRows

    committed = committed or CommittedRows(
        paths.checkpoints_dir, plan.fingerprint, plan.num_sequences
    )
    is_done = committed.done_mask()
    is_done[list(Quarantine.of(plan, paths).ordinals())] = True
    return is_done


def _left(
    batches: Sequence[NDArray[np.int64]],
    is_done: NDArray[np.bool_],
    suspects: Sequence[int],
    deferred: Sequence[int],
) -> list[tuple[int, NDArray[np.int64]]]:
    """What is not done, as (batch_idx, ordinals): suspects one by one, whole batches without them, the deferred one by one."""
    is_suspect = np.zeros_like(is_done)
    is_suspect[[*suspects, *deferred]] = True
    left = [(batch_idx, batch[~is_done[batch]]) for batch_idx, batch in enumerate(batches)]
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


def read_checkpoints(plan: RunPlan, paths: RunPaths) -> Survey:
    """Read all checkpoints whole, and hold their content, not only their bytes, against their markers and the plan."""
    from vnp_lib.checkpoint import Damage, Survey, survey_checkpoints

    survey = survey_checkpoints(paths.checkpoints_dir, plan.fingerprint, verify_digests=False)
    layout = layout_from_plan(plan, survey.valid) if survey.valid else None
    reasons = [failure_reason(load_planned, plan, record, layout) for record in survey.valid]
    read = list(zip(survey.valid, reasons, strict=True))
    return Survey(
        valid=tuple(record for record, reason in read if reason is None),
        damaged=(
            *survey.damaged,
            *(
                Damage(
                    path=record.path, reason=_without_path(reason, record.path), is_unfinished=False
                )
                for record, reason in read
                if reason is not None
            ),
        ),
    )


def failure_reason(read: Any, *arguments: Any, **options: Any) -> str | None:
    try:
        read(*arguments, **options)
    except (StorageError, OSError) as error:
        return str(error)
    return None


def _without_path(reason: str, path: Path) -> str:
    return reason.removeprefix(f"{path}: ").removeprefix(f"{path} ")


def layout_from_plan(plan: RunPlan, records: Sequence[CheckpointRecord]) -> RowLayout:
    """What a row of a run is; how wide a mean is that its plan says nothing else of, the first checkpoint tells."""
    if records:
        return RowLayout.of_identity(plan.identity, embed_dim=records[0].width)
    from vnp_lib.model import architecture_of

    return RowLayout.of_identity(
        plan.identity, embed_dim=architecture_of(plan.identity["model"]).embed_dim
    )


def load_planned(plan: RunPlan, record: CheckpointRecord, layout: RowLayout) -> Checkpoint:
    """Read a checkpoint whole, and check that it holds what its marker and the plan say.

    Raises:
        CheckpointError: It does not prove itself, or does not fit; says what to do.
    """
    from vnp_lib.checkpoint import load_checkpoint

    require_planned(plan, record)
    checkpoint = load_checkpoint(record.path, fingerprint=plan.fingerprint)
    _require_as_recorded(plan, record, checkpoint, layout)
    return checkpoint


def with_copies(plan: RunPlan, ordinals: Collection[int]) -> NDArray[np.bool_]:
    """Which sequences are among `ordinals` or a copy of one that is, (N,)."""
    is_meant = np.zeros(plan.num_sequences, dtype=bool)
    is_meant[list(ordinals)] = True
    return is_meant | is_meant[plan.representatives]


def require_planned(plan: RunPlan, record: CheckpointRecord) -> None:
    ordinals = record.ordinals
    is_known = (ordinals >= 0) & (ordinals < plan.num_sequences)
    if not is_known.all() or (plan.representatives[ordinals] != ordinals).any():
        raise CheckpointError(
            f"{record.path} holds ordinals that the plan does not compute; move it and its marker away"
        )
    if np.unique(ordinals).size != ordinals.size:
        raise CheckpointError(f"{record.path} holds an ordinal twice; move it and its marker away")


def _require_as_recorded(
    plan: RunPlan, record: CheckpointRecord, checkpoint: Checkpoint, layout: RowLayout
) -> None:
    offsets = offsets_of(layout.widths(plan.lengths[record.ordinals]))
    wanted = (record.ordinals.size, layout.fixed_width) if layout.is_fixed else (int(offsets[-1]),)
    if checkpoint.embeddings.shape != wanted:
        raise CheckpointError(
            f"{record.path} has rows of shape {checkpoint.embeddings.shape}; {wanted} is wanted"
        )
    if not layout.is_fixed and checkpoint.metadata.get("offsets") != offsets.tolist():
        raise CheckpointError(
            f"{record.path} has rows of other widths than its sequences' lengths come to; move it and its marker away"
        )
    if checkpoint.metadata.get("ordinals") != record.ordinals.tolist():
        raise CheckpointError(
            f"{record.path} and its marker differ in their ordinals; move both away"
        )
    if checkpoint.sequence_ids != plan.ids(record.ordinals):
        raise CheckpointError(
            f"{record.path} gives its rows other ids than the plan; move it and its marker away"
        )
