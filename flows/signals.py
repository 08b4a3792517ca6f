"""What SIGTERM does to a flow."""

from __future__ import annotations

import asyncio
import itertools
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from prefect.exceptions import TerminationSignal

from vnp_lib.supervisor import kill_children


@contextmanager
def sigterm_cancels_the_flow() -> Iterator[None]:
    """Make SIGTERM one thing, a cancellation of the flow, wherever in the event loop it strikes. A second one kills the children.

    Prefect's handler raises TerminationSignal in whatever code is running. Out of the selector it ends asyncio.run. Out of
    a callback asyncio only logs it, and out of a task it is that task's own failure: the flow would run on.
    """
    loop, flow_task = asyncio.get_running_loop(), asyncio.current_task()
    assert flow_task is not None
    earlier = itertools.count()

    def on_sigterm() -> None:
        if next(earlier):
            kill_children()
        elif not flow_task.cancelling():
            flow_task.cancel()

    def on_loop_error(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        if not isinstance(context.get("exception"), TerminationSignal):
            loop.default_exception_handler(context)

    loop.set_exception_handler(on_loop_error)
    try:
        with every_sigterm_heard(loop, on_sigterm):
            yield
    except (TerminationSignal, BaseExceptionGroup) as error:
        if isinstance(error, BaseExceptionGroup) and not error.subgroup(TerminationSignal):
            raise
        raise asyncio.CancelledError("SIGTERM") from error
    finally:
        loop.set_exception_handler(None)


@contextmanager
def every_sigterm_heard(loop: asyncio.AbstractEventLoop, on_sigterm: Callable[[], None]) -> Iterator[None]:
    """Call `on_sigterm` in the loop for each SIGTERM. The signal's handler stays in its place, and may do what it likes."""
    if threading.current_thread() is not threading.main_thread():  # the only one in which Python hears signals
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
