"""Read the checkpoints of a run and validate them against its plan."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, ParamSpec

import numpy as np

from vnp_lib.checkpoint import CheckpointRecord, Damage, Survey, survey_checkpoints
from vnp_lib.errors import CheckpointError, StorageError
from vnp_lib.plan import RowLayout, RunPaths, RunPlan, offsets_of

if TYPE_CHECKING:
    from vnp_lib.checkpoint import Checkpoint

P = ParamSpec("P")


def read_checkpoints(plan: RunPlan, paths: RunPaths) -> Survey:
    """Read all checkpoints completely, and compare their content with markers and plan."""
    survey = survey_checkpoints(paths.checkpoints_dir, plan.fingerprint, verify_digests=False)
    layout = layout_from_plan(plan, survey.valid) if survey.valid else None
    valid: list[CheckpointRecord] = []
    damaged = list(survey.damaged)
    for record in survey.valid:
        assert layout is not None
        reason = failure_reason(load_planned, plan, record, layout)
        if reason is None:
            valid.append(record)
        else:
            reason = reason.removeprefix(f"{record.path}: ").removeprefix(f"{record.path} ")
            damaged.append(Damage(path=record.path, reason=reason, is_unfinished=False))
    return Survey(valid=tuple(valid), damaged=tuple(damaged))


def failure_reason(
    read: Callable[P, object], *arguments: P.args, **options: P.kwargs
) -> str | None:
    """Call `read`, and return the message of a storage error, or None if there is none."""
    try:
        read(*arguments, **options)
    except (StorageError, OSError) as error:
        return str(error)
    return None


def layout_from_plan(plan: RunPlan, records: Sequence[CheckpointRecord]) -> RowLayout:
    """Return the layout of a run's rows; the first checkpoint gives the width of a plain mean."""
    if records:
        return RowLayout.of_identity(plan.identity, embed_dim=records[0].width)
    # The face of `model` imports torch, which takes seconds.
    from vnp_lib.model import architecture_of

    return RowLayout.of_identity(
        plan.identity, embed_dim=architecture_of(plan.identity["model"]).embed_dim
    )


def load_planned(plan: RunPlan, record: CheckpointRecord, layout: RowLayout) -> Checkpoint:
    """Read a checkpoint completely, and check that it holds what its marker and the plan say.

    Raises:
        CheckpointError: It fails validation or does not fit the plan; the message says what to do.
    """
    # Reading the content of a checkpoint imports torch, which takes seconds.
    from vnp_lib.checkpoint import load_checkpoint

    require_planned(plan, record)
    checkpoint = load_checkpoint(record.path, fingerprint=plan.fingerprint)
    offsets = offsets_of(layout.widths(plan.lengths[record.ordinals]))
    wanted = (record.ordinals.size, layout.fixed_width) if layout.is_fixed else (int(offsets[-1]),)
    if checkpoint.embeddings.shape != wanted:
        raise CheckpointError(
            f"{record.path} has rows of shape {checkpoint.embeddings.shape}; {wanted} is wanted"
        )
    if not layout.is_fixed and checkpoint.metadata.get("offsets") != offsets.tolist():
        raise CheckpointError(
            f"{record.path} has rows of other widths than its sequences' lengths come to; "
            f"move it and its marker away"
        )
    if checkpoint.metadata.get("ordinals") != record.ordinals.tolist():
        raise CheckpointError(
            f"{record.path} and its marker differ in their ordinals; move both away"
        )
    if checkpoint.sequence_ids != plan.ids(record.ordinals):
        raise CheckpointError(
            f"{record.path} gives its rows other ids than the plan; move it and its marker away"
        )
    return checkpoint


def require_planned(plan: RunPlan, record: CheckpointRecord) -> None:
    """Raise CheckpointError if a record has an ordinal twice, or one not in the plan."""
    ordinals = record.ordinals
    is_known = (ordinals >= 0) & (ordinals < plan.num_sequences)
    if not is_known.all() or (plan.representatives[ordinals] != ordinals).any():
        raise CheckpointError(
            f"{record.path} holds ordinals that the plan does not compute; "
            f"move it and its marker away"
        )
    if np.unique(ordinals).size != ordinals.size:
        raise CheckpointError(f"{record.path} holds an ordinal twice; move it and its marker away")
