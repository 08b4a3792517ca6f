"""Write checkpoints of fake rows, with our writer or with plain `torch.save`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vnp_lib.checkpoint.writer import AsyncCheckpointWriter
from vnp_lib.plan.paths import checkpoint_path
from vnp_lib.storage.durable import digest_file, marker_path, write_marker

RUN = "f1" * 32


def ids_of(ordinals: list[int]) -> list[str]:
    return [f"seq{ordinal}" for ordinal in ordinals]


def rows_of(ordinals: list[int], width: int = 4) -> Tensor:
    """Return rows that identify their ordinals."""
    return torch.tensor(ordinals, dtype=torch.float32)[:, None] * 100 + torch.arange(width)


def write_checkpoint(path: Path, ordinals: list[int], *, rows: Tensor | None = None) -> None:
    """Write a checkpoint like a run does, with `rows` instead of those of the ordinals."""
    with AsyncCheckpointWriter() as writer:
        writer.write_checkpoint_async(
            path,
            rows_of(ordinals) if rows is None else rows,
            ids_of(ordinals),
            {"ordinals": ordinals, "fingerprint": RUN},
        )


def write_shard(
    checkpoints_dir: Path, num_checkpoints: int, *, rank: int = 0, rows: int = 3
) -> list[Path]:
    """Write checkpoints of `rows` consecutive ordinals each."""
    paths = [
        checkpoint_path(checkpoints_dir, rank, batch_idx) for batch_idx in range(num_checkpoints)
    ]
    for batch_idx, path in enumerate(paths):
        write_checkpoint(path, list(range(batch_idx * rows, (batch_idx + 1) * rows)))
    return paths


def write_by_hand(path: Path, content: Any) -> None:
    """Write a checkpoint like other tools do: torch.save and an empty marker."""
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(content, path)
    marker_path(path).touch()


def content_by_hand(rows: int = 3, **changes: Any) -> dict[str, Any]:
    """Return the content of a checkpoint that names no run, with changes."""
    ids = [f"s{row}" for row in range(rows)]
    return {"embeddings": torch.ones(rows, 4), "sequence_ids": ids, "metadata": {}} | changes


def vouch_for(path: Path, **fields: Any) -> None:
    """Write the marker of a checkpoint of three rows, or of other `fields`, for any file."""
    marker_path(path).unlink(missing_ok=True)
    shape = {"rows": 3, "width": 4, "dtype": "float32"}
    write_marker(path, digest_file(path), **shape | fields)
