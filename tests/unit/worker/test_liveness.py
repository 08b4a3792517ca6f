"""Signs of life of another process: silence that was watched, and what the kernel tells of it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

from tests.helpers import wait_until
from vnp_lib.worker.liveness import ProcessState, Silence


class Clock:
    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def test_silence_is_the_time_since_the_last_sign_of_life() -> None:
    clock = Clock()
    silence = Silence(look_every_s=1.0, clock=clock)
    seen = []
    for clock.now_s in (1.0, 2.1, 3.0):
        seen.append(silence.look())
    assert seen == [1.0, 2.1, 3.0]
    silence.end()
    clock.now_s = 4.5
    assert silence.look() == 1.5


def test_a_clock_that_stood_still_is_not_silence() -> None:
    """A look that comes an hour late counts as one in time, and says that it was late; the next one is in time again."""
    clock = Clock()
    silence = Silence(look_every_s=1.0, clock=clock)
    clock.now_s = 1.0
    silence.look()
    clock.now_s = 3601.0
    assert (silence.look(), silence.was_late) == (2.0, True)
    clock.now_s = 3602.0
    assert (silence.look(), silence.was_late) == (3.0, False)


def test_time_in_which_nobody_listened_is_left_out() -> None:
    clock = Clock()
    silence = Silence(look_every_s=1.0, clock=clock)
    clock.now_s = 30.0
    silence.skip()
    clock.now_s = 31.0
    assert silence.look() == 1.0


def test_a_process_is_seen_to_work_to_wait_and_to_be_stopped(tmp_path: Path) -> None:
    code = "import sys\nfor line in sys.stdin:\n    print(sum(range(10**7)), flush=True)\n"
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        for _ in range(2):  # its start is work, too
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
    """A slow disk: hardly any time of a processor between two blocks."""
    before = ProcessState(cpu_s=1.0, io_bytes=100)
    assert ProcessState(cpu_s=1.0, io_bytes=101).has_worked_since(before, 60.0)
    assert ProcessState(cpu_s=5.0, io_bytes=100).has_worked_since(before, 60.0)
    assert not ProcessState(cpu_s=1.5, io_bytes=100).has_worked_since(before, 60.0)
