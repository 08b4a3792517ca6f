"""A Prefect of the tests' own, and `python flows/embed.py` as a person starts it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from prefect.testing.utilities import prefect_test_harness

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def prefect_server() -> Iterator[None]:
    """A server with an empty database, for flows that run in the test's own process."""
    with prefect_test_harness(server_startup_timeout=120):
        yield


@dataclass(frozen=True, slots=True, kw_only=True)
class CommandLine:
    """`python flows/embed.py` with its own Prefect home, so that nothing of this machine's is touched."""

    prefect_home: Path

    def start(self, *arguments: object) -> subprocess.Popen[str]:
        """Start it as the leader of a process group of its own."""
        environment = {k: v for k, v in os.environ.items() if not k.startswith(("PREFECT_", "VNP_"))}
        return subprocess.Popen(
            [sys.executable, "flows/embed.py", *map(str, arguments)],
            cwd=ROOT,
            env=environment | {"PREFECT_HOME": str(self.prefect_home)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def run(self, *arguments: object, timeout_s: float = 180.0) -> subprocess.CompletedProcess[str]:
        """Run it to its end, whatever that is."""
        process = self.start(*arguments)
        try:
            out, err = process.communicate(timeout=timeout_s)
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)
            raise
        return subprocess.CompletedProcess(arguments, process.returncode, out, err)


@pytest.fixture(scope="session")
def command_line(tmp_path_factory) -> CommandLine:
    return CommandLine(prefect_home=tmp_path_factory.mktemp("prefect"))


def wait_until(condition: Callable[[], bool], *, timeout_s: float = 120.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"it did not happen within {timeout_s} s"
        time.sleep(0.02)
