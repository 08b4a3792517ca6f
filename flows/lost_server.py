"""A Prefect server that is gone in the middle of a run: it is a record, so the run goes on and ends as the disk says."""

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
    """How the flow's body ended, for the case that Prefect cannot tell."""

    def __init__(self) -> None:
        self.state: State[Any] | None = None
        self._has_ended = asyncio.Event()

    @contextmanager
    def noted(self) -> Iterator[None]:
        """Have the flow that is run in the block note its end here."""
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
    """Tell whoever runs this flow how its body ended."""
    if (ending := _ending.get()) is not None:
        ending.note(state)
    return state


def is_lost_server(error: object) -> bool:
    """Whether an exception is of a request to Prefect's server, and not of the work."""
    return isinstance(error, _LOST)


async def try_without_prefect(
    attempt: Callable[[], Awaitable[dict[str, Any]]],
    handle_failure: Callable[[Exception], Awaitable[RetryDecision]],
) -> State[Any]:
    """Do what Prefect's task engine does with a shard: attempt it, and again after the delay while `handle_failure` says so."""
    while True:
        try:
            return Completed(data=await attempt())
        except Exception as error:
            decision = await handle_failure(error)
            if not decision.retry:
                return Failed(message=decision.reason, data=error)
            await asyncio.sleep(decision.delay_s)
