"""Validate and resume from checkpoint files."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch

from vnp_lib.checkpoint.file import (
    CheckpointContent,
    read_content,
    readable_ids,
    to_numpy,
)
from vnp_lib.checkpoint.manifest import CheckpointManifest
from vnp_lib.checkpoint.markers import batch_idx_of, checkpoint_paths, move_checkpoint
from vnp_lib.checkpoint.survey import Damage, require_few_lost
from vnp_lib.errors import CheckpointError, FingerprintMismatchError, StorageError

logger = logging.getLogger(__name__)


class ResumedRows(NamedTuple):
    """The rows in the checkpoints of one shard."""

    ids: list[str]
    # (len(ids), D) or end to end, in the order of the ids; bfloat16 is converted to float32.
    embeddings: np.ndarray[Any, Any] | None
    resume_batch_idx: int  # number of the next checkpoint
    # The ids in unused checkpoints, if readable. All that is not in `ids` is to be computed.
    corrupted_ids: list[str]


def validate_checkpoint_pt(path: Path) -> tuple[bool, str]:
    """Check whether a checkpoint can be used; if not, return the reason.

    An empty marker, as `touch` creates it, proves nothing. It is accepted for a checkpoint that
    names no run, as other tools write them, if its content is valid.
    """
    try:
        read_content(Path(path), fingerprint=None, may_be_bare=True)
    except StorageError as error:
        return False, str(error)
    return True, ""


def resume_from_checkpoints(
    checkpoint_dir: Path,
    rank: int,
    force_restart: bool = False,
    manifest: CheckpointManifest | None = None,
    *,
    on_damage: Literal["stop", "skip"] = "stop",
    fingerprint: str | None = None,
) -> ResumedRows:
    """Load all checkpoints of one shard at once, in order.

    Unused checkpoints are moved away, so that their numbers are free again: damaged ones to
    `damaged/` in the shard's directory; good ones after a damaged one, or before a forced restart,
    to `superseded/`.

    Args:
        checkpoint_dir: The directory that holds `shard_{rank}`.
        rank: The shard.
        force_restart: Use no checkpoint.
        manifest: Its counts for this shard are set from the checkpoints used.
        on_damage: "stop" uses the checkpoints before the first damaged one; "skip" uses all but the
            damaged ones.
        fingerprint: The run that they have to belong to; None accepts any.

    Raises:
        FingerprintMismatchError: They belong to another run. Nothing has been moved.
        StorageFailingError: With "skip", more than 3 and more than 1 % of them are damaged: the
            storage is failing. Nothing has been moved.
    """
    shard_dir = Path(checkpoint_dir) / f"shard_{rank}"
    paths = checkpoint_paths(shard_dir)
    usable, damaged = (
        ([], []) if force_restart else _usable_checkpoints(paths, fingerprint, on_damage)
    )
    if on_damage == "skip":
        require_few_lost([each for each in damaged if not each.is_unfinished], total=len(paths))
    used = {path for path, _ in usable}
    unused = [path for path in paths if path not in used]
    corrupted_ids = [] if force_restart else [id_ for path in unused for id_ in readable_ids(path)]
    damaged_paths = {each.path for each in damaged}
    for path in unused:
        move_checkpoint(path, to="damaged" if path in damaged_paths else "superseded")
    if manifest is not None:
        _reconcile(manifest, rank, usable)
    counted = paths if on_damage == "skip" else [path for path, _ in usable]
    return ResumedRows(
        ids=[id_ for _, content in usable for id_ in content.sequence_ids],
        embeddings=to_numpy(torch.cat([content.embeddings for _, content in usable]))
        if usable
        else None,
        resume_batch_idx=batch_idx_of(counted[-1]) + 1 if counted else 0,
        corrupted_ids=corrupted_ids,
    )


class _Committed(NamedTuple):
    path: Path
    rank: int
    batch_idx: int
    rows: int


def _usable_checkpoints(
    paths: list[Path], fingerprint: str | None, on_damage: Literal["stop", "skip"]
) -> tuple[list[tuple[Path, CheckpointContent]], list[Damage]]:
    usable: list[tuple[Path, CheckpointContent]] = []
    damaged: list[Damage] = []
    for path in paths:
        try:
            content = read_content(path, fingerprint=None, may_be_bare=True)
            first = usable[0][1] if usable else content
            if (content.width, content.dtype) != (first.width, first.dtype):
                raise CheckpointError(
                    f"rows of {content.width} {content.dtype}; "
                    f"those before it have {first.width} {first.dtype}"
                )
        except CheckpointError as error:
            damaged.append(Damage.of(path, error))
            logger.warning("%s cannot be used: %s", path, error)
            if on_damage == "stop":
                break
        else:
            found = content.metadata.get("fingerprint")
            if fingerprint is not None and found != fingerprint:
                raise FingerprintMismatchError(
                    f"{path} is of the run {found!r}, and this run is {fingerprint!r}: "
                    f"choose another directory, or force a restart"
                )
            usable.append((path, content))
    return usable, damaged


def _reconcile(
    manifest: CheckpointManifest, rank: int, usable: Sequence[tuple[Path, CheckpointContent]]
) -> None:
    records = [
        _Committed(
            path=path, rank=rank, batch_idx=batch_idx_of(path), rows=len(content.sequence_ids)
        )
        for path, content in usable
    ]
    try:
        manifest.reconcile(records, rank=rank)
    except (StorageError, OSError) as error:
        logger.warning(
            "the manifest does not list the used checkpoints of shard %d: %s", rank, error
        )
