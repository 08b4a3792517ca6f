"""File locks that survive crashes and name their holder."""

from __future__ import annotations

import fcntl
import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from vnp_lib.errors import LockTimeoutError, StorageError
from vnp_lib.formatting import utc_now
from vnp_lib.processes import ProcessIdentity
from vnp_lib.storage import durable
from vnp_lib.storage.durable import canonical_json
from vnp_lib.storage.mounts import locks_are_shared

_LOCK_POLL_S = 0.005


@dataclass(frozen=True, slots=True, kw_only=True)
class LockHolder:
    """The process that holds a lock, as recorded in the lock file.

    Attributes:
        host: Its host name.
        pid: Its process id.
        since: When it acquired the lock, in UTC by ISO 8601.
        purpose: What it holds the lock for, as the end of "held by process 7 to ...".
        boot: As of `ProcessIdentity`. Version 1.0 recorded neither this nor the next two.
        pid_namespace: As of `ProcessIdentity`.
        started_at: As of `ProcessIdentity`.
    """

    host: str
    pid: int
    since: str
    purpose: str
    boot: str = ""
    pid_namespace: str = ""
    started_at: str = "0"

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host} since {self.since}, to {self.purpose}"

    @property
    def process(self) -> ProcessIdentity:
        """The identity of the process. Of version 1.0, this boot and this container are assumed."""
        here = ProcessIdentity.current()
        return ProcessIdentity(
            host=self.host,
            boot=self.boot or here.boot,
            pid_namespace=self.pid_namespace or here.pid_namespace,
            pid=self.pid,
            started_at=self.started_at,
        )


class FileLock:
    """An exclusive, non-reentrant lock between processes and between threads of one process.

    It is `flock` on a file that is never removed: otherwise two processes could each lock a file of
    that name. The kernel releases the lock when its holder exits or is killed. The descriptor is
    closed on exec but shared by a fork, so a process that holds a lock must start others by spawn.

    On NFS the lock is a lease of the client (about 90 s on v4) that a paused host loses without
    notice, and v3 may keep the lock of a host that is gone. So no result depends on the lock: it
    avoids duplicate work, and keeps the counts in the manifest right.
    """

    def __init__(
        self,
        path: Path,
        *,
        purpose: str,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        """`purpose` completes "held by process 7 to ..." in the message for other processes."""
        self.path = path
        self._purpose = purpose
        self._clock = clock
        self._sleep = sleep
        self._between_threads = threading.Lock()
        self._fd: int | None = None

    @contextmanager
    def held(self, *, timeout_s: float) -> Iterator[None]:
        """Hold the lock for a block. Raises as `acquire`."""
        self.acquire(timeout_s)
        try:
            yield
        finally:
            self.release()

    def acquire(self, timeout_s: float) -> None:
        """Acquire the lock, waiting up to `timeout_s`; 0 tries once.

        Raises:
            LockTimeoutError: Another holder kept the lock; the message names its host, pid, purpose
                and since when it holds the lock.
            StorageError: The file system has no locks.
            OSError: The lock file cannot be opened.
        """
        deadline_s = self._clock() + timeout_s
        if not self._between_threads.acquire(timeout=timeout_s):
            raise self._timed_out(timeout_s)
        try:
            fd = durable.ops.open(self.path, os.O_RDWR | os.O_CREAT)
            try:
                self._wait_for_lock(fd, deadline_s, timeout_s)
                self._sign(fd)
            except BaseException:
                durable.ops.close(fd)
                raise
        except BaseException:
            self._between_threads.release()
            raise
        self._fd = fd

    def release(self) -> None:
        """Release the lock."""
        fd, self._fd = self._fd, None
        if fd is None:
            raise RuntimeError(f"{self.path} is not held")
        try:
            with suppress(OSError):
                os.ftruncate(fd, 0)
            durable.ops.flock(fd, fcntl.LOCK_UN)
        finally:
            try:
                durable.ops.close(fd)
            finally:
                self._between_threads.release()

    def holder(self) -> LockHolder | None:
        """Return the holder named in the lock file, which may be a process that was killed."""
        try:
            holder = LockHolder(**json.loads(self.path.read_bytes()))
        except (OSError, ValueError, TypeError):
            return None
        return holder if isinstance(holder.pid, int) else None

    def presumed_holder(self) -> LockHolder | None:
        """Return the holder named in the lock file, unless it is known to have ended.

        Processes on this machine are looked up. For those on other machines, a shared lock is
        tried for a moment, if the file system shares locks between machines.
        """
        holder = self.holder()
        if holder is None or (holder.process.is_visible() and not holder.process.is_alive()):
            return None
        if (
            not holder.process.is_visible()
            and locks_are_shared(self.path.parent)
            and self._is_free()
        ):
            return None
        return holder

    def _is_free(self) -> bool:
        try:
            fd = durable.ops.open(self.path, os.O_RDONLY)
        except OSError:
            return False
        try:
            durable.ops.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError:
            return False
        finally:
            durable.ops.close(fd)
        return True

    def _wait_for_lock(self, fd: int, deadline_s: float, timeout_s: float) -> None:
        while True:
            try:
                return durable.ops.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if self._clock() >= deadline_s:
                    raise self._timed_out(timeout_s) from None
            except OSError as error:
                raise StorageError(
                    f"{self.path} cannot be locked ({error}): choose a file system with locks"
                ) from error
            self._sleep(_LOCK_POLL_S)

    def _sign(self, fd: int) -> None:
        since = utc_now().isoformat(timespec="seconds")
        holder = LockHolder(**asdict(ProcessIdentity.current()), since=since, purpose=self._purpose)
        # On a full disk the name cannot be written, but the lock is held nevertheless.
        with suppress(OSError):
            os.ftruncate(fd, 0)
            os.pwrite(fd, canonical_json(asdict(holder)), 0)

    def _timed_out(self, timeout_s: float) -> LockTimeoutError:
        holder = self.holder() or "an unnamed process"
        return LockTimeoutError(f"{self.path} is held by {holder}; waited {timeout_s:g} s for it")
