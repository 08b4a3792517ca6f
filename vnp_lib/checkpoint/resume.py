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
    """What the checkpoints of one shard hold."""

    ids: list[str]
    embeddings: (
        np.ndarray[Any, Any] | None
    )  # (len(ids), D) or end to end, in the order of the ids; bfloat16 as float32
    resume_batch_idx: int  # the number of the next checkpoint
    corrupted_ids: list[
        str
    ]  # what unused checkpoints say they held; all that is not in `ids` is to be computed


def validate_checkpoint_pt(path: Path) -> tuple[bool, str]:
    """Say whether a checkpoint can be used, and if not, why.

    An empty marker, as `touch` makes it, proves nothing; it is let pass beside a checkpoint that names no run, as other
    tools leave them, when its content is right in itself.
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
    """Load the checkpoints of one shard, in order, all at once.

    What is not used is moved aside, so that its number and its rows are free to be written again: damaged checkpoints to
    `damaged/`, good ones that come after them or before a forced restart to `superseded/`, in the shard's directory.

    Args:
        checkpoint_dir: Holds `shard_{rank}`.
        force_restart: Use none.
        manifest: Its counts for this shard are set from what is used.
        on_damage: "stop" uses what comes before the first damaged checkpoint; "skip" uses all but the damaged ones.
        fingerprint: The run that they have to be of; None takes any.

    Raises:
        FingerprintMismatchError: They are of another run. Nothing has been moved.
        StorageFailingError: With "skip", more than 3 and more than 1 % are damaged: the storage is failing. Nothing has been moved.
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
    return ResumedRows(
        ids=[id_ for _, content in usable for id_ in content.sequence_ids],
        embeddings=to_numpy(torch.cat([content.embeddings for _, content in usable]))
        if usable
        else None,
        resume_batch_idx=_next_batch_idx(
            [path for path, _ in usable] if on_damage == "stop" else paths
        ),
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
            _require_alike(content, usable[0][1] if usable else content)
        except CheckpointError as error:
            damaged.append(Damage.of(path, error))
            logger.warning("%s cannot be used: %s", path, error)
            if on_damage == "stop":
                break
        else:
            _require_same_run(path, content, fingerprint)
            usable.append((path, content))
    return usable, damaged


def _require_alike(content: CheckpointContent, first: CheckpointContent) -> None:
    if (content.width, content.dtype) != (first.width, first.dtype):
        raise CheckpointError(
            f"rows of {content.width} {content.dtype}; those before it have {first.width} {first.dtype}"
        )


def _require_same_run(path: Path, content: CheckpointContent, fingerprint: str | None) -> None:
    found = content.metadata.get("fingerprint")
    if fingerprint is not None and found != fingerprint:
        raise FingerprintMismatchError(
            f"{path} is of the run {found!r}, and this run is {fingerprint!r}: choose another directory, or force a restart"
        )


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
            "the manifest does not know which checkpoints of shard %d are used: %s", rank, error
        )


def _next_batch_idx(paths: Sequence[Path]) -> int:
    return batch_idx_of(paths[-1]) + 1 if paths else 0
