"""Identify processes across machines, containers, reboots and reused process ids."""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Self

_UNKNOWN = "0"


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessIdentity:
    """The identity of one process, which differs from that of a later process with the same id.

    Attributes:
        host: Host name.
        boot: First digits of the kernel's boot id; "0" if unknown.
        pid_namespace: Inode of the pid namespace, of which each container has its own; "0" if
            unknown.
        pid: Process id in that namespace.
        started_at: Start time in clock ticks since the boot; "0" if unknown.
    """

    host: str
    boot: str
    pid_namespace: str
    pid: int
    started_at: str

    @classmethod
    def current(cls) -> Self:
        """Return the identity of this process."""
        pid = os.getpid()
        return cls(
            host=socket.gethostname(),
            boot=_boot(),
            pid_namespace=_pid_namespace(pid),
            pid=pid,
            started_at=_started_at(pid) or _UNKNOWN,
        )

    def is_visible(self) -> bool:
        """Return whether `is_alive` can be determined by this process.

        It can if both are of the same machine, boot and pid namespace.
        """
        here = (socket.gethostname(), _boot(), _pid_namespace(os.getpid()))
        return (self.host, self.boot, self.pid_namespace) == here

    def is_alive(self) -> bool:
        """Return whether a visible process is running, and its id is not that of a later one."""
        try:
            os.kill(self.pid, 0)
        except (ProcessLookupError, OverflowError):
            return False
        except PermissionError:
            # The process is running, as another user.
            pass
        started_at = _started_at(self.pid)
        return (
            started_at is None
            or _UNKNOWN in (self.started_at, started_at)
            or started_at == self.started_at
        )


@lru_cache(maxsize=1)
def _boot() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii")[:8]
    except (OSError, UnicodeDecodeError):
        return _UNKNOWN


@lru_cache(maxsize=8)
def _pid_namespace(pid: int) -> str:
    """Return the namespace of this process; its id is a cache key because of forks."""
    try:
        return str(os.stat(f"/proc/{pid}/ns/pid").st_ino)
    except OSError:
        return _UNKNOWN


def _started_at(pid: int) -> str | None:
    """Return the start time of a process, or None if unknown."""
    try:
        # The name of the program, in parentheses, may contain spaces and parentheses. The start
        # time is the 22nd field of the line.
        return (
            Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()[19].decode("ascii")
        )
    except (OSError, LookupError):
        return None
