"""Run thousands of trials: a process of one thread that has loaded torch forks for every trial.

`Trials` is used by the tests, `serve` runs in that process.
"""

from __future__ import annotations

import gc
import importlib
import logging
import os
import pickle
import shutil
import signal
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

ROOT = Path(__file__).parents[2]
_ENVIRONMENT = {
    **{name: "1" for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")},
    "JE_ARROW_MALLOC_CONF": "background_thread:false",
    "VIRNUCPRO_VIRAL_CHECKPOINT_MODE": "",
}
_MOST_FAILURES = 2  # per process
_NOT_RUN = "not run, because others failed"


class Ended(NamedTuple):
    """How a forked process ended."""

    value: Any  # what it returned; None if it did not
    error: str  # its traceback, or the signal that killed it; empty if it returned

    @property
    def was_killed(self) -> bool:
        return self.error.startswith("killed by signal")


class Trials:
    """Run functions of modules in separate processes, several at a time."""

    def __init__(self, scratch: Path, *, only_seed: int | None = None) -> None:
        """Start the server; `only_seed` replaces all seeds."""
        self.scratch = scratch
        self._only_seed = only_seed
        self._server = subprocess.Popen(
            [sys.executable, "-c", "from tests.faults.trials import serve; serve()"],
            cwd=ROOT,
            env=os.environ | _ENVIRONMENT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,
        )

    def run(self, trial: Callable[..., Any], seeds: Sequence[int], *common: Any) -> list[Any]:
        """Call `trial(directory, seed, *common)` for each seed, and return the results.

        Each call gets an empty directory. Several trials share a process, so that a trial must
        start no threads, and do its work in `call`.

        Raises:
            AssertionError: If trials failed: the first few, and how to run one alone.
        """
        seeds = list(seeds) if self._only_seed is None else [self._only_seed]
        return self._run(trial, seeds, common)

    def once(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Call `function(directory, *arguments)` in a separate process, and return the result."""
        return self._run(_without_seed, [0], (function, *arguments))[0]

    def _run(
        self, trial: Callable[..., Any], seeds: list[int], common: tuple[Any, ...]
    ) -> list[Any]:
        pickle.dump((trial, seeds, common, self.scratch), self._server.stdin)
        self._server.stdin.flush()
        ended: list[Ended] = pickle.load(self._server.stdout)
        failed = [
            (seed, each.error)
            for seed, each in zip(seeds, ended, strict=True)
            if each.error not in ("", _NOT_RUN)
        ]
        if failed:
            errors = "\n".join(
                f"--fault-seed={seed} runs this one alone:\n{error}" for seed, error in failed
            )
            raise AssertionError(
                f"trials of {trial.__name__} failed, and no more were run\n{errors}"
            )
        return [each.value for each in ended]

    def close(self) -> None:
        """Kill all processes, also those of a trial that hangs."""
        self._server.stdin.close()
        self._server.stdout.close()
        os.killpg(self._server.pid, signal.SIGKILL)
        self._server.wait()


def serve() -> None:
    """Run the trials that are requested on standard input, until it ends."""
    # With the imports of this module, forking would take twice as long.
    sys.modules["torch.nn.attention.varlen"] = None

    import numpy as np
    import pyarrow as pa
    import torch

    from tests.faults import workload

    # There would be thousands of warnings about intended damage.
    logging.disable()
    torch.set_num_threads(1)
    workload.put_doubles_in_place()
    for module in call(workload.modules_of_a_run).value:
        # Once, and not in every trial.
        importlib.import_module(module)
    # PyArrow looks for pandas at its first array.
    pa.array(np.zeros(1))
    gc.collect()
    # A collection would touch, and so copy, every page that a fork shares with this process.
    gc.freeze()
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    while True:
        try:
            trial, seeds, common, scratch = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        assert len(os.listdir("/proc/self/task")) == 1, "a fork of a process with threads may hang"
        pickle.dump(_run_all(trial, seeds, common, scratch), answers)
        answers.flush()


def scratch_directory() -> Path:
    """Make a directory, in memory if the system has room for files there."""
    shared_memory = Path("/dev/shm")
    is_roomy = shared_memory.is_dir() and shutil.disk_usage(shared_memory).free > 2 * 1024**3
    return Path(tempfile.mkdtemp(prefix="vnp-faults-", dir=shared_memory if is_roomy else None))


class Fork:
    """A forked process that calls a function. The parent must have one thread."""

    def __init__(self, function: Callable[..., Any], *arguments: Any, **options: Any) -> None:
        reading, writing = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            os.close(reading)
            _call(writing, function, arguments, options)
        os.close(writing)
        self._reading = reading

    def wait(self) -> Ended:
        """Wait until it exits."""
        with open(self._reading, "rb") as pipe:
            result = pipe.read()
        status = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        if status < 0:
            return Ended(None, f"killed by signal {-status}")
        return Ended(*pickle.loads(result))


def call(function: Callable[..., Any], *arguments: Any, **options: Any) -> Ended:
    """Call a function in a forked process, and wait until it exits."""
    return Fork(function, *arguments, **options).wait()


def _call(
    pipe: int, function: Callable[..., Any], arguments: tuple[Any, ...], options: dict[str, Any]
) -> NoReturn:
    """Call a function and exit at once, without the clean-up that belongs to the parent."""
    try:
        ended = Ended(function(*arguments, **options), "")
    except BaseException:
        ended = Ended(None, traceback.format_exc())
    with open(pipe, "wb") as file:
        pickle.dump(tuple(ended), file)
    os._exit(0)


def _without_seed(directory: Path, seed: int, function: Callable[..., Any], *arguments: Any) -> Any:
    ended = call(function, directory, *arguments)
    assert not ended.error, ended.error
    return ended.value


def _run_all(
    trial: Callable[..., Any], seeds: list[int], common: tuple[Any, ...], scratch: Path
) -> list[Ended]:
    """Divide the trials among as many processes as cores; results are in the order of seeds."""
    num_processes = len(os.sched_getaffinity(0))
    shares = [seeds[first::num_processes] for first in range(num_processes)]
    forks = [Fork(_run_share, trial, share, common, scratch) for share in shares]
    ended: list[Ended] = [Ended(None, _NOT_RUN)] * len(seeds)
    for first, fork in enumerate(forks):
        share = fork.wait()
        assert not share.error, share.error
        ended[first::num_processes] = share.value
    return ended


def _run_share(
    trial: Callable[..., Any], seeds: list[int], common: tuple[Any, ...], scratch: Path
) -> list[Ended]:
    ended: list[Ended] = []
    for seed in seeds:
        too_many_failed = sum(bool(each.error) for each in ended) >= _MOST_FAILURES
        ended.append(
            Ended(None, _NOT_RUN) if too_many_failed else _run_one(trial, seed, common, scratch)
        )
    return ended


def _run_one(trial: Callable[..., Any], seed: int, common: tuple[Any, ...], scratch: Path) -> Ended:
    directory = Path(tempfile.mkdtemp(dir=scratch))
    try:
        value = trial(directory, seed, *common)
    except Exception:
        # Its directory is kept until the session ends.
        return Ended(None, traceback.format_exc())
    shutil.rmtree(directory)
    return Ended(value, "")
