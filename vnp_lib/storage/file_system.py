"""Test whether the file system of a directory supports what a run needs."""

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
# Errors of operations that the file system does not support, so that a retry cannot succeed.
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
    """The operations that were tested on a file system, each with its error, or None.

    Attributes:
        directory: Where they were tested.
        mount: Its file system; None if unknown.
        new_file: Create a file exclusively.
        link: Create a hard link, but never over an existing file.
        rename: Rename a file over an existing one.
        directory_sync: Sync a directory.
        lock: Lock a file.
        mapping: Map a file into memory.
        has_locks_seen_by_others: Whether locks exclude processes on other machines, as far as is
            known.
    """

    directory: Path
    mount: Mount | None
    new_file: OSError | None = None
    link: OSError | None = None
    rename: OSError | None = None
    directory_sync: OSError | None = None
    lock: OSError | None = None
    mapping: OSError | None = None
    has_locks_seen_by_others: bool = True

    def require_usable(self) -> None:
        """Raise ConfigError if a run cannot use the directory; the message says what to do."""
        for error, lacking in (
            (self.new_file, "does not create files exclusively"),
            (self.link, "has no hard links, by which a run publishes a file without replacing one"),
            (self.rename, "does not rename a file over another"),
            (
                self.directory_sync,
                "does not sync directories, so that a power failure could undo what was saved",
            ),
            (self.lock, "has no locks, by which a run excludes other runs"),
            (self.mapping, "does not map files into memory"),
        ):
            if error is None:
                continue
            if error.errno in _FULL:
                raise ConfigError(
                    f"--output-dir {self.directory}: {_reason(error)}; make room, or choose "
                    "another directory"
                )
            if error.errno not in _UNABLE:
                raise ConfigError(
                    f"--output-dir {self.directory} cannot be used: {_reason(error)} on "
                    f"{self._on}; repair it, or choose another directory"
                )
            raise ConfigError(
                f"--output-dir {self.directory} is on {self._on}, which {lacking} "
                f"({_reason(error)}): choose a directory on another file system, such as a local "
                "disk, and copy the dataset here when it is complete"
            )

    @property
    def warning(self) -> str | None:
        """A limitation of a usable directory that the user should know, or None."""
        if self.has_locks_seen_by_others:
            return None
        return (
            f"{self.directory} is on {self._on}, whose locks other machines may not see: if two "
            "runs are started in this directory on two machines, neither would notice; no row "
            "would be lost or wrong, but all would be computed twice"
        )

    @property
    def _on(self) -> str:
        return str(self.mount) if self.mount is not None else "a file system of unknown type"


def try_file_system(directory: Path) -> FileSystemAbilities:
    """Test the operations that a run needs with a few small files in an existing directory."""
    mount = mount_of(directory)
    first, second = (durable.temporary_path(directory / name) for name in ("probe", "probe-link"))
    try:
        new_file = _error_of(lambda: _make_once(first))
        if new_file is not None:
            return FileSystemAbilities(directory=directory, mount=mount, new_file=new_file)
        lock, is_excluded = _try_lock(first)
        return FileSystemAbilities(
            directory=directory,
            mount=mount,
            lock=lock,
            mapping=_error_of(lambda: _map(first)),
            link=_error_of(lambda: _link_once(first, second)),
            rename=_error_of(lambda: _rename_over(first, second)),
            directory_sync=_error_of(lambda: durable.fsync_directory(directory)),
            has_locks_seen_by_others=is_excluded and (mount is None or not mount.has_local_locks),
        )
    finally:
        for path in (first, second):
            durable.remove_temporary(path)


def _error_of(test: Callable[[], None]) -> OSError | None:
    try:
        test()
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
    raise OSError(errno.ENOTSUP, "an existing file was created again")


def _link_once(source: Path, target: Path) -> None:
    durable.ops.link(source, target)
    try:
        durable.ops.link(source, target)
    except FileExistsError:
        return
    raise OSError(errno.ENOTSUP, "a link replaced an existing file")


def _rename_over(source: Path, target: Path) -> None:
    # The test of links may have created it. Of two names of one file, a rename keeps both.
    if target.exists():
        durable.ops.unlink(target)
    _make_once(target)
    durable.ops.replace(source, target)


def _try_lock(path: Path) -> tuple[OSError | None, bool]:
    """Lock a file; return the error, and whether the lock excludes a second descriptor."""
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
