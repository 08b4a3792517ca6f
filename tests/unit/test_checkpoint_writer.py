"""Tests of checkpoints: when they are due, how they are written, validated and resumed."""

from __future__ import annotations

import errno
import logging
import os
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.checkpoints import (
    RUN,
    content_by_hand,
    ids_of,
    rows_of,
    write_by_hand,
    write_checkpoint,
    write_shard,
)
from tests.helpers import flip_bit
from vnp_lib.checkpoint import writer as writer_module
from vnp_lib.checkpoint.file import load_checkpoint
from vnp_lib.checkpoint.manifest import CheckpointManifest
from vnp_lib.checkpoint.resume import resume_from_checkpoints, validate_checkpoint_pt
from vnp_lib.checkpoint.survey import heal_shard, survey_checkpoints
from vnp_lib.checkpoint.writer import AsyncCheckpointWriter, CheckpointTrigger
from vnp_lib.errors import (
    CheckpointWriteError,
    FingerprintMismatchError,
    NumericalInstabilityError,
    StorageError,
)
from vnp_lib.plan.paths import checkpoint_path
from vnp_lib.storage import durable
from vnp_lib.storage.durable import DurableOps, marker_path, read_marker


class Clock:
    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


class HeldWriter(AsyncCheckpointWriter):
    """Holds every write until it is released."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.go_on = threading.Event()
        self.started = threading.Semaphore(0)
        self.threads: list[str] = []

    def _write_checkpoint_sync(
        self,
        checkpoint_path: Path,
        embeddings: Tensor,
        sequence_ids: list[str],
        metadata: dict[str, Any],
    ) -> None:
        self.threads.append(threading.current_thread().name)
        self.started.release()
        assert self.go_on.wait(timeout=30)
        super()._write_checkpoint_sync(checkpoint_path, embeddings, sequence_ids, metadata)


class DenyingOps(DurableOps):
    """Denies the n-th call of one operation, as often as there are codes left."""

    def __init__(self, operation: str, codes: list[int]) -> None:
        self.codes = codes
        self.calls = 0
        denied = getattr(super(), operation)

        def deny(*args: Any) -> Any:
            self.calls += 1
            if self.codes:
                code = self.codes.pop(0)
                raise OSError(code, os.strerror(code))
            return denied(*args)

        setattr(self, operation, deny)


class Killed(BaseException):
    """The process is gone."""


class UnsyncedOps(DurableOps):
    """For what no power cut is to befall."""

    def fsync(self, fd: int) -> None:
        pass

    def fsync_directory(self, path: Path) -> None:
        pass


class DyingOps(UnsyncedOps):
    """Ends the process before its n-th operation: the disk sees no later one."""

    def __init__(self, kill_at: int) -> None:
        self._operations_left = kill_at
        self.is_dead = False

    def __getattribute__(self, name: str) -> Any:
        value = super().__getattribute__(name)
        return (
            value
            if name.startswith("_") or name in ("is_dead", "perform")
            else partial(self.perform, value)
        )

    def perform(self, call: Callable[..., Any], *arguments: Any) -> Any:
        self._operations_left -= 1
        self.is_dead = self._operations_left < 0
        if self.is_dead:
            raise Killed
        return call(*arguments)


@pytest.fixture
def deny(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, list[int]], DenyingOps]:
    def use(operation: str, codes: list[int]) -> DenyingOps:
        ops = DenyingOps(operation, codes)
        monkeypatch.setattr(durable, "ops", ops)
        return ops

    return use


# --- when a checkpoint is due ---


def test_trigger_sequence_threshold_fires() -> None:
    trigger = CheckpointTrigger(seq_threshold=100)
    assert trigger.should_checkpoint(50) == (False, None)
    assert trigger.should_checkpoint(50) == (True, "sequence_threshold")


def test_trigger_time_threshold_fires() -> None:
    clock = Clock()
    trigger = CheckpointTrigger(time_threshold_sec=5, clock=clock)
    clock.now_s += 4.9
    assert trigger.should_checkpoint(1) == (False, None)
    clock.now_s += 0.1
    assert trigger.should_checkpoint(1) == (True, "time_threshold")


def test_trigger_emergency_override() -> None:
    """It fires however few sequences there are, and wins over the other two."""
    clock = Clock()
    trigger = CheckpointTrigger(
        seq_threshold=10, time_threshold_sec=5, emergency_override_sec=8, clock=clock
    )
    clock.now_s += 8
    assert trigger.should_checkpoint(1) == (True, "emergency_time_override")
    assert trigger.should_checkpoint(100) == (True, "emergency_time_override")


def test_trigger_reset_clears_counters() -> None:
    clock = Clock()
    trigger = CheckpointTrigger(
        seq_threshold=10, time_threshold_sec=5, emergency_override_sec=8, clock=clock
    )
    clock.now_s += 8
    trigger.should_checkpoint(100)
    trigger.reset()
    assert trigger.should_checkpoint(1) == (False, None)


def test_trigger_viral_mode_overrides_defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VIRNUCPRO_VIRAL_CHECKPOINT_MODE", "true")
    trigger = CheckpointTrigger()
    assert (trigger.seq_threshold, trigger.time_threshold_sec) == (5000, 180.0)
    assert CheckpointTrigger(seq_threshold=999).seq_threshold == 999
    assert CheckpointTrigger(time_threshold_sec=99).time_threshold_sec == 99


def test_trigger_viral_mode_disabled_uses_defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VIRNUCPRO_VIRAL_CHECKPOINT_MODE", raising=False)
    trigger = CheckpointTrigger()
    assert (trigger.seq_threshold, trigger.time_threshold_sec) == (10000, 300.0)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"seq_threshold": 0}, "seq_threshold is 0"),
        ({"time_threshold_sec": -1}, "time_threshold_sec is -1"),
        ({"time_threshold_sec": float("nan")}, "time_threshold_sec is nan"),
        ({"emergency_override_sec": 300}, "emergency_override_sec is 300"),
    ],
)
def test_a_threshold_that_makes_no_sense_is_named(settings: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        CheckpointTrigger(**settings)


# --- writing ---


def test_writer_creates_pt_with_done_marker(tmp_path: Path) -> None:
    path = checkpoint_path(tmp_path, 0, 0)
    write_checkpoint(path, [0, 1])
    assert path.is_file()
    assert marker_path(path).is_file()
    marker = read_marker(path)
    digest = durable.digest_file(path)
    assert marker == {
        "schema": 2,
        "size_bytes": digest.size_bytes,
        "sha256": digest.sha256,
        "rows": 2,
        "width": 4,
        "dtype": "float32",
        "ordinals": [0, 1],
        "fingerprint": RUN,
    }


def test_writer_pt_contains_correct_data(tmp_path: Path) -> None:
    embeddings = torch.randn(10, 128)
    ids = [f"seq{row}" for row in range(10)]
    metadata = {
        "batch_idx": 3,
        "reason": "final",
        "share": 0.5,
        "packed": True,
        "none": None,
        "list": [1, "a"],
    }
    with AsyncCheckpointWriter() as writer:
        writer.write_checkpoint_async(tmp_path / "batch_00000.pt", embeddings, ids, metadata)
    loaded = torch.load(tmp_path / "batch_00000.pt", weights_only=True)
    assert set(loaded) == {"embeddings", "sequence_ids", "metadata"}
    assert torch.equal(loaded["embeddings"], embeddings)
    assert loaded["sequence_ids"] == ids
    assert loaded["metadata"] == metadata


def test_writer_atomic_write_no_temp_file_remains(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "batch_00000.pt", [0])
    assert sorted(os.listdir(tmp_path)) == ["batch_00000.pt", "batch_00000.pt.done"]


@pytest.mark.parametrize(
    "as_array", [lambda rows: rows.numpy(), lambda rows: rows], ids=["numpy", "tensor"]
)
def test_writer_copies_numpy_data_safely(tmp_path: Path, as_array: Callable[[Tensor], Any]) -> None:
    """What the caller does to its array, ids and metadata afterwards reaches no file."""
    rows = as_array(torch.ones(4, 3))
    ids, metadata = ["a", "b", "c", "d"], {"ordinals": [0, 1, 2, 3]}
    with HeldWriter() as writer:
        writer.write_checkpoint_async(tmp_path / "batch_00000.pt", rows, ids, metadata)
        assert writer.started.acquire(timeout=30)
        rows[:] = 999.0
        ids[0] = "overwritten"
        metadata["ordinals"][0] = 999
        writer.go_on.set()
    loaded = load_checkpoint(tmp_path / "batch_00000.pt", fingerprint=None)
    assert (loaded.embeddings == 1).all()
    assert loaded.sequence_ids == ["a", "b", "c", "d"]
    assert loaded.metadata == {"ordinals": [0, 1, 2, 3]}


def test_writer_gpu_to_cpu_transfer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The copy to the CPU is the caller's, and the first thing that happens to the tensor."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    embeddings = torch.randn(3, 4, device=device)
    transfers: list[tuple[str, str]] = []
    to, numpy = Tensor.to, Tensor.numpy

    def recorded_to(tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        transfers.append((f"to {args[0]}", threading.current_thread().name))
        return to(tensor, *args, **kwargs)

    def recorded_numpy(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        transfers.append(("numpy", threading.current_thread().name))
        return numpy(tensor, *args, **kwargs)

    monkeypatch.setattr(Tensor, "to", recorded_to)
    monkeypatch.setattr(Tensor, "numpy", recorded_numpy)
    with AsyncCheckpointWriter() as writer:
        writer.write_checkpoint_async(tmp_path / "batch_00000.pt", embeddings, ["a", "b", "c"], {})
    here = threading.current_thread().name
    assert transfers == [("to cpu", here), ("numpy", here)]
    loaded = torch.load(tmp_path / "batch_00000.pt", weights_only=True)["embeddings"]
    assert loaded.device.type == "cpu"
    assert torch.equal(loaded, embeddings.cpu())


def test_a_write_says_how_long_it_took(tmp_path: Path) -> None:
    times_s = iter([5.0, 7.5])
    with AsyncCheckpointWriter(clock=lambda: next(times_s)) as writer:
        written = writer.write_checkpoint_async(
            tmp_path / "batch_00000.pt", torch.ones(1, 2), ["a"], {}
        )
    assert written.result() == 2.5


def test_writer_shutdown_waits_for_pending(tmp_path: Path) -> None:
    writer = AsyncCheckpointWriter()
    for batch_idx in range(3):
        writer.write_checkpoint_async(
            tmp_path / f"batch_{batch_idx:05d}.pt", torch.ones(2, 3), ["a", "b"], {}
        )
    writer.shutdown()
    assert len(list(tmp_path.glob("*.pt"))) == len(list(tmp_path.glob("*.pt.done"))) == 3


def test_writer_async_failure_propagates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save, calls = torch.save, []

    def fail_second(*args: Any, **kwargs: Any) -> None:
        calls.append(args)
        if len(calls) == 2:
            raise OSError("the disk said no")
        save(*args, **kwargs)

    monkeypatch.setattr(torch, "save", fail_second)
    writer = AsyncCheckpointWriter()
    first, second = (tmp_path / f"batch_0000{batch_idx}.pt" for batch_idx in range(2))
    writer.write_checkpoint_async(first, torch.ones(1, 2), ["a"], {})
    writer.write_checkpoint_async(second, torch.ones(1, 2), ["b"], {})
    with pytest.raises(
        RuntimeError, match=r"1 checkpoint write\(s\) failed: .*batch_00001.pt.*the disk said no"
    ):
        writer.wait_all()
    writer.shutdown()
    assert validate_checkpoint_pt(first) == (True, "")
    assert sorted(os.listdir(tmp_path)) == ["batch_00000.pt", "batch_00000.pt.done"]


def test_writer_has_pending_returns_true_before_completion(tmp_path: Path) -> None:
    with HeldWriter() as writer:
        writer.write_checkpoint_async(tmp_path / "batch_00000.pt", torch.ones(1, 2), ["a"], {})
        assert writer.has_pending()
        writer.go_on.set()
        writer.wait_all()
        assert not writer.has_pending()


def test_the_same_content_gives_the_same_bytes(tmp_path: Path) -> None:
    """Whatever the string objects and the order of keys: a second writer's file is the same."""
    ids = ["cpu", "storage", "embeddings", "a", "a", "seq0"]
    made = [bytes(id_, "ascii").decode() for id_ in ids]
    first = {"ordinals": list(range(6)), "fingerprint": RUN, "reason": "final"}
    rows = torch.randn(6, 4)
    with AsyncCheckpointWriter() as writer:
        writer.write_checkpoint_async(tmp_path / "a.pt", rows, ids, first)
        writer.write_checkpoint_async(
            tmp_path / "b.pt", rows.numpy(), made, {key: first[key] for key in reversed(first)}
        )
    assert (tmp_path / "a.pt").read_bytes() == (tmp_path / "b.pt").read_bytes()
    assert (
        marker_path(tmp_path / "a.pt").read_bytes() == marker_path(tmp_path / "b.pt").read_bytes()
    )


@pytest.mark.parametrize(
    "view",
    [
        lambda base: base[500:510],
        lambda base: base[:20:2],
        lambda base: base.T[:10],
        lambda base: base[0].expand(10, -1),
    ],
    ids=["slice", "stride", "transposed", "expanded"],
)
def test_a_view_saves_its_own_rows_only(tmp_path: Path, view: Callable[[Tensor], Tensor]) -> None:
    rows = view(torch.randn(1000, 1000))
    with AsyncCheckpointWriter() as writer:
        writer.write_checkpoint_async(
            tmp_path / "batch_00000.pt", rows, [str(row) for row in range(10)], {}
        )
    assert (tmp_path / "batch_00000.pt").stat().st_size < rows.nbytes + 10_000
    assert np.array_equal(
        load_checkpoint(tmp_path / "batch_00000.pt", fingerprint=None).embeddings, rows.numpy()
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_every_floating_type_comes_back_exactly(tmp_path: Path, dtype: torch.dtype) -> None:
    rows = torch.nn.Parameter(torch.randn(3, 5).to(dtype))
    write_checkpoint(tmp_path / "batch_00000.pt", [0, 1, 2], rows=rows)
    saved = torch.load(tmp_path / "batch_00000.pt", weights_only=True)["embeddings"]
    assert saved.dtype == dtype
    assert not saved.requires_grad
    loaded = load_checkpoint(tmp_path / "batch_00000.pt", fingerprint=RUN).embeddings
    assert loaded.dtype == (np.float32 if dtype == torch.bfloat16 else saved.numpy().dtype)
    assert np.array_equal(loaded.astype(np.float64), rows.detach().double().numpy())


@pytest.mark.parametrize(
    "rows", [np.ones((3, 2))[::-1], np.ones((2, 3), dtype=">f4").T], ids=["reversed", "big-endian"]
)
def test_every_memory_layout_of_numpy_is_taken(tmp_path: Path, rows: Any) -> None:
    rows.flags.writeable = False
    write_checkpoint(tmp_path / "batch_00000.pt", [0, 1, 2], rows=rows)
    assert (load_checkpoint(tmp_path / "batch_00000.pt", fingerprint=RUN).embeddings == rows).all()


@pytest.mark.parametrize(
    ("changes", "error", "reason"),
    [
        ({"embeddings": [[1.0]]}, TypeError, "is a list; it must be a tensor or a NumPy array"),
        ({"embeddings": torch.ones(2)}, ValueError, "shape mismatch"),
        ({"embeddings": torch.ones(0, 4), "sequence_ids": []}, ValueError, "shape mismatch"),
        (
            {"embeddings": torch.ones(2, 4, dtype=torch.int64)},
            ValueError,
            "is int64; it must be a floating type",
        ),
        ({"sequence_ids": ["a"]}, ValueError, "2 rows, 1 sequence_ids"),
        ({"sequence_ids": ["a", 7]}, ValueError, "no list of strings"),
        ({"metadata": {"ordinals": [0]}}, ValueError, "2 rows, 1 ordinals"),
        ({"metadata": {"ordinals": [3, 3]}}, ValueError, "an ordinal is there twice"),
        ({"metadata": {"ordinals": [0, -1]}}, ValueError, "whole numbers from 0"),
        ({"metadata": {"fingerprint": 7}}, ValueError, "fingerprint is no string"),
        ({"metadata": {"path": Path("a")}}, TypeError, r"metadata\['path'\] holds a PosixPath"),
        (
            {"metadata": {"ordinals": np.arange(2)}},
            TypeError,
            r"metadata\['ordinals'\] holds a ndarray",
        ),
        (
            {"embeddings": torch.tensor([[1.0], [torch.nan]])},
            NumericalInstabilityError,
            "not finite: b$",
        ),
        (
            {"embeddings": torch.tensor([[torch.inf], [0.0]])},
            NumericalInstabilityError,
            "not finite: a$",
        ),
    ],
)
def test_invalid_content_is_refused_up_front(
    tmp_path: Path, changes: dict[str, Any], error: type[Exception], reason: str
) -> None:
    given: dict[str, Any] = {
        "embeddings": torch.ones(2, 4),
        "sequence_ids": ["a", "b"],
        "metadata": {},
    } | changes
    with AsyncCheckpointWriter() as writer:
        for _ in range(3):  # and takes none of the room in flight
            with pytest.raises(error, match=reason):
                writer.write_checkpoint_async(tmp_path / "batch_00000.pt", **given)
    assert os.listdir(tmp_path) == []


def test_rows_whose_sum_is_too_large_are_finite_all_the_same(tmp_path: Path) -> None:
    rows = torch.full((3, 4), torch.finfo(torch.float32).max)
    write_checkpoint(tmp_path / "batch_00000.pt", [0, 1, 2], rows=rows)
    assert (
        load_checkpoint(tmp_path / "batch_00000.pt", fingerprint=RUN).embeddings == rows.numpy()
    ).all()


def test_pieces_are_written_as_one_checkpoint(tmp_path: Path) -> None:
    """What is handed over in pieces is written as if it were whole."""
    rows, ids, metadata = (
        rows_of([0, 1, 2, 3, 4]),
        ids_of([0, 1, 2, 3, 4]),
        {"ordinals": [0, 1, 2, 3, 4]},
    )
    with AsyncCheckpointWriter() as writer:
        writer.write_checkpoint_async(tmp_path / "whole.pt", rows, ids, metadata)
        writer.hand_over(tmp_path / "pieces.pt", [rows[:2], rows[2:3], rows[3:]], ids, metadata)
    assert (tmp_path / "pieces.pt").read_bytes() == (tmp_path / "whole.pt").read_bytes()


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        (
            {"pieces": [torch.ones(1, 4), torch.tensor([[1.0, 1.0, torch.inf, -torch.inf]])]},
            "not finite: b$",
        ),
        ({"pieces": [torch.ones(1, 4)]}, "shape mismatch"),
        ({"metadata": {"ordinals": [3, 3]}}, "an ordinal is there twice"),
    ],
)
def test_what_is_handed_over_and_is_no_checkpoint_is_not_written(
    tmp_path: Path, changes: dict[str, Any], reason: str
) -> None:
    given = {"pieces": [torch.ones(2, 4)], "sequence_ids": ["a", "b"], "metadata": {}} | changes
    with AsyncCheckpointWriter() as writer:
        written = writer.hand_over(tmp_path / "batch_00000.pt", **given)
        with pytest.raises(CheckpointWriteError, match=reason):
            writer.wait_all()
    assert written.exception() is not None
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("size_bytes", "expected"), [(1000, 2), (200 * 1024**2, 1), (300 * 1024**2, 1)]
)
def test_a_full_queue_holds_the_caller_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size_bytes: int, expected: int
) -> None:
    """Two checkpoints or 256 MB may be in flight, or one of any size."""
    real_limit = writer_module.MAX_IN_FLIGHT_BYTES
    scale = 1000
    monkeypatch.setattr(writer_module, "MAX_IN_FLIGHT_BYTES", real_limit // scale)
    rows = torch.ones(1, max(1, size_bytes // scale // 4))
    queued = 0

    def queue_five() -> None:
        nonlocal queued
        for batch_idx in range(5):
            writer.write_checkpoint_async(tmp_path / f"batch_{batch_idx:05d}.pt", rows, ["a"], {})
            queued += 1

    with HeldWriter() as writer:
        caller = threading.Thread(target=queue_five)
        caller.start()
        assert writer.started.acquire(timeout=30)
        caller.join(timeout=0.3)
        queued_at_first = queued
        writer.go_on.set()
        caller.join(timeout=30)
    assert (queued_at_first, queued) == (expected, 5)
    assert len(list(tmp_path.glob("*.done"))) == 5


def test_an_error_surfaces_at_the_next_checkpoint_and_stays(tmp_path: Path, deny: Any) -> None:
    deny("fsync", [errno.EROFS])
    writer = AsyncCheckpointWriter()
    future = writer.write_checkpoint_async(tmp_path / "batch_00000.pt", torch.ones(1, 2), ["a"], {})
    assert isinstance(future.exception(timeout=30), StorageError)
    with pytest.raises(CheckpointWriteError, match="Read-only file system"):
        writer.hand_over(tmp_path / "batch_00001.pt", [torch.ones(1, 2)], ["a"], {})
    with pytest.raises(CheckpointWriteError, match="Read-only file system"):
        writer.wait_all()
    assert not writer.has_pending()
    writer.shutdown()
    assert os.listdir(tmp_path) == []


def test_leaving_the_block_raises_an_unseen_error(tmp_path: Path, deny: Any) -> None:
    """Leaving the block raises an error that nobody has heard of."""
    deny("link", [errno.EROFS])
    with pytest.raises(CheckpointWriteError), AsyncCheckpointWriter() as writer:
        writer.write_checkpoint_async(tmp_path / "batch_00000.pt", torch.ones(1, 2), ["a"], {})


def test_leaving_the_block_by_an_error_waits_and_lets_it_through(tmp_path: Path) -> None:
    def compute() -> None:
        with AsyncCheckpointWriter() as writer:
            writer.write_checkpoint_async(tmp_path / "batch_00000.pt", torch.ones(1, 2), ["a"], {})
            raise KeyError("the model's")

    with pytest.raises(KeyError):
        compute()
    assert validate_checkpoint_pt(tmp_path / "batch_00000.pt") == (True, "")


def test_waiting_has_a_limit_and_forgets_nothing(tmp_path: Path) -> None:
    with HeldWriter() as writer:
        writer.write_checkpoint_async(tmp_path / "batch_00000.pt", torch.ones(1, 2), ["a"], {})
        with pytest.raises(TimeoutError, match="1 checkpoints are still being written"):
            writer.wait_all(timeout=0.01)
        assert writer.has_pending()
        writer.go_on.set()
    assert validate_checkpoint_pt(tmp_path / "batch_00000.pt") == (True, "")


def test_a_cancelled_write_is_a_failure(tmp_path: Path) -> None:
    writer = HeldWriter()
    writer.write_checkpoint_async(tmp_path / "batch_00000.pt", torch.ones(1, 2), ["a"], {})
    assert writer.write_checkpoint_async(
        tmp_path / "batch_00001.pt", torch.ones(1, 2), ["a"], {}
    ).cancel()
    writer.go_on.set()
    with pytest.raises(CheckpointWriteError, match="cancelled"):
        writer.wait_all()
    writer.shutdown()


@pytest.mark.parametrize("operation", ["open", "write", "fsync", "link", "fsync_directory"])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_waited_for(tmp_path: Path, deny: Any, operation: str, code: int) -> None:
    (tmp_path / "shard_0").mkdir()
    slept: list[float] = []
    deny(operation, [code] * 4)
    with AsyncCheckpointWriter(sleep=slept.append) as writer:
        writer.write_checkpoint_async(
            checkpoint_path(tmp_path, 0, 0), rows_of([0, 1]), ids_of([0, 1]), {}
        )
    assert slept == [1, 5, 15, 30]
    assert np.array_equal(
        load_checkpoint(checkpoint_path(tmp_path, 0, 0), fingerprint=None).embeddings,
        rows_of([0, 1]),
    )
    assert sorted(os.listdir(tmp_path / "shard_0")) == ["batch_00000.pt", "batch_00000.pt.done"]


def test_a_full_disk_is_a_clear_error(tmp_path: Path, deny: Any) -> None:
    """A disk that stays full ends in a clear error and spoils nothing."""
    committed = write_shard(tmp_path, 2)
    slept: list[float] = []
    deny("write", [errno.ENOSPC] * 1000)
    writer = AsyncCheckpointWriter(sleep=slept.append)
    writer.write_checkpoint_async(checkpoint_path(tmp_path, 0, 2), rows_of([6]), ids_of([6]), {})
    with pytest.raises(
        StorageError,
        match=r"batch_00002.pt: the disk is full .* make room and start the same run again",
    ):
        writer.wait_all()
    writer.shutdown()
    assert slept == [1, 5, 15, 30]
    assert [
        record.path for record in survey_checkpoints(tmp_path, RUN, verify_digests=True).valid
    ] == committed
    assert len(os.listdir(tmp_path / "shard_0")) == 4


@pytest.mark.parametrize("operation", ["write", "fsync", "link", "fsync_directory"])
def test_an_io_error_is_retried_on_a_new_file(tmp_path: Path, deny: Any, operation: str) -> None:
    """After an io error the rows are written once more to a new file."""
    (tmp_path / "shard_0").mkdir()
    deny(operation, [errno.EIO])
    write_checkpoint(checkpoint_path(tmp_path, 0, 0), [0, 1])
    assert validate_checkpoint_pt(checkpoint_path(tmp_path, 0, 0)) == (True, "")
    deny(operation, [errno.EIO] * 2)
    with pytest.raises(StorageError, match="see to the storage"):
        write_checkpoint(checkpoint_path(tmp_path, 0, 1), [2, 3])
    assert sorted(os.listdir(tmp_path / "shard_0")) == ["batch_00000.pt", "batch_00000.pt.done"]


def test_a_failed_fsync_is_never_repeated_on_its_descriptor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class FailingFsync(DurableOps):
        opened: list[int] = []
        synced: list[int] = []

        def open(self, path: Path, flags: int) -> int:
            self.opened.append(super().open(path, flags))
            return self.opened[-1]

        def fsync(self, fd: int) -> None:
            self.synced.append(len(self.opened))
            if len(self.synced) == 1:
                raise OSError(errno.EIO, "lost pages")
            super().fsync(fd)

    monkeypatch.setattr(durable, "ops", FailingFsync())
    write_checkpoint(tmp_path / "batch_00000.pt", [0])
    assert FailingFsync.synced == [
        1,
        2,
        3,
    ]  # the first file, the second file, the marker: each once


def test_the_marker_is_written_after_the_file_is_durable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[str] = []

    class Recording(DurableOps):
        def fsync(self, fd: int) -> None:
            steps.append("fsync")
            super().fsync(fd)

        def link(self, source: Path, target: Path) -> None:
            steps.append(target.suffix)
            super().link(source, target)

        def fsync_directory(self, path: Path) -> None:
            steps.append("fsync_directory")
            super().fsync_directory(path)

    manifest = CheckpointManifest(tmp_path / "manifest.json")
    manifest.initialize(1, "", "")
    monkeypatch.setattr(durable, "ops", Recording())
    monkeypatch.setattr(manifest, "update_shard_checkpoint", lambda *_: steps.append("manifest"))
    with AsyncCheckpointWriter(manifest=manifest, rank=0) as writer:
        writer.write_checkpoint_async(tmp_path / "batch_00000.pt", torch.ones(1, 2), ["a"], {})
        writer.wait_all()
        steps.append("acknowledged")
    made_directory = ["fsync_directory"]
    file, marker = ["fsync", ".pt", "fsync_directory"], ["fsync", ".done", "fsync_directory"]
    assert steps == made_directory + file + marker + ["manifest", "acknowledged"]


def test_a_committed_checkpoint_is_in_the_manifest(tmp_path: Path) -> None:
    manifest = CheckpointManifest(tmp_path / "manifest.json")
    manifest.initialize(2, "", "")
    with AsyncCheckpointWriter(manifest=manifest, rank=1) as writer:
        writer.write_checkpoint_async(
            checkpoint_path(tmp_path, 1, 7), torch.ones(3, 2), ["a", "b", "c"], {}
        )
    shard = manifest.get_shard_status(1)
    assert shard is not None
    assert (shard["last_checkpoint_batch"], shard["total_sequences"]) == (7, 3)
    with pytest.raises(ValueError, match="rank is None"):
        AsyncCheckpointWriter(manifest=manifest)


def test_a_lost_manifest_costs_no_checkpoint(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    manifest = CheckpointManifest(tmp_path / "manifest.json")
    with AsyncCheckpointWriter(manifest=manifest, rank=0) as writer:
        writer.write_checkpoint_async(checkpoint_path(tmp_path, 0, 0), torch.ones(1, 2), ["a"], {})
    assert validate_checkpoint_pt(checkpoint_path(tmp_path, 0, 0)) == (True, "")
    assert "is committed, but not in the manifest yet" in caplog.text


def test_another_writers_checkpoint_is_never_overwritten(tmp_path: Path) -> None:
    path = checkpoint_path(tmp_path, 0, 0)
    write_checkpoint(path, [0, 1])
    before = path.read_bytes()
    with pytest.raises(StorageError, match="another writer has just written it"):
        write_checkpoint(path, [2, 3])
    assert path.read_bytes() == before
    assert validate_checkpoint_pt(path) == (True, "")


@pytest.mark.parametrize("remainder", ["file", "marker", "damaged"])
def test_what_a_crash_left_under_the_name_is_moved_aside(tmp_path: Path, remainder: str) -> None:
    path = checkpoint_path(tmp_path, 0, 0)
    write_checkpoint(path, [0, 1])
    if remainder == "file":
        marker_path(path).unlink()
    elif remainder == "marker":
        path.unlink()
    else:
        flip_bit(path, 8000)
    write_checkpoint(path, [2, 3])
    assert load_checkpoint(path, fingerprint=RUN).sequence_ids == ids_of([2, 3])
    assert len(list((tmp_path / "shard_0" / "damaged").iterdir())) == (
        2 if remainder == "damaged" else 1
    )


@pytest.mark.parametrize("remainder", [None, "file", "marker"])
def test_a_kill_loses_doubles_and_mislabels_no_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, remainder: str | None
) -> None:
    """Also where an earlier crash has left half a checkpoint under the name."""
    kill_at, is_over = 0, False
    while not is_over:
        monkeypatch.setattr(durable, "ops", UnsyncedOps())
        run = tmp_path / str(kill_at)
        write_checkpoint(checkpoint_path(run, 0, 0), [0, 1])
        if remainder is not None:
            write_checkpoint(checkpoint_path(run, 0, 1), [2, 3])
            (
                checkpoint_path(run, 0, 1)
                if remainder == "marker"
                else marker_path(checkpoint_path(run, 0, 1))
            ).unlink()
        dying = DyingOps(kill_at)
        monkeypatch.setattr(durable, "ops", dying)
        try:
            write_checkpoint(checkpoint_path(run, 0, 1), [2, 3])
        except (Killed, CheckpointWriteError):
            assert dying.is_dead
        is_over = not dying.is_dead
        monkeypatch.setattr(durable, "ops", UnsyncedOps())

        next_batch_idx = heal_shard(run, 0, RUN)
        is_done = survey_checkpoints(run, RUN, verify_digests=True).done_mask(5)
        assert is_done[:2].all()
        assert is_done[2] == is_done[3]
        write_checkpoint(
            checkpoint_path(run, 0, next_batch_idx),
            [ordinal for ordinal in range(5) if not is_done[ordinal]],
        )
        loaded = [
            load_checkpoint(record.path, fingerprint=RUN)
            for record in survey_checkpoints(run, RUN, verify_digests=True).valid
        ]
        ordinals = [ordinal for each in loaded for ordinal in each.metadata["ordinals"]]
        assert sorted(ordinals) == list(range(5))
        assert [id_ for each in loaded for id_ in each.sequence_ids] == ids_of(ordinals)
        assert np.array_equal(
            np.concatenate([each.embeddings for each in loaded]), rows_of(ordinals)
        )
        kill_at += 1
    assert kill_at > 15


def test_hostile_ids_are_data(tmp_path: Path) -> None:
    """They come back as they are, and nothing is written anywhere else."""
    ids = [
        "../../escape",
        "/etc/passwd",
        "nul\0byte",
        "new\nline",
        "x" * 300,
        "",
        "\udc80",
        "batch_00000.pt",
        "é" * 200,
    ]
    path = checkpoint_path(tmp_path / "run", 0, 0)
    with AsyncCheckpointWriter() as writer:
        writer.write_checkpoint_async(
            path, torch.ones(len(ids), 2), ids, {"ordinals": list(range(len(ids)))}
        )
    assert load_checkpoint(path, fingerprint=None).sequence_ids == ids
    written = {
        each.relative_to(tmp_path).as_posix() for each in tmp_path.rglob("*") if each.is_file()
    }
    assert written == {"run/shard_0/batch_00000.pt", "run/shard_0/batch_00000.pt.done"}


# --- believing ---


def test_validate_empty_file_fails(tmp_path: Path) -> None:
    path = tmp_path / "batch_00000.pt"
    path.touch()
    marker_path(path).touch()
    is_valid, reason = validate_checkpoint_pt(path)
    assert not is_valid
    assert "0 bytes" in reason


def test_validate_no_done_marker_fails(tmp_path: Path) -> None:
    path = tmp_path / "batch_00000.pt"
    torch.save(content_by_hand(), path)
    is_valid, reason = validate_checkpoint_pt(path)
    assert not is_valid
    assert "missing .done marker" in reason.lower()


def test_validate_corrupt_torch_file_fails(tmp_path: Path) -> None:
    path = tmp_path / "batch_00000.pt"
    path.write_bytes(b"these bytes are no checkpoint")
    marker_path(path).touch()
    is_valid, reason = validate_checkpoint_pt(path)
    assert not is_valid
    assert "failed to load" in reason


def test_validate_missing_keys_fails(tmp_path: Path) -> None:
    write_by_hand(tmp_path / "batch_00000.pt", {"embeddings": torch.ones(3, 4)})
    is_valid, reason = validate_checkpoint_pt(tmp_path / "batch_00000.pt")
    assert not is_valid
    assert reason == "missing required keys: sequence_ids, metadata"


def test_validate_shape_mismatch_fails(tmp_path: Path) -> None:
    write_by_hand(
        tmp_path / "batch_00000.pt",
        content_by_hand(embeddings=torch.ones(10, 4), sequence_ids=["a"] * 5),
    )
    is_valid, reason = validate_checkpoint_pt(tmp_path / "batch_00000.pt")
    assert not is_valid
    assert reason == "shape mismatch: 10 rows, 5 sequence_ids"


def test_validate_valid_checkpoint_passes(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "batch_00000.pt", [0, 1, 2])
    assert validate_checkpoint_pt(tmp_path / "batch_00000.pt") == (True, "")


# --- resuming ---


def test_resume_no_checkpoints_returns_empty_4tuple(tmp_path: Path) -> None:
    assert tuple(resume_from_checkpoints(tmp_path, 0)) == ([], None, 0, [])


def test_resume_force_restart_ignores_checkpoints(tmp_path: Path) -> None:
    write_shard(tmp_path, 2)
    assert tuple(resume_from_checkpoints(tmp_path, 0, force_restart=True)) == ([], None, 0, [])


def test_resume_loads_valid_pt_checkpoints_in_order(tmp_path: Path) -> None:
    write_checkpoint(checkpoint_path(tmp_path, 0, 1), [7, 2])
    write_checkpoint(checkpoint_path(tmp_path, 0, 0), [9, 4, 5])
    ids, embeddings, resume_batch_idx, corrupted_ids = resume_from_checkpoints(tmp_path, 0)
    assert ids == ids_of([9, 4, 5, 7, 2])
    assert embeddings is not None
    assert np.array_equal(embeddings, rows_of([9, 4, 5, 7, 2]))
    assert (resume_batch_idx, corrupted_ids) == (2, [])


def test_resume_stops_at_corrupted_checkpoint_and_returns_corrupted_ids(tmp_path: Path) -> None:
    paths = write_shard(tmp_path, 3)
    marker_path(paths[1]).unlink()
    ids, embeddings, resume_batch_idx, corrupted_ids = resume_from_checkpoints(tmp_path, 0)
    assert ids == ids_of([0, 1, 2])
    assert embeddings is not None
    assert np.array_equal(embeddings, rows_of([0, 1, 2]))
    assert resume_batch_idx == 1
    assert corrupted_ids == ids_of([3, 4, 5, 6, 7, 8])


def test_resume_data_integrity_shapes_align(tmp_path: Path) -> None:
    for batch_idx, rows in enumerate((5, 3)):
        ids = [f"{batch_idx}-{row}" for row in range(rows)]
        write_by_hand(
            checkpoint_path(tmp_path, 0, batch_idx),
            {"embeddings": torch.randn(rows, 128), "sequence_ids": ids, "metadata": {}},
        )
    resumed = resume_from_checkpoints(tmp_path, 0)
    assert resumed.embeddings is not None
    assert resumed.embeddings.shape == (8, 128)
    assert len(resumed.ids) == 8


@pytest.mark.parametrize("dtype", [torch.float32, torch.int64])
def test_resume_data_integrity_no_corruption(tmp_path: Path, dtype: torch.dtype) -> None:
    rows = torch.arange(30, dtype=dtype).reshape(10, 3)
    content = {"embeddings": rows, "sequence_ids": [str(row) for row in range(10)], "metadata": {}}
    write_by_hand(checkpoint_path(tmp_path, 0, 0), content)
    resumed = resume_from_checkpoints(tmp_path, 0)
    assert resumed.embeddings is not None
    assert np.array_equal(resumed.embeddings, np.arange(30).reshape(10, 3))


def test_numbers_after_a_stop_are_free(tmp_path: Path) -> None:
    """The good one after the damaged one is computed again; otherwise its rows would be double."""
    paths = write_shard(tmp_path, 3)
    os.truncate(paths[1], 10)
    resumed = resume_from_checkpoints(tmp_path, 0)
    assert resumed.corrupted_ids == ids_of(
        [6, 7, 8]
    )  # of the cut one nothing is known, and nothing is made up
    assert [path.exists() for path in paths] == [True, False, False]
    assert not marker_path(paths[1]).exists()
    write_checkpoint(paths[1], [3, 4, 5])
    write_checkpoint(paths[2], [6, 7, 8])
    assert resume_from_checkpoints(tmp_path, 0).ids == ids_of(list(range(9)))


def test_skipping_costs_the_damaged_one_only(tmp_path: Path) -> None:
    paths = write_shard(tmp_path, 3)
    flip_bit(paths[1], 9000)
    resumed = resume_from_checkpoints(tmp_path, 0, on_damage="skip")
    assert resumed.ids == ids_of([0, 1, 2, 6, 7, 8])
    assert resumed.embeddings is not None
    assert np.array_equal(resumed.embeddings, rows_of([0, 1, 2, 6, 7, 8]))
    assert resumed.resume_batch_idx == 3
    assert [path.exists() for path in paths] == [True, False, True]


def test_skipping_on_failing_storage_is_refused(tmp_path: Path) -> None:
    paths = write_shard(tmp_path, 5)
    for path in paths[:4]:
        flip_bit(path, 9000)
    with pytest.raises(StorageError, match="4 of 5 checkpoints are damaged"):
        resume_from_checkpoints(tmp_path, 0, on_damage="skip")
    assert all(path.exists() for path in paths)


def test_a_forced_restart_moves_the_old_checkpoints_aside(tmp_path: Path) -> None:
    (path,) = write_shard(tmp_path, 1)
    resume_from_checkpoints(tmp_path, 0, force_restart=True)
    write_checkpoint(path, [0])
    assert len(list((tmp_path / "shard_0" / "superseded").glob("*.pt"))) == 1


def test_rows_of_another_width_are_not_mixed_in(tmp_path: Path) -> None:
    write_checkpoint(checkpoint_path(tmp_path, 0, 0), [0, 1])
    write_checkpoint(checkpoint_path(tmp_path, 0, 1), [2, 3], rows=torch.ones(2, 7))
    resumed = resume_from_checkpoints(tmp_path, 0)
    assert resumed.ids == ids_of([0, 1])
    assert resumed.corrupted_ids == ids_of([2, 3])


def test_resuming_another_run_is_refused_and_touches_nothing(tmp_path: Path) -> None:
    paths = write_shard(tmp_path, 2)
    flip_bit(paths[1], 9000)
    with pytest.raises(
        FingerprintMismatchError, match=f"is of the run '{RUN}', and this run is 'other'"
    ):
        resume_from_checkpoints(tmp_path, 0, fingerprint="other")
    assert all(path.exists() for path in paths)
    assert resume_from_checkpoints(tmp_path, 0, fingerprint=RUN).ids == ids_of([0, 1, 2])


def test_resuming_over_and_over_changes_nothing(tmp_path: Path) -> None:
    paths = write_shard(tmp_path, 3)
    before = {path: path.read_bytes() for path in paths}
    results = [resume_from_checkpoints(tmp_path, 0) for _ in range(4)]
    assert all(result.ids == ids_of(list(range(9))) for result in results)
    assert {path: path.read_bytes() for path in paths} == before
    assert sorted(os.listdir(tmp_path / "shard_0")) == sorted(
        name for path in paths for name in (path.name, marker_path(path).name)
    )


def test_resuming_sets_the_manifests_counts_from_what_is_used(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    manifest = CheckpointManifest(tmp_path / "manifest.json")
    paths = write_shard(tmp_path, 2)
    resume_from_checkpoints(tmp_path, 0, manifest=manifest)
    assert "the manifest does not list the used checkpoints of shard 0" in caplog.text
    manifest.initialize(1, "", "")
    os.truncate(paths[1], 10)
    with caplog.at_level(logging.WARNING):
        resume_from_checkpoints(tmp_path, 0, manifest=manifest)
    assert manifest.get_global_progress()["total_sequences_checkpointed"] == 3
    assert "the file has 10 bytes" in caplog.text
