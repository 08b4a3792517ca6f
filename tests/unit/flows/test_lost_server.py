"""A shard and a run whose Prefect server is lost."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace

import httpx
import pytest
from prefect.client.schemas.objects import State
from prefect.states import Completed, Failed

from flows.lost_server import Ending, is_lost_server, note_ending, try_without_prefect
from flows.retry_hook import make_retry_hook
from vnp_lib.worker.retry import RetryDecision

LOST = httpx.ConnectError("All connection attempts failed")


@pytest.mark.parametrize(
    ("error", "is_lost"),
    [(LOST, True), (httpx.ReadTimeout(""), True), (OSError(), False), (None, False)],
)
def test_only_a_failed_request_is_a_lost_server(error, is_lost):
    assert is_lost_server(error) == is_lost


def test_without_prefect_a_shard_is_retried():
    """As long as the failure handler says so."""
    outcomes = iter([RuntimeError("first"), RuntimeError("second"), {"rank": 3}])
    handled = []

    async def attempt():
        outcome = next(outcomes)
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    async def handle_failure(error):
        handled.append(str(error))
        return RetryDecision(retry=True, delay_s=0.0, reason="again")

    state = asyncio.run(try_without_prefect(attempt, handle_failure))
    assert handled == ["first", "second"]
    assert state.is_completed()
    assert state.data == {"rank": 3}


def test_without_prefect_a_shard_fails_with_the_reason():
    async def attempt():
        raise RuntimeError("broken")

    async def handle_failure(error):
        return RetryDecision(retry=False, delay_s=0.0, reason="exhausted 3 retries")

    state = asyncio.run(try_without_prefect(attempt, handle_failure))
    assert state.is_failed()
    assert state.message == "exhausted 3 retries"


@pytest.mark.parametrize(("executor", "num_handled"), [("local", 0), ("work-pool", 1)])
def test_a_lost_server_is_no_failure_of_a_local_shard(executor, num_handled):
    """It costs no attempt, and no strike is recorded."""
    handled = []

    async def handle_failure(error, flow_run_id):
        handled.append(error)
        return RetryDecision(retry=True, delay_s=0.0, reason="again")

    hook = make_retry_hook(
        SimpleNamespace(config=SimpleNamespace(executor=executor)), handle_failure
    )
    is_retried = asyncio.run(
        hook(SimpleNamespace(), SimpleNamespace(flow_run_id=None), Failed(data=LOST))
    )
    assert len(handled) == num_handled
    assert is_retried == bool(num_handled)


def test_the_end_of_a_flow_is_known_without_prefect():
    """It is recorded only inside `Ending.recording`."""
    completed = Completed(message="2 sequences embedded")
    assert note_ending(completed) is completed

    async def run() -> State:
        ending = Ending()
        with ending.recording():
            asyncio.get_running_loop().call_soon(note_ending, completed)
            return await asyncio.wait_for(ending.wait(), 10)

    assert asyncio.run(run()) is completed
