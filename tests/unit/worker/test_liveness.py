"""Signs of life of another process: observed silence, and what the kernel reports about it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

from tests.helpers import wait_until
from vnp_lib.worker.liveness import ProcessState, SilenceTimer


class Clock:
    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def test_silence_is_the_time_since_the_last_sign_of_life() -> None:
    clock = Clock()
    silence = SilenceTimer(poll_s=1.0, clock=clock)
    seen = []
    for clock.now_s in (1.0, 2.1, 3.0):
        seen.append(silence.check())
    assert seen == [1.0, 2.1, 3.0]
    silence.restart()
    clock.now_s = 4.5
    assert silence.check() == 1.5


def test_a_suspended_clock_is_not_silence() -> None:
    """A check that comes an hour late counts as one in time, and reports that it was late."""
    clock = Clock()
    silence = SilenceTimer(poll_s=1.0, clock=clock)
    clock.now_s = 1.0
    silence.check()
    clock.now_s = 3601.0
    assert (silence.check(), silence.was_late) == (2.0, True)
    clock.now_s = 3602.0
    assert (silence.check(), silence.was_late) == (3.0, False)


def test_skipped_time_is_not_counted() -> None:
    clock = Clock()
    silence = SilenceTimer(poll_s=1.0, clock=clock)
    clock.now_s = 30.0
    silence.skip()
    clock.now_s = 31.0
    assert silence.check() == 1.0


def test_a_process_works_waits_and_is_stopped() -> None:
    """Its state is read from /proc; when it is gone, nothing is known about it."""
    code = "import sys\nfor line in sys.stdin:\n    print(sum(range(10**7)), flush=True)\n"
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        # Twice, since its start is work, too.
        for _ in range(2):
            before = ProcessState.of(process.pid)
            process.stdin.write(b"\n")
            process.stdin.flush()
            process.stdout.readline()
        worked = ProcessState.of(process.pid)
        assert worked.has_worked_since(before, 1.0)
        assert not worked.has_worked_since(worked, 1.0)
        assert not worked.is_stopped
        os.kill(process.pid, signal.SIGSTOP)
        wait_until(lambda: ProcessState.of(process.pid).is_stopped, timeout_s=10)
        os.kill(process.pid, signal.SIGCONT)
        wait_until(lambda: not ProcessState.of(process.pid).is_stopped, timeout_s=10)
        process.stdin.close()
    assert ProcessState.of(process.pid) == ProcessState()


def test_reading_without_computing_is_work() -> None:
    """On a slow disk, hardly any CPU time passes between two blocks."""
    before = ProcessState(cpu_s=1.0, io_bytes=100)
    assert ProcessState(cpu_s=1.0, io_bytes=101).has_worked_since(before, 60.0)
    assert ProcessState(cpu_s=5.0, io_bytes=100).has_worked_since(before, 60.0)
    assert not ProcessState(cpu_s=1.5, io_bytes=100).has_worked_since(before, 60.0)
