"""The program that embeds on this machine: `python flows/embed.py`, or `vnp-embed` where the package is installed."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, cast

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

if TYPE_CHECKING:  # Prefect is imported when its server is at hand
    from prefect.client.schemas.objects import State

_SHOW_PATIENCE_S = 1.0
_RECORDING_S = 10.0  # that Prefect may take to record the end of a run before its server is asked for a sign of life
_BACKGROUND_LOGGERS = (
    "prefect._internal",
    "prefect._internal.concurrency",
    "websockets.client",
    "EventsWorker",
    "APILogWorker",
    "ConcurrencySlotAcquisitionWithLeaseService",
)


def main(arguments: Sequence[str] | None = None, *, program: str = "vnp-embed") -> int:
    """Run the flow on this machine and return the exit code: 0, 1 failed, 2 unusable input, 130 and 143 stopped.

    What is said on standard output and error is for show: a run ends well where it cannot be written.
    """
    with standard_streams(patience_s=_SHOW_PATIENCE_S):
        try:
            return _main(sys.argv[1:] if arguments is None else arguments, program)
        except InputError as error:
            _tell(error)
            return ExitCode.UNUSABLE_INPUT


def _main(arguments: Sequence[str], program: str) -> int:
    started_at = time.monotonic()
    config = parse_command_line(arguments, program=program)
    validate_config(config)
    if config.metrics_port is not None:
        from vnp_lib.report import validate_metrics_port

        validate_metrics_port(config)
    _leave_out_the_flows_directory()
    try:
        return _run(config, find_prefect(_tell), started_at)
    except KeyboardInterrupt:
        return _say_interrupted()


def _run(config: EmbedConfig, server: PrefectServer, started_at: float) -> int:
    from prefect.exceptions import TerminationSignal

    quiet_prefect(verbose=config.verbose)
    if config.weights == RANDOM_WEIGHTS:
        _tell("warning: --weights random: an untrained model, the vectors mean nothing")
    try:
        outcome, result = run_flow(config, server, started_at)
    except (TerminationSignal, asyncio.CancelledError):
        signal.signal(
            signal.SIGTERM, signal.SIG_IGN
        )  # we are leaving, and Prefect's server has to be stopped yet
        _tell("stopped by SIGTERM. What was computed is kept: the same command goes on from there")
        return ExitCode.STOPPED
    except KeyboardInterrupt:
        return _say_interrupted()
    if isinstance(result, InputError):
        raise result
    return report_outcome(config, outcome, time.monotonic() - started_at)


def _say_interrupted() -> int:
    _tell("interrupted. What was computed is kept: the same command goes on from there")
    return ExitCode.INTERRUPTED


def run_flow(
    config: EmbedConfig, server: PrefectServer, started_at: float
) -> tuple[State[Any], Any]:
    """Run the flow to its end and return how it ended, and its result: where it failed by an exception, that.

    How the flow ended counts, not whether Prefect could record it.
    """
    from flows.lost_server import Ending, is_lost_server

    ending = Ending()
    try:
        return asyncio.run(_embed_to_its_end(config, server, ending, started_at))
    except Exception as error:
        if not is_lost_server(error):
            raise
        if ending.state is None:
            raise InputError(
                f"Prefect's server at {server.api_url} does not answer any more: {error}"
            ) from error
        _tell(_lost(server))
        return ending.state, ending.state.data


async def _embed_to_its_end(
    config: EmbedConfig, server: PrefectServer, ending: Any, started_at: float
) -> tuple[State[Any], Any]:
    from flows.embed import embed

    with ending.noted():
        leaving = asyncio.create_task(_leave_without_prefect(config, server, ending, started_at))
        try:
            outcome = await cast("Awaitable[State[Any]]", embed(config, return_state=True))
        finally:
            leaving.cancel()
    return outcome, await outcome.aresult(raise_on_failure=False)


async def _leave_without_prefect(
    config: EmbedConfig, server: PrefectServer, ending: Any, started_at: float
) -> None:
    """End the program where the flow has ended and Prefect's server is gone: Prefect would try for minutes to record it."""
    state = await ending.wait()
    recording_s = 0.0 if server.is_gone else _RECORDING_S
    await asyncio.sleep(recording_s)
    while not server.is_gone and await asyncio.to_thread(server.answers):
        await asyncio.sleep(_RECORDING_S)
    _tell(_lost(server))
    elapsed_s = time.monotonic() - started_at - recording_s
    _exit_now(lambda: report_outcome(config, state, elapsed_s), server)


def _exit_now(report: Callable[[], int], server: PrefectServer) -> NoReturn:
    """Report, clean up and end without Python's exit handlers, of which Prefect's wait for its server."""
    code: int = ExitCode.FAILED
    try:
        code = report()
        kill_workers()
        server.cleanup.close()
    finally:
        os._exit(code)


def _lost(server: PrefectServer) -> str:
    whose = (
        "its own Prefect server"
        if isinstance(server, TemporaryServer)
        else f"Prefect's server at {server.api_url}"
    )
    return f"note: the run has ended without {whose}, which does not answer any more: its end is not recorded there"


def quiet_prefect(*, verbose: bool) -> None:
    """Keep Prefect's lines off the console; they still reach its API. What its background threads say of a server that is
    lost never belongs there: kilobytes of tracebacks about events that nobody waits for.
    """
    for name in _BACKGROUND_LOGGERS:
        logging.getLogger(name).addFilter(
            lambda record: False
        )  # Prefect sets their levels anew when a flow begins
    prefect = logging.getLogger("prefect")
    prefect.propagate = verbose
    prefect.addHandler(
        logging.NullHandler()
    )  # without any handler, warnings would go to standard error after all
    logging.raiseExceptions = False  # nor what is wrong with a log line, or with where it goes


def _leave_out_the_flows_directory() -> None:
    """`python flows/embed.py` puts `flows/` first on the path, where `events` or `signals` would be taken for another's."""
    here = Path(__file__).parent
    sys.path[:] = [entry for entry in sys.path if not entry or Path(entry).absolute() != here]


def report_outcome(config: EmbedConfig, outcome: State[Any], elapsed_s: float) -> int:
    """Print how the run ended, and what to do next."""
    if not outcome.is_completed():
        _tell(f"failed after {format_duration(elapsed_s)}: {outcome.message}")
        _tell("What was computed is kept: the same command goes on from there")
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
