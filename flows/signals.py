"""What SIGTERM, Ctrl-C and SIGQUIT do to a flow.

SIGTERM and SIGINT ask for one thing: that the workers save what they have computed, and that all leave. Those that come
within 8 s of the first change nothing, however many they are and whoever sends them. A later one, or SIGQUIT (Ctrl-\\) at
any time, ends everything at once; what is in no checkpoint is computed again.
"""

from __future__ import annotations

import asyncio
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from prefect.exceptions import TerminationSignal

from vnp_lib.worker import Request, StopRequests, has_workers, kill_workers


@contextmanager
def sigterm_cancels_the_flow() -> Iterator[None]:
    """Make SIGTERM one thing, a cancellation of the flow, wherever in the event loop it strikes, and however often.

    Prefect's handler raises TerminationSignal in whatever code is running. Out of the selector it ends asyncio.run. Out of
    a callback asyncio only logs it, and out of a task it is that task's own failure: the flow would run on.
    """
    loop, flow_task = asyncio.get_running_loop(), asyncio.current_task()
    assert flow_task is not None
    requests = _Requests()

    def on_sigterm() -> None:
        if requests.on_sigterm() and not flow_task.cancelling():
            flow_task.cancel()

    def on_loop_error(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        if not isinstance(context.get("exception"), TerminationSignal):
            loop.default_exception_handler(context)

    loop.set_exception_handler(on_loop_error)
    try:
        with every_sigterm_heard(loop, on_sigterm), requests.other_signals_heard():
            yield
    except (TerminationSignal, BaseExceptionGroup) as error:
        if isinstance(error, BaseExceptionGroup) and not error.subgroup(TerminationSignal):
            raise
        requests.on_sigterm()
        raise asyncio.CancelledError("SIGTERM") from error
    finally:
        loop.set_exception_handler(None)


class _Requests:
    """The signals that a flow gets, counted together."""

    def __init__(self) -> None:
        self._requests = StopRequests()
        self._has_sigterm = False

    def on_sigterm(self) -> bool:
        """Take SIGTERM over at the first one, and say whether it is that.

        Not before: Prefect acknowledges a cancellation by its control channel only where its own handler is in place. And
        for good: each further one would be raised out of the code that leaves.
        """
        if self._has_sigterm:
            return False
        self._has_sigterm = True
        if _is_main_thread():
            signal.signal(signal.SIGTERM, self._on_further_sigterm)
        if self._requests.on_signal() == Request.EXIT_NOW:  # Ctrl-C was the first
            kill_workers()
        return True

    def _on_further_sigterm(self, signum: int, frame: FrameType | None) -> None:
        if self._requests.on_signal() == Request.EXIT_NOW:
            self._leave_at_once(signum, frame)

    def _leave_at_once(self, signum: int, frame: FrameType | None) -> None:
        kill_workers()
        raise TerminationSignal(signal=signal.SIGTERM)

    @contextmanager
    def other_signals_heard(self) -> Iterator[None]:
        """Handle SIGINT and SIGQUIT within the block."""
        interrupt = signal.getsignal(signal.SIGINT)
        if not _is_main_thread() or not callable(interrupt):
            yield
            return

        def on_interrupt(signum: int, frame: FrameType | None) -> None:
            request = self._requests.on_signal()
            if request == Request.EXIT_NOW:
                kill_workers()
            if request != Request.REPEATED or not has_workers():
                interrupt(signum, frame)

        quit_before = signal.signal(signal.SIGQUIT, self._leave_at_once)
        signal.signal(signal.SIGINT, on_interrupt)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, interrupt)
            signal.signal(signal.SIGQUIT, quit_before)


@contextmanager
def every_sigterm_heard(
    loop: asyncio.AbstractEventLoop, on_sigterm: Callable[[], None]
) -> Iterator[None]:
    """Call `on_sigterm` in the loop for each SIGTERM. The signal's handler stays in its place, and may do what it likes."""
    if not _is_main_thread():  # the only one in which Python hears signals
        yield
        return

    def on_signals() -> None:
        for number in reader.recv(64):
            if number == signal.SIGTERM:
                on_sigterm()

    reader, writer = socket.socketpair()
    with reader, writer:
        reader.setblocking(False)
        writer.setblocking(False)
        loop.add_reader(reader, on_signals)
        before = signal.set_wakeup_fd(writer.fileno())
        try:
            yield
        finally:
            signal.set_wakeup_fd(before)
            if not loop.is_closed():
                loop.remove_reader(reader)


def _is_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()
