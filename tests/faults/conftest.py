"""How many trials the fault tests run, with which seed, and the table of what they found.

`pytest` runs a small number of each; `make faults`, which is `pytest tests/faults --faults=full`, runs all of them.
"""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest

from tests.faults.figures import table


def pytest_addoption(parser):
    group = parser.getgroup("faults")
    group.addoption(
        "--faults", choices=("small", "full"), default="small", help="How many trials of each fault to run."
    )
    group.addoption("--fault-seed", type=int, default=None, help="Run again the one trial that failed with this seed.")


def pytest_terminal_summary(terminalreporter):
    lines = table()
    if lines:
        terminalreporter.section("faults")
        for line in lines:
            terminalreporter.write_line(line)


@pytest.fixture(scope="session")
def scale(request) -> Callable[[int, int], int]:
    """`scale(50, 2_000)` is how many trials to run: 50 in the default suite, 2,000 under `--faults=full`."""
    is_full = request.config.getoption("--faults", default="small") == "full"
    return lambda small, full: full if is_full else small


@pytest.fixture(scope="session")
def seeds(request) -> Callable[[int], list[int]]:
    """`seeds(50)` is a seed for each of 50 trials, or the one given by `--fault-seed`."""
    given = request.config.getoption("--fault-seed", default=None)
    draw = random.Random(20_260_101)
    return lambda count: [given] if given is not None else [draw.getrandbits(32) for _ in range(count)]
