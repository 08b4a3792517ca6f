"""Fixtures of all tests: input files, a Prefect server, command lines, sabotage of workers."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from pathlib import Path

import dnaio
import pytest

from flows.prefect_environment import prepare_environment
from tests.faults.figures import table
from tests.helpers import EXAMPLE, CommandLine, embed_alone
from tests.poison import sabotage_workers

# Prefect servers that the tests start without a run must not send telemetry either.
prepare_environment()

# Spinning OpenMP threads become very slow if any other process needs a core.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

ALPHABET = "ACDEFGHIKLMNPQRSTVWY"


def pytest_terminal_summary(terminalreporter):
    lines = table()
    if lines:
        terminalreporter.section("faults")
        for line in lines:
            terminalreporter.write_line(line)


@pytest.fixture
def inference_mode() -> Iterator[None]:
    """Run a test in torch's inference mode, as in our own forward passes."""
    # Torch takes seconds to import.
    import torch

    with torch.inference_mode():
        yield


@pytest.fixture(scope="session")
def tiny_fasta(tmp_path_factory):
    """Write forty proteins of 5 to 60 residues."""
    draw = random.Random(7)
    path = tmp_path_factory.mktemp("tiny") / "tiny.fasta"
    records = (
        f">protein_{i} of no importance\n{''.join(draw.choices(ALPHABET, k=draw.randint(5, 60)))}\n"
        for i in range(40)
    )
    path.write_text("".join(records))
    return path


@pytest.fixture(scope="session")
def short_fasta(tmp_path_factory):
    """Write the 69 proteins of the example with up to 200 residues: enough work to interrupt."""
    path = tmp_path_factory.mktemp("short") / "short.fasta"
    with dnaio.open(EXAMPLE) as records, dnaio.open(path, mode="w") as short:
        for record in records:
            if len(record) <= 200:
                short.write(record)
    return path


@pytest.fixture(scope="session")
def prefect_server() -> Iterator[None]:
    """Start a server with an empty database, for flows in the test's own process."""
    # Prefect takes seconds to import.
    from prefect.testing.utilities import prefect_test_harness

    with prefect_test_harness(server_startup_timeout=600):
        yield


@pytest.fixture(scope="session")
def command_line(tmp_path_factory) -> CommandLine:
    """Return the command line with Prefect's embedded server, as without any set-up."""
    return CommandLine(prefect_home=tmp_path_factory.mktemp("prefect"))


@pytest.fixture(scope="session")
def served_command_line(tmp_path_factory, prefect_server) -> CommandLine:
    """Return the command line with a permanent server, which starts seconds sooner."""
    from prefect.settings import PREFECT_API_URL

    return CommandLine(
        prefect_home=tmp_path_factory.mktemp("prefect"), api_url=PREFECT_API_URL.value()
    )


@pytest.fixture(scope="session")
def uninterrupted(tmp_path_factory, short_fasta) -> Path:
    """Return the run directory of the short input, embedded without interruption."""
    return embed_alone(short_fasta, tmp_path_factory.mktemp("uninterrupted") / "run")


@pytest.fixture
def sabotage(tmp_path, monkeypatch):
    """Return a function that makes the worker processes of a test run code as they start.

    The code is a `sitecustomize`, which Python imports. It has the variables `rank`, the worker's
    shard, and `attempt`, the number of worker processes of that shard, from 1.
    """

    return lambda code: sabotage_workers(tmp_path, monkeypatch, code)
