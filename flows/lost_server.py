"""A run whose Prefect server is lost: it continues without it, since the disk has its state."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import httpx
from prefect.client.schemas.objects import State
from prefect.exceptions import PrefectHTTPStatusError
from prefect.states import Completed, Failed
from websockets.exceptions import WebSocketException

from vnp_lib.worker import RetryDecision

_LOST = (httpx.HTTPError, PrefectHTTPStatusError, WebSocketException)
_ending: ContextVar[Ending | None] = ContextVar("ending", default=None)


class Ending:
    """The final state of the flow's body, for the case that Prefect cannot record it."""

    def __init__(self) -> None:
        self.state: State[Any] | None = None
        self._has_ended = asyncio.Event()

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Record the end of the flow that runs in the block."""
        token = _ending.set(self)
        try:
            yield
        finally:
            _ending.reset(token)

    async def wait(self) -> State[Any]:
        await self._has_ended.wait()
        assert self.state is not None
        return self.state

    def note(self, state: State[Any]) -> None:
        self.state = state
        self._has_ended.set()


def note_ending(state: State[Any]) -> State[Any]:
    """Record the end of the flow's body for the `Ending` that is recording."""
    if (ending := _ending.get()) is not None:
        ending.note(state)
    return state


def is_lost_server(error: object) -> bool:
    """Whether an exception comes from a request to Prefect's server, and not from the work."""
    return isinstance(error, _LOST)


async def try_without_prefect(
    attempt: Callable[[], Awaitable[dict[str, Any]]],
    handle_failure: Callable[[Exception], Awaitable[RetryDecision]],
) -> State[Any]:
    """Attempt a shard, and again after each delay, as Prefect's task engine does."""
    while True:
        try:
            return Completed(data=await attempt())
        except Exception as error:
            decision = await handle_failure(error)
            if not decision.retry:
                return Failed(message=decision.reason, data=error)
            await asyncio.sleep(decision.delay_s)
