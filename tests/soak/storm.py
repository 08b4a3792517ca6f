"""Strike a run with random faults, and start it again until it is complete."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path

from tests.helpers import CommandLine, is_alive, workers_of
from tests.soak.machine import slowness
from tests.soak.workers import read_journal

ORPHANS_EXIT_WITHIN_S = 12.0

_MOST_STARTS = 30
_QUIET_LIMIT_S = 300.0  # for a run to complete without faults
_POLL_S = 0.02
_FAILED = 1
_OWN_ENDS = (0, _FAILED)
_STRUCK_ENDS = (0, _FAILED, 130, 143, -signal.SIGINT, -signal.SIGTERM, -signal.SIGKILL)


class Fault(StrEnum):
    """A fault."""

    WORKER_TERM = "SIGTERM to a worker"
    WORKER_KILL = "SIGKILL to a worker"
    WORKER_STOP = "SIGSTOP to a worker"
    FLOW_TERM = "SIGTERM to the flow"
    FLOW_INT = "SIGINT to the flow"
    FLOW_KILL = "SIGKILL to the flow"
    DISK_FULL = "full disk, for a while"
    DISK_SLOW = "slow disk, for a while"


_SIGNALS = {
    Fault.WORKER_TERM: signal.SIGTERM,
    Fault.WORKER_KILL: signal.SIGKILL,
    Fault.WORKER_STOP: signal.SIGSTOP,
    Fault.FLOW_TERM: signal.SIGTERM,
    Fault.FLOW_INT: signal.SIGINT,
    Fault.FLOW_KILL: signal.SIGKILL,
}
_OF_WORKERS = (Fault.WORKER_TERM, Fault.WORKER_KILL, Fault.WORKER_STOP)
_OF_THE_FLOW = (Fault.FLOW_TERM, Fault.FLOW_INT, Fault.FLOW_KILL)
_OF_THE_DISK = {
    Fault.DISK_FULL: ("disk_full", (0.2, 1.5)),
    Fault.DISK_SLOW: ("slow_disk", (2.0, 6.0)),
}
# Longer than the silence limit of a soak.
FROZEN_AT_MOST_S = 15.0
_STOPPING = (Fault.FLOW_TERM, Fault.FLOW_INT)


@dataclass(slots=True)
class Struck:
    """The faults of a run, and how long processes took to stop."""

    faults: Counter[Fault] = field(default_factory=Counter)
    starts: int = 0
    lost_workers: set[int] = field(default_factory=set)  # process ids that could not save
    worker_stops_s: list[float] = field(default_factory=list)  # from SIGTERM to exit
    flow_stops_s: list[float] = field(default_factory=list)
    # From the flow's SIGKILL to the exit of a worker.
    orphans_s: list[float] = field(default_factory=list)


class Storm:
    """Start a run, strike it at random times, and start it again until it is complete."""

    def __init__(
        self,
        command_line: CommandLine,
        arguments: Sequence[object],
        run_dir: Path,
        journal_dir: Path,
        seed: int,
    ) -> None:
        self._command_line = command_line
        self._arguments = arguments
        self._run_dir = run_dir
        self._journal_dir = journal_dir
        self._draw = random.Random(seed)
        self._struck = Struck()
        self._flow: subprocess.Popen[str] | None = None
        self._stopping: dict[int, float] = {}  # workers with SIGTERM, and when
        self._frozen: set[int] = set()
        self._thaw_at = 0.0
        self._stopping_since: float | None = None  # the flow
        self._killed_at = 0.0
        self._orphans: set[int] = set()
        self._disk_faults: dict[str, float] = {}  # until when

    def rage(self, faults: Sequence[Fault]) -> Struck:
        """Strike with each of `faults` in turn, then let the run complete. No process is left.

        Raises:
            AssertionError: If it exited in a wrong way, or did not complete.
        """
        left = list(faults)
        try:
            while True:
                self._start()
                is_struck = self._follow(left)
                if self._ended(is_struck) == 0:
                    return self._struck
        finally:
            self._clear_up()

    def _start(self) -> None:
        assert self._struck.starts < _MOST_STARTS, f"not complete after {_MOST_STARTS} starts"
        self._struck.starts += 1
        self._flow = self._command_line.start(*self._arguments)
        self._stopping_since = None

    def _follow(self, left: list[Fault]) -> bool:
        """Strike while the flow is alive; return whether the flow itself was struck."""
        assert self._flow is not None
        is_struck = False
        rows_before = read_journal(self._journal_dir).rows_computed
        due = self._next_due(rows_before)
        quiet_since = time.monotonic()
        while self._flow.poll() is None:
            time.sleep(_POLL_S)
            self._look_after()
            assert time.monotonic() - quiet_since < _QUIET_LIMIT_S * slowness(), (
                "it does not complete"
            )
            if left and not is_struck and self._is_due(*due) and self._strike(left[0]):
                is_struck = left.pop(0) in _OF_THE_FLOW
                due = self._next_due(read_journal(self._journal_dir).rows_computed)
                quiet_since = time.monotonic()
        return is_struck

    def _next_due(self, rows: int) -> tuple[float, int]:
        """Draw a time and a number of rows: mostly during the work, sometimes before it."""
        if self._draw.random() < 0.7:
            return time.monotonic() + 0.2, rows + self._draw.randint(1, 60)
        return time.monotonic() + self._draw.uniform(0.2, 8.0), 0

    def _is_due(self, at: float, rows: int) -> bool:
        return time.monotonic() >= at and read_journal(self._journal_dir).rows_computed >= rows

    def _strike(self, fault: Fault) -> bool:
        """Strike, or return False if there is no process to strike yet."""
        assert self._flow is not None
        if fault in _OF_WORKERS:
            struck = self._frozen | self._orphans | set(self._stopping)
            workers = sorted(set(workers_of(self._run_dir)) - struck)
            if not workers:
                return False
            self._strike_worker(self._draw.choice(workers), fault)
        elif fault in _OF_THE_FLOW:
            self._strike_flow(fault)
        else:
            name, (least_s, most_s) = _OF_THE_DISK[fault]
            (self._journal_dir / name).touch()
            self._disk_faults[name] = time.monotonic() + self._draw.uniform(least_s, most_s)
        self._struck.faults[fault] += 1
        return True

    def _strike_worker(self, pid: int, fault: Fault) -> None:
        try:
            os.kill(pid, _SIGNALS[fault])
        except ProcessLookupError:
            return
        if fault == Fault.WORKER_TERM:
            self._stopping[pid] = time.monotonic()
        else:
            self._struck.lost_workers.add(pid)
        if fault == Fault.WORKER_STOP:
            self._frozen.add(pid)
            self._thaw_at = time.monotonic() + self._draw.uniform(2.0, FROZEN_AT_MOST_S)

    def _strike_flow(self, fault: Fault) -> None:
        assert self._flow is not None
        workers = workers_of(self._run_dir)
        self._flow.send_signal(_SIGNALS[fault])
        if fault in _STOPPING:
            self._stopping_since = time.monotonic()
            return
        self._flow.wait()
        self._killed_at = time.monotonic()
        self._orphans |= set(workers)
        self._thaw()

    def _thaw(self) -> None:
        """Continue stopped workers: the flow waits for them, and an orphan cannot exit."""
        for pid in self._frozen:
            if is_alive(pid):
                os.kill(pid, signal.SIGCONT)
        self._frozen.clear()

    def _look_after(self) -> None:
        now = time.monotonic()
        if self._frozen and now >= self._thaw_at:
            self._thaw()
        for pid in [pid for pid in self._stopping if not is_alive(pid)]:
            self._struck.worker_stops_s.append(now - self._stopping.pop(pid))
        for pid in [pid for pid in self._orphans if not is_alive(pid)]:
            self._orphans.remove(pid)
            self._struck.orphans_s.append(now - self._killed_at)
        limit_s = ORPHANS_EXIT_WITHIN_S * slowness()
        assert not self._orphans or now - self._killed_at < limit_s, (
            f"orphans after {limit_s} s: {self._orphans}"
        )
        for name in [name for name, until in self._disk_faults.items() if now >= until]:
            del self._disk_faults[name]
            (self._journal_dir / name).unlink()

    def _ended(self, is_struck: bool) -> int:
        """Return the flow's exit code. Unless it was killed, its workers exited before it."""
        assert self._flow is not None
        _, err = self._flow.communicate()
        code = self._flow.returncode
        assert code in (_STRUCK_ENDS if is_struck else _OWN_ENDS), f"exit code {code}: {err}"
        assert code != _FAILED or is_struck or "exhausted" in err, err
        if self._stopping_since is not None:
            self._struck.flow_stops_s.append(time.monotonic() - self._stopping_since)
        if code != -signal.SIGKILL:
            left_behind = set(workers_of(self._run_dir)) - self._orphans
            assert not left_behind, f"exited with code {code} before its workers {left_behind}"
        return code

    def _clear_up(self) -> None:
        for name in self._disk_faults:
            (self._journal_dir / name).unlink(missing_ok=True)
        if self._flow is not None and self._flow.poll() is None:
            self._flow.kill()
            self._flow.communicate()
        self._thaw()
