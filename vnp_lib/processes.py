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
    """One process, told apart from every other, also from a later one with the same id."""

    host: str
    boot: str  # first digits of the kernel's boot id; "0" where the system has none
    pid_namespace: str  # inode of the pid namespace: containers of one machine have one each
    pid: int
    started_at: str  # clock ticks since the boot; "0" where the system does not say

    @classmethod
    def current(cls) -> Self:
        """Identify this process."""
        pid = os.getpid()
        return cls(
            host=socket.gethostname(),
            boot=_boot(),
            pid_namespace=_pid_namespace(pid),
            pid=pid,
            started_at=_started_at(pid) or _UNKNOWN,
        )

    def is_visible(self) -> bool:
        """Whether `is_alive` can be told from here: the same machine, since the same boot, in the same pid namespace."""
        here = (socket.gethostname(), _boot(), _pid_namespace(os.getpid()))
        return (self.host, self.boot, self.pid_namespace) == here

    def is_alive(self) -> bool:
        """Whether a visible process still runs, and its id is not another's by now."""
        if not _is_running(self.pid):
            return False
        started_at = _started_at(self.pid)
        return (
            started_at is None
            or _UNKNOWN in (self.started_at, started_at)
            or started_at == self.started_at
        )


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True


@lru_cache(maxsize=1)
def _boot() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii")[:8]
    except (OSError, UnicodeDecodeError):
        return _UNKNOWN


@lru_cache(maxsize=8)
def _pid_namespace(pid: int) -> str:
    """Of this process; its id is an argument since a fork may have another namespace."""
    try:
        return str(os.stat(f"/proc/{pid}/ns/pid").st_ino)
    except OSError:
        return _UNKNOWN


def _started_at(pid: int) -> str | None:
    """When a process was started, or None where the system does not say."""
    try:
        # The name of the program, in parentheses, may hold spaces and parentheses. The start is the 22nd field.
        return (
            Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()[19].decode("ascii")
        )
    except (OSError, LookupError):
        return None
