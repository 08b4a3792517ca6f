"""A Prefect of the tests' own, and `python flows/embed.py` as a person starts it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from prefect.testing.utilities import prefect_test_harness

from tests.support import CommandLine


@pytest.fixture(scope="session")
def prefect_server() -> Iterator[None]:
    """A server with an empty database, for flows that run in the test's own process."""
    with prefect_test_harness(server_startup_timeout=120):
        yield


@pytest.fixture(scope="session")
def command_line(tmp_path_factory) -> CommandLine:
    return CommandLine(prefect_home=tmp_path_factory.mktemp("prefect"))
