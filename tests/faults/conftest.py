"""Options and fixtures of the fault tests: number of trials, seeds, processes, the oracle.

`pytest` runs a small number of trials; `make faults`, which is `pytest tests/faults --faults=full`,
runs all of them.
"""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable, Iterator

import pytest

from tests.faults.compare import Outcome, uninterrupted_run
from tests.faults.trials import Trials, scratch_directory
from tests.faults.workload import expected_rows


def pytest_addoption(parser):
    group = parser.getgroup("faults")
    group.addoption(
        "--faults",
        choices=("small", "full"),
        default="small",
        help="How many trials of each fault to run.",
    )
    group.addoption(
        "--fault-seed",
        type=int,
        default=None,
        help="Run only the trial with this seed.",
    )


@pytest.fixture(scope="session")
def scale(request) -> Callable[[int, int], int]:
    """Return a function of two numbers of trials: the default, and that of `--faults=full`."""
    is_full = request.config.getoption("--faults", default="small") == "full"
    return lambda small, full: full if is_full else small


@pytest.fixture(scope="session")
def seeds() -> Callable[[int], list[int]]:
    """Return a function that gives so many seeds, the same in every session."""
    draw = random.Random(20_260_101)
    return lambda count: [draw.getrandbits(32) for _ in range(count)]


@pytest.fixture(scope="session")
def trials(request) -> Iterator[Trials]:
    """Return a runner of trials, each in its own process and directory."""
    scratch = scratch_directory()
    trials = Trials(scratch, only_seed=request.config.getoption("--fault-seed", default=None))
    yield trials
    trials.close()
    shutil.rmtree(scratch)


@pytest.fixture(scope="session")
def oracle(trials) -> Outcome:
    """Return the outcome of an uninterrupted run, whose rows equal an independent computation."""
    outcome = trials.once(uninterrupted_run)
    assert outcome.rows == expected_rows()
    return outcome
