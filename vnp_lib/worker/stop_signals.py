"""What one more signal asks of a process that saves its work before it leaves."""

from __future__ import annotations

import time
from collections.abc import Callable
from enum import Enum, auto

HURRY_AFTER_S = 8.0


class Request(Enum):
    """What a signal asks for."""

    STOP = auto()  # save what is computed, and leave
    AGAIN = auto()  # the same, which is under way
    HURRY = auto()  # leave at once


class StopRequests:
    """Tells a request to stop that is repeated from one to leave at once.

    One preemption often brings several signals: the service manager signals each process of a group, `timeout`, `srun` or a
    container's init pass theirs on, and a key is pressed twice. So all that come within 8 s of the first are one request,
    however many they are. A signal that comes later is from somebody who does not want to wait.
    """

    def __init__(self, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._asked_at_s: float | None = None

    def on_signal(self) -> Request:
        """Count one more signal, and return what it asks for."""
        now_s = self._clock()
        if self._asked_at_s is None:
            self._asked_at_s = now_s
            return Request.STOP
        return Request.HURRY if now_s - self._asked_at_s >= HURRY_AFTER_S else Request.AGAIN

    def restart(self) -> None:
        """Count the seconds from now: the request has come once more, by a way that never means to hurry."""
        self._asked_at_s = self._clock()
