"""The loop on one device: where it stops, and what it calls durable."""

from __future__ import annotations

import errno
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from vnp_lib import checkpoint
from vnp_lib.checkpoint import load_checkpoint, validate_checkpoint_pt
from vnp_lib.failures import CheckpointWriteError
from vnp_lib.inference import AsyncInferenceRunner
from vnp_lib.listener import Listener
from vnp_lib.plan import checkpoint_path
from vnp_lib.tokens import PackedBatch, pack_batch


class StubModel:
    """Gives every token four times its number."""

    def forward_packed(self, input_ids: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> Mapping[str, Any]:
        return {"representations": {6: input_ids[:, None].float().expand(-1, 4)}}


def batches(count: int) -> list[PackedBatch]:
    return [
        pack_batch(["MKV", "MKL"], sequence_ids=[f"{k}a", f"{k}b"], ordinals=[2 * k, 2 * k + 1], batch_idx=k)
        for k in range(count)
    ]


def test_a_stop_is_heeded_after_the_batch_and_its_rows_are_kept(tmp_path: Path) -> None:
    runner = AsyncInferenceRunner(StubModel(), "cpu", checkpoint_dir=tmp_path)
    computed: list[int] = []

    class Stopping(Listener):
        def should_stop(self) -> bool:
            return len(computed) == 2

    for result in runner.embed(batches(5), listener=Stopping()):
        computed.append(result.batch_idx)
    assert computed == [0, 1]
    kept = load_checkpoint(checkpoint_path(tmp_path, 0, 0), fingerprint=None)
    assert kept.sequence_ids == ["0a", "0b", "1a", "1b"]


def test_a_checkpoint_is_announced_once_it_is_durable_and_never_if_it_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second one gets no marker, since the disk is read-only by then."""
    announced: list[tuple[int, int, bool]] = []
    write_marker = checkpoint.write_marker

    def write_first_marker(path: Path, *arguments: Any, **fields: Any) -> Any:
        if path.name != "batch_00000.pt":
            raise OSError(errno.EROFS, "Read-only file system")
        return write_marker(path, *arguments, **fields)

    class Hearing(Listener):
        def on_checkpoint(self, number: int, rows: int) -> None:
            announced.append((number, rows, validate_checkpoint_pt(checkpoint_path(tmp_path, 0, number))[0]))

    monkeypatch.setattr(checkpoint, "write_marker", write_first_marker)
    runner = AsyncInferenceRunner(StubModel(), "cpu", checkpoint_dir=tmp_path, checkpoint_seq_threshold=2)
    with pytest.raises(CheckpointWriteError, match="Read-only file system"):
        list(runner.embed(batches(2), listener=Hearing()))
    assert announced == [(0, 2, True)]
