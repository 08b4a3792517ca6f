"""Signs of life of another process, and for how long there has been none."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Self

_LATE_S = 0.5
_IDLE_SHARE = 0.05  # of a core: threads that only wait for each other take less


class Silence:
    """Counts the seconds without a sign of life, as far as they were watched.

    Between a look and one that comes late, this process or its machine may have stood still (SIGSTOP, a suspended laptop, a
    paused virtual machine), and whoever is watched with it. So a late look counts as one that came in time.

    Args:
        look_every_s: How often `look` is called where nothing stands still.
    """

    def __init__(self, *, look_every_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._look_every_s = look_every_s
        self._clock = clock
        self.was_late = False
        self.end()

    def end(self) -> None:
        """Count from now: there was a sign of life."""
        self._seconds = 0.0
        self._looked_at_s = self._clock()

    def skip(self) -> None:
        """Leave out the time since the last look: nobody watched."""
        self._looked_at_s = self._clock()

    def look(self) -> float:
        """Return the seconds counted up to now. `was_late` says whether this look came late."""
        now_s = self._clock()
        step_s, self._looked_at_s = now_s - self._looked_at_s, now_s
        self.was_late = step_s > 2 * self._look_every_s + _LATE_S
        self._seconds += self._look_every_s if self.was_late else step_s
        return self._seconds


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessState:
    """What the kernel tells of a process; all zero where it tells nothing."""

    is_stopped: bool = False  # by SIGSTOP, or by a debugger
    cpu_s: float = 0.0
    io_bytes: int = 0  # read and written, pipes and cached files included

    @classmethod
    def of(cls, pid: int, proc: Path = Path("/proc")) -> Self:
        """Read a process's state. A process that is gone, or a system without /proc, tells nothing."""
        is_stopped, cpu_s, io_bytes = False, 0.0, 0
        with suppress(OSError, ValueError, IndexError):
            fields = (
                (proc / str(pid) / "stat")
                .read_text(encoding="utf-8", errors="replace")
                .rpartition(")")[2]
                .split()
            )
            is_stopped = fields[0] in ("T", "t")
            cpu_s = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
        with suppress(OSError, ValueError):
            counters = dict(
                line.split(": ")
                for line in (proc / str(pid) / "io").read_text(encoding="utf-8").splitlines()
            )
            io_bytes = sum(int(counters.get(name, 0)) for name in ("rchar", "wchar", "read_bytes"))
        return cls(is_stopped=is_stopped, cpu_s=cpu_s, io_bytes=io_bytes)

    def has_worked_since(self, earlier: Self, elapsed_s: float) -> bool:
        """Whether the process has read, written or computed since an earlier look, `elapsed_s` ago."""
        return (
            self.io_bytes > earlier.io_bytes or self.cpu_s - earlier.cpu_s > _IDLE_SHARE * elapsed_s
        )
