"""Signs of life of another process, and the time since the last one."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Self

_LATE_S = 0.5
_IDLE_SHARE = 0.05  # of a core: threads that only wait for each other use less


class SilenceTimer:
    """Counts the seconds without a sign of life, as far as they were observed.

    Between a check and one that comes late, this process or its machine may have been suspended
    (SIGSTOP, a suspended laptop, a paused virtual machine), and the observed process with it. So a
    late check counts as one that came in time.

    Args:
        poll_s: Seconds between two calls of `check` while nothing is suspended.
    """

    def __init__(self, *, poll_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._poll_s = poll_s
        self._clock = clock
        self.was_late = False
        self.restart()

    def restart(self) -> None:
        """Count from now: there was a sign of life."""
        self._seconds = 0.0
        self._checked_at_s = self._clock()

    def skip(self) -> None:
        """Leave out the time since the last check: nobody observed."""
        self._checked_at_s = self._clock()

    def check(self) -> float:
        """Return the seconds counted up to now, and set `was_late` if this call came late."""
        now_s = self._clock()
        step_s, self._checked_at_s = now_s - self._checked_at_s, now_s
        self.was_late = step_s > 2 * self._poll_s + _LATE_S
        self._seconds += self._poll_s if self.was_late else step_s
        return self._seconds


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessState:
    """What the kernel reports about a process; zeros if it reports nothing."""

    is_stopped: bool = False  # by SIGSTOP, or by a debugger
    cpu_s: float = 0.0
    io_bytes: int = 0  # read and written, pipes and cached files included

    @classmethod
    def of(cls, pid: int, proc: Path = Path("/proc")) -> Self:
        """Read the state of a process; without /proc, or if the process is gone, return zeros."""
        is_stopped, cpu_s, io_bytes = False, 0.0, 0
        with suppress(OSError, ValueError, IndexError):
            stat = (proc / str(pid) / "stat").read_text(encoding="utf-8", errors="replace")
            # The name of the program, in parentheses, may contain blanks and parentheses.
            fields = stat.rpartition(")")[2].split()
            is_stopped = fields[0] in ("T", "t")
            cpu_s = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
        with suppress(OSError, ValueError):
            lines = (proc / str(pid) / "io").read_text(encoding="utf-8").splitlines()
            counters = dict(line.split(": ") for line in lines)
            io_bytes = sum(int(counters.get(name, 0)) for name in ("rchar", "wchar", "read_bytes"))
        return cls(is_stopped=is_stopped, cpu_s=cpu_s, io_bytes=io_bytes)

    def has_worked_since(self, earlier: Self, elapsed_s: float) -> bool:
        """Whether the process has read, written or computed since `earlier`, `elapsed_s` ago."""
        return (
            self.io_bytes > earlier.io_bytes or self.cpu_s - earlier.cpu_s > _IDLE_SHARE * elapsed_s
        )
