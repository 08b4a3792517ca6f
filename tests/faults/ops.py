"""Replacements of `vnp_lib.storage.durable.ops` that count, kill at, deny or record operations."""

from __future__ import annotations

import os
import pickle
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vnp_lib.storage import durable
from vnp_lib.storage.durable import DurableOps


class WatchedOps(DurableOps):
    """Pass every operation through `perform`, one at a time."""

    def __init__(self) -> None:
        self._one_at_a_time = threading.RLock()

    def perform(self, name: str, act: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
        """Perform the operation `name`, which is `act(*arguments)`, or something else."""
        return act(*arguments)


def _watch(name: str) -> None:
    real = getattr(DurableOps, name)

    def watched(self: WatchedOps, *arguments: Any) -> Any:
        with self._one_at_a_time:
            return self.perform(name, lambda *given: real(self, *given), arguments)

    setattr(WatchedOps, name, watched)


for _name in (name for name in vars(DurableOps) if not name.startswith("_")):
    _watch(_name)


class CountingOps(WatchedOps):
    """Count the operations, from 1. `names` lists them."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def perform(self, name: str, act: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
        self.names.append(name)
        return self.at(len(self.names), name, act, arguments)

    def at(
        self, number: int, name: str, act: Callable[..., Any], arguments: tuple[Any, ...]
    ) -> Any:
        """Perform the operation with this number."""
        return act(*arguments)


class KillingOps(CountingOps):
    """Send SIGKILL instead of operation `kill_at`, after half of the bytes if it is a write."""

    def __init__(self, kill_at: int) -> None:
        super().__init__()
        self._kill_at = kill_at

    def at(
        self, number: int, name: str, act: Callable[..., Any], arguments: tuple[Any, ...]
    ) -> Any:
        if number == self._kill_at:
            if name == "write":
                fd, data = arguments
                act(fd, data[: len(data) // 2])
            os.kill(os.getpid(), signal.SIGKILL)
        return super().at(number, name, act, arguments)


class DenyingOps(CountingOps):
    """Fail operation `deny_at` with an errno, and, if `for_good`, everything after it.

    `close` releases its descriptor before it fails, as in Linux. `synced_again` is true if a
    descriptor was synced after a failed sync.
    """

    def __init__(self, deny_at: int, code: int, *, for_good: bool) -> None:
        super().__init__()
        self.synced_again = False
        self._deny_at = deny_at
        self._code = code
        self._for_good = for_good
        self._failed_fds: set[int] = set()

    def at(
        self, number: int, name: str, act: Callable[..., Any], arguments: tuple[Any, ...]
    ) -> Any:
        is_denied = number >= self._deny_at if self._for_good else number == self._deny_at
        if name == "fsync":
            self.synced_again |= arguments[0] in self._failed_fds
            self._failed_fds |= {arguments[0]} if is_denied else set()
        if name == "close":
            self._failed_fds.discard(arguments[0])
            act(*arguments)
        if is_denied:
            raise OSError(
                self._code, os.strerror(self._code), f"injected at operation {number}, {name}"
            )
        return None if name == "close" else act(*arguments)


class ShortWritingOps(CountingOps):
    """Write one byte only at operation `cut_at`, and, if `for_good`, half at each later write."""

    def __init__(self, cut_at: int, *, for_good: bool) -> None:
        super().__init__()
        self._cut_at = cut_at
        self._for_good = for_good

    def at(
        self, number: int, name: str, act: Callable[..., Any], arguments: tuple[Any, ...]
    ) -> Any:
        if (
            name != "write"
            or number < self._cut_at
            or (number > self._cut_at and not self._for_good)
        ):
            return act(*arguments)
        fd, data = arguments
        return act(fd, data[: 1 if number == self._cut_at else (len(data) + 1) // 2])


class RecordingOps(WatchedOps):
    """Append every successful operation to a file, with its data and result.

    Sends SIGKILL instead of operation `kill_at` of those named `kill_name`, or of all without it.
    """

    def __init__(
        self, record: Path, *, kill_at: int | None = None, kill_name: str | None = None
    ) -> None:
        super().__init__()
        self._record = os.open(record, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        self._until_kill = kill_at
        self._kill_name = kill_name

    def perform(self, name: str, act: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
        if self._until_kill is not None and self._kill_name in (None, name):
            self._until_kill -= 1
            if self._until_kill == 0:
                os.kill(os.getpid(), signal.SIGKILL)
        result = act(*arguments)
        self.note(
            name,
            *(bytes(each) if isinstance(each, memoryview) else each for each in arguments),
            result,
        )
        return result

    def note(self, *event: Any) -> None:
        """Record an event among the operations."""
        with self._one_at_a_time:
            os.write(self._record, pickle.dumps(event))


def install(ops: DurableOps) -> None:
    """Make the library use `ops` for the rest of this process."""
    durable.ops = ops
