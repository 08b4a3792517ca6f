"""How many trials the fault tests run, with which seed, and the table of what they found.

`pytest` runs a small number of each; `make faults`, which is `pytest tests/faults --faults=full`, runs all of them.
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
        help="Run again the one trial that failed with this seed.",
    )


@pytest.fixture(scope="session")
def scale(request) -> Callable[[int, int], int]:
    """`scale(50, 2_000)` is how many trials to run: 50 in the default suite, 2,000 under `--faults=full`."""
    is_full = request.config.getoption("--faults", default="small") == "full"
    return lambda small, full: full if is_full else small


@pytest.fixture(scope="session")
def seeds() -> Callable[[int], list[int]]:
    """`seeds(50)` is a seed for each of 50 trials, the same at every session."""
    draw = random.Random(20_260_101)
    return lambda count: [draw.getrandbits(32) for _ in range(count)]


@pytest.fixture(scope="session")
def trials(request) -> Iterator[Trials]:
    """Runs trials, each in a process and a directory of its own."""
    scratch = scratch_directory()
    trials = Trials(scratch, only_seed=request.config.getoption("--fault-seed", default=None))
    yield trials
    trials.close()
    shutil.rmtree(scratch)


@pytest.fixture(scope="session")
def oracle(trials) -> Outcome:
    """What a run leaves that nobody interrupts. Its rows are those that can be worked out by hand."""
    outcome = trials.once(uninterrupted_run)
    assert outcome.rows == expected_rows()
    return outcome
