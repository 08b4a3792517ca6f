"""Try whether a directory's file system can do what a run needs, before anything is computed."""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from vnp_lib.errors import ConfigError
from vnp_lib.storage import durable
from vnp_lib.storage.mounts import Mount, mount_of

_FULL = (errno.ENOSPC, errno.EDQUOT)
# What the system says of what it cannot do at all, and will not be able to do later.
_UNABLE = (
    errno.ENOTSUP,
    errno.ENOSYS,
    errno.EPERM,
    errno.EACCES,
    errno.EINVAL,
    errno.EMLINK,
    errno.ENODEV,
    errno.ENOLCK,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class FileSystemAbilities:
    """What a file system could do when it was tried, and what the system said where it could not."""

    directory: Path
    mount: Mount | None
    new_file: OSError | None = None  # that refuses to be made twice
    link: OSError | None = None  # a second name that replaces nothing
    rename: OSError | None = None  # over a file that is there
    directory_sync: OSError | None = None
    lock: OSError | None = None
    mapping: OSError | None = None  # of a file into memory
    has_locks_seen_by_others: bool = True

    def require_usable(self) -> None:
        """Raise ConfigError, which says what is lacking and what to do, where a run cannot use the directory."""
        for error, lacking in (
            (self.new_file, "does not make files as a run needs them, each only once"),
            (self.link, "has no hard links, by which a run publishes a file without replacing one"),
            (self.rename, "does not rename a file over another"),
            (
                self.directory_sync,
                "does not sync directories, so that a power cut could undo what was saved",
            ),
            (self.lock, "has no locks, by which a run keeps others out"),
            (self.mapping, "does not map files into memory"),
        ):
            if error is None:
                continue
            if error.errno in _FULL:
                raise ConfigError(
                    f"--output-dir {self.directory}: {_reason(error)}; make room, or choose another directory"
                )
            if error.errno not in _UNABLE:
                raise ConfigError(
                    f"--output-dir {self.directory} cannot be used: {_reason(error)} on {self._on}; see to it, or choose "
                    "another directory"
                )
            raise ConfigError(
                f"--output-dir {self.directory} is on {self._on}, which {lacking} ({_reason(error)}): choose a directory on "
                "another file system, such as a local disk, and copy the dataset here when it is complete"
            )

    @property
    def warning(self) -> str | None:
        """What a user should know of a directory that can be used."""
        if self.has_locks_seen_by_others:
            return None
        return (
            f"{self.directory} is on {self._on}, whose locks other machines may not see: should two runs be started in this "
            "directory, on two machines, neither would notice; no row would be lost or wrong, but all would be computed twice"
        )

    @property
    def _on(self) -> str:
        return str(self.mount) if self.mount is not None else "a file system of unknown type"


def try_file_system(directory: Path) -> FileSystemAbilities:
    """Make and remove a few small files in a directory that is there, and say how that went."""
    mount = mount_of(directory)
    first, second = (durable.temporary_path(directory / name) for name in ("probe", "probe-link"))
    try:
        new_file = _tried(lambda: _make_once(first))
        if new_file is not None:
            return FileSystemAbilities(directory=directory, mount=mount, new_file=new_file)
        lock, is_excluded = _try_lock(first)
        return FileSystemAbilities(
            directory=directory,
            mount=mount,
            lock=lock,
            mapping=_tried(lambda: _map(first)),
            link=_tried(lambda: _link(first, second)),
            rename=_tried(lambda: _rename_over(first, second)),
            directory_sync=_tried(lambda: durable.fsync_directory(directory)),
            has_locks_seen_by_others=is_excluded and (mount is None or not mount.has_local_locks),
        )
    finally:
        for path in (first, second):
            durable.remove_temporary(path)


def _tried(act: Callable[[], None]) -> OSError | None:
    try:
        act()
    except OSError as error:
        return error
    return None


def _reason(error: OSError) -> str:
    return error.strerror or str(error)


def _make_once(path: Path) -> None:
    flags = os.O_CREAT | os.O_EXCL | os.O_RDWR
    fd = durable.ops.open(path, flags)
    try:
        durable.ops.write(fd, memoryview(b"probe"))
        durable.ops.fsync(fd)
    finally:
        durable.ops.close(fd)
    try:
        durable.ops.close(durable.ops.open(path, flags))
    except FileExistsError:
        return
    raise OSError(errno.ENOTSUP, "a file that is there was made again")


def _link(source: Path, target: Path) -> None:
    durable.ops.link(source, target)
    try:
        durable.ops.link(source, target)
    except FileExistsError:
        return
    raise OSError(errno.ENOTSUP, "a link replaced a file that was there")


def _rename_over(source: Path, target: Path) -> None:
    if target.exists():  # by the link: of two names of one file, a rename leaves both
        durable.ops.unlink(target)
    _make_once(target)
    durable.ops.replace(source, target)


def _try_lock(path: Path) -> tuple[OSError | None, bool]:
    """Lock a file, and say whether somebody who has opened it anew is kept out."""
    holder = durable.ops.open(path, os.O_RDWR)
    try:
        other = durable.ops.open(path, os.O_RDWR)
        try:
            durable.ops.flock(holder, fcntl.LOCK_EX | fcntl.LOCK_NB)
            try:
                durable.ops.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return None, True
            return None, False
        except OSError as error:
            return error, False
        finally:
            durable.ops.close(other)
    finally:
        durable.ops.close(holder)


def _map(path: Path) -> None:
    fd = durable.ops.open(path, os.O_RDONLY)
    try:
        mmap.mmap(fd, 0, access=mmap.ACCESS_READ).close()
    finally:
        durable.ops.close(fd)
