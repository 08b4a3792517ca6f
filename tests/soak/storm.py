"""A run that is struck again and again, and started again until it is complete."""

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
from tests.soak.children import read_journal
from tests.soak.machine import slowness

ORPHANS_LEAVE_WITHIN_S = 12.0

_MOST_STARTS = 30
_QUIET_LIMIT_S = 300.0  # for a run that is left alone to come to its end
_POLL_S = 0.02
_FAILED = 1
_OWN_ENDS = (0, _FAILED)
_STRUCK_ENDS = (0, _FAILED, 130, 143, -signal.SIGINT, -signal.SIGTERM, -signal.SIGKILL)


class Fault(StrEnum):
    """What strikes."""

    CHILD_TERM = "SIGTERM to a child"
    CHILD_KILL = "SIGKILL to a child"
    CHILD_STOP = "SIGSTOP to a child"
    FLOW_TERM = "SIGTERM to the flow"
    FLOW_INT = "SIGINT to the flow"
    FLOW_KILL = "SIGKILL to the flow"
    DISK_FULL = "full disk, for a while"
    DISK_SLOW = "slow disk, for a while"


_SIGNALS = {
    Fault.CHILD_TERM: signal.SIGTERM,
    Fault.CHILD_KILL: signal.SIGKILL,
    Fault.CHILD_STOP: signal.SIGSTOP,
    Fault.FLOW_TERM: signal.SIGTERM,
    Fault.FLOW_INT: signal.SIGINT,
    Fault.FLOW_KILL: signal.SIGKILL,
}
_OF_CHILDREN = (Fault.CHILD_TERM, Fault.CHILD_KILL, Fault.CHILD_STOP)
_OF_THE_FLOW = (Fault.FLOW_TERM, Fault.FLOW_INT, Fault.FLOW_KILL)
_OF_THE_DISK = {
    Fault.DISK_FULL: ("disk_full", (0.2, 1.5)),
    Fault.DISK_SLOW: ("slow_disk", (2.0, 6.0)),
}
FROZEN_AT_MOST_S = 15.0  # longer than the silence limit of a soak
_STOPPING = (Fault.FLOW_TERM, Fault.FLOW_INT)


@dataclass(slots=True)
class Struck:
    """What has struck a run, and how those took it who were asked to stop."""

    faults: Counter[Fault] = field(default_factory=Counter)
    starts: int = 0
    lost_children: set[int] = field(default_factory=set)  # process ids of those that could not save
    child_stops_s: list[float] = field(default_factory=list)  # from SIGTERM to the end
    flow_stops_s: list[float] = field(default_factory=list)
    orphans_s: list[float] = field(
        default_factory=list
    )  # from the flow's SIGKILL to the end of a child


class Storm:
    """Starts a run, strikes it at random times, and starts it again until it is complete."""

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
        self._told: dict[int, float] = {}  # children that have been asked to stop, and when
        self._frozen: set[int] = set()
        self._thaw_at = 0.0
        self._stopping_since: float | None = None  # the flow
        self._killed_at = 0.0
        self._orphans: set[int] = set()
        self._disk_faults: dict[str, float] = {}  # until when

    def rage(self, faults: Sequence[Fault]) -> Struck:
        """Strike with each of `faults` in turn, and let the run come to its end after that. Nobody is left then.

        Raises:
            AssertionError: It ended in a way that it must not, or did not end.
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
        """Strike while the flow is alive; say whether it was struck itself."""
        assert self._flow is not None
        is_struck = False
        rows_before = read_journal(self._journal_dir).rows_computed
        due = self._next_due(rows_before)
        quiet_since = time.monotonic()
        while self._flow.poll() is None:
            time.sleep(_POLL_S)
            self._look_after()
            assert time.monotonic() - quiet_since < _QUIET_LIMIT_S * slowness(), (
                "it does not come to an end"
            )
            if left and not is_struck and self._is_due(*due) and self._strike(left[0]):
                is_struck = left.pop(0) in _OF_THE_FLOW
                due = self._next_due(read_journal(self._journal_dir).rows_computed)
                quiet_since = time.monotonic()
        return is_struck

    def _next_due(self, rows: int) -> tuple[float, int]:
        """A time, and a number of rows computed: mostly work is struck, and now and then whatever there is before it."""
        if self._draw.random() < 0.7:
            return time.monotonic() + 0.2, rows + self._draw.randint(1, 60)
        return time.monotonic() + self._draw.uniform(0.2, 8.0), 0

    def _is_due(self, at: float, rows: int) -> bool:
        return time.monotonic() >= at and read_journal(self._journal_dir).rows_computed >= rows

    def _strike(self, fault: Fault) -> bool:
        """False where there is nobody to strike yet."""
        assert self._flow is not None
        if fault in _OF_CHILDREN:
            struck = self._frozen | self._orphans | set(self._told)
            children = sorted(set(workers_of(self._run_dir)) - struck)
            if not children:
                return False
            self._strike_child(self._draw.choice(children), fault)
        elif fault in _OF_THE_FLOW:
            self._strike_flow(fault)
        else:
            name, (least_s, most_s) = _OF_THE_DISK[fault]
            (self._journal_dir / name).touch()
            self._disk_faults[name] = time.monotonic() + self._draw.uniform(least_s, most_s)
        self._struck.faults[fault] += 1
        return True

    def _strike_child(self, pid: int, fault: Fault) -> None:
        try:
            os.kill(pid, _SIGNALS[fault])
        except ProcessLookupError:
            return
        if fault == Fault.CHILD_TERM:
            self._told[pid] = time.monotonic()
        else:
            self._struck.lost_children.add(pid)
        if fault == Fault.CHILD_STOP:
            self._frozen.add(pid)
            self._thaw_at = time.monotonic() + self._draw.uniform(2.0, FROZEN_AT_MOST_S)

    def _strike_flow(self, fault: Fault) -> None:
        assert self._flow is not None
        children = workers_of(self._run_dir)
        self._flow.send_signal(_SIGNALS[fault])
        if fault in _STOPPING:
            self._stopping_since = time.monotonic()
            return
        self._flow.wait()
        self._killed_at = time.monotonic()
        self._orphans |= set(children)
        self._thaw()

    def _thaw(self) -> None:
        """Let them go on. Nobody else does: a worker that is stopped is waited for, and an orphan cannot leave."""
        for pid in self._frozen:
            if is_alive(pid):
                os.kill(pid, signal.SIGCONT)
        self._frozen.clear()

    def _look_after(self) -> None:
        now = time.monotonic()
        if self._frozen and now >= self._thaw_at:
            self._thaw()
        for pid in [pid for pid in self._told if not is_alive(pid)]:
            self._struck.child_stops_s.append(now - self._told.pop(pid))
        for pid in [pid for pid in self._orphans if not is_alive(pid)]:
            self._orphans.remove(pid)
            self._struck.orphans_s.append(now - self._killed_at)
        limit_s = ORPHANS_LEAVE_WITHIN_S * slowness()
        assert not self._orphans or now - self._killed_at < limit_s, (
            f"orphans after {limit_s} s: {self._orphans}"
        )
        for name in [name for name, until in self._disk_faults.items() if now >= until]:
            del self._disk_faults[name]
            (self._journal_dir / name).unlink()

    def _ended(self, is_struck: bool) -> int:
        """How the flow ended. Unless it was killed, its children have gone before it."""
        assert self._flow is not None
        _, err = self._flow.communicate()
        code = self._flow.returncode
        assert code in (_STRUCK_ENDS if is_struck else _OWN_ENDS), f"exit code {code}: {err}"
        assert code != _FAILED or is_struck or "exhausted" in err, err
        if self._stopping_since is not None:
            self._struck.flow_stops_s.append(time.monotonic() - self._stopping_since)
        if code != -signal.SIGKILL:
            left_behind = set(workers_of(self._run_dir)) - self._orphans
            assert not left_behind, (
                f"left with exit code {code}, but not its children {left_behind}"
            )
        return code

    def _clear_up(self) -> None:
        for name in self._disk_faults:
            (self._journal_dir / name).unlink(missing_ok=True)
        if self._flow is not None and self._flow.poll() is None:
            self._flow.kill()
            self._flow.communicate()
        self._thaw()
