"""The file system of a path, and whether other machines see its locks."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from vnp_lib.storage import mounts
from vnp_lib.storage.mounts import locks_are_shared, mount_of


@pytest.fixture
def mounted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Pretend that `tmp_path` is a mount of its own."""

    def mount(kind: str, options: str = "rw", of_mount: str = "rw,relatime") -> Path:
        device = os.stat(tmp_path).st_dev
        number = f"{os.major(device)}:{os.minor(device)}"
        point = str(tmp_path).replace(" ", r"\040")
        table = tmp_path / "mountinfo"
        table.write_text(
            f"1 0 {number} / / rw - ext4 /dev/a rw\n"
            f"2 1 {number} / {point} {of_mount} shared:7 - {kind} server:/export {options}\n"
            "3 1 0:99 / /proc rw - proc proc rw\n"
        )
        monkeypatch.setattr(mounts, "MOUNTINFO", table)
        return tmp_path

    return mount


def test_the_innermost_mount_counts(mounted) -> None:
    path = mounted("nfs4", "rw,vers=4.2")
    found = mount_of(path)
    assert found is not None
    assert (found.kind, found.point) == ("nfs4", path)
    assert str(found) == f"a file system of type nfs4, mounted on {path}"


@pytest.mark.parametrize(
    ("kind", "options", "are_shared"),
    [
        ("ext4", "rw", True),
        ("nfs4", "rw,local_lock=none", True),
        ("nfs", "rw,local_lock=all", False),
        ("nfs", "rw,nolock", False),
        ("lustre", "rw,flock", True),
        ("lustre", "rw,localflock", False),
        ("cifs", "rw,nobrl", False),
        ("beegfs", "rw", False),
        ("fuse.sshfs", "rw", False),
    ],
)
def test_local_locks_are_known_by_type_and_options(mounted, kind, options, are_shared) -> None:
    assert locks_are_shared(mounted(kind, options)) is are_shared


@pytest.mark.parametrize(
    ("kind", "is_known"), [("beegfs", True), ("fuse.sshfs", False), ("ext4", False)]
)
def test_known_and_possible_local_locks_differ(mounted, kind, is_known) -> None:
    """Only known local locks cause a warning; possible ones are merely not relied on."""
    found = mount_of(mounted(kind))
    assert found is not None
    assert found.has_local_locks is is_known


def test_a_system_without_a_table_of_mounts_is_trusted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mounts, "MOUNTINFO", tmp_path / "missing")
    assert mount_of(tmp_path) is None
    assert locks_are_shared(tmp_path)
