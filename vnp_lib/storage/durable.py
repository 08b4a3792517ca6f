"""Write files and directories that survive a crash intact, or not at all."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import hashlib
import io
import json
import os
import re
import shutil
import socket
import time
import uuid
from array import array
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, cast

from vnp_lib.errors import StorageError
from vnp_lib.processes import ProcessIdentity
from vnp_lib.storage import packed_integers

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

# A file is written under a temporary name in its own directory, synced, and published under its
# name; then the directory is synced. A `.done` marker next to it is written the same way
# afterwards, and holds its size and sha256. Readers trust the marker, and the file only if it
# matches the marker.

MARKER_SCHEMA = 2
# Schema 1 has lists of numbers in plain JSON.
_MARKER_SCHEMAS = (1, MARKER_SCHEMA)
MAX_JSON_BYTES = 32 * 1024**2
FOREIGN_TEMPORARY_AGE_S = 3600.0

# The limit of all common file systems.
_MOST_NAME_BYTES = 255
_READ_BLOCK_BYTES = 1024**2
_FILE_MODE = 0o640

# Arguments of renameat2.
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2

# The second form is that of version 1.0.
_TEMPORARY = re.compile(
    r"\.tmp-(.+)@([^@]+)@([^@]+)@([^@]+)@([1-9]\d{0,6})@(\d+)@[0-9a-f]{8}", re.DOTALL
)
_TEMPORARY_OF_VERSION_1_0 = re.compile(r"\.tmp-(.+)-([1-9]\d{0,6})-[0-9a-f]{8}", re.DOTALL)


class DurableOps:
    """The system calls that decide which files exist after a crash; `ops` is the instance in use.

    Fault tests replace `ops` to count, deny, truncate or kill at any of them.
    """

    def open(self, path: Path, flags: int) -> int:
        return os.open(path, flags | os.O_CLOEXEC | os.O_NOFOLLOW, _FILE_MODE)

    def write(self, fd: int, data: memoryview) -> int:
        return os.write(fd, data)

    def fsync(self, fd: int) -> None:
        os.fsync(fd)

    def close(self, fd: int) -> None:
        os.close(fd)

    def link(self, source: Path, target: Path) -> None:
        os.link(source, target, follow_symlinks=False)

    def replace(self, source: Path, target: Path) -> None:
        os.replace(source, target)

    def exchange(self, first: Path, second: Path) -> None:
        """Exchange two directories atomically; OSError if system or file system cannot."""
        libc = ctypes.CDLL(None, use_errno=True)
        # Only Linux has it, with glibc from version 2.28 on.
        if not hasattr(libc, "renameat2"):
            raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS), str(first))
        paths = (_AT_FDCWD, os.fsencode(first), _AT_FDCWD, os.fsencode(second))
        if libc.renameat2(*paths, _RENAME_EXCHANGE) != 0:
            code = ctypes.get_errno()
            raise OSError(code, os.strerror(code), str(first))

    def unlink(self, path: Path) -> None:
        os.unlink(path)

    def mkdir(self, path: Path) -> None:
        os.mkdir(path)

    def fsync_directory(self, path: Path) -> None:
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)

    def flock(self, fd: int, operation: int) -> None:
        fcntl.flock(fd, operation)


ops = DurableOps()


@dataclass(frozen=True, slots=True, kw_only=True)
class FileDigest:
    """Size and checksum of a file."""

    size_bytes: int
    sha256: str  # hexadecimal


class DurableFile(io.RawIOBase):
    """An append-only file that computes its digest while it is written by `durable_file`."""

    def __init__(self, fd: int) -> None:
        # The first failed write, kept because libraries wrap it in exceptions of their own.
        self.error: OSError | None = None
        self._fd = fd
        self._size_bytes = 0
        self._sha256 = hashlib.sha256()

    @property
    def digest(self) -> FileDigest:
        """Size and sha256 of everything written so far."""
        return FileDigest(size_bytes=self._size_bytes, sha256=self._sha256.hexdigest())

    def write(self, data: ReadableBuffer, /) -> int:
        """Write all of `data`, even if the system accepts less per call.

        After one error, every write raises the same error.
        """
        if self.error is not None:
            raise self.error
        view = memoryview(data).cast("B")
        size_bytes = len(view)
        try:
            while view:
                written = ops.write(self._fd, view)
                if written <= 0:
                    raise OSError(errno.EIO, "the system accepted none of the bytes")
                self._sha256.update(view[:written])
                self._size_bytes += written
                view = view[written:]
        except OSError as error:
            self.error = error
            raise
        return size_bytes

    def writable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._size_bytes


@contextmanager
def durable_file(path: Path, *, replace: bool = False) -> Iterator[DurableFile]:
    """Write `path` atomically: completely, or not at all.

    If the block succeeds, the file is synced and published under its name, and its directory is
    synced; `.digest` of the yielded file is then that of `path`. If anything fails, the temporary
    file is removed and `path` is unchanged. With `replace`, a failed sync of the directory is an
    exception: after a power failure, either of the two files may be under the name.

    Args:
        path: Path of the file; its directory exists.
        replace: Whether to replace an existing file.

    Raises:
        FileExistsError: `path` exists, and `replace` is not set. The file is unchanged.
        OSError: The first error of the system, even if a library that wrote to the file raised
            another exception instead.
    """
    temporary = temporary_path(path)
    fd = ops.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
    file = DurableFile(fd)
    try:
        try:
            yield file
            if file.error is not None:
                raise file.error
            ops.fsync(fd)
            written = os.fstat(fd)
        finally:
            ops.close(fd)
        _publish(temporary, path, written, replace=replace)
    except BaseException as error:
        with suppress(OSError):
            ops.unlink(temporary)
        if file.error is not None and error is not file.error:
            raise file.error from error
        raise


@contextmanager
def durable_path(path: Path, *, replace: bool = False) -> Iterator[Path]:
    """Write `path` atomically with a library that opens its file itself.

    Yields the path to write to, an empty file in the same directory. Otherwise as `durable_file`.
    """
    temporary = temporary_path(path)
    ops.close(ops.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
    try:
        yield temporary
        _fsync_file(temporary)
        _publish(temporary, path, temporary.stat(), replace=replace)
    except BaseException:
        with suppress(OSError):
            ops.unlink(temporary)
        raise


@contextmanager
def durable_directory(path: Path, *, replace: bool = False) -> Iterator[Path]:
    """Write a directory atomically: completely, or not at all.

    Yields the path to write to, an empty directory next to `path`. If the block succeeds, its
    content is synced and renamed to `path`; if anything fails, it is removed.

    Args:
        path: Path of the directory; its parent exists.
        replace: Whether to replace an existing directory, which is removed with its content. After
            a crash between the two renames, `path` may not exist.

    Raises:
        FileExistsError: `path` exists, and `replace` is not set. The directory is unchanged.
        OSError: The error of the system.
    """
    temporary, old = temporary_path(path), temporary_path(path)
    ops.mkdir(temporary)
    try:
        yield temporary
        for parent, _, names in os.walk(temporary):
            for name in names:
                _fsync_file(Path(parent, name))
            fsync_directory(Path(parent))
        if os.path.lexists(path):
            if not replace:
                raise FileExistsError(errno.EEXIST, "the directory exists", str(path))
            ops.replace(path, old)
        ops.replace(temporary, path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    fsync_directory(path.parent)
    shutil.rmtree(old, ignore_errors=True)


def write_file(path: Path, data: bytes, *, replace: bool = False) -> FileDigest:
    """Write `data` to `path` as `durable_file` does."""
    with durable_file(path, replace=replace) as file:
        file.write(data)
    return file.digest


def write_sealed_json(path: Path, fields: dict[str, Any], *, replace: bool = False) -> FileDigest:
    """Write a JSON object with a `seal`, the sha256 of its other fields.

    The seal detects a flipped bit after which the file is still valid JSON.

    Raises:
        StorageError: The file would be larger than 32 MiB, the limit of `read_sealed_json`. Nothing
            is written.
        OSError: As `durable_file`.
    """
    # Each field is serialised only once, because a manifest may have megabytes.
    before = canonical_json({key: value for key, value in fields.items() if key < "seal"})[1:-2]
    after = canonical_json({key: value for key, value in fields.items() if key > "seal"})[1:-2]
    seal = hashlib.sha256(_json_object([before, after])).hexdigest()
    data = _json_object([before, f'"seal":"{seal}"'.encode("ascii"), after])
    if len(data) > MAX_JSON_BYTES:
        raise StorageError(
            f"{path} would have {len(data):,} bytes, but only {MAX_JSON_BYTES:,} are read of such "
            "a file: it is not written"
        )
    return write_file(path, data, replace=replace)


def read_sealed_json(path: Path) -> dict[str, Any]:
    """Read an object written by `write_sealed_json`, without its seal.

    Raises:
        StorageError: The file is missing, larger than 32 MiB or not a JSON object, or its seal
            does not match.
        OSError: The system could not read it.
    """
    try:
        with path.open("rb") as file:
            data = file.read(MAX_JSON_BYTES + 1)
    except FileNotFoundError:
        raise StorageError(f"{path} is missing") from None
    if len(data) > MAX_JSON_BYTES:
        raise StorageError(
            f"{path} is larger than {MAX_JSON_BYTES:,} bytes, the limit for such a file"
        )
    try:
        fields = json.loads(data, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise StorageError(f"{path} is torn or damaged: not JSON ({error})") from error
    if not isinstance(fields, dict) or not _is_sealed(data, fields.pop("seal", None)):
        raise StorageError(f"{path} is damaged: its seal does not match its content")
    return cast(dict[str, Any], fields)


def canonical_json(value: Any) -> bytes:
    """Return `value` as ASCII JSON with sorted keys, no white space, and a newline at the end."""
    return (
        json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False) + "\n"
    ).encode("ascii")


def marker_path(path: Path) -> Path:
    """Return the path of the marker of a file: `batch_00000.pt.done` for `batch_00000.pt`."""
    return path.with_name(path.name + ".done")


def write_marker(path: Path, digest: FileDigest, **fields: Any) -> FileDigest:
    """Record durably that `path` is complete.

    The marker is a sealed JSON object of `schema`, `size_bytes`, `sha256` and `fields`. A field
    that is a list of integers is packed, because parsing it would take longer than all the rest.

    Raises:
        FileExistsError: `path` has a marker.
        OSError: As `durable_file`.
    """
    packed = {
        name: packed_integers.pack(value) or value if isinstance(value, list) else value
        for name, value in fields.items()
    }
    return write_sealed_json(
        marker_path(path), {**packed, "schema": MARKER_SCHEMA, **asdict(digest)}
    )


def read_marker(path: Path) -> dict[str, Any]:
    """Read the marker of `path`: `size_bytes`, `sha256`, and the fields that its writer added.

    Raises:
        StorageError: The marker is missing or damaged, or was written by another version of vnp.
        OSError: The system could not read it.
    """
    fields = read_marker_arrays(path)
    return {
        name: value.tolist() if isinstance(value, array) else value
        for name, value in fields.items()
    }


def read_marker_arrays(path: Path) -> dict[str, Any]:
    """Read the marker of `path` with packed lists as arrays. Raises as `read_marker`."""
    marker = marker_path(path)
    fields = read_sealed_json(marker)
    if fields.get("schema") not in _MARKER_SCHEMAS:
        known = " and ".join(map(str, _MARKER_SCHEMAS))
        raise StorageError(
            f"{marker} has schema {fields.get('schema')!r}; this version reads {known}"
        )
    try:
        return {
            name: packed_integers.unpack(value) if packed_integers.is_packed(value) else value
            for name, value in fields.items()
        }
    except ValueError as error:
        raise StorageError(f"{marker} is damaged: {error}") from error


def digest_file(path: Path) -> FileDigest:
    """Compute the digest of a file, reading 1 MiB at a time. OSError if it cannot be read."""
    with path.open("rb") as file:
        return digest_stream(file)


def digest_stream(file: BinaryIO) -> FileDigest:
    """Compute the digest of the rest of an open file, reading 1 MiB at a time."""
    sha256 = hashlib.sha256()
    size_bytes = 0
    while block := file.read(_READ_BLOCK_BYTES):
        sha256.update(block)
        size_bytes += len(block)
    return FileDigest(size_bytes=size_bytes, sha256=sha256.hexdigest())


def exchange_directories(first: Path, second: Path) -> bool:
    """Exchange two directories atomically and durably; return False if that is not supported.

    Raises:
        OSError: The exchange is supported, but failed.
    """
    try:
        ops.exchange(first, second)
    except OSError as error:
        if error.errno in (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EPERM):
            return False
        raise
    fsync_directory(first.parent)
    fsync_directory(second.parent)
    return True


def make_directory(path: Path) -> None:
    """Create a directory and its missing parents, durably.

    The parent of `path` is synced even if `path` exists, because the process that created it may
    have been killed before that sync. A parent that may not be opened, such as another user's
    directory of mode 0711, is left unsynced.
    """
    if not path.parent.is_dir():
        make_directory(path.parent)
    try:
        ops.mkdir(path)
    except FileExistsError:
        if not path.is_dir():
            raise NotADirectoryError(
                errno.ENOTDIR, "a file exists where a directory is required", str(path)
            ) from None
    with suppress(PermissionError):
        fsync_directory(path.parent)


def fsync_directory(path: Path) -> None:
    """Make the names in a directory durable, if its file system supports that."""
    try:
        ops.fsync_directory(path)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise


def refresh_listing(directory: Path) -> None:
    """Discard the system's cached listing of a directory.

    An NFS client does so if it changes a directory that other clients have changed.
    """
    path = temporary_path(directory / "look")
    # A read-only directory is listed as it is.
    with suppress(OSError):
        fd = ops.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
        try:
            ops.close(fd)
        finally:
            remove_temporary(path)


def remove_file(path: Path) -> None:
    """Remove a file. The removal survives a power failure once the directory is synced."""
    ops.unlink(path)


def remove_temporary(path: Path) -> None:
    """Remove a temporary file of this process, with one retry; a failure does not end the run."""
    for _ in range(2):
        with suppress(OSError):
            return ops.unlink(path)


def move_file(source: Path, target: Path) -> None:
    """Rename a file durably within one file system. An existing `target` is replaced."""
    ops.replace(source, target)
    fsync_directory(target.parent)
    fsync_directory(source.parent)


def require_free_space(directory: Path, size_bytes: int) -> None:
    """Raise StorageError unless the file system of `directory` has `size_bytes` free."""
    free_bytes = shutil.disk_usage(directory).free
    if free_bytes < size_bytes:
        raise StorageError(
            f"{directory} has {free_bytes:,} bytes free and {size_bytes:,} are needed: make room, "
            "or choose another directory"
        )


def path_below(directory: Path, name: str) -> Path:
    """Return the path of a file below `directory`, whose name may contain directories.

    On disk the name is UTF-8, whatever the locale, so that it is the same file in every shell.

    Raises:
        ValueError: The name leads out of `directory`, or is too long. The message completes a
            sentence that begins with the name.
    """
    parts = name.split("/")
    if any(part in ("", ".", "..") for part in parts):
        raise ValueError("leads out of the directory as a file name, or nowhere")
    if any(len(part.encode()) > _MOST_NAME_BYTES for part in parts):
        raise ValueError(f"is too long for a file name, which has up to {_MOST_NAME_BYTES} bytes")
    return directory.joinpath(*(os.fsdecode(part.encode()) for part in parts))


def temporary_path(path: Path) -> Path:
    """Return a unique temporary path next to `path` that identifies the writing process.

    Its parts are separated by a character that is not allowed in host names.
    """
    writer = ProcessIdentity.current()
    identity = (
        writer.host,
        writer.boot,
        writer.pid_namespace,
        writer.pid,
        writer.started_at,
        uuid.uuid4().hex[:8],
    )
    return path.with_name(f".tmp-{path.name}@" + "@".join(map(str, identity)))


def replace_unsynced(path: Path, data: ReadableBuffer, *, temporary_dir: Path) -> None:
    """Write or replace a file atomically, without a sync: a power failure may undo it.

    Args:
        path: Path of the file; its directory exists.
        data: Content of the file.
        temporary_dir: A directory on the same file system, for the temporary file.
    """
    temporary = temporary_path(temporary_dir / "file")
    try:
        temporary.write_bytes(data)
        ops.replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            ops.unlink(temporary)
        raise


def remove_orphaned_temporaries(
    directory: Path, *, clock: Callable[[], float] | None = None
) -> list[Path]:
    """Remove temporary files and directories of processes that have ended; return their paths.

    A writer on this machine has ended if its process has, even if another process has the same id
    now. The state of processes on other machines and in other containers is unknown: their files
    are orphaned if they have not been written to for an hour, by the clock of the file system.
    Other files are never removed.

    Args:
        clock: Seconds since the epoch; by default, those of the file system's clock.
    """
    removed = []
    now_s: float | None = None
    for path in sorted(directory.glob(".tmp-*")):
        if not any(form.fullmatch(path.name) for form in (_TEMPORARY, _TEMPORARY_OF_VERSION_1_0)):
            continue
        is_orphaned = _writer_is_gone(path)
        if is_orphaned is None:
            now_s = now_s or (clock() if clock is not None else _file_system_time(directory))
            with suppress(FileNotFoundError):
                is_orphaned = now_s - path.lstat().st_mtime > FOREIGN_TEMPORARY_AGE_S
        if is_orphaned:
            with suppress(FileNotFoundError):
                if path.is_dir() and not path.is_symlink():
                    shutil.rmtree(path)
                else:
                    ops.unlink(path)
                removed.append(path)
    return removed


def _publish(temporary: Path, path: Path, written: os.stat_result, *, replace: bool) -> None:
    if replace:
        ops.replace(temporary, path)
        fsync_directory(path.parent)
        return
    try:
        ops.link(temporary, path)
    except FileExistsError:
        # Over NFS, a lost reply can make a successful link look like a failed one.
        if not _is_same_file(path, written):
            raise
    try:
        ops.unlink(temporary)
        fsync_directory(path.parent)
    except BaseException:
        if _is_same_file(path, written):
            with suppress(OSError):
                ops.unlink(path)
        raise


def _fsync_file(path: Path) -> None:
    fd = ops.open(path, os.O_RDONLY)
    try:
        ops.fsync(fd)
    finally:
        ops.close(fd)


def _is_same_file(path: Path, written: os.stat_result) -> bool:
    try:
        return os.path.samestat(path.stat(), written)
    except OSError:
        return False


def _json_object(members: Sequence[bytes]) -> bytes:
    return b"{" + b",".join(filter(None, members)) + b"}\n"


def _is_sealed(data: bytes, seal: object) -> bool:
    """Return whether the seal was computed from exactly these bytes without the seal."""
    if not isinstance(seal, str):
        return False
    before, found, after = data.partition(f'"seal":"{seal}"'.encode())
    if before.endswith(b","):
        before = before[:-1]
    else:
        after = after.removeprefix(b",")
    return bool(found) and hashlib.sha256(before + after).hexdigest() == seal


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a JSON number")


def _writer_is_gone(path: Path) -> bool | None:
    """Return whether the writer of a temporary file has ended, or None if unknown."""
    if match := _TEMPORARY.fullmatch(path.name):
        _, host, boot, pid_namespace, pid, started_at = match.groups()
        writer = ProcessIdentity(
            host=host, boot=boot, pid_namespace=pid_namespace, pid=int(pid), started_at=started_at
        )
        return not writer.is_alive() if writer.is_visible() else None
    # The host name begins after the first hyphen, provided that the name of the file has none.
    # Otherwise it differs from this host's, and nothing is known of the writer.
    match = _TEMPORARY_OF_VERSION_1_0.fullmatch(path.name)
    assert match is not None
    if match[1].partition("-")[2] != socket.gethostname():
        return None
    writer = replace(ProcessIdentity.current(), pid=int(match[2]), started_at="0")
    return not writer.is_alive()


def _file_system_time(directory: Path) -> float:
    """Return the time of the clock that stamps files; on a network file system, the server's."""
    path = temporary_path(directory / "clock")
    try:
        fd = ops.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
        try:
            ops.close(fd)
            return path.lstat().st_mtime
        finally:
            remove_temporary(path)
    except OSError:
        return time.time()
