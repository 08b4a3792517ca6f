"""Checkpoints: when they are due, how they are written, what is believed of them, and what a resume makes of them."""

from __future__ import annotations

import errno
import json
import logging
import os
import pickle
import threading
import warnings
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from vnp_lib import checkpoint, checkpoint_file, files
from vnp_lib.checkpoint import (
    AsyncCheckpointWriter,
    CheckpointTrigger,
    resume_from_checkpoints,
    validate_checkpoint_pt,
)
from vnp_lib.checkpoint_file import batch_idx_of, load_checkpoint, set_aside
from vnp_lib.checkpoint_survey import Damage, Survey, heal_shard, survey_checkpoints
from vnp_lib.failures import (
    CheckpointError,
    CheckpointWriteError,
    FingerprintMismatchError,
    NumericalInstabilityError,
    StorageError,
)
from vnp_lib.files import DurableOps, marker_path, read_marker, write_file, write_marker
from vnp_lib.manifest import CheckpointManifest
from vnp_lib.plan import checkpoint_path

RUN = "f1" * 32


class Clock:
    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


def ids_of(ordinals: list[int]) -> list[str]:
    return [f"seq{ordinal}" for ordinal in ordinals]


def rows_of(ordinals: list[int], width: int = 4) -> Tensor:
    """A row that only its ordinal can have."""
    return torch.tensor(ordinals, dtype=torch.float32)[:, None] * 100 + torch.arange(width)


def write(path: Path, ordinals: list[int], *, rows: Tensor | None = None, fingerprint: str = RUN) -> None:
    with AsyncCheckpointWriter() as writer:
        writer.write_checkpoint_async(
            path,
            rows_of(ordinals) if rows is None else rows,
            ids_of(ordinals),
            {"ordinals": ordinals, "fingerprint": fingerprint},
        )


def write_shard(checkpoints_dir: Path, num_checkpoints: int, *, rank: int = 0, rows: int = 3) -> list[Path]:
    """Checkpoints of `rows` ordinals each, counted through."""
    paths = [checkpoint_path(checkpoints_dir, rank, batch_idx) for batch_idx in range(num_checkpoints)]
    for batch_idx, path in enumerate(paths):
        write(path, list(range(batch_idx * rows, (batch_idx + 1) * rows)))
    return paths


def write_by_hand(path: Path, content: Any) -> None:
    """As other tools do: torch.save and an empty marker."""
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(content, path)
    marker_path(path).touch()


def content_by_hand(rows: int = 3, **changes: Any) -> dict[str, Any]:
    ids = [f"s{row}" for row in range(rows)]
    return {"embeddings": torch.ones(rows, 4), "sequence_ids": ids, "metadata": {}} | changes


def flip_bit(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position // 8] ^= 1 << position % 8
    path.write_bytes(data)


class HeldWriter(AsyncCheckpointWriter):
    """Holds every write until it is told to go on."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.go_on = threading.Event()
        self.started = threading.Semaphore(0)
        self.threads: list[str] = []

    def _write_checkpoint_sync(
        self, checkpoint_path: Path, embeddings: Tensor, sequence_ids: list[str], metadata: dict[str, Any]
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
    """Ends the process, as far as the disk can tell, before its n-th operation: nothing happens any more."""

    def __init__(self, kill_at: int) -> None:
        self._operations_left = kill_at
        self.is_dead = False

    def __getattribute__(self, name: str) -> Any:
        value = super().__getattribute__(name)
        return value if name.startswith("_") or name in ("is_dead", "perform") else partial(self.perform, value)

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
        monkeypatch.setattr(files, "ops", ops)
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
    trigger = CheckpointTrigger(seq_threshold=10, time_threshold_sec=5, emergency_override_sec=8, clock=clock)
    clock.now_s += 8
    assert trigger.should_checkpoint(1) == (True, "emergency_time_override")
    assert trigger.should_checkpoint(100) == (True, "emergency_time_override")


def test_trigger_reset_clears_counters() -> None:
    clock = Clock()
    trigger = CheckpointTrigger(seq_threshold=10, time_threshold_sec=5, emergency_override_sec=8, clock=clock)
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
    write(path, [0, 1])
    assert path.is_file()
    assert marker_path(path).is_file()
    marker = read_marker(path)
    digest = files.digest_file(path)
    assert marker == {
        "schema": 1,
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
    metadata = {"batch_idx": 3, "reason": "final", "share": 0.5, "packed": True, "none": None, "list": [1, "a"]}
    with AsyncCheckpointWriter() as writer:
        writer.write_checkpoint_async(tmp_path / "batch_00000.pt", embeddings, ids, metadata)
    loaded = torch.load(tmp_path / "batch_00000.pt", weights_only=True)
    assert set(loaded) == {"embeddings", "sequence_ids", "metadata"}
    assert torch.equal(loaded["embeddings"], embeddings)
    assert loaded["sequence_ids"] == ids
    assert loaded["metadata"] == metadata


def test_writer_atomic_write_no_temp_file_remains(tmp_path: Path) -> None:
    write(tmp_path / "batch_00000.pt", [0])
    assert sorted(os.listdir(tmp_path)) == ["batch_00000.pt", "batch_00000.pt.done"]


@pytest.mark.parametrize("as_array", [lambda rows: rows.numpy(), lambda rows: rows], ids=["numpy", "tensor"])
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
    assert transfers == [("to cpu", threading.current_thread().name)]
    loaded = torch.load(tmp_path / "batch_00000.pt", weights_only=True)["embeddings"]
    assert loaded.device.type == "cpu"
    assert torch.equal(loaded, embeddings.cpu())


def test_a_write_says_how_long_it_took(tmp_path: Path) -> None:
    times_s = iter([5.0, 7.5])
    with AsyncCheckpointWriter(clock=lambda: next(times_s)) as writer:
        written = writer.write_checkpoint_async(tmp_path / "batch_00000.pt", torch.ones(1, 2), ["a"], {})
    assert written.result() == 2.5


def test_writer_shutdown_waits_for_pending(tmp_path: Path) -> None:
    writer = AsyncCheckpointWriter()
    for batch_idx in range(3):
        writer.write_checkpoint_async(tmp_path / f"batch_{batch_idx:05d}.pt", torch.ones(2, 3), ["a", "b"], {})
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
    with pytest.raises(RuntimeError, match=r"1 checkpoints could not be written: .*batch_00001.pt.*the disk said no"):
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
    """Whoever made the strings, in whatever order the keys came: a second writer's file is the first's."""
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
    assert marker_path(tmp_path / "a.pt").read_bytes() == marker_path(tmp_path / "b.pt").read_bytes()


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
        writer.write_checkpoint_async(tmp_path / "batch_00000.pt", rows, [str(row) for row in range(10)], {})
    assert (tmp_path / "batch_00000.pt").stat().st_size < rows.nbytes + 10_000
    assert np.array_equal(load_checkpoint(tmp_path / "batch_00000.pt", fingerprint=None).embeddings, rows.numpy())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_every_floating_type_comes_back_exactly(tmp_path: Path, dtype: torch.dtype) -> None:
    rows = torch.nn.Parameter(torch.randn(3, 5).to(dtype))
    write(tmp_path / "batch_00000.pt", [0, 1, 2], rows=rows)
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
    write(tmp_path / "batch_00000.pt", [0, 1, 2], rows=rows)
    assert (load_checkpoint(tmp_path / "batch_00000.pt", fingerprint=RUN).embeddings == rows).all()


@pytest.mark.parametrize(
    ("changes", "error", "reason"),
    [
        ({"embeddings": [[1.0]]}, TypeError, "is a list; it must be a tensor or a NumPy array"),
        ({"embeddings": torch.ones(2)}, ValueError, "shape mismatch"),
        ({"embeddings": torch.ones(0, 4), "sequence_ids": []}, ValueError, "shape mismatch"),
        ({"embeddings": torch.ones(2, 4, dtype=torch.int64)}, ValueError, "is int64; it must be a floating type"),
        ({"sequence_ids": ["a"]}, ValueError, "2 rows, 1 sequence_ids"),
        ({"sequence_ids": ["a", 7]}, ValueError, "no list of strings"),
        ({"metadata": {"ordinals": [0]}}, ValueError, "2 rows, 1 ordinals"),
        ({"metadata": {"ordinals": [3, 3]}}, ValueError, "an ordinal is there twice"),
        ({"metadata": {"ordinals": [0, -1]}}, ValueError, "whole numbers from 0"),
        ({"metadata": {"fingerprint": 7}}, ValueError, "fingerprint is no string"),
        ({"metadata": {"path": Path("a")}}, TypeError, r"metadata\['path'\] holds a PosixPath"),
        ({"metadata": {"ordinals": np.arange(2)}}, TypeError, r"metadata\['ordinals'\] holds a ndarray"),
        ({"embeddings": torch.tensor([[1.0], [torch.nan]])}, NumericalInstabilityError, "not finite: b$"),
        ({"embeddings": torch.tensor([[torch.inf], [0.0]])}, NumericalInstabilityError, "not finite: a$"),
    ],
)
def test_what_no_reader_would_take_is_refused_at_the_door(
    tmp_path: Path, changes: dict[str, Any], error: type[Exception], reason: str
) -> None:
    given: dict[str, Any] = {"embeddings": torch.ones(2, 4), "sequence_ids": ["a", "b"], "metadata": {}} | changes
    with AsyncCheckpointWriter() as writer:
        for _ in range(3):  # and takes none of the room in flight
            with pytest.raises(error, match=reason):
                writer.write_checkpoint_async(tmp_path / "batch_00000.pt", **given)
    assert os.listdir(tmp_path) == []


def test_rows_whose_sum_is_too_large_are_finite_all_the_same(tmp_path: Path) -> None:
    rows = torch.full((3, 4), torch.finfo(torch.float32).max)
    write(tmp_path / "batch_00000.pt", [0, 1, 2], rows=rows)
    assert (load_checkpoint(tmp_path / "batch_00000.pt", fingerprint=RUN).embeddings == rows.numpy()).all()


def test_what_is_handed_over_in_pieces_is_written_as_if_it_were_whole(tmp_path: Path) -> None:
    rows, ids, metadata = rows_of([0, 1, 2, 3, 4]), ids_of([0, 1, 2, 3, 4]), {"ordinals": [0, 1, 2, 3, 4]}
    with AsyncCheckpointWriter() as writer:
        writer.write_checkpoint_async(tmp_path / "whole.pt", rows, ids, metadata)
        writer.hand_over(tmp_path / "pieces.pt", [rows[:2], rows[2:3], rows[3:]], ids, metadata)
    assert (tmp_path / "pieces.pt").read_bytes() == (tmp_path / "whole.pt").read_bytes()


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"pieces": [torch.ones(1, 4), torch.tensor([[1.0, 1.0, torch.inf, -torch.inf]])]}, "not finite: b$"),
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


@pytest.mark.parametrize(("size_bytes", "expected"), [(1000, 2), (200 * 1024**2, 1), (300 * 1024**2, 1)])
def test_a_full_queue_holds_the_caller_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size_bytes: int, expected: int
) -> None:
    """Two checkpoints or 256 MB may be in flight, or one of any size."""
    real_limit = checkpoint.MAX_IN_FLIGHT_BYTES
    scale = 1000
    monkeypatch.setattr(checkpoint, "MAX_IN_FLIGHT_BYTES", real_limit // scale)
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
        writer.write_checkpoint_async(tmp_path / "batch_00001.pt", torch.ones(1, 2), ["a"], {})
    with pytest.raises(CheckpointWriteError, match="Read-only file system"):
        writer.wait_all()
    assert not writer.has_pending()
    writer.shutdown()
    assert os.listdir(tmp_path) == []


def test_leaving_the_block_raises_an_error_that_nobody_has_heard_of(tmp_path: Path, deny: Any) -> None:
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
    assert writer.write_checkpoint_async(tmp_path / "batch_00001.pt", torch.ones(1, 2), ["a"], {}).cancel()
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
        writer.write_checkpoint_async(checkpoint_path(tmp_path, 0, 0), rows_of([0, 1]), ids_of([0, 1]), {})
    assert slept == [1, 5, 15, 30]
    assert np.array_equal(
        load_checkpoint(checkpoint_path(tmp_path, 0, 0), fingerprint=None).embeddings, rows_of([0, 1])
    )
    assert sorted(os.listdir(tmp_path / "shard_0")) == ["batch_00000.pt", "batch_00000.pt.done"]


def test_a_disk_that_stays_full_ends_in_a_clear_error_and_spoils_nothing(tmp_path: Path, deny: Any) -> None:
    committed = write_shard(tmp_path, 2)
    slept: list[float] = []
    deny("write", [errno.ENOSPC] * 1000)
    writer = AsyncCheckpointWriter(sleep=slept.append)
    writer.write_checkpoint_async(checkpoint_path(tmp_path, 0, 2), rows_of([6]), ids_of([6]), {})
    with pytest.raises(
        StorageError, match=r"batch_00002.pt: the disk is full .* make room and start the same run again"
    ):
        writer.wait_all()
    writer.shutdown()
    assert slept == [1, 5, 15, 30]
    assert [record.path for record in survey_checkpoints(tmp_path, RUN, verify_digests=True).valid] == committed
    assert len(os.listdir(tmp_path / "shard_0")) == 4


@pytest.mark.parametrize("operation", ["write", "fsync", "link", "fsync_directory"])
def test_after_an_io_error_the_rows_are_written_once_more_to_a_new_file(
    tmp_path: Path, deny: Any, operation: str
) -> None:
    (tmp_path / "shard_0").mkdir()
    deny(operation, [errno.EIO])
    write(checkpoint_path(tmp_path, 0, 0), [0, 1])
    assert validate_checkpoint_pt(checkpoint_path(tmp_path, 0, 0)) == (True, "")
    deny(operation, [errno.EIO] * 2)
    with pytest.raises(StorageError, match="see to the storage"):
        write(checkpoint_path(tmp_path, 0, 1), [2, 3])
    assert sorted(os.listdir(tmp_path / "shard_0")) == ["batch_00000.pt", "batch_00000.pt.done"]


def test_a_failed_fsync_is_never_repeated_on_its_descriptor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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

    monkeypatch.setattr(files, "ops", FailingFsync())
    write(tmp_path / "batch_00000.pt", [0])
    assert FailingFsync.synced == [1, 2, 3]  # the first file, the second file, the marker: each once


def test_the_marker_is_written_after_the_file_is_durable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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
    monkeypatch.setattr(files, "ops", Recording())
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
        writer.write_checkpoint_async(checkpoint_path(tmp_path, 1, 7), torch.ones(3, 2), ["a", "b", "c"], {})
    shard = manifest.get_shard_status(1)
    assert shard is not None
    assert (shard["last_checkpoint_batch"], shard["total_sequences"]) == (7, 3)
    with pytest.raises(ValueError, match="rank is None"):
        AsyncCheckpointWriter(manifest=manifest)


def test_a_lost_manifest_costs_no_checkpoint(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    manifest = CheckpointManifest(tmp_path / "manifest.json")
    with AsyncCheckpointWriter(manifest=manifest, rank=0) as writer:
        writer.write_checkpoint_async(checkpoint_path(tmp_path, 0, 0), torch.ones(1, 2), ["a"], {})
    assert validate_checkpoint_pt(checkpoint_path(tmp_path, 0, 0)) == (True, "")
    assert "is committed, but the manifest does not know it yet" in caplog.text


def test_another_writers_checkpoint_is_never_overwritten(tmp_path: Path) -> None:
    path = checkpoint_path(tmp_path, 0, 0)
    write(path, [0, 1])
    before = path.read_bytes()
    with pytest.raises(StorageError, match="another writer has just written it"):
        write(path, [2, 3])
    assert path.read_bytes() == before
    assert validate_checkpoint_pt(path) == (True, "")


@pytest.mark.parametrize("remainder", ["file", "marker", "damaged"])
def test_what_a_crash_left_under_the_name_is_moved_aside(tmp_path: Path, remainder: str) -> None:
    path = checkpoint_path(tmp_path, 0, 0)
    write(path, [0, 1])
    if remainder == "file":
        marker_path(path).unlink()
    elif remainder == "marker":
        path.unlink()
    else:
        flip_bit(path, 8000)
    write(path, [2, 3])
    assert load_checkpoint(path, fingerprint=RUN).sequence_ids == ids_of([2, 3])
    assert len(list((tmp_path / "shard_0" / "damaged").iterdir())) == (2 if remainder == "damaged" else 1)


@pytest.mark.parametrize("remainder", [None, "file", "marker"])
def test_killed_at_any_operation_no_row_is_lost_doubled_or_mislabelled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, remainder: str | None
) -> None:
    """Also where an earlier crash has left half a checkpoint under the name."""
    kill_at, is_over = 0, False
    while not is_over:
        monkeypatch.setattr(files, "ops", UnsyncedOps())
        run = tmp_path / str(kill_at)
        write(checkpoint_path(run, 0, 0), [0, 1])
        if remainder is not None:
            write(checkpoint_path(run, 0, 1), [2, 3])
            (checkpoint_path(run, 0, 1) if remainder == "marker" else marker_path(checkpoint_path(run, 0, 1))).unlink()
        dying = DyingOps(kill_at)
        monkeypatch.setattr(files, "ops", dying)
        try:
            write(checkpoint_path(run, 0, 1), [2, 3])
        except (Killed, CheckpointWriteError):
            assert dying.is_dead
        is_over = not dying.is_dead
        monkeypatch.setattr(files, "ops", UnsyncedOps())

        next_batch_idx = heal_shard(run, 0, RUN)
        is_done = survey_checkpoints(run, RUN, verify_digests=True).done_mask(5)
        assert is_done[:2].all()
        assert is_done[2] == is_done[3]
        write(checkpoint_path(run, 0, next_batch_idx), [ordinal for ordinal in range(5) if not is_done[ordinal]])
        loaded = [
            load_checkpoint(record.path, fingerprint=RUN)
            for record in survey_checkpoints(run, RUN, verify_digests=True).valid
        ]
        ordinals = [ordinal for each in loaded for ordinal in each.metadata["ordinals"]]
        assert sorted(ordinals) == list(range(5))
        assert [id_ for each in loaded for id_ in each.sequence_ids] == ids_of(ordinals)
        assert np.array_equal(np.concatenate([each.embeddings for each in loaded]), rows_of(ordinals))
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
        writer.write_checkpoint_async(path, torch.ones(len(ids), 2), ids, {"ordinals": list(range(len(ids)))})
    assert load_checkpoint(path, fingerprint=None).sequence_ids == ids
    written = {each.relative_to(tmp_path).as_posix() for each in tmp_path.rglob("*") if each.is_file()}
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
    assert reason == "missing key: sequence_ids, metadata"


def test_validate_shape_mismatch_fails(tmp_path: Path) -> None:
    write_by_hand(tmp_path / "batch_00000.pt", content_by_hand(embeddings=torch.ones(10, 4), sequence_ids=["a"] * 5))
    is_valid, reason = validate_checkpoint_pt(tmp_path / "batch_00000.pt")
    assert not is_valid
    assert reason == "shape mismatch: 10 rows, 5 sequence_ids"


def test_validate_valid_checkpoint_passes(tmp_path: Path) -> None:
    write(tmp_path / "batch_00000.pt", [0, 1, 2])
    assert validate_checkpoint_pt(tmp_path / "batch_00000.pt") == (True, "")


def test_a_file_that_is_not_there_is_invalid(tmp_path: Path) -> None:
    assert validate_checkpoint_pt(tmp_path / "batch_00000.pt") == (False, "the file is missing")


def test_no_flipped_bit_of_a_checkpoint_passes(tmp_path: Path) -> None:
    """torch.load checks no CRC: by itself it takes a flipped bit, such as the last one here."""
    path = tmp_path / "batch_00000.pt"
    write(path, [0, 1, 2])
    size_bits = path.stat().st_size * 8
    for position in range(0, size_bits, 23):
        flip_bit(path, position)
        with pytest.raises(CheckpointError, match="sha256"):
            load_checkpoint(path, fingerprint=RUN)
        assert not validate_checkpoint_pt(path)[0]
        flip_bit(path, position)
    flip_bit(path, size_bits // 2)
    torch.load(path, weights_only=True)
    flip_bit(path, size_bits // 2)
    assert validate_checkpoint_pt(path) == (True, "")


@pytest.mark.parametrize("length", [0, 1, 10, 511, 512, 1000, -1, "grown"])
def test_no_cut_or_grown_checkpoint_passes(tmp_path: Path, length: int | str) -> None:
    path = tmp_path / "batch_00000.pt"
    write(path, [0, 1, 2])
    whole = path.read_bytes()
    path.write_bytes(whole + b"\0" if isinstance(length, str) else whole[:length])
    with pytest.raises(CheckpointError, match="bytes"):
        load_checkpoint(path, fingerprint=RUN)
    assert not validate_checkpoint_pt(path)[0]


def test_no_flipped_bit_of_a_marker_passes(tmp_path: Path) -> None:
    path = checkpoint_path(tmp_path, 0, 0)
    write(path, [0, 1, 2])
    for position in range(0, marker_path(path).stat().st_size * 8 - 8, 5):
        flip_bit(marker_path(path), position)
        survey = survey_checkpoints(tmp_path, RUN, verify_digests=False)
        assert survey.valid == ()
        assert [damage.path for damage in survey.damaged] == [path]
        assert not validate_checkpoint_pt(path)[0]
        flip_bit(marker_path(path), position)


def test_a_marker_cut_to_nothing_does_not_pass_for_one_made_by_touch(tmp_path: Path) -> None:
    path = checkpoint_path(tmp_path, 0, 0)
    write(path, [0, 1, 2])
    marker_path(path).write_bytes(b"")
    assert validate_checkpoint_pt(path) == (False, "its marker is empty, though it names its run")


def test_an_empty_marker_is_never_enough_for_the_flow(tmp_path: Path) -> None:
    path = checkpoint_path(tmp_path, 0, 0)
    write_by_hand(path, content_by_hand())
    assert validate_checkpoint_pt(path) == (True, "")
    with pytest.raises(CheckpointError, match="not JSON"):
        load_checkpoint(path, fingerprint=None)
    assert survey_checkpoints(tmp_path, RUN, verify_digests=False).valid == ()


def test_two_files_that_changed_places_are_not_believed(tmp_path: Path) -> None:
    first, second = write_shard(tmp_path, 2)
    first.rename(tmp_path / "x")
    second.rename(first)
    (tmp_path / "x").rename(second)
    assert survey_checkpoints(tmp_path, RUN, verify_digests=True).valid == ()


def test_a_quick_survey_sees_a_file_of_another_size(tmp_path: Path) -> None:
    """It reads the markers only, and asks the file system for the sizes."""
    first, second = write_shard(tmp_path, 2)
    with first.open("ab") as file:
        file.write(b"\0")
    survey = survey_checkpoints(tmp_path, RUN, verify_digests=False)
    assert [record.path for record in survey.valid] == [second]
    assert [damage.path for damage in survey.damaged] == [first]


def test_a_file_that_does_not_fit_its_marker_never_reaches_torch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = checkpoint_path(tmp_path, 0, 0)
    write(path, [0, 1, 2])
    flip_bit(path, 9000)
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("torch has been given the bytes"))
    with pytest.raises(CheckpointError, match="bytes have changed"):
        load_checkpoint(path, fingerprint=RUN)


def test_what_a_killed_writer_left_unpublished_is_not_read(tmp_path: Path) -> None:
    """Another file and another marker, each whole, under their temporary names."""
    path = checkpoint_path(tmp_path, 0, 0)
    write(path, [3, 4])
    for source in (path, marker_path(path)):
        source.rename(source.with_name(f".tmp-{source.name}-host-7-0123abcd"))
    assert survey_checkpoints(tmp_path, RUN, verify_digests=True) == Survey(valid=(), damaged=())
    write(path, [0, 1, 2])
    (record,) = survey_checkpoints(tmp_path, RUN, verify_digests=True).valid
    assert record.ordinals.tolist() == [0, 1, 2]
    assert resume_from_checkpoints(tmp_path, 0).ids == ids_of([0, 1, 2])


@pytest.mark.parametrize("fingerprint", ["ee" * 32, None])
def test_a_checkpoint_of_another_run_is_not_believed(tmp_path: Path, fingerprint: str | None) -> None:
    path = checkpoint_path(tmp_path, 0, 0)
    metadata = {"ordinals": [0]} | ({"fingerprint": fingerprint} if fingerprint else {})
    with AsyncCheckpointWriter() as writer:
        writer.write_checkpoint_async(path, torch.ones(1, 2), ["a"], metadata)
    with pytest.raises(CheckpointError, match=f"is of the run {fingerprint!r}, and this run is '{RUN}'"):
        load_checkpoint(path, fingerprint=RUN)
    (damage,) = survey_checkpoints(tmp_path, RUN, verify_digests=True).damaged
    assert "is of the run" in damage.reason
    assert not damage.is_unfinished


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ([1, 2], "holds a list"),
        (content_by_hand(extra=1), "unknown key: 'extra'"),
        (content_by_hand(embeddings=[1.0]), "no plain tensor"),
        (content_by_hand(embeddings=torch.ones(3, 4).to_sparse()), "_rebuild_sparse_tensor"),
        (content_by_hand(embeddings=torch.nn.Parameter(torch.ones(3, 4))), "_rebuild_parameter"),
        (content_by_hand(embeddings=torch.ones(3, 4, dtype=torch.complex64)), "ComplexFloatStorage"),
        (content_by_hand(embeddings=torch.ones(3, 4, dtype=torch.bool)), "BoolStorage"),
        (content_by_hand(embeddings=torch.ones(3)), "shape mismatch"),
        (content_by_hand(embeddings=torch.ones(3, 0)), "shape mismatch"),
        (content_by_hand(embeddings=torch.ones(3, 1).expand(3, 1 << 40)), "claims more than the file holds"),
        (content_by_hand(embeddings=torch.ones(4, 3).T), "claims more than the file holds"),
        (content_by_hand(embeddings=torch.full((3, 4), torch.nan)), "not finite"),
        (content_by_hand(sequence_ids=("a", "b", "c")), "no list of strings"),
        (content_by_hand(sequence_ids=["a", "b", 3]), "no list of strings"),
        (content_by_hand(metadata=[]), "metadata is no dict"),
        (content_by_hand(metadata={"ordinals": [0, 1]}), "3 rows, 2 ordinals"),
        (content_by_hand(metadata={"ordinals": [0, 1, 1]}), "twice"),
        (content_by_hand(metadata={"ordinals": [0, 1, 2**63]}), "whole numbers"),
        (content_by_hand(metadata={"ordinals": torch.arange(3)}), "more than one tensor"),
        (content_by_hand(metadata={"ordinals": 3}), "whole numbers"),
    ],
)
@pytest.mark.parametrize("has_digest", [True, False])
def test_content_that_is_no_checkpoint_is_refused_with_the_reason(
    tmp_path: Path, content: Any, reason: str, has_digest: bool
) -> None:
    """Also where a marker vouches for the bytes."""
    path = tmp_path / "batch_00000.pt"
    write_by_hand(path, content)
    if has_digest:
        vouch_for(path)
    is_valid, found = validate_checkpoint_pt(path)
    assert not is_valid
    assert reason in found


def test_a_marker_that_says_otherwise_is_not_believed(tmp_path: Path) -> None:
    path = tmp_path / "batch_00000.pt"
    write_by_hand(path, content_by_hand(metadata={"ordinals": [4, 5, 6]}))
    vouch_for(path, ordinals=[4, 5, 7])
    assert validate_checkpoint_pt(path) == (False, "its ordinals is not what its marker says")


def vouch_for(path: Path, **fields: Any) -> None:
    marker_path(path).unlink()
    shape = {"rows": 3, "width": 4, "dtype": "float32"}
    write_marker(path, files.digest_file(path), **shape | fields)


class RunsCode:
    """What `pickle.load` of it would do."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> Any:
        return self.call


@pytest.mark.parametrize("place", ["whole", "embeddings", "sequence_ids", "metadata", "plain pickle"])
@pytest.mark.parametrize(
    "function", [os.system, exec, eval, open, Path.touch, os.mkdir], ids=lambda each: each.__name__
)
def test_a_checkpoint_that_runs_code_is_refused_and_runs_none(tmp_path: Path, place: str, function: Any) -> None:
    proof = tmp_path / "proof"
    arguments = {
        os.system: (f"touch {proof}",),
        exec: (f"open({str(proof)!r}, 'w')",),
        eval: (f"open({str(proof)!r}, 'w')",),
        open: (str(proof), "w"),
        Path.touch: (proof,),
        os.mkdir: (str(proof),),
    }[function]
    trap = RunsCode(function, *arguments)
    path = checkpoint_path(tmp_path, 0, 0)
    changes: dict[str, Any] = {place: trap}
    write_by_hand(path, trap if place in ("whole", "plain pickle") else content_by_hand(**changes))
    if place == "plain pickle":
        path.write_bytes(pickle.dumps(trap))
    assert "failed to load" in validate_checkpoint_pt(path)[1]
    vouch_for(path)
    with pytest.raises(CheckpointError, match="failed to load"):
        load_checkpoint(path, fingerprint=None)
    assert resume_from_checkpoints(tmp_path, 0).ids == []
    assert not proof.exists()


def test_torch_by_itself_would_run_no_code_either(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Were our look at the pickle to miss something."""
    path = tmp_path / "batch_00000.pt"
    write_by_hand(path, content_by_hand(metadata=RunsCode(os.mkdir, str(tmp_path / "proof"))))
    monkeypatch.setattr(checkpoint_file, "_check_archive", lambda *_: None)
    assert "Weights only load failed" in validate_checkpoint_pt(path)[1]
    assert not (tmp_path / "proof").exists()


@pytest.mark.parametrize("member", ["archive/data/0", "archive/data.pkl"])
def test_an_archive_with_compressed_members_is_refused(tmp_path: Path, member: str) -> None:
    """A deflated member can claim a thousand times the file's size."""
    write_by_hand(tmp_path / "plain.pt", content_by_hand())
    with zipfile.ZipFile(tmp_path / "plain.pt") as plain, zipfile.ZipFile(tmp_path / "bomb.pt", "w") as bomb:
        for each in plain.infolist():
            name = each.filename.replace("plain/", "archive/")
            compression = zipfile.ZIP_DEFLATED if name == member else zipfile.ZIP_STORED
            bomb.writestr(name, plain.read(each), compress_type=compression)
    marker_path(tmp_path / "bomb.pt").touch()
    assert validate_checkpoint_pt(tmp_path / "bomb.pt") == (
        False,
        "failed to load: a member of the archive is compressed",
    )


def test_an_archive_whose_members_claim_more_than_it_holds_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "batch_00000.pt"
    write_by_hand(path, content_by_hand())
    data = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        claimed = archive.getinfo("batch_00000/data/0")
    size = claimed.file_size.to_bytes(4, "little")
    central = data.rindex(b"PK\x01\x02", 0, data.rindex(b"batch_00000/data/0"))
    entry = data[central:].replace(size, (1 << 30).to_bytes(4, "little"), 2)
    path.write_bytes(data[:central] + entry)
    is_valid, reason = validate_checkpoint_pt(path)
    assert not is_valid
    assert reason == "failed to load: the members of the archive claim more than the file holds"


def test_a_tensor_larger_than_its_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever torch.load makes of the bytes."""
    path = tmp_path / "batch_00000.pt"
    write_by_hand(path, content_by_hand())
    monkeypatch.setattr(torch, "load", lambda *_, **__: content_by_hand(rows=1000))
    assert validate_checkpoint_pt(path) == (False, "embeddings claims more than the file holds")


def test_random_damage_to_an_unproven_file_is_always_a_reason_never_a_crash(tmp_path: Path) -> None:
    """An empty marker leaves the content to speak for itself: whatever it holds, the answer is a pair."""
    path = tmp_path / "batch_00000.pt"
    write_by_hand(path, content_by_hand())
    whole = path.read_bytes()
    random = np.random.default_rng(7)
    pickled = whole.index(b"\x80\x02")
    for _ in range(300):
        damaged = bytearray(whole)
        for position in random.integers(pickled, pickled + 400, size=3):
            damaged[position] = random.integers(256)
        path.write_bytes(damaged)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what torch thinks of its bytes
            is_valid, reason = validate_checkpoint_pt(path)
        assert is_valid is (reason == "")


# --- surveying ---


def test_a_survey_gives_every_valid_checkpoint_in_order(tmp_path: Path) -> None:
    for rank in (10, 2):
        write_shard(tmp_path, 12, rank=rank, rows=1)
    (tmp_path / "shard_2" / "job.json").touch()
    (tmp_path / "shard_x").mkdir()
    (tmp_path / "manifest.json").touch()
    survey = survey_checkpoints(tmp_path, RUN, verify_digests=True)
    assert [(record.rank, record.batch_idx) for record in survey.valid] == [
        (rank, batch_idx) for rank in (2, 10) for batch_idx in range(12)
    ]
    assert survey.damaged == ()
    record = survey.valid[3]
    assert record.ordinals.dtype == np.int64
    assert record.ordinals.tolist() == [3]
    assert (record.rows, record.width, record.dtype, record.fingerprint) == (1, 4, "float32", RUN)
    assert record.size_bytes == record.path.stat().st_size
    assert survey.done_mask(20).nonzero()[0].tolist() == list(range(12))


def test_a_survey_of_nothing_is_empty(tmp_path: Path) -> None:
    assert survey_checkpoints(tmp_path / "none", RUN, verify_digests=True) == Survey(valid=(), damaged=())


def test_a_damaged_checkpoint_in_the_middle_costs_that_one(tmp_path: Path) -> None:
    paths = write_shard(tmp_path, 4)
    flip_bit(paths[1], 9000)
    survey = survey_checkpoints(tmp_path, RUN, verify_digests=True)
    assert [record.path for record in survey.valid] == [paths[0], paths[2], paths[3]]
    assert [damage.path for damage in survey.damaged] == [paths[1]]
    assert len(survey_checkpoints(tmp_path, RUN, verify_digests=False).valid) == 4


def test_what_a_stopped_writer_left_is_told_from_damage(tmp_path: Path) -> None:
    paths = write_shard(tmp_path, 3)
    marker_path(paths[0]).unlink()
    paths[1].unlink()
    survey = survey_checkpoints(tmp_path, RUN, verify_digests=True)
    assert [(damage.path, damage.is_unfinished) for damage in survey.damaged] == [(paths[0], True), (paths[1], False)]


def test_a_name_that_no_writer_synced_is_synced_before_it_is_believed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_shard(tmp_path, 1)
    synced: list[Path] = []
    monkeypatch.setattr(files.ops, "fsync_directory", synced.append)
    survey_checkpoints(tmp_path, RUN, verify_digests=False)
    assert synced == [tmp_path / "shard_0"]


def test_a_read_only_directory_can_be_surveyed(tmp_path: Path, deny: Any) -> None:
    write_shard(tmp_path, 1)
    deny("fsync_directory", [errno.EROFS])
    assert len(survey_checkpoints(tmp_path, RUN, verify_digests=True).valid) == 1


def test_too_many_open_files_is_not_taken_for_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_shard(tmp_path, 1)

    def refuse(*_: Any, **__: Any) -> Any:
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(StorageError, match="Too many open files") as caught:
        survey_checkpoints(tmp_path, RUN, verify_digests=True)
    assert not isinstance(caught.value, CheckpointError)


@pytest.mark.parametrize(
    ("valid", "damaged", "unfinished", "is_failing"),
    [(0, 3, 0, False), (0, 4, 0, True), (1000, 4, 0, False), (300, 4, 0, True), (396, 4, 0, False), (0, 0, 50, False)],
)
def test_much_damage_means_that_the_storage_is_failing(
    valid: int, damaged: int, unfinished: int, is_failing: bool
) -> None:
    def lost(count: int, is_unfinished: bool) -> tuple[Damage, ...]:
        return tuple(Damage(path=Path("a"), reason="sha256", is_unfinished=is_unfinished) for _ in range(count))

    survey = Survey(valid=(None,) * valid, damaged=lost(damaged, False) + lost(unfinished, True))  # type: ignore[arg-type]
    if is_failing:
        with pytest.raises(StorageError, match=f"{damaged} of {valid + damaged} checkpoints are damaged: the storage"):
            survey.require_sound_storage()
    else:
        survey.require_sound_storage()


def test_what_is_set_aside_is_kept_as_evidence(tmp_path: Path) -> None:
    path = checkpoint_path(tmp_path, 0, 0)
    targets = []
    for ordinal in range(2):
        write(path, [ordinal])
        targets.append(set_aside(path))
    assert [load_checkpoint(target, fingerprint=RUN).sequence_ids for target in targets] == [["seq0"], ["seq1"]]
    assert {target.parent for target in targets} == {tmp_path / "shard_0" / "damaged"}
    assert survey_checkpoints(tmp_path, RUN, verify_digests=True) == Survey(valid=(), damaged=())


def test_the_marker_goes_before_its_file_when_a_checkpoint_is_moved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed in between, a file without a marker is left, which is no damage; and both names are synced each time."""
    path = checkpoint_path(tmp_path, 0, 0)
    write(path, [0])
    steps: list[str] = []

    class Recording(DurableOps):
        def replace(self, source: Path, target: Path) -> None:
            steps.append(source.suffix)
            super().replace(source, target)

        def fsync_directory(self, path: Path) -> None:
            steps.append(path.name)
            super().fsync_directory(path)

    monkeypatch.setattr(files, "ops", Recording())
    set_aside(path)
    made_directory = ["shard_0"]
    assert steps == [*made_directory, ".done", "damaged", "shard_0", ".pt", "damaged", "shard_0"]


def test_healing_a_shard_frees_the_damaged_and_touches_no_other(tmp_path: Path) -> None:
    paths = write_shard(tmp_path, 3)
    write_shard(tmp_path, 1, rank=1)
    flip_bit(paths[1], 9000)
    assert heal_shard(tmp_path, 0, RUN) == 3
    assert [path.exists() for path in paths] == [True, False, True]
    assert heal_shard(tmp_path, 1, RUN) == 1
    assert heal_shard(tmp_path, 2, RUN) == 0


def test_a_shard_on_failing_storage_is_left_as_it_is(tmp_path: Path) -> None:
    paths = write_shard(tmp_path, 5)
    for path in paths[:4]:
        flip_bit(path, 9000)
    with pytest.raises(StorageError, match="4 of 5 checkpoints are damaged: the storage is failing"):
        heal_shard(tmp_path, 0, RUN)
    assert all(path.exists() for path in paths)


@pytest.mark.parametrize("name", ["batch_0.pt", "batch_00000.pt.done", "batch_000000.pt", "batch_-0001.pt", "a.pt"])
def test_what_is_no_checkpoints_name_has_no_number(name: str) -> None:
    with pytest.raises(ValueError, match="no name of a checkpoint"):
        batch_idx_of(Path(name))


def test_a_number_may_outgrow_five_digits() -> None:
    assert batch_idx_of(Path("shard_0/batch_123456.pt")) == 123456


# --- resuming ---


def test_resume_no_checkpoints_returns_empty_4tuple(tmp_path: Path) -> None:
    assert tuple(resume_from_checkpoints(tmp_path, 0)) == ([], None, 0, [])


def test_resume_force_restart_ignores_checkpoints(tmp_path: Path) -> None:
    write_shard(tmp_path, 2)
    assert tuple(resume_from_checkpoints(tmp_path, 0, force_restart=True)) == ([], None, 0, [])


def test_resume_loads_valid_pt_checkpoints_in_order(tmp_path: Path) -> None:
    write(checkpoint_path(tmp_path, 0, 1), [7, 2])
    write(checkpoint_path(tmp_path, 0, 0), [9, 4, 5])
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


def test_after_a_stop_every_number_from_there_on_is_free_to_be_written(tmp_path: Path) -> None:
    """The good one after the damaged one is computed again; left in place, its rows would be there twice."""
    paths = write_shard(tmp_path, 3)
    os.truncate(paths[1], 10)
    resumed = resume_from_checkpoints(tmp_path, 0)
    assert resumed.corrupted_ids == ids_of([6, 7, 8])  # of the cut one nothing is known, and nothing is made up
    assert [path.exists() for path in paths] == [True, False, False]
    assert not marker_path(paths[1]).exists()
    write(paths[1], [3, 4, 5])
    write(paths[2], [6, 7, 8])
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
    write(path, [0])
    assert len(list((tmp_path / "shard_0" / "superseded").glob("*.pt"))) == 1


def test_rows_of_another_width_are_not_mixed_in(tmp_path: Path) -> None:
    write(checkpoint_path(tmp_path, 0, 0), [0, 1])
    write(checkpoint_path(tmp_path, 0, 1), [2, 3], rows=torch.ones(2, 7))
    resumed = resume_from_checkpoints(tmp_path, 0)
    assert resumed.ids == ids_of([0, 1])
    assert resumed.corrupted_ids == ids_of([2, 3])


def test_resuming_another_run_is_refused_and_touches_nothing(tmp_path: Path) -> None:
    paths = write_shard(tmp_path, 2)
    flip_bit(paths[1], 9000)
    with pytest.raises(FingerprintMismatchError, match=f"is of the run '{RUN}', and this run is 'other'"):
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


def test_resuming_sets_the_manifests_counts_from_what_is_used(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    manifest = CheckpointManifest(tmp_path / "manifest.json")
    paths = write_shard(tmp_path, 2)
    resume_from_checkpoints(tmp_path, 0, manifest=manifest)
    assert "the manifest does not know which checkpoints of shard 0 are used" in caplog.text
    manifest.initialize(1, "", "")
    os.truncate(paths[1], 10)
    with caplog.at_level(logging.WARNING):
        resume_from_checkpoints(tmp_path, 0, manifest=manifest)
    assert manifest.get_global_progress()["total_sequences_checkpointed"] == 3
    assert "the file has 10 bytes" in caplog.text


def test_a_json_marker_by_another_hand_is_refused(tmp_path: Path) -> None:
    path = checkpoint_path(tmp_path, 0, 0)
    write_by_hand(path, content_by_hand())
    marker_path(path).unlink()
    write_file(marker_path(path), json.dumps({"rows": 3}).encode())
    assert not validate_checkpoint_pt(path)[0]
    marker_path(path).unlink()
    write_marker(path, files.digest_file(path))
    assert validate_checkpoint_pt(path) == (False, "its marker has no rows")
