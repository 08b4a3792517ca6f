"""Handle SIGTERM, Ctrl-C and SIGQUIT in a flow.

SIGTERM and SIGINT request the same: the workers save what they have computed, and all processes
exit. Signals within 8 s of the first change nothing, however many and whoever sends them. A later
one, or SIGQUIT (Ctrl-\\) at any time, ends everything at once; what is in no checkpoint is computed
again.
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
    """Turn SIGTERM into one cancellation of the flow, whatever code it interrupts, however often.

    Prefect's handler raises TerminationSignal in whatever code is running. Raised from the
    selector, it ends asyncio.run. Raised from a callback, asyncio only logs it, and raised from a
    task it is the failure of that task: the flow would continue.
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
        with handle_every_sigterm(loop, on_sigterm), requests.handle_other_signals():
            yield
    except (TerminationSignal, BaseExceptionGroup) as error:
        if isinstance(error, BaseExceptionGroup) and not error.subgroup(TerminationSignal):
            raise
        requests.on_sigterm()
        raise asyncio.CancelledError("SIGTERM") from error
    finally:
        loop.set_exception_handler(None)


class _Requests:
    """The stop signals that a flow gets, counted together."""

    def __init__(self) -> None:
        self._requests = StopRequests()
        self._has_sigterm = False

    def on_sigterm(self) -> bool:
        """Replace Prefect's handler at the first SIGTERM, and return whether this is the first.

        Not before: Prefect acknowledges a cancellation on its control channel only if its own
        handler is installed. And permanently: each further signal would raise an exception in the
        code that shuts down.
        """
        if self._has_sigterm:
            return False
        self._has_sigterm = True
        if _is_main_thread():

            def on_further_sigterm(signum: int, frame: FrameType | None) -> None:
                if self._requests.on_signal() == Request.EXIT_NOW:
                    self._exit_now(signum, frame)

            signal.signal(signal.SIGTERM, on_further_sigterm)
        # After an earlier Ctrl-C, even the first SIGTERM may be urgent.
        if self._requests.on_signal() == Request.EXIT_NOW:
            kill_workers()
        return True

    def _exit_now(self, signum: int, frame: FrameType | None) -> None:
        kill_workers()
        raise TerminationSignal(signal=signal.SIGTERM)

    @contextmanager
    def handle_other_signals(self) -> Iterator[None]:
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

        quit_before = signal.signal(signal.SIGQUIT, self._exit_now)
        signal.signal(signal.SIGINT, on_interrupt)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, interrupt)
            signal.signal(signal.SIGQUIT, quit_before)


@contextmanager
def handle_every_sigterm(
    loop: asyncio.AbstractEventLoop, on_sigterm: Callable[[], None]
) -> Iterator[None]:
    """Call `on_sigterm` in the loop for each SIGTERM; the handler of the signal stays installed."""
    # Python handles signals in the main thread only.
    if not _is_main_thread():
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
