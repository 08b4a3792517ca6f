"""A missing operation of a file system is reported up front in one sentence, with a remedy."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest

from tests.helpers import small_config
from vnp_lib.errors import ConfigError, StorageError
from vnp_lib.failures import FailureCause, classify_exception
from vnp_lib.run.directory import open_run
from vnp_lib.storage import durable, file_system
from vnp_lib.storage.durable import DurableOps
from vnp_lib.storage.file_system import try_file_system
from vnp_lib.storage.mounts import Mount

LACKING = {
    "link": ("has no hard links", [errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK]),
    "replace": ("does not rename a file over another", [errno.EPERM, errno.ENOSYS]),
    "flock": ("has no locks", [errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EINVAL]),
    "fsync_directory": ("does not sync directories", [errno.ENOSYS, errno.EPERM]),
    "open": ("does not create files exclusively", [errno.EACCES]),
}


@pytest.fixture
def lacking(monkeypatch: pytest.MonkeyPatch):
    """Make the system refuse one operation."""

    def lack(name: str, code: int) -> None:
        def refuse(*arguments: Any) -> None:
            raise OSError(code, os.strerror(code))

        ops = DurableOps()
        monkeypatch.setattr(ops, name, refuse, raising=True)
        monkeypatch.setattr(durable, "ops", ops)

    return lack


def test_an_ordinary_directory_passes_and_stays_empty(tmp_path: Path) -> None:
    abilities = try_file_system(tmp_path)
    abilities.require_usable()
    assert abilities.warning is None
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("name", "code"), [(name, code) for name, (_, codes) in LACKING.items() for code in codes]
)
def test_a_missing_operation_is_reported_with_a_remedy(
    tmp_path: Path, lacking, monkeypatch: pytest.MonkeyPatch, name: str, code: int
) -> None:
    lacking(name, code)
    mount = Mount(point=Path("/mnt/share"), kind="exfat", options=frozenset())
    monkeypatch.setattr(file_system, "mount_of", lambda path: mount)
    with pytest.raises(ConfigError) as caught:
        try_file_system(tmp_path).require_usable()
    message = str(caught.value)
    assert message.startswith(
        f"--output-dir {tmp_path} is on a file system of type exfat, mounted on /mnt/share, which "
    )
    assert LACKING[name][0] in message
    assert os.strerror(code) in message
    assert "choose a directory on another file system" in message


def test_memory_maps_are_tested(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: Any, **options: Any) -> None:
        raise OSError(errno.ENODEV, os.strerror(errno.ENODEV))

    monkeypatch.setattr(file_system.mmap, "mmap", refuse)
    with pytest.raises(ConfigError, match="does not map files into memory"):
        try_file_system(tmp_path).require_usable()


@pytest.mark.parametrize("code", [errno.EINVAL, errno.ENOTSUP])
def test_directories_that_need_no_sync_are_accepted(tmp_path: Path, lacking, code: int) -> None:
    lacking("fsync_directory", code)
    try_file_system(tmp_path).require_usable()


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_not_a_missing_operation(tmp_path: Path, lacking, code: int) -> None:
    lacking("write", code)
    with pytest.raises(ConfigError, match=f"{os.strerror(code)}; make room"):
        try_file_system(tmp_path).require_usable()


def test_a_failing_disk_is_not_a_missing_operation(tmp_path: Path, lacking) -> None:
    lacking("link", errno.EIO)
    with pytest.raises(
        ConfigError, match="cannot be used: Input/output error on a file system of type"
    ):
        try_file_system(tmp_path).require_usable()


@pytest.mark.parametrize(
    ("name", "broken"), [("link", os.replace), ("flock", lambda *arguments: None)]
)
def test_an_operation_that_only_seems_to_work_is_detected(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, broken: Any
) -> None:
    """A link that replaces a file is refused; a lock that excludes nobody is warned of."""
    ops = DurableOps()
    if name == "link":
        real = ops.link

        def replacing(source: Path, target: Path) -> None:
            target.unlink(missing_ok=True)
            real(source, target)

        broken = replacing
    monkeypatch.setattr(ops, name, broken)
    monkeypatch.setattr(durable, "ops", ops)
    abilities = try_file_system(tmp_path)
    if name == "link":
        with pytest.raises(ConfigError, match="hard links"):
            abilities.require_usable()
    else:
        abilities.require_usable()
        assert abilities.warning is not None
        assert "neither would notice" in abilities.warning


def test_a_run_is_refused_before_anything_is_created(
    tmp_path: Path, tiny_fasta: Path, lacking
) -> None:
    lacking("link", errno.EPERM)
    with (
        pytest.raises(ConfigError, match="has no hard links"),
        open_run(small_config(tiny_fasta, tmp_path / "run")),
    ):
        pass
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("code", [errno.ENOTSUP, errno.ENOSYS, errno.EPERM])
def test_a_missing_operation_is_not_retried(code: int) -> None:
    error = StorageError("batch_00000.pt: inspect the storage")
    error.__cause__ = OSError(code, os.strerror(code))
    failure = classify_exception(error)
    assert failure.cause == FailureCause.CONFIGURATION
    assert failure.is_permanent
