"""One child process: started, followed line by line, stopped in time, and its end judged."""

from __future__ import annotations

import asyncio
import atexit
import json
import os
import signal
import sys
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

from vnp_lib.config import child_environment
from vnp_lib.failures import Failure, FailureCause, ShardFailedError, classify_exit
from vnp_lib.machine import control_group

Event = dict[str, Any]
OnEvent = Callable[[Event], Awaitable[None]]
T = TypeVar("T")

_LONGEST_EVENT_BYTES = 2**20

_followed: set[asyncio.subprocess.Process] = set()  # children that are not known to be gone


def worker_command(job_path: Path) -> list[str]:
    """Return the command of a worker process. It imports nothing from the current directory, and this process's `vnp_lib`."""
    return [sys.executable, "-P", str(Path(__file__).with_name("run_worker.py").absolute()), str(job_path)]


async def run_child(
    job_path: Path,
    *,
    device: str,
    log_path: Path,
    on_event: OnEvent,
    startup_limit_s: float,
    silence_limit_s: float,
    grace_s: float,
) -> Event:
    """Follow one attempt on a shard to its end and return its last event.

    However this ends, by return, error or cancellation, the child is gone by then. Its standard error is appended
    to `log_path`.

    Raises:
        ShardFailedError: The child failed, died, or was silent for too long.
    """
    with open(log_path, "ab", opener=_open_no_link) as log:
        child = await asyncio.create_subprocess_exec(
            *worker_command(job_path),
            stdin=asyncio.subprocess.PIPE,  # never written to: its end tells the child that we are gone
            stdout=asyncio.subprocess.PIPE,
            stderr=log,
            start_new_session=True,  # a Ctrl-C is for us; we decide when the child stops
            limit=_LONGEST_EVENT_BYTES,
            env=child_environment(device),
        )
    _followed.add(child)
    attempt = _Followed(startup_limit_s=startup_limit_s, silence_limit_s=silence_limit_s)
    try:
        assert child.stdout is not None
        while line := await _within(attempt.limit_s, _read_line(child.stdout)):
            attempt.hear(json.loads(line))
            await on_event(attempt.last)
        await _within(grace_s, child.wait())
    except TimeoutError:
        raise ShardFailedError(attempt.silence()) from None
    finally:
        await stop_child(child, grace_s)
    if child.returncode:
        raise ShardFailedError(attempt.failure(child.returncode))
    return attempt.last


class _Followed:
    """What a child has said so far, and what that tells when it stops talking."""

    def __init__(self, *, startup_limit_s: float, silence_limit_s: float) -> None:
        self.last: Event = {}
        self.limit_s = startup_limit_s
        self._startup_limit_s = startup_limit_s
        self._silence_limit_s = silence_limit_s
        self._in_model: list[tuple[int, int | None]] = []  # batch_idx, and ordinal of a single sequence; oldest first
        self._is_probing = False
        self._oom_kills_before = host_oom_kills()

    def hear(self, event: Event) -> None:
        self.last = event
        match event:
            case {"event": "waiting" | "started"}:
                self.limit_s = self._startup_limit_s
            case {"event": "probing"}:
                self._is_probing = True
            case {"event": "computing", "batch_idx": int(batch_idx), "ordinal": ordinal}:
                self.limit_s = self._silence_limit_s
                self._is_probing = False
                self._in_model.append((batch_idx, ordinal))
            case {"event": "batch" | "exact_row"}:
                self._in_model.pop(0)

    def failure(self, exit_code: int) -> Failure:
        """Judge a child that left with a code other than 0: by its own last word where it had one."""
        if self.last.get("event") == "failed":
            return Failure.from_json(self.last["failure"] | {"exit_code": exit_code})
        batch_idx, ordinal = self._suspect()
        return classify_exit(
            exit_code,
            batch_idx=batch_idx,
            ordinal=ordinal,
            is_probing=self._is_probing,
            ran_out_of_host_memory=host_oom_kills() > self._oom_kills_before,
            last_event=self.last.get("event", ""),
        )

    def silence(self) -> Failure:
        if self.last.get("event") == "failed":  # it hangs on its way out, and what it said holds
            return Failure.from_json(self.last["failure"])
        batch_idx, ordinal = self._suspect()
        return Failure(
            cause=FailureCause.HARDWARE if self._is_probing else FailureCause.HANG,
            message=f"no progress for {self.limit_s:g} s after {self.last.get('event', 'its start')!r}; it was stopped",
            batch_idx=batch_idx,
            ordinal=ordinal,
        )

    def _suspect(self) -> tuple[int | None, int | None]:
        return self._in_model[0] if self._in_model else (None, None)


def host_oom_kills(cgroup: Path = Path("/proc/self/cgroup"), root: Path = Path("/sys/fs/cgroup")) -> int:
    """How often the kernel's OOM killer has struck in this process's control group; 0 where that cannot be told."""
    try:
        events = (control_group(cgroup, root) / "memory.events").read_text().splitlines()
        return int(next(line for line in events if line.startswith("oom_kill ")).split()[1])
    except (OSError, StopIteration, ValueError):
        return 0


async def stop_child(child: asyncio.subprocess.Process, grace_s: float) -> None:
    """End a child and wait for it, through any number of cancellations: SIGTERM, and after the grace SIGKILL.

    asyncio delivers a cancellation more than once on the way out of a program. Were the wait to end at the first,
    the child would lose its pipe while it saves.
    """
    deadline = time.monotonic() + grace_s
    cancelled: asyncio.CancelledError | None = None
    with suppress(ProcessLookupError):
        child.terminate()
    while child.returncode is None:
        if time.monotonic() >= deadline:
            with suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
        try:
            await _within(max(0.1, deadline - time.monotonic()), child.wait())
        except TimeoutError:
            pass
        except asyncio.CancelledError as error:
            cancelled = error
    _followed.discard(child)
    if cancelled:
        raise cancelled


def kill_children() -> None:
    """End every child at once. What it has not committed is computed again."""
    for child in _followed:
        if child.returncode is None:
            with suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)


atexit.register(kill_children)  # where even the wait for them was broken off; a deaf child would outlive us


async def _read_line(stream: asyncio.StreamReader) -> bytes:
    """Read one line; empty at the end of the stream, also where a killed writer left half a line."""
    line = await stream.readline()
    return line if line.endswith(b"\n") else b""


async def _within(seconds: float, awaitable: Awaitable[T]) -> T:
    """Unlike asyncio.wait_for before Python 3.12, never lose a cancellation that meets the result."""
    async with asyncio.timeout(seconds):
        return await awaitable


def _open_no_link(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NOFOLLOW, 0o640)
