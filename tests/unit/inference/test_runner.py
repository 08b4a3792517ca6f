"""The loop on one device: where it stops, and what it calls durable."""

from __future__ import annotations

import errno
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import vnp_lib
from vnp_lib.checkpoint import writer
from vnp_lib.checkpoint.file import load_checkpoint
from vnp_lib.checkpoint.resume import validate_checkpoint_pt
from vnp_lib.errors import CheckpointWriteError, SequenceTooLargeError
from vnp_lib.inference.callbacks import Callbacks
from vnp_lib.inference.runner import AsyncInferenceRunner
from vnp_lib.model.tokens import FIRST_RESIDUE, RESIDUES, PackedBatch, pack_batch
from vnp_lib.plan.paths import checkpoint_path
from vnp_lib.prefetch import Prefetcher
from vnp_lib.software import Software, package_in_use


class StubModel:
    """Gives every token four times its number."""

    def forward_packed(
        self, input_ids: Tensor, cu_seqlens: Tensor, max_seqlen: int
    ) -> Mapping[str, Any]:
        return {"representations": {6: input_ids[:, None].float().expand(-1, 4)}}


def batches(count: int) -> list[PackedBatch]:
    return [
        pack_batch(
            ["MKV", "MKL"],
            sequence_ids=[f"{k}a", f"{k}b"],
            ordinals=[2 * k, 2 * k + 1],
            batch_idx=k,
        )
        for k in range(count)
    ]


def test_a_stop_is_heeded_after_the_batch_and_its_rows_are_kept(tmp_path: Path) -> None:
    runner = AsyncInferenceRunner(StubModel(), "cpu", checkpoint_dir=tmp_path)
    computed: list[int] = []

    class Stopping(Callbacks):
        def should_stop(self) -> bool:
            return len(computed) == 2

    for result in runner.embed(batches(5), callbacks=Stopping()):
        computed.append(result.batch_idx)
    assert computed == [0, 1]
    kept = load_checkpoint(checkpoint_path(tmp_path, 0, 0), fingerprint=None)
    assert kept.sequence_ids == ["0a", "0b", "1a", "1b"]


def test_only_a_durable_checkpoint_is_announced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With its writing time. The second one gets no marker, since the disk is read-only by then."""
    announced: list[tuple[int, int, bool]] = []
    took: list[float] = []
    write_marker = writer.write_marker

    def write_first_marker(path: Path, *arguments: Any, **fields: Any) -> Any:
        if path.name != "batch_00000.pt":
            raise OSError(errno.EROFS, "Read-only file system")
        return write_marker(path, *arguments, **fields)

    class Hearing(Callbacks):
        def on_checkpoint(self, number: int, rows: int, seconds: float) -> None:
            took.append(seconds)
            announced.append(
                (number, rows, validate_checkpoint_pt(checkpoint_path(tmp_path, 0, number))[0])
            )

    monkeypatch.setattr(writer, "write_marker", write_first_marker)
    runner = AsyncInferenceRunner(
        StubModel(), "cpu", checkpoint_dir=tmp_path, checkpoint_seq_threshold=2
    )
    with pytest.raises(CheckpointWriteError, match="Read-only file system"):
        list(runner.embed(batches(2), callbacks=Hearing()))
    assert announced == [(0, 2, True)]
    assert took[0] > 0


def test_a_result_says_how_many_batches_wait_for_the_model(tmp_path: Path) -> None:
    """Batches that are read count; the one just computed and the end of the input do not."""
    all_are_read = threading.Event()

    def read() -> Iterator[PackedBatch]:
        yield from batches(3)
        all_are_read.set()

    class Waiting(StubModel):
        def forward_packed(
            self, input_ids: Tensor, cu_seqlens: Tensor, max_seqlen: int
        ) -> Mapping[str, Any]:
            assert all_are_read.wait(timeout=60)
            return super().forward_packed(input_ids, cu_seqlens, max_seqlen)

    runner = AsyncInferenceRunner(Waiting(), "cpu", checkpoint_dir=tmp_path)
    assert [result.num_queued for result in runner.embed(read())] == [2, 1, 0]


def test_an_error_of_the_reader_waits_for_its_turn_and_is_no_batch() -> None:
    was_asked_again = threading.Event()

    class Failing(Iterator[str]):
        num_asked = 0

        def __next__(self) -> str:
            self.num_asked += 1
            if self.num_asked == 1:
                return "first"
            if self.num_asked == 2:
                raise OSError("the input is gone")
            was_asked_again.set()
            raise StopIteration

    ahead = Prefetcher(Failing(), 4)
    items = iter(ahead)
    assert next(items) == "first"
    assert was_asked_again.wait(timeout=60)
    assert ahead.num_ready() == 0
    with pytest.raises(OSError, match="the input is gone"):
        next(items)


def test_a_too_large_sequence_is_named_and_all_others_are_kept(
    tmp_path: Path,
) -> None:
    class Small(StubModel):
        def forward_packed(
            self, input_ids: Tensor, cu_seqlens: Tensor, max_seqlen: int
        ) -> Mapping[str, Any]:
            if input_ids.numel() > 10:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return super().forward_packed(input_ids, cu_seqlens, max_seqlen)

    large = pack_batch(
        ["MKV" * 9, "MK"], sequence_ids=["huge", "small"], ordinals=[10, 11], batch_idx=5
    )
    runner = AsyncInferenceRunner(Small(), "cpu", checkpoint_dir=tmp_path)
    with pytest.raises(SequenceTooLargeError, match=r"'huge' \(27 residues\)"):
        list(runner.embed([large, *batches(2)]))
    kept = load_checkpoint(checkpoint_path(tmp_path, 0, 0), fingerprint=None)
    assert kept.sequence_ids == ["small", "0a", "0b", "1a", "1b"]
    assert kept.metadata["ordinals"] == [11, 0, 1, 2, 3]


def test_a_checkpoint_says_what_computed_it(tmp_path: Path) -> None:
    list(AsyncInferenceRunner(StubModel(), "cpu", checkpoint_dir=tmp_path).embed(batches(1)))
    metadata = load_checkpoint(checkpoint_path(tmp_path, 0, 0), fingerprint=None).metadata
    assert Software.of_metadata(metadata) == Software(
        vnp=vnp_lib.__version__,
        code_sha256=package_in_use().code_sha256,
        torch=torch.__version__,
        device=f"CPU ({torch.backends.cpu.get_cpu_capability()})",
    )


def test_a_non_finite_row_is_omitted_if_the_callback_returns(
    tmp_path: Path,
) -> None:
    """In the loop's own order: its batch-mates are kept under their own ids."""

    class Spoilt(StubModel):
        def forward_packed(
            self, input_ids: Tensor, cu_seqlens: Tensor, max_seqlen: int
        ) -> Mapping[str, Any]:
            states = input_ids[:, None].float().repeat(1, 4)
            states[input_ids == RESIDUES.index("W") + FIRST_RESIDUE] = float("nan")
            return {"representations": {6: states}}

    class Forgiving(Callbacks):
        omitted: list[str] = []

        def on_not_finite(self, batch: PackedBatch) -> None:
            self.omitted.extend(batch.sequence_ids)

    bad = pack_batch(
        ["MWV", "MKV", "W"], sequence_ids=["b1", "good", "b2"], ordinals=[10, 11, 12], batch_idx=5
    )
    runner = AsyncInferenceRunner(Spoilt(), "cpu", checkpoint_dir=tmp_path)
    results = list(runner.embed([bad, *batches(1)], callbacks=Forgiving()))
    assert Forgiving.omitted == ["b1", "b2"]
    assert [result.sequence_ids for result in results] == [("good",), ("0a", "0b")]
    kept = load_checkpoint(checkpoint_path(tmp_path, 0, 0), fingerprint=None)
    assert (kept.sequence_ids, kept.metadata["ordinals"]) == (["good", "0a", "0b"], [11, 0, 1])
    assert (kept.embeddings[0] == kept.embeddings[1]).all()  # both are MKV
