"""Tests of the record of a run: changes count at once, and are written when possible."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from vnp_lib.checkpoint.manifest import CheckpointManifest
from vnp_lib.errors import StorageError
from vnp_lib.run import record as run_record
from vnp_lib.run.record import RunRecord
from vnp_lib.storage import durable
from vnp_lib.storage.durable import DurableOps
from vnp_lib.storage.locks import FileLock


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_record, "RETRY_S", 0.01)
    monkeypatch.setattr(run_record, "LOCK_TIMEOUT_S", 0.05)


def new_record(directory: Path, *, is_opened: bool = True) -> RunRecord:
    record = RunRecord(
        directory / "manifest.json", world_size=2, input_fingerprint="f", model_config_hash="m"
    )
    if is_opened:
        record.open_or_rebuild(2, "f", "m", [])
    return record


@pytest.fixture
def record(tmp_path: Path) -> RunRecord:
    return new_record(tmp_path)


def on_disk(record: RunRecord, rank: int = 0) -> dict:
    shard = CheckpointManifest(record.path).get_shard_status(rank)
    assert shard is not None
    return shard


def until_on_disk(record: RunRecord, *, attempts: int) -> None:
    deadline_s = time.monotonic() + 30
    while on_disk(record)["attempts"] != attempts:
        assert time.monotonic() < deadline_s
        time.sleep(0.01)


class FailingOps(DurableOps):
    """Fail at one kind of operation as long as `code` is set."""

    def __init__(self, name: str, code: int, *, does_it_first: bool = False) -> None:
        self.code: int | None = code

        def failing(*arguments: object) -> object:
            result = None
            if self.code is None or does_it_first:
                result = getattr(DurableOps, name)(self, *arguments)
            if self.code is not None:
                raise OSError(self.code, os.strerror(self.code))
            return result

        setattr(self, name, failing)


@contextmanager
def held(record: RunRecord) -> Iterator[None]:
    """Hold the lock as a process that hangs does."""
    with FileLock(record.path.with_suffix(".lock"), purpose="hang").held(timeout_s=0):
        yield


def test_a_change_is_in_the_file_when_it_returns(record: RunRecord) -> None:
    assert record.start_attempt(0, device="1") == 1
    assert (on_disk(record)["attempts"], on_disk(record)["device"]) == (1, "1")


def test_a_held_lock_delays_nothing_and_names_its_holder(record: RunRecord, caplog) -> None:
    """A lock that is not given up holds nothing up and its holder is named."""
    with held(record):
        began_s = time.monotonic()
        attempts = [record.start_attempt(0) for _ in range(20)]
        record.record_failure(0, {"accuses_batch": True})
        assert time.monotonic() - began_s < 10  # 21 times a limit of 30 s would be ten minutes
        assert attempts == [*range(1, 21)]
        assert record.failures(0) == [{"accuses_batch": True}]
        assert on_disk(record)["attempts"] == 0
        time.sleep(0.1)
    until_on_disk(record, attempts=20)
    record.close()
    assert f"is held by process {os.getpid()} on" in caplog.text
    assert "to hang" in caplog.text
    assert caplog.text.count("cannot be brought up to date") == 1


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.EACCES])
@pytest.mark.parametrize("operation", ["open", "write", "fsync", "replace"])
def test_changes_on_a_failing_disk_are_written_later(
    record: RunRecord, monkeypatch: pytest.MonkeyPatch, operation: str, code: int
) -> None:
    """A disk that takes nothing is no error and what it lacks is written later."""
    ops = FailingOps(operation, code)
    monkeypatch.setattr(durable, "ops", ops)
    assert [record.start_attempt(0) for _ in range(3)] == [1, 2, 3]
    record.mark_shard_failed(1, "why")
    assert record.get_resumable_shards() == [0, 1]
    assert on_disk(record)["attempts"] == 0
    ops.code = None
    record.close()
    assert on_disk(record)["attempts"] == 3
    assert on_disk(record, 1)["error"] == "why"


def test_a_written_change_reported_as_failed_counts_once(
    record: RunRecord, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The new file is in its place, and the sync of the directory fails."""
    ops = FailingOps("fsync_directory", errno.EIO)
    monkeypatch.setattr(durable, "ops", ops)
    record.record_failure(0, {"number": 1})
    record.record_failure(0, {"number": 2})
    assert record.failures(0) == [{"number": 1}, {"number": 2}]
    ops.code = None
    record.close()
    assert on_disk(record)["failures"] == [{"number": 1}, {"number": 2}]


@pytest.mark.parametrize("damage", [b"", b"torn", None])
def test_a_damaged_or_lost_file_is_rebuilt_from_memory(
    record: RunRecord, damage: bytes | None
) -> None:
    record.start_attempt(0)
    record.path.unlink()
    if damage is not None:
        record.path.write_bytes(damage)
    assert record.start_attempt(0) == 2
    assert on_disk(record)["attempts"] == 2


def test_an_unopened_record_rebuilds_no_file(tmp_path: Path) -> None:
    """It does not know what was in it."""
    (tmp_path / "manifest.json").write_bytes(b"torn")
    record = new_record(tmp_path, is_opened=False)
    record.update_shard_checkpoint(1, 0, 10, "batch_00000.pt")
    assert record.get_shard_status(1)["total_sequences"] == 10
    record.close()
    assert record.path.read_bytes() == b"torn"


def test_what_the_file_lacks_at_the_end_is_said(record: RunRecord, caplog) -> None:
    with held(record):
        record.start_attempt(0)
        record.close()
    assert "lacks the last 1 changes" in caplog.text
    assert "is held by process" in caplog.text


def test_what_others_write_is_seen_and_kept(record: RunRecord) -> None:
    with held(record):
        record.start_attempt(0)
    other = CheckpointManifest(record.path)
    other.update_shard_checkpoint(0, 0, 10, "batch_00000.pt")
    assert record.get_shard_status(0)["total_sequences"] == 10
    record.close()
    shard = on_disk(record)
    assert (shard["attempts"], shard["total_sequences"]) == (1, 10)


def test_a_manifest_with_a_hanging_lock_is_opened(tmp_path: Path) -> None:
    """A manifest whose lock hangs is opened all the same."""
    record = new_record(tmp_path)
    record.start_attempt(0)
    with held(record):
        later = new_record(tmp_path)
        assert later.start_attempt(0) == 2
    later.close()
    assert on_disk(later)["attempts"] == 2


def test_a_shard_that_is_not_there_is_still_an_error(record: RunRecord) -> None:
    with pytest.raises(ValueError, match="there is no shard 7"):
        record.start_attempt(7)


def test_a_plain_manifest_raises_as_before(
    record: RunRecord, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever uses it directly has no memory to fall back on."""
    record.path.write_bytes(b"torn")
    with pytest.raises(StorageError, match="not JSON"):
        CheckpointManifest(record.path).start_attempt(0)
