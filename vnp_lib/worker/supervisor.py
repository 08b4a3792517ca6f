"""Start a worker process, follow its events, stop it in time, and classify how it ended."""

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
from vnp_lib.worker.liveness import ProcessState, SilenceTimer

logger = logging.getLogger(__name__)

OnEvent = Callable[[Event], Awaitable[None]]
T = TypeVar("T")

# Sent to the standard input of a worker process. The end of that input means that the parent is
# gone.
STOP_LINE = b"stop\n"

# Factor on the silence limit for a sequence that is computed alone because an earlier attempt was
# silent at it.
_DEFERRED_LIMIT_FACTOR = 5
_POLL_S = 1.0  # for signs of life; less if a limit is short
_EXIT_POLL_S = 0.1

# Worker processes that are not known to have exited, and the seconds each has to save its work.
_followed: dict[asyncio.subprocess.Process, float] = {}


def worker_command(job_path: Path) -> list[str]:
    """Return the command of a worker process.

    It runs this process's `vnp_lib` and imports nothing from the current directory.
    """
    main = Path(__file__).with_name("__main__.py").absolute()
    return [sys.executable, "-P", str(main), str(job_path)]


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
    """Run one attempt on a shard in a worker process, and return its last event.

    However this ends, by return, error or cancellation, the worker process has exited by then. Its
    standard error is appended to `log_path`, if that can be written.

    Args:
        job_path: The job, as `ShardJob` writes it.
        device: "cpu", or the number of a GPU.
        log_path: The log of the worker process.
        on_event: Called with each event, in order.
        startup_limit_s: Seconds without a sign of life until the model is loaded, and for saving.
        silence_limit_s: Seconds without a sign of life while batches are computed.
        grace_s: Seconds to save its work when it is stopped; then it is killed.

    Raises:
        ShardFailedError: The worker process failed, crashed, or was silent for too long.
    """
    with _open_log(log_path) as log:
        worker = await asyncio.create_subprocess_exec(
            *worker_command(job_path),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=log,
            # A Ctrl-C is for this process, which decides when the worker process stops.
            start_new_session=True,
            env=worker_environment(device),
        )
    _followed[worker] = grace_s
    state = _WorkerState(startup_limit_s=startup_limit_s, silence_limit_s=silence_limit_s)
    try:
        async for event in _events(worker, state):
            await on_event(event)
        await _wait_for_exit(worker, grace_s)
    except TimeoutError:
        raise ShardFailedError(state.silence()) from None
    finally:
        await stop_worker(worker, grace_s)
    if worker.returncode:
        raise ShardFailedError(state.failure(worker.returncode))
    return state.last


async def _events(worker: asyncio.subprocess.Process, state: _WorkerState) -> AsyncIterator[Event]:
    """Yield the events of a worker process, up to the end of its output.

    Raises:
        TimeoutError: It was silent for longer than `state` allows at that moment.
    """
    assert worker.stdout is not None
    reader = EventReader(worker.stdout)
    poll_s = min(_POLL_S, state.shortest_limit_s / 8)
    silence = SilenceTimer(poll_s=poll_s)
    process, was_stopped = ProcessState.of(worker.pid), False
    while not reader.is_at_end:
        if (event := await reader.next(within_s=poll_s)) is not None:
            if state.on_event(event):
                silence.restart()
            yield event
            silence.skip()
            continue
        before, process = process, ProcessState.of(worker.pid)
        works_silently = state.may_work_silently and process.has_worked_since(before, poll_s)
        if process.is_stopped or works_silently:
            silence.restart()
        # After a late check, the events sent in the meantime are read before the limit applies.
        elif silence.check() >= state.limit_s and not silence.was_late:
            raise TimeoutError
        if process.is_stopped != was_stopped:
            was_stopped = process.is_stopped
            change = (
                "is stopped by a signal or a debugger: waiting until it continues"
                if was_stopped
                else "continues"
            )
            message = f"worker process {worker.pid} {change}"
            yield LogMessage(level=logging.WARNING, message=message)


class _WorkerState:
    """What a worker process has reported, and what follows from that if it crashes or hangs."""

    def __init__(self, *, startup_limit_s: float, silence_limit_s: float) -> None:
        self.last: Event | None = None
        self.limit_s = startup_limit_s
        self.shortest_limit_s = min(startup_limit_s, silence_limit_s)
        # While it reads, checks, loads or saves, its input and output count as signs of life.
        self.may_work_silently = True
        self._doing = "its start"
        self._pass_limit_s = silence_limit_s
        self._startup_limit_s = startup_limit_s
        self._silence_limit_s = silence_limit_s
        self._in_model: list[BatchStarted] = []  # oldest first
        self._is_probing = False
        self._oom_kills_before = host_oom_kills()

    def on_event(self, event: Event) -> bool:
        """Take note of an event, and return whether it is a sign of life."""
        # The limit applies to all of the waiting, whatever is logged meanwhile.
        is_waiting = isinstance(self.last, WaitingForShard)
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
                factor = _DEFERRED_LIMIT_FACTOR if event.is_deferred else 1
                self._pass_limit_s = max(factor * self._silence_limit_s, event.slowest_s)
                self._allow(self._pass_limit_s, silent_work=False)
                self._is_probing = False
                self._in_model.append(event)
            case BatchComputed() | ExactRowComputed() if self._in_model:
                self._in_model.pop(0)
        return True

    def failure(self, exit_code: int) -> Failure:
        """Return why the worker process exited with a code other than 0.

        What it reported itself comes first.
        """
        if isinstance(self.last, AttemptFailed):
            return replace(self.last.failure, exit_code=exit_code)
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
        """Return why a worker process was stopped that gave no sign of life."""
        # It hangs while it exits: what it reported before holds.
        if isinstance(self.last, AttemptFailed):
            return self.last.failure
        if isinstance(self.last, WaitingForShard):
            message = (
                f"{self.last.message}; gave up after {self.limit_s:g} s (--runtime.startup-limit-s)"
            )
            return Failure(cause=FailureCause.STORAGE, message=message)
        batch_idx, ordinal = self._suspect()
        option = "startup" if self.may_work_silently else "silence"
        message = (
            f"no progress for {self.limit_s:g} s after {self._doing} "
            f"(--runtime.{option}-limit-s); the worker process was stopped"
        )
        return Failure(
            cause=FailureCause.HARDWARE if self._is_probing else FailureCause.HANG,
            message=message,
            batch_idx=batch_idx,
            ordinal=ordinal,
        )

    def _allow(self, limit_s: float, *, silent_work: bool) -> None:
        self.limit_s = limit_s
        self.may_work_silently = silent_work

    def _suspect(self) -> tuple[int | None, int | None]:
        if not self._in_model:
            return None, None
        return self._in_model[0].batch_idx, self._in_model[0].ordinal


def host_oom_kills(
    cgroup: Path = Path("/proc/self/cgroup"), root: Path = Path("/sys/fs/cgroup")
) -> int:
    """Return how often the OOM killer has struck in this control group; 0 if that is unknown."""
    try:
        path = control_group(cgroup, root) / "memory.events"
        events = path.read_text(encoding="utf-8").splitlines()
        return int(next(line for line in events if line.startswith("oom_kill ")).split()[1])
    except (OSError, StopIteration, ValueError):
        return 0


async def stop_worker(worker: asyncio.subprocess.Process, grace_s: float) -> None:
    """Stop a worker process and wait until it exits; kill it after the grace period.

    asyncio delivers a cancellation more than once while a program exits. The wait continues through
    all of them: otherwise the worker process would lose its pipe while it saves.
    """
    cancelled: asyncio.CancelledError | None = None
    waited = SilenceTimer(poll_s=_EXIT_POLL_S)
    _request_stop(worker)
    while worker.returncode is None:
        if waited.check() >= grace_s:
            _kill(worker)
        try:
            await _within(_EXIT_POLL_S, worker.wait())
        except TimeoutError:
            pass
        except asyncio.CancelledError as error:
            cancelled = error
    _followed.pop(worker, None)
    if cancelled:
        raise cancelled


def kill_workers() -> None:
    """Kill all worker processes at once. What is in no checkpoint is computed again."""
    for worker in _followed:
        _kill(worker)


def has_workers() -> bool:
    """Whether a worker process is running that may have something to save."""
    return any(worker.returncode is None for worker in _followed)


def _request_stop(worker: asyncio.subprocess.Process) -> None:
    """Ask a worker process to save and exit: on its pipe, and by SIGTERM.

    SIGTERM ends one that does not read its pipe yet. The line comes first: it shows the worker
    process that the signal is the same request, whatever signals it got before.
    """
    if worker.returncode is None and worker.stdin is not None:
        with suppress(OSError, RuntimeError):
            worker.stdin.write(STOP_LINE)
    with suppress(ProcessLookupError):
        worker.terminate()
        # A stopped process could not save.
        worker.send_signal(signal.SIGCONT)


def _kill(worker: asyncio.subprocess.Process) -> None:
    if worker.returncode is None:
        with suppress(ProcessLookupError):
            os.killpg(worker.pid, signal.SIGKILL)


@atexit.register
def _stop_remaining_workers() -> None:
    """At exit, let worker processes that are saving use the rest of their grace; then kill them.

    There are some only if even the wait in `stop_worker` was interrupted.
    """
    for worker in _followed:
        _request_stop(worker)
    began_at_s = time.monotonic()
    for worker, grace_s in _followed.items():
        while _is_running(worker) and time.monotonic() - began_at_s < grace_s:
            time.sleep(_EXIT_POLL_S)
    kill_workers()


def _is_running(worker: asyncio.subprocess.Process) -> bool:
    """Whether a worker process is running, asked without its event loop.

    Its exit code may have been collected by another waiter.
    """
    if worker.returncode is not None:
        return False
    try:
        return os.waitpid(worker.pid, os.WNOHANG)[0] == 0
    except ChildProcessError:
        return False


async def _wait_for_exit(worker: asyncio.subprocess.Process, limit_s: float) -> None:
    """Wait for a worker process that has closed its pipe; raise TimeoutError if it hangs."""
    waited = SilenceTimer(poll_s=_EXIT_POLL_S)
    while worker.returncode is None:
        with suppress(TimeoutError):
            await _within(_EXIT_POLL_S, worker.wait())
        if worker.returncode is None and waited.check() >= limit_s:
            raise TimeoutError


async def _within(seconds: float, awaitable: Awaitable[T]) -> T:
    """Wait as asyncio.wait_for does, which before Python 3.12 could lose a cancellation."""
    async with asyncio.timeout(seconds):
        return await awaitable


def _open_log(path: Path) -> BinaryIO:
    """Open a log for appending; if that fails (full disk, quota), open the null device.

    Raises:
        OSError: The log is a symbolic link, which might lead out of the run directory.
    """

    def open_no_link(name: str, flags: int) -> int:
        return os.open(name, flags | os.O_NOFOLLOW, 0o640)

    try:
        return open(path, "ab", opener=open_no_link)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise
        logger.warning("cannot write %s (%s): this attempt has no log", path, error.strerror)
        return open(os.devnull, "ab")
