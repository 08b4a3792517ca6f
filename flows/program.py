"""The program `python flows/embed.py`, or `vnp-embed`: run the flow on this machine."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys
import time
from collections.abc import Awaitable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from flows.prefect_server import PrefectServer, TemporaryServer, find_prefect
from vnp_lib.config import EmbedConfig
from vnp_lib.dataset import open_dataset
from vnp_lib.errors import ExitCode, InputError
from vnp_lib.formatting import format_duration
from vnp_lib.options import parse_command_line
from vnp_lib.plan import RunPaths
from vnp_lib.run import RANDOM_WEIGHTS, validate_config
from vnp_lib.streams import standard_streams
from vnp_lib.worker import kill_workers

# Prefect is imported only once its server is known.
if TYPE_CHECKING:
    from prefect.client.schemas.objects import State

_OUTPUT_LIMIT_S = 1.0
_RECORDING_S = 10.0  # for Prefect to record the end of a run, before its server is checked
_HOW_TO_RESUME = "Completed work is saved. Run the same command to resume."
_BACKGROUND_LOGGERS = (
    "prefect._internal",
    "prefect._internal.concurrency",
    "websockets.client",
    "EventsWorker",
    "APILogWorker",
    "ConcurrencySlotAcquisitionWithLeaseService",
)


def main(arguments: Sequence[str] | None = None, *, program: str = "vnp-embed") -> int:
    """Run the flow on this machine and return the exit code.

    It is 0, or 1 if the run failed, 2 if the input is unusable, 130 or 143 if it was stopped. A run
    does not fail if its standard output and error cannot be written.
    """
    with standard_streams(patience_s=_OUTPUT_LIMIT_S):
        started_at = time.monotonic()
        try:
            arguments = sys.argv[1:] if arguments is None else arguments
            config = parse_command_line(arguments, program=program)
            validate_config(config)
            if config.metrics_port is not None:
                from vnp_lib.report import validate_metrics_port

                validate_metrics_port(config)
            # `python flows/embed.py` puts `flows/` first on the import path, where `import signals`
            # in another library would find our file.
            here = Path(__file__).parent
            sys.path[:] = [each for each in sys.path if not each or Path(each).absolute() != here]
            try:
                return _run(config, find_prefect(_tell), started_at)
            except KeyboardInterrupt:
                return _report_interrupt()
        except InputError as error:
            _tell(error)
            return ExitCode.UNUSABLE_INPUT


def _run(config: EmbedConfig, server: PrefectServer, started_at: float) -> int:
    from prefect.exceptions import TerminationSignal

    quiet_prefect(verbose=config.verbose)
    if config.weights == RANDOM_WEIGHTS:
        _tell("warning: --weights random: an untrained model, the vectors mean nothing")
    try:
        outcome, result = run_flow(config, server, started_at)
    except (TerminationSignal, asyncio.CancelledError):
        # This program is exiting, and has yet to stop Prefect's server.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        _tell(f"stopped by SIGTERM. {_HOW_TO_RESUME}")
        return ExitCode.STOPPED
    except KeyboardInterrupt:
        return _report_interrupt()
    if isinstance(result, InputError):
        raise result
    return report_outcome(config, outcome, time.monotonic() - started_at)


def _report_interrupt() -> int:
    _tell(f"interrupted. {_HOW_TO_RESUME}")
    return ExitCode.INTERRUPTED


def run_flow(
    config: EmbedConfig, server: PrefectServer, started_at: float
) -> tuple[State[Any], Any]:
    """Run the flow, and return its final state and its result, which may be an exception.

    The end of the flow counts, not whether Prefect could record it.
    """
    from flows.embed import embed
    from flows.lost_server import Ending, is_lost_server

    ending = Ending()

    async def embed_to_its_end() -> tuple[State[Any], Any]:
        with ending.recording():
            exiting = asyncio.create_task(_exit_without_prefect(config, server, ending, started_at))
            try:
                outcome = await cast("Awaitable[State[Any]]", embed(config, return_state=True))
            finally:
                exiting.cancel()
        return outcome, await outcome.aresult(raise_on_failure=False)

    try:
        return asyncio.run(embed_to_its_end())
    except Exception as error:
        if not is_lost_server(error):
            raise
        if ending.state is None:
            raise InputError(
                f"Prefect's server at {server.api_url} no longer answers: {error}"
            ) from error
        _tell(_lost(server))
        return ending.state, ending.state.data


async def _exit_without_prefect(
    config: EmbedConfig, server: PrefectServer, ending: Any, started_at: float
) -> None:
    """Exit if the flow has ended and Prefect's server is gone.

    Prefect would try for minutes to record the end, and its exit handlers wait for its server.
    """
    state = await ending.wait()
    recording_s = 0.0 if server.is_gone else _RECORDING_S
    await asyncio.sleep(recording_s)
    while not server.is_gone and await asyncio.to_thread(server.answers):
        await asyncio.sleep(_RECORDING_S)
    _tell(_lost(server))
    elapsed_s = time.monotonic() - started_at - recording_s
    code: int = ExitCode.FAILED
    try:
        code = report_outcome(config, state, elapsed_s)
        kill_workers()
        server.cleanup.close()
    finally:
        # Without Python's exit handlers.
        os._exit(code)


def _lost(server: PrefectServer) -> str:
    whose = (
        "the run's own Prefect server"
        if isinstance(server, TemporaryServer)
        else f"Prefect's server at {server.api_url}"
    )
    return f"note: {whose} no longer answers, so the end of the run is not recorded there"


def quiet_prefect(*, verbose: bool) -> None:
    """Keep Prefect's log off the console; it still reaches its API.

    Its background threads are silenced in any case: about a lost server, they would print kilobytes
    of tracebacks.
    """
    for name in _BACKGROUND_LOGGERS:
        # A filter, since Prefect resets their levels when a flow begins.
        logging.getLogger(name).addFilter(lambda record: False)
    prefect = logging.getLogger("prefect")
    prefect.propagate = verbose
    # Without any handler, warnings would go to standard error after all.
    prefect.addHandler(logging.NullHandler())
    # Errors in logging itself are not printed either.
    logging.raiseExceptions = False


def report_outcome(config: EmbedConfig, outcome: State[Any], elapsed_s: float) -> int:
    """Print how the run ended, and what to do next; return the exit code."""
    if not outcome.is_completed():
        _tell(f"failed after {format_duration(elapsed_s)}: {outcome.message}")
        _tell(_HOW_TO_RESUME)
        return ExitCode.FAILED
    has_rows = len(open_dataset(config.output_dir)) > 0
    print(
        f"{outcome.message} in {format_duration(elapsed_s)}\n"
        f"dataset: {RunPaths(config.output_dir).embeddings_dir}\n"
        f"report:  {RunPaths(config.output_dir).report}\n"
        "read it back:\n"
        "    from vnp_lib.dataset import open_dataset\n"
        f'    dataset = open_dataset("{config.output_dir}")\n'
        f"    print(len(dataset){', dataset.ids[0], dataset[dataset.ids[0]]' if has_rows else ''})"
    )
    return ExitCode.DONE


def _tell(message: object) -> None:
    print(message, file=sys.stderr)
