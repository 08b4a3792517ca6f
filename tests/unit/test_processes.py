"""Processes are identified across reused ids, machines, boots and containers."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace

import pytest

from vnp_lib.processes import ProcessIdentity

HERE = ProcessIdentity.current()


def test_this_process_is_visible_and_alive() -> None:
    assert HERE.pid == os.getpid()
    assert HERE.is_visible()
    assert HERE.is_alive()


def test_a_later_process_with_the_same_id_is_another() -> None:
    """In a container, the main process always has the id 1."""
    assert not replace(HERE, started_at=str(int(HERE.started_at) - 1)).is_alive()


def test_a_process_that_has_ended_is_not_alive() -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    assert not replace(HERE, pid=ended.pid).is_alive()


@pytest.mark.parametrize(
    "other", [{"host": "node-" + HERE.host}, {"boot": "00000001"}, {"pid_namespace": "1"}]
)
def test_another_machine_boot_or_container_is_not_visible(other: dict[str, str]) -> None:
    assert not replace(HERE, **other).is_visible()


def test_without_a_start_time_the_id_decides() -> None:
    assert replace(HERE, started_at="0").is_alive()
