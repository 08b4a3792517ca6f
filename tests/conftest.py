"""Input that several test modules share, and a Prefect of the tests' own."""

from __future__ import annotations

import os
import random
import textwrap
from collections.abc import Iterator
from pathlib import Path

import dnaio
import pytest

from flows.prefect_environment import prepare_environment
from tests.faults.figures import table
from tests.helpers import EXAMPLE, ROOT, CommandLine, embed_alone

# Servers that the tests start, without a run, are to send nothing to anybody either.
prepare_environment()

# Threads that spin while they wait for each other crawl as soon as anything else wants a processor.
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
    """Torch without what learning needs, as our own calls of a network have it."""
    import torch  # seconds to import: for those who ask for it

    with torch.inference_mode():
        yield


@pytest.fixture(scope="session")
def tiny_fasta(tmp_path_factory):
    """Forty proteins of 5 to 60 residues."""
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
    """The 69 proteins of the example that have up to 200 residues: long enough to be interrupted in."""
    path = tmp_path_factory.mktemp("short") / "short.fasta"
    with dnaio.open(EXAMPLE) as records, dnaio.open(path, mode="w") as short:
        for record in records:
            if len(record) <= 200:
                short.write(record)
    return path


@pytest.fixture(scope="session")
def prefect_server() -> Iterator[None]:
    """A server with an empty database, for flows that run in the test's own process."""
    from prefect.testing.utilities import (
        prefect_test_harness,
    )  # seconds to import: for those who ask for it

    with prefect_test_harness(server_startup_timeout=600):
        yield


@pytest.fixture(scope="session")
def command_line(tmp_path_factory) -> CommandLine:
    """The command line with Prefect's embedded server, as a person has it who has set up nothing."""
    return CommandLine(prefect_home=tmp_path_factory.mktemp("prefect"))


@pytest.fixture(scope="session")
def served_command_line(tmp_path_factory, prefect_server) -> CommandLine:
    """The command line with a standing server, which starts seconds sooner."""
    from prefect.settings import PREFECT_API_URL

    return CommandLine(
        prefect_home=tmp_path_factory.mktemp("prefect"), api_url=PREFECT_API_URL.value()
    )


@pytest.fixture(scope="session")
def uninterrupted(tmp_path_factory, short_fasta) -> Path:
    """The run directory of the short input, embedded where nobody interrupts."""
    return embed_alone(short_fasta, tmp_path_factory.mktemp("uninterrupted") / "run")


@pytest.fixture
def sabotage(tmp_path, monkeypatch):
    """Give code to be run by the children of this test as they start, as a `sitecustomize` that Python imports.

    The code sees `rank`, the child's shard, and `attempt`, the number of children this shard has had, from 1.
    """

    def make(code: str) -> None:
        directory = tmp_path / "sabotage"
        directory.mkdir()
        preamble = f"""
import os, pathlib, re, sys
job = re.search(r"shard_([0-9]+)/job.json$", sys.orig_argv[-1])
if job:
    rank = int(job[1])
    tally = pathlib.Path({str(directory)!r}, f"shard_{{rank}}")
    with tally.open("a") as file:
        file.write("x")
    attempt = len(tally.read_text())
"""
        (directory / "sitecustomize.py").write_text(
            preamble + textwrap.indent(textwrap.dedent(code), "    ")
        )
        monkeypatch.setenv(
            "PYTHONPATH", f"{directory}{os.pathsep}{ROOT}"
        )  # ours, in a copy of the tree too

    return make
