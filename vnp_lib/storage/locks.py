"""File locks that survive crashes and say who holds them."""

from __future__ import annotations

import fcntl
import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

from vnp_lib.errors import LockTimeoutError, StorageError
from vnp_lib.processes import ProcessIdentity
from vnp_lib.storage import durable
from vnp_lib.storage.durable import canonical_json
from vnp_lib.storage.mounts import locks_are_shared

_LOCK_POLL_S = 0.005


@dataclass(frozen=True, slots=True, kw_only=True)
class LockHolder:
    """Who holds a lock."""

    host: str
    pid: int
    since: str  # ISO 8601, UTC
    purpose: str
    boot: str = ""  # as of `ProcessIdentity`; version 1.0 did not write it
    pid_namespace: str = ""
    started_at: str = "0"

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host} since {self.since}, to {self.purpose}"

    @property
    def process(self) -> ProcessIdentity:
        """Which process it is. One that version 1.0 has named is taken to be of this boot and this container."""
        here = ProcessIdentity.current()
        return ProcessIdentity(
            host=self.host,
            boot=self.boot or here.boot,
            pid_namespace=self.pid_namespace or here.pid_namespace,
            pid=self.pid,
            started_at=self.started_at,
        )


class FileLock:
    """An exclusive lock between processes, and between the threads of one.

    It is `flock` on a file that stays for ever: were it unlinked, two processes could each lock a file of that name. The
    kernel frees the lock when its holder dies, however it dies. It is not reentrant. The descriptor is closed on exec but
    shared by a fork: a process that holds a lock starts others by spawn only.

    On NFS the lock is a lease of the client (about 90 s on v4) that a paused host loses without being told, and v3 may
    keep a dead host's lock. So no result depends on it: it saves double work, and keeps the manifest's counts right.
    """

    def __init__(
        self,
        path: Path,
        *,
        purpose: str,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        """`purpose` completes "held by process 7 to ..." in the message that others get."""
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
        """Take the lock, waiting up to `timeout_s`; 0 tries once.

        Raises:
            LockTimeoutError: Somebody else held it all the time; names host, pid, since when and what for.
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
        """Give the lock back."""
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
        """Who holds the lock, from the lock file: a holder that died leaves its name there, though not the lock."""
        try:
            holder = LockHolder(**json.loads(self.path.read_bytes()))
        except (OSError, ValueError, TypeError):
            return None
        return holder if isinstance(holder.pid, int) else None

    def presumed_holder(self) -> LockHolder | None:
        """Who holds the lock, as far as can be told: who is dead, on this machine, does not.

        Whether another machine's process is dead, the lock itself says, if it is one that machines share: it is tried,
        shared, for a moment.
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
        since = datetime.now(UTC).isoformat(timespec="seconds")
        holder = LockHolder(**asdict(ProcessIdentity.current()), since=since, purpose=self._purpose)
        with suppress(OSError):  # a full disk takes no name, but the lock is ours all the same
            os.ftruncate(fd, 0)
            os.pwrite(fd, canonical_json(asdict(holder)), 0)

    def _timed_out(self, timeout_s: float) -> LockTimeoutError:
        who = self.holder() or "a process that left no name"
        return LockTimeoutError(f"{self.path} is held by {who}; waited {timeout_s:g} s for it")
