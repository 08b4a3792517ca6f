"""One child process: started, followed line by line, stopped in time, and its end judged."""

from __future__ import annotations

import asyncio
import atexit
import errno
import logging
import os
import signal
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO, TypeVar

from vnp_lib.devices import control_group
from vnp_lib.environment import worker_environment
from vnp_lib.failures import Failure, FailureCause, ShardFailedError, classify_exit
from vnp_lib.run import (
    AttemptDone,
    AttemptFailed,
    AttemptStarted,
    AttemptStopped,
    BatchComputed,
    BatchStarted,
    DeviceProbing,
    Event,
    EventReader,
    ExactRowComputed,
    LayerStarted,
    LogMessage,
    ModelLoading,
    SavingStarted,
    WaitingForShard,
)
from vnp_lib.worker.liveness import ProcessState, Silence

logger = logging.getLogger(__name__)

OnEvent = Callable[[Event], Awaitable[None]]
T = TypeVar("T")

STOP_LINE = b"stop\n"  # to a worker, on its standard input; its end means that the parent is gone

_SECOND_OPINION = 5  # times the silence limit, for a sequence that is computed alone since an attempt was silent at it
_LOOK_EVERY_S = 1.0  # for signs of life; oftener where a limit is short
_LOOK_AT_EXIT_S = 0.1

# Workers that are not known to be gone, and the seconds each has to save its work.
_followed: dict[asyncio.subprocess.Process, float] = {}


def worker_command(job_path: Path) -> list[str]:
    """Return the command of a worker process. It imports nothing from the current directory, and this process's `vnp_lib`."""
    return [
        sys.executable,
        "-P",
        str(Path(__file__).with_name("__main__.py").absolute()),
        str(job_path),
    ]


async def run_worker(
    job_path: Path,
    *,
    device: str,
    log_path: Path,
    on_event: OnEvent,
    startup_limit_s: float,
    silence_limit_s: float,
    grace_s: float,
) -> Event | None:
    """Follow one attempt on a shard to its end and return its last event.

    However this ends, by return, error or cancellation, the child is gone by then. Its standard error is appended
    to `log_path`, if that can be written.

    Raises:
        ShardFailedError: The child failed, died, or was silent for too long.
    """
    with _open_log(log_path) as log:
        child = await asyncio.create_subprocess_exec(
            *worker_command(job_path),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=log,
            start_new_session=True,  # a Ctrl-C is for us; we decide when the child stops
            env=worker_environment(device),
        )
    _followed[child] = grace_s
    attempt = _Followed(startup_limit_s=startup_limit_s, silence_limit_s=silence_limit_s)
    try:
        async for event in _events(child, attempt):
            await on_event(event)
        await _wait_for_exit(child, grace_s)
    except TimeoutError:
        raise ShardFailedError(attempt.silence()) from None
    finally:
        await stop_worker(child, grace_s)
    if child.returncode:
        raise ShardFailedError(attempt.failure(child.returncode))
    return attempt.last


async def _events(child: asyncio.subprocess.Process, attempt: _Followed) -> AsyncIterator[Event]:
    """Yield what a worker reports, up to the end of its reports.

    Raises:
        TimeoutError: It was silent for longer than the attempt allows at that moment.
    """
    assert child.stdout is not None
    reader = EventReader(child.stdout)
    look_every_s = min(_LOOK_EVERY_S, attempt.shortest_limit_s / 8)
    silence = Silence(look_every_s=look_every_s)
    seen, was_stopped = ProcessState.of(child.pid), False
    while not reader.is_at_end:
        if (event := await reader.next(within_s=look_every_s)) is not None:
            if attempt.on_event(event):
                silence.end()
            yield event
            silence.skip()
            continue
        before, seen = seen, ProcessState.of(child.pid)
        if seen.is_stopped or (
            attempt.may_work_silently and seen.has_worked_since(before, look_every_s)
        ):
            silence.end()
        # After a late look, what the worker sent in the meantime is read before it is judged.
        elif silence.look() >= attempt.limit_s and not silence.was_late:
            raise TimeoutError
        if seen.is_stopped != was_stopped:
            was_stopped = seen.is_stopped
            told = (
                "is stopped by a signal or a debugger, and waited for" if was_stopped else "goes on"
            )
            yield LogMessage(level=logging.WARNING, message=f"worker process {child.pid} {told}")


class _Followed:
    """What a child has said so far, and what that tells when it stops talking."""

    def __init__(self, *, startup_limit_s: float, silence_limit_s: float) -> None:
        self.last: Event | None = None
        self.limit_s = startup_limit_s
        self.shortest_limit_s = min(startup_limit_s, silence_limit_s)
        self.may_work_silently = (
            True  # it reads, checks, loads or saves: what it reads and writes are signs of life
        )
        self._doing = "its start"
        self._pass_limit_s = silence_limit_s
        self._startup_limit_s = startup_limit_s
        self._silence_limit_s = silence_limit_s
        self._in_model: list[BatchStarted] = []  # oldest first
        self._is_probing = False
        self._oom_kills_before = host_oom_kills()

    def on_event(self, event: Event) -> bool:
        """Take note of an event, and say whether it is a sign of life."""
        is_waiting = isinstance(self.last, WaitingForShard)
        # The limit is on all of the waiting, whatever is logged meanwhile.
        if is_waiting and isinstance(event, WaitingForShard | LogMessage):
            return False
        if not isinstance(event, LogMessage | LayerStarted):
            self.last = event
            self._doing = repr(event.name)
        match event:
            case WaitingForShard():
                self._allow(self._startup_limit_s, silent_work=False)
            case AttemptStarted() | ModelLoading():
                self._allow(self._startup_limit_s, silent_work=True)
            case SavingStarted():
                self._allow(self._startup_limit_s, silent_work=True)
                self._in_model.clear()
            case AttemptFailed() | AttemptStopped() | AttemptDone():
                # It only has to exit.
                self._allow(self._silence_limit_s, silent_work=False)
            case LayerStarted():
                self._allow(self._pass_limit_s, silent_work=False)
            case DeviceProbing():
                self._is_probing = True
            case BatchStarted():
                factor = _SECOND_OPINION if event.is_deferred else 1
                self._pass_limit_s = max(factor * self._silence_limit_s, event.slowest_s)
                self._allow(self._pass_limit_s, silent_work=False)
                self._is_probing = False
                self._in_model.append(event)
            case BatchComputed() | ExactRowComputed() if self._in_model:
                self._in_model.pop(0)
        return True

    def failure(self, exit_code: int) -> Failure:
        """Judge a child that left with a code other than 0: by its own last word where it had one."""
        if (reported := self._reported(exit_code)) is not None:
            return reported
        batch_idx, ordinal = self._suspect()
        return classify_exit(
            exit_code,
            batch_idx=batch_idx,
            ordinal=ordinal,
            is_probing=self._is_probing,
            ran_out_of_host_memory=host_oom_kills() > self._oom_kills_before,
            last_event=self.last.name if self.last is not None else "",
        )

    def silence(self) -> Failure:
        """Judge a child that was stopped since it gave no sign of life."""
        if (
            reported := self._reported(None)
        ) is not None:  # it hangs on its way out, and what it said holds
            return reported
        if isinstance(self.last, WaitingForShard):
            message = f"{self.last.message}; given up after {self.limit_s:g} s (--runtime.startup-limit-s)"
            return Failure(cause=FailureCause.STORAGE, message=message)
        batch_idx, ordinal = self._suspect()
        option = "startup" if self.may_work_silently else "silence"
        return Failure(
            cause=FailureCause.HARDWARE if self._is_probing else FailureCause.HANG,
            message=f"no progress for {self.limit_s:g} s after {self._doing} (--runtime.{option}-limit-s); it was stopped",
            batch_idx=batch_idx,
            ordinal=ordinal,
        )

    def _allow(self, limit_s: float, *, silent_work: bool) -> None:
        self.limit_s = limit_s
        self.may_work_silently = silent_work

    def _reported(self, exit_code: int | None) -> Failure | None:
        """The failure that the child reported itself, if it did and that can be read."""
        if not isinstance(self.last, AttemptFailed):
            return None
        failure = self.last.failure
        return failure if exit_code is None else replace(failure, exit_code=exit_code)

    def _suspect(self) -> tuple[int | None, int | None]:
        if not self._in_model:
            return None, None
        return self._in_model[0].batch_idx, self._in_model[0].ordinal


def host_oom_kills(
    cgroup: Path = Path("/proc/self/cgroup"), root: Path = Path("/sys/fs/cgroup")
) -> int:
    """How often the kernel's OOM killer has struck in this process's control group; 0 where that cannot be told."""
    try:
        events = (
            (control_group(cgroup, root) / "memory.events").read_text(encoding="utf-8").splitlines()
        )
        return int(next(line for line in events if line.startswith("oom_kill ")).split()[1])
    except (OSError, StopIteration, ValueError):
        return 0


async def stop_worker(child: asyncio.subprocess.Process, grace_s: float) -> None:
    """End a child and wait for it, through any number of cancellations: asked to stop, and after the grace SIGKILL.

    asyncio delivers a cancellation more than once on the way out of a program. Were the wait to end at the first,
    the child would lose its pipe while it saves.
    """
    cancelled: asyncio.CancelledError | None = None
    waited = Silence(look_every_s=_LOOK_AT_EXIT_S)
    _ask_to_stop(child)
    while child.returncode is None:
        if waited.look() >= grace_s:
            _kill(child)
        try:
            await _within(_LOOK_AT_EXIT_S, child.wait())
        except TimeoutError:
            pass
        except asyncio.CancelledError as error:
            cancelled = error
    _followed.pop(child, None)
    if cancelled:
        raise cancelled


def kill_workers() -> None:
    """End every child at once. What it has not committed is computed again."""
    for child in _followed:
        _kill(child)


def has_workers() -> bool:
    """Whether there are children that may have something to save."""
    return any(child.returncode is None for child in _followed)


def _ask_to_stop(child: asyncio.subprocess.Process) -> None:
    """Ask a child to save and leave: on its pipe, and by SIGTERM, which ends one that does not listen yet.

    The line comes first: by it, the child knows the signal for the same request, whatever signals it got before.
    """
    if child.returncode is None and child.stdin is not None:
        with suppress(OSError, RuntimeError):
            child.stdin.write(STOP_LINE)
    with suppress(ProcessLookupError):
        child.terminate()
        child.send_signal(signal.SIGCONT)  # a stopped process could not save


def _kill(child: asyncio.subprocess.Process) -> None:
    if child.returncode is None:
        with suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)


def _stop_remaining_workers() -> None:
    """Give children that save the rest of their time where even the wait for them was broken off; then kill them."""
    for child in _followed:
        _ask_to_stop(child)
    began_at_s = time.monotonic()
    for child, grace_s in _followed.items():
        while _is_running(child) and time.monotonic() - began_at_s < grace_s:
            time.sleep(_LOOK_AT_EXIT_S)
    kill_workers()


atexit.register(_stop_remaining_workers)


def _is_running(child: asyncio.subprocess.Process) -> bool:
    """Whether a child runs, without its event loop; its exit code may be taken by whoever else waits for it."""
    if child.returncode is not None:
        return False
    try:
        return os.waitpid(child.pid, os.WNOHANG)[0] == 0
    except ChildProcessError:
        return False


async def _wait_for_exit(child: asyncio.subprocess.Process, limit_s: float) -> None:
    """Wait for a child that has closed its pipe. TimeoutError where it does not leave."""
    waited = Silence(look_every_s=_LOOK_AT_EXIT_S)
    while child.returncode is None:
        with suppress(TimeoutError):
            await _within(_LOOK_AT_EXIT_S, child.wait())
        if child.returncode is None and waited.look() >= limit_s:
            raise TimeoutError


async def _within(seconds: float, awaitable: Awaitable[T]) -> T:
    """Unlike asyncio.wait_for before Python 3.12, never lose a cancellation that meets the result."""
    async with asyncio.timeout(seconds):
        return await awaitable


def _open_log(path: Path) -> BinaryIO:
    """Open a log for appending; if that cannot be done (a full disk, a quota of files), open the null device.

    Raises:
        OSError: The log is a symbolic link, which might lead out of the run directory.
    """
    try:
        return open(path, "ab", opener=_open_no_link)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise
        logger.warning("%s cannot be written (%s): this attempt has no log", path, error.strerror)
        return open(os.devnull, "ab")


def _open_no_link(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NOFOLLOW, 0o640)
