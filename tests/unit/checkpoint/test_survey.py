"""What a survey finds of a run's checkpoints, and what is done about the damaged ones."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.checkpoints import RUN, ids_of, write_checkpoint, write_shard
from tests.helpers import flip_bit
from vnp_lib.checkpoint import survey
from vnp_lib.checkpoint.resume import resume_from_checkpoints
from vnp_lib.checkpoint.survey import CommittedRows, Damage, Survey, heal_shard, survey_checkpoints
from vnp_lib.errors import CheckpointError, StorageError
from vnp_lib.plan.paths import checkpoint_path
from vnp_lib.storage import durable
from vnp_lib.storage.durable import marker_path


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
    assert survey_checkpoints(tmp_path / "none", RUN, verify_digests=True) == Survey(
        valid=(), damaged=()
    )


def test_a_quick_survey_sees_a_file_of_another_size(tmp_path: Path) -> None:
    """It reads the markers only, and asks the file system for the sizes."""
    first, second = write_shard(tmp_path, 2)
    with first.open("ab") as file:
        file.write(b"\0")
    survey = survey_checkpoints(tmp_path, RUN, verify_digests=False)
    assert [record.path for record in survey.valid] == [second]
    assert [damage.path for damage in survey.damaged] == [first]


def test_what_a_killed_writer_left_unpublished_is_not_read(tmp_path: Path) -> None:
    """Another file and another marker, each whole, under their temporary names."""
    path = checkpoint_path(tmp_path, 0, 0)
    write_checkpoint(path, [3, 4])
    for source in (path, marker_path(path)):
        source.rename(source.with_name(f".tmp-{source.name}-host-7-0123abcd"))
    assert survey_checkpoints(tmp_path, RUN, verify_digests=True) == Survey(valid=(), damaged=())
    write_checkpoint(path, [0, 1, 2])
    (record,) = survey_checkpoints(tmp_path, RUN, verify_digests=True).valid
    assert record.ordinals.tolist() == [0, 1, 2]
    assert resume_from_checkpoints(tmp_path, 0).ids == ids_of([0, 1, 2])


def test_two_files_that_changed_places_are_not_believed(tmp_path: Path) -> None:
    first, second = write_shard(tmp_path, 2)
    first.rename(tmp_path / "x")
    second.rename(first)
    (tmp_path / "x").rename(second)
    assert survey_checkpoints(tmp_path, RUN, verify_digests=True).valid == ()


def test_a_damaged_checkpoint_in_the_middle_costs_that_one(tmp_path: Path) -> None:
    paths = write_shard(tmp_path, 4)
    flip_bit(paths[1], 9000)
    survey = survey_checkpoints(tmp_path, RUN, verify_digests=True)
    assert [record.path for record in survey.valid] == [paths[0], paths[2], paths[3]]
    assert [damage.path for damage in survey.damaged] == [paths[1]]
    assert len(survey_checkpoints(tmp_path, RUN, verify_digests=False).valid) == 4


def test_unfinished_checkpoints_are_not_damage(tmp_path: Path) -> None:
    paths = write_shard(tmp_path, 3)
    marker_path(paths[0]).unlink()
    paths[1].unlink()
    survey = survey_checkpoints(tmp_path, RUN, verify_digests=True)
    assert [(damage.path, damage.is_unfinished) for damage in survey.damaged] == [
        (paths[0], True),
        (paths[1], False),
    ]


def test_an_unsynced_name_is_synced_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A name that no writer synced is synced before it is believed."""
    write_shard(tmp_path, 1)
    synced: list[Path] = []
    monkeypatch.setattr(durable.ops, "fsync_directory", synced.append)
    survey_checkpoints(tmp_path, RUN, verify_digests=False)
    assert synced == [tmp_path / "shard_0"]


def test_a_read_only_directory_can_be_surveyed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_shard(tmp_path, 1)

    def refuse(_: Path) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(durable.ops, "fsync_directory", refuse)
    assert len(survey_checkpoints(tmp_path, RUN, verify_digests=True).valid) == 1


def test_too_many_open_files_is_not_taken_for_damage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_shard(tmp_path, 1)

    def refuse(*_: Any, **__: Any) -> Any:
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(StorageError, match="Too many open files") as caught:
        survey_checkpoints(tmp_path, RUN, verify_digests=True)
    assert not isinstance(caught.value, CheckpointError)


@pytest.mark.parametrize(
    ("valid", "damaged", "unfinished", "is_failing"),
    [
        (0, 3, 0, False),
        (0, 4, 0, True),
        (1000, 4, 0, False),
        (300, 4, 0, True),
        (396, 4, 0, False),
        (0, 0, 50, False),
    ],
)
def test_much_damage_means_that_the_storage_is_failing(
    valid: int, damaged: int, unfinished: int, is_failing: bool
) -> None:
    def lost(count: int, is_unfinished: bool) -> tuple[Damage, ...]:
        return tuple(
            Damage(path=Path("a"), reason="sha256", is_unfinished=is_unfinished)
            for _ in range(count)
        )

    lost_files = lost(damaged, False) + lost(unfinished, True)
    survey = Survey(valid=(None,) * valid, damaged=lost_files)  # type: ignore[arg-type]
    if is_failing:
        with pytest.raises(
            StorageError,
            match=f"{damaged} of {valid + damaged} checkpoints are damaged: the storage",
        ):
            survey.require_sound_storage()
    else:
        survey.require_sound_storage()


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
    with pytest.raises(
        StorageError, match="4 of 5 checkpoints are damaged: the storage is failing"
    ):
        heal_shard(tmp_path, 0, RUN)
    assert all(path.exists() for path in paths)


def test_a_listed_but_hidden_checkpoint_is_awaited(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As over NFS, where a machine caches that a name is missing: no good file is moved."""
    _, late = write_shard(tmp_path, 2)
    waited_s = 0.0
    lstat, open_ = os.lstat, Path.open

    def refuse_late(path: Any) -> None:
        if Path(path) == late and waited_s < 30:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))

    def lstat_late(path: Any, **options: Any) -> os.stat_result:
        refuse_late(path)
        return lstat(path, **options)

    def open_late(path: Path, *arguments: Any, **options: Any) -> Any:
        refuse_late(path)
        return open_(path, *arguments, **options)

    def sleep(delay_s: float) -> None:
        nonlocal waited_s
        waited_s += delay_s

    monkeypatch.setattr(os, "lstat", lstat_late)
    monkeypatch.setattr(Path, "open", open_late)
    assert heal_shard(tmp_path, 0, RUN, sleep=sleep) == 2
    assert waited_s >= 30
    assert "1 files are listed and not found" in caplog.text
    assert not (tmp_path / "shard_0" / "damaged").exists()


def test_a_marker_alone_is_waited_for_by_nobody(tmp_path: Path) -> None:
    """Its checkpoint is not listed: it is lost."""
    (path,) = write_shard(tmp_path, 1)
    path.unlink()
    assert heal_shard(tmp_path, 0, RUN, sleep=lambda delay_s: pytest.fail("waited")) == 0


def settled_ns() -> int:
    """A time at which all that is there was written long ago."""
    return time.time_ns() + 10**10


def change_marker(path: Path) -> None:
    """Write other bytes of the same size into a file, at a later time of the file system."""
    time.sleep(0.02)
    flip_bit(marker_path(path))


def change_size(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"x")


def change_directory(path: Path) -> None:
    path.parent.rename(path.parent.with_name("elsewhere"))


CHANGES: list[Callable[[Path], None]] = [
    change_marker,
    change_size,
    change_directory,
    Path.unlink,
    lambda path: marker_path(path).unlink(),
    lambda path: write_checkpoint(path.with_name("batch_00009.pt"), [7]),
    lambda path: path.with_name("batch_00009.pt").touch(),
    lambda path: None,
]


@pytest.mark.parametrize("clock_ns", [time.time_ns, settled_ns])
@pytest.mark.parametrize("change", CHANGES)
def test_a_second_look_sees_what_a_first_one_would(
    tmp_path: Path, change: Callable[[Path], None], clock_ns: Callable[[], int]
) -> None:
    path = write_shard(tmp_path, 2, rows=1)[0]
    for number in range(3):  # other ordinals: what is lost of one shard is in no other
        write_checkpoint(checkpoint_path(tmp_path, 1, number), [2 + number])
    committed = CommittedRows(tmp_path, RUN, 8, clock_ns=clock_ns)
    assert committed.done_mask().nonzero()[0].tolist() == [0, 1, 2, 3, 4]
    change(path)
    now = survey_checkpoints(tmp_path, RUN, verify_digests=False).done_mask(8)
    assert committed.done_mask().tolist() == now.tolist()
    assert committed.done_mask().tolist() == now.tolist()


def test_a_second_look_reads_only_what_is_new(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And what was written just before."""
    first, second = write_shard(tmp_path, 2)
    read: list[Path] = []
    real = survey.read_record
    monkeypatch.setattr(
        survey,
        "read_record",
        lambda path, *others, **options: read.append(path) or real(path, *others, **options),
    )
    young, old = (
        CommittedRows(tmp_path, RUN, 8),
        CommittedRows(tmp_path, RUN, 8, clock_ns=settled_ns),
    )
    for committed in (young, young, old, old):
        committed.done_mask()
    assert read == [first, second] * 3
