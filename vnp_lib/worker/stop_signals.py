"""Repeated stop signals: which of them are one request, and which ask to exit at once."""

from __future__ import annotations

import time
from collections.abc import Callable
from enum import Enum, auto

EXIT_NOW_AFTER_S = 8.0


class Request(Enum):
    """What a signal asks a process to do."""

    STOP = auto()  # save what is computed, and exit
    REPEATED = auto()  # the same again, while that is under way
    EXIT_NOW = auto()


class StopRequests:
    """Distinguishes a repeated request to stop from a request to exit at once.

    One preemption often brings several signals: the service manager signals each process of a
    group, `timeout`, `srun` or a container's init forward theirs, and a key is pressed twice. So
    all signals within 8 s of the first are one request. A later signal comes from somebody who does
    not want to wait.
    """

    def __init__(self, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._requested_at_s: float | None = None

    def on_signal(self) -> Request:
        """Count one more signal, and return what it asks for."""
        now_s = self._clock()
        if self._requested_at_s is None:
            self._requested_at_s = now_s
            return Request.STOP
        if now_s - self._requested_at_s >= EXIT_NOW_AFTER_S:
            return Request.EXIT_NOW
        return Request.REPEATED

    def restart(self) -> None:
        """Count from now: the same request came again, in a way that never asks to exit at once."""
        self._requested_at_s = self._clock()
