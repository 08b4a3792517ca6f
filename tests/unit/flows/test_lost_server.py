"""A shard and a run whose Prefect server is gone."""

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
def test_only_a_request_that_failed_is_a_lost_server(error, is_lost):
    assert is_lost_server(error) == is_lost


def test_without_prefect_a_shard_is_tried_again_while_it_is_judged_worth_it():
    outcomes = iter([RuntimeError("first"), RuntimeError("second"), {"rank": 3}])
    judged = []

    async def attempt():
        outcome = next(outcomes)
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    async def handle_failure(error):
        judged.append(str(error))
        return RetryDecision(retry=True, delay_s=0.0, reason="again")

    state = asyncio.run(try_without_prefect(attempt, handle_failure))
    assert judged == ["first", "second"]
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


@pytest.mark.parametrize(("executor", "num_judged"), [("local", 0), ("work-pool", 1)])
def test_a_lost_server_is_no_failure_of_a_shard_that_is_embedded_here(executor, num_judged):
    """It costs no attempt, and no strike is recorded."""
    judged = []

    async def handle_failure(error, flow_run_id):
        judged.append(error)
        return RetryDecision(retry=True, delay_s=0.0, reason="again")

    hook = make_retry_hook(
        SimpleNamespace(config=SimpleNamespace(executor=executor)), handle_failure
    )
    is_retried = asyncio.run(
        hook(SimpleNamespace(), SimpleNamespace(flow_run_id=None), Failed(data=LOST))
    )
    assert len(judged) == num_judged
    assert is_retried == bool(num_judged)


def test_how_a_flow_ended_is_known_without_prefect():
    """To whoever runs it; a flow that nobody asks notes nothing."""
    completed = Completed(message="2 sequences embedded")
    assert note_ending(completed) is completed

    async def run() -> State:
        ending = Ending()
        with ending.noted():
            asyncio.get_running_loop().call_soon(note_ending, completed)
            return await asyncio.wait_for(ending.wait(), 10)

    assert asyncio.run(run()) is completed
