"""Durable files: what is written here survives a crash whole, or is not there at all.

A file is written under a temporary name in its own directory, synced, published under its name and the directory synced.
A `.done` marker beside it, written the same way afterwards, holds its size and sha256: a reader believes the marker, and
the file only as far as the marker bears it out. Locks are files that are never unlinked.

Every system call that decides what a crash leaves behind goes through `ops`, so that a fault harness can put its own
`DurableOps` there and count, deny, cut or kill at any of them.
"""

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

MARKER_SCHEMA = 2
_MARKER_SCHEMAS = (1, MARKER_SCHEMA)  # the first has lists of numbers as JSON has them
MAX_JSON_BYTES = 32 * 1024**2
FOREIGN_TEMPORARY_AGE_S = 3600.0

_MOST_NAME_BYTES = 255  # of a file, on all common file systems
_READ_BLOCK_BYTES = 1024**2
_FILE_MODE = 0o640
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # of renameat2
_TEMPORARY = re.compile(
    r"\.tmp-(.+)@([^@]+)@([^@]+)@([^@]+)@([1-9]\d{0,6})@(\d+)@[0-9a-f]{8}", re.DOTALL
)
_TEMPORARY_BEFORE = re.compile(r"\.tmp-(.+)-([1-9]\d{0,6})-[0-9a-f]{8}", re.DOTALL)


class DurableOps:
    """The system calls that decide what a crash leaves behind. `ops` is the instance in use."""

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
        """Give each of two names what is under the other, at one stroke. OSError where system or file system cannot."""
        _exchange(first, second)

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
    """What a whole file is known by."""

    size_bytes: int
    sha256: str  # hexadecimal


class DurableFile(io.RawIOBase):
    """A file being written: append-only, and hashed on the way. Made by `durable_file`."""

    def __init__(self, fd: int) -> None:
        self.error: OSError | None = (
            None  # the first failed write: libraries wrap it in errors of their own
        )
        self._fd = fd
        self._size_bytes = 0
        self._sha256 = hashlib.sha256()

    @property
    def digest(self) -> FileDigest:
        """Size and sha256 of all that has been written so far."""
        return FileDigest(size_bytes=self._size_bytes, sha256=self._sha256.hexdigest())

    def write(self, data: ReadableBuffer, /) -> int:
        """Write all of `data`, however little the system takes at a time. After one error every write raises it."""
        if self.error is not None:
            raise self.error
        view = memoryview(data).cast("B")
        try:
            self._write_all(view)
        except OSError as error:
            self.error = error
            raise
        return len(view)

    def writable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._size_bytes

    def _write_all(self, view: memoryview) -> None:
        while view:
            written = ops.write(self._fd, view)
            if written <= 0:
                raise OSError(errno.EIO, "the system took none of the bytes")
            self._sha256.update(view[:written])
            self._size_bytes += written
            view = view[written:]


@contextmanager
def durable_file(path: Path, *, replace: bool = False) -> Iterator[DurableFile]:
    """Write `path` as a whole or not at all.

    When the block ends well the file is synced, published under its name, and its directory synced; `.digest` of the
    yielded file then is the file's. When anything fails, the temporary file is removed and `path` is as before (with
    `replace`, a failed sync of the directory leaves it open which of the two files a power cut would show).

    Args:
        path: Where the file is to be; its directory exists.
        replace: Put the file in the place of one that is there.

    Raises:
        FileExistsError: `path` is there, and `replace` is not set. It is untouched.
        OSError: What the system said, also where a library that wrote to the file raised something else for it.
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
    """Let a library that opens its file itself write `path`, as a whole or not at all.

    Yields the name under which to write: an empty file beside `path`. All else is as of `durable_file`.
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
    """Write a directory as a whole or not at all.

    Yields the name under which to write: an empty directory beside `path`. When the block ends well, all in it is synced
    and `path` appears with all of it; when anything fails, what was written is removed.

    Args:
        path: Where the directory is to be; the one above it exists.
        replace: Put the directory in the place of one that is there, which is removed with all that is in it. A crash at
            the moment of the exchange can leave neither under the name.

    Raises:
        FileExistsError: `path` is there, and `replace` is not set. It is untouched.
        OSError: What the system said.
    """
    temporary, old = temporary_path(path), temporary_path(path)
    ops.mkdir(temporary)
    try:
        yield temporary
        _fsync_tree(temporary)
        if os.path.lexists(path):
            if not replace:
                raise FileExistsError(errno.EEXIST, "a directory is there", str(path))
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


def write_json(path: Path, value: Any, *, replace: bool = False) -> FileDigest:
    """Write `value` as canonical JSON to `path` as `durable_file` does. ValueError or TypeError if it is not JSON."""
    return write_file(path, canonical_json(value), replace=replace)


def write_sealed_json(path: Path, fields: dict[str, Any], *, replace: bool = False) -> FileDigest:
    """Write an object with a `seal`, the sha256 of its other fields: a flipped bit that is still JSON does not pass.

    Raises:
        StorageError: It would be larger than 32 MiB, which nobody could read. Nothing is written.
        OSError: As `durable_file`.
    """
    data = _sealed(fields)
    if len(data) > MAX_JSON_BYTES:
        raise StorageError(
            f"{path} would have {len(data):,} bytes, and no more than {MAX_JSON_BYTES:,} are read of such a file: it is not written"
        )
    return write_file(path, data, replace=replace)


def read_sealed_json(path: Path) -> dict[str, Any]:
    """Read what `write_sealed_json` wrote, without its seal.

    Raises:
        StorageError: It is missing, larger than 32 MiB, not a JSON object, or its seal does not fit.
        OSError: The system could not read it.
    """
    try:
        with path.open("rb") as file:
            data = file.read(MAX_JSON_BYTES + 1)
    except FileNotFoundError:
        raise StorageError(f"{path} is missing") from None
    if len(data) > MAX_JSON_BYTES:
        raise StorageError(
            f"{path} is larger than {MAX_JSON_BYTES:,} bytes, the most that is read of such a file"
        )
    try:
        fields = json.loads(data, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise StorageError(f"{path} is torn or damaged: not JSON ({error})") from error
    if not isinstance(fields, dict) or not _is_sealed(data, fields.pop("seal", None)):
        raise StorageError(f"{path} is damaged: its seal does not fit its content")
    return cast(dict[str, Any], fields)


def canonical_json(value: Any) -> bytes:
    """The one way to write `value` as JSON: keys sorted, no white space, ASCII, a newline at the end."""
    return (
        json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False) + "\n"
    ).encode("ascii")


def marker_path(path: Path) -> Path:
    """The marker of `path`: `batch_00000.pt.done` beside `batch_00000.pt`."""
    return path.with_name(path.name + ".done")


def write_marker(path: Path, digest: FileDigest, **fields: Any) -> FileDigest:
    """Say durably that `path` is whole: a sealed JSON object of schema, size_bytes, sha256 and `fields`.

    A field that is a list of whole numbers is packed: it would take longer to read than all the rest.

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
    """Read the marker of `path`: size_bytes, sha256, and what its writer added.

    Raises:
        StorageError: There is none, it is damaged, or another version of this software wrote it.
        OSError: The system could not read it.
    """
    fields = read_marker_arrays(path)
    return {
        name: value.tolist() if isinstance(value, array) else value
        for name, value in fields.items()
    }


def read_marker_arrays(path: Path) -> dict[str, Any]:
    """The same, with lists of whole numbers as arrays where the writer has packed them."""
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
    """Read all of `path`, a MiB at a time. OSError where it cannot be read."""
    with path.open("rb") as file:
        return digest_stream(file)


def digest_stream(file: BinaryIO) -> FileDigest:
    """Read an open file from where it stands to its end, a MiB at a time."""
    sha256 = hashlib.sha256()
    size_bytes = 0
    while block := file.read(_READ_BLOCK_BYTES):
        sha256.update(block)
        size_bytes += len(block)
    return FileDigest(size_bytes=size_bytes, sha256=sha256.hexdigest())


def exchange_directories(first: Path, second: Path) -> bool:
    """Exchange two directories at one stroke, durably, and say whether that is possible here.

    Raises:
        OSError: They could not be exchanged for another reason.
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
    """Make `path` and what is missing above it, durably.

    The directory above `path` is synced even where `path` is there: whoever made it may have died before doing so. One
    that may not be opened, such as another user's of mode 0711, is left unsynced.
    """
    if not path.parent.is_dir():
        make_directory(path.parent)
    try:
        ops.mkdir(path)
    except FileExistsError:
        if not path.is_dir():
            raise NotADirectoryError(
                errno.ENOTDIR, "there is a file where a directory has to be", str(path)
            ) from None
    with suppress(PermissionError):
        fsync_directory(path.parent)


def fsync_directory(path: Path) -> None:
    """Make the names in `path` durable. That a file system knows no such thing (EINVAL, ENOTSUP) is accepted."""
    try:
        ops.fsync_directory(path)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise


def refresh_listing(directory: Path) -> None:
    """Have the system look anew what is in a directory: an NFS client does when a change of its own meets one of others."""
    path = temporary_path(directory / "look")
    with suppress(OSError):  # what cannot be written to is looked at as it is
        fd = ops.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
        try:
            ops.close(fd)
        finally:
            remove_temporary(path)


def remove_file(path: Path) -> None:
    """Remove a file; that survives a power loss once its directory is synced."""
    ops.unlink(path)


def remove_temporary(path: Path) -> None:
    """Remove a temporary file of our own, with a second try where that fails: the run goes on, and nothing is to be left of it."""
    for _ in range(2):
        with suppress(OSError):
            return ops.unlink(path)


def move_file(source: Path, target: Path) -> None:
    """Rename durably, within one file system; `target` is a name that nobody else uses, or is replaced."""
    ops.replace(source, target)
    fsync_directory(target.parent)
    fsync_directory(source.parent)


def require_free_space(directory: Path, size_bytes: int) -> None:
    """Raise StorageError unless `directory` has room for `size_bytes` more."""
    free_bytes = shutil.disk_usage(directory).free
    if free_bytes < size_bytes:
        raise StorageError(
            f"{directory} has {free_bytes:,} bytes free and {size_bytes:,} are needed: make room, or choose another directory"
        )


def path_below(directory: Path, name: str) -> Path:
    """Where a file of such a name is. A "/" in it makes directories, but none outside of `directory`.

    On disk the name is UTF-8, whatever the locale: it is the same file in every shell.

    Raises:
        ValueError: It leads out of `directory`, or is too long; what is wrong with it, as the end of a sentence.
    """
    parts = name.split("/")
    if any(part in ("", ".", "..") for part in parts):
        raise ValueError("leads out of the directory as a file name, or nowhere")
    if any(len(part.encode()) > _MOST_NAME_BYTES for part in parts):
        raise ValueError(f"is too long for a file name, which has {_MOST_NAME_BYTES} bytes at most")
    return directory.joinpath(*(os.fsdecode(part.encode()) for part in parts))


def temporary_path(path: Path) -> Path:
    """A name beside `path` that says who writes: its parts are divided by a sign that no host name has."""
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


def replace_unsynced(path: Path, data: ReadableBuffer, *, by_way_of: Path) -> None:
    """Put `data` under `path`, in the place of what is there, whole or not at all. Nothing is synced: a power cut may undo it.

    Args:
        path: Where the file is to be; its directory exists.
        data: All of it.
        by_way_of: A directory on the same file system, for the temporary file.
    """
    temporary = temporary_path(by_way_of / "file")
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
    """Remove the temporary files and directories in `directory` whose writers are gone, and say which.

    A writer of this machine is gone when its process is, whoever has its id by now. Of other machines' and containers'
    processes nothing can be known: their files count as orphaned when nobody has written to them for an hour, by the
    clock of the file system. Nothing else is ever touched.

    Args:
        clock: Seconds since the epoch, in the place of the file system's clock.
    """
    removed = []
    now_s: float | None = None
    for path in filter(_is_temporary, sorted(directory.glob(".tmp-*"))):
        is_orphaned = _writer_is_gone(path)
        if is_orphaned is None:
            now_s = now_s or (clock() if clock is not None else _file_system_time(directory))
            is_orphaned = _age_s(path, now_s=now_s) > FOREIGN_TEMPORARY_AGE_S
        if is_orphaned:
            with suppress(FileNotFoundError):
                _remove(path)
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
        if not _is_same_file(
            path, written
        ):  # over NFS a link that succeeded can be told as one that did not
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


def _fsync_tree(directory: Path) -> None:
    for parent, _, names in os.walk(directory):
        for name in names:
            _fsync_file(Path(parent, name))
        fsync_directory(Path(parent))


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        ops.unlink(path)


def _is_same_file(path: Path, written: os.stat_result) -> bool:
    try:
        return os.path.samestat(path.stat(), written)
    except OSError:
        return False


def _sealed(fields: dict[str, Any]) -> bytes:
    """Canonical JSON of `fields` and their seal, each serialised once: a manifest has megabytes."""
    before = canonical_json({key: value for key, value in fields.items() if key < "seal"})[1:-2]
    after = canonical_json({key: value for key, value in fields.items() if key > "seal"})[1:-2]
    seal = hashlib.sha256(_object([before, after])).hexdigest()
    return _object([before, f'"seal":"{seal}"'.encode("ascii"), after])


def _object(members: Sequence[bytes]) -> bytes:
    return b"{" + b",".join(filter(None, members)) + b"}\n"


def _is_sealed(data: bytes, seal: object) -> bool:
    """Whether the bytes without their seal are those that it was made of, byte for byte."""
    if not isinstance(seal, str):
        return False
    before, found, after = data.partition(f'"seal":"{seal}"'.encode())
    if before.endswith(b","):
        before = before[:-1]
    else:
        after = after.removeprefix(b",")
    return bool(found) and hashlib.sha256(before + after).hexdigest() == seal


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no number of JSON")


def _is_temporary(path: Path) -> bool:
    return bool(_TEMPORARY.fullmatch(path.name) or _TEMPORARY_BEFORE.fullmatch(path.name))


def _writer_is_gone(path: Path) -> bool | None:
    """Whether a temporary file's writer has ended; None where that cannot be told from here."""
    if match := _TEMPORARY.fullmatch(path.name):
        _, host, boot, pid_namespace, pid, started_at = match.groups()
        writer = ProcessIdentity(
            host=host, boot=boot, pid_namespace=pid_namespace, pid=int(pid), started_at=started_at
        )
        return not writer.is_alive() if writer.is_visible() else None
    # As version 1.0 named them. Where the host's name begins is clear only if the file's has no hyphen.
    match = _TEMPORARY_BEFORE.fullmatch(path.name)
    assert match is not None
    if match[1].partition("-")[2] != socket.gethostname():
        return None
    writer = replace(ProcessIdentity.current(), pid=int(match[2]), started_at="0")
    return not writer.is_alive()


def _age_s(path: Path, *, now_s: float) -> float:
    try:
        return now_s - path.lstat().st_mtime
    except FileNotFoundError:
        return 0.0


def _file_system_time(directory: Path) -> float:
    """What time it is by the clock that stamps the files of a directory: over a network, not this machine's."""
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


def _exchange(first: Path, second: Path) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if not hasattr(libc, "renameat2"):  # of glibc from 2.28 on, and of Linux
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS), str(first))
    if (
        libc.renameat2(
            _AT_FDCWD, os.fsencode(first), _AT_FDCWD, os.fsencode(second), _RENAME_EXCHANGE
        )
        != 0
    ):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), str(first))
