"""Two runs on one directory: a lock refuses the second; without locks the dataset is right too."""

from __future__ import annotations

import os
import random
import re
import signal
import socket
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from tests.faults.compare import Outcome, assert_recovers, committed_files, outcome_of
from tests.faults.figures import record_figure
from tests.faults.ops import WatchedOps, install
from tests.faults.trials import Fork, call
from tests.faults.workload import FASTA, config_for, run_to_the_end, write_fasta
from vnp_lib.checkpoint.resume import validate_checkpoint_pt
from vnp_lib.errors import RunDirectoryBusyError, VnpError
from vnp_lib.run import directory
from vnp_lib.run.directory import open_run
from vnp_lib.storage.durable import marker_path
from vnp_lib.storage.locks import FileLock

pytestmark = pytest.mark.slow

LONGEST_OFFSET_S = 0.15
MOST_ATTEMPTS = 25


def test_two_runs_without_working_locks_make_the_one_dataset(trials, oracle, seeds, scale) -> None:
    """A network file system may grant two processes the lock of a run, a shard or the manifest."""
    counts = sum(trials.run(run_twice_without_locks, seeds(scale(16, 200)), oracle), Counter())
    num_trials = counts.pop("trials")
    assert counts["committed files replaced"] == 0
    record_figure(
        "two runs on one directory, locks bypassed, random offsets",
        num_trials,
        f"identical; {', '.join(f'{count:,} {what}' for what, count in sorted(counts.items()))}",
    )


def test_a_second_run_is_refused_with_the_holder(trials, oracle, scale) -> None:
    """The lock is free as soon as its holder is killed."""
    waited_s = trials.run(refuse_the_second, range(scale(3, 30)), oracle)
    record_figure(
        "a second run while the first holds the lock",
        len(waited_s),
        f"refused within {max(waited_s) * 1000:.0f} ms",
    )


def test_a_failed_run_removes_nothing_of_another_run(trials, oracle) -> None:
    """Both found no directory, no lock refused either, and one has other input."""
    trials.once(fail_during_another, oracle)


def fail_during_another(directory: Path, oracle: Outcome) -> None:
    run_dir = directory / "run"
    ended = call(open_while_another_runs, run_dir)
    assert "FingerprintMismatchError" in ended.error
    ended = call(outcome_of, run_dir)
    assert ended.value == oracle, ended.error


def open_while_another_runs(run_dir: Path) -> None:
    bypass_locks()
    plan_run = directory.plan_run

    def plan_late(*arguments: Any) -> Any:
        directory.plan_run = plan_run
        write_fasta(run_dir.parent)
        assert call(run_to_the_end, run_dir).value
        (run_dir.parent / FASTA).write_text(">another\nMKV\n")
        return plan_run(*arguments)

    directory.plan_run = plan_late
    with open_run(config_for(run_dir)):
        pass


def run_twice_without_locks(directory: Path, seed: int, oracle: Outcome) -> Counter[str]:
    draw = random.Random(seed)
    run_dir = directory / "run"
    write_fasta(directory)
    log = directory / "events"
    forks = [Fork(run_until_done, run_dir, draw.getrandbits(32), log) for _ in range(2)]
    failures: Counter[str] = Counter()
    for fork in forks:
        ended = fork.wait()
        assert not ended.error, ended.error
        failures += Counter(ended.value)
    ended = call(outcome_of, run_dir)
    assert ended.value == oracle, ended.error

    before = committed_files(run_dir, oracle)
    assert_finishes(run_dir, oracle)
    assert {path for path in before if path.exists()} == set(before)
    events = Counter(log.read_text().splitlines() if log.exists() else ())
    return (
        Counter(
            {
                "trials": 1,
                "committed files replaced": 0,
                "failed attempts that were repeated": failures.total(),
            }
        )
        + events
    )


def assert_finishes(run_dir: Path, oracle: Outcome) -> None:
    """Assert that a later run completes normally; rows may have been computed twice."""
    ended = call(run_to_the_end, run_dir)
    assert not ended.error, ended.error
    ended = call(outcome_of, run_dir)
    assert ended.value == oracle, ended.error


def run_until_done(run_dir: Path, seed: int, log: Path) -> list[str]:
    """Do what the flow does, start again on failure, and return the errors."""
    bypass_locks()
    install(CommitWatchingOps(log))
    draw = random.Random(seed)
    shards = draw.randint(1, 3)
    time.sleep(draw.uniform(0, LONGEST_OFFSET_S))
    errors = []
    for _ in range(MOST_ATTEMPTS):
        try:
            if run_to_the_end(run_dir, shards=shards):
                return errors
        except (VnpError, OSError, ValueError) as error:
            # The manifest of the other run may have fewer shards.
            if isinstance(error, ValueError) and "there is no shard" not in str(error):
                raise
            errors.append(f"{type(error).__name__}: {error}")
            time.sleep(draw.uniform(0, LONGEST_OFFSET_S))
    raise AssertionError(f"no dataset after {MOST_ATTEMPTS} attempts: {errors[-3:]}")


def bypass_locks() -> None:
    """Grant every lock, for the rest of this process."""
    FileLock.acquire = lambda self, timeout_s: None
    FileLock.release = lambda self: None


class CommitWatchingOps(WatchedOps):
    """Log every operation that would replace or remove a committed checkpoint."""

    def __init__(self, log: Path) -> None:
        super().__init__()
        self._log = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def perform(self, name: str, act: Any, arguments: tuple[Any, ...]) -> Any:
        if name == "replace":
            source, target = arguments
            if _is_committed(target):
                self._record("committed files replaced")
            if _is_committed(source):
                self._record("committed checkpoints moved aside")
        if name == "unlink" and _is_committed(arguments[0]):
            self._record("committed files removed")
        return act(*arguments)

    def _record(self, event: str) -> None:
        os.write(self._log, f"{event}\n".encode())


def _is_committed(path: Path) -> bool:
    if not re.fullmatch(r"batch_\d{5}\.pt(\.done)?", path.name):
        return False
    checkpoint = path.with_name(path.name.removesuffix(".done"))
    return (
        path.exists() and marker_path(checkpoint).exists() and validate_checkpoint_pt(checkpoint)[0]
    )


def refuse_the_second(directory: Path, seed: int, oracle: Outcome) -> float:
    run_dir = directory / "run"
    write_fasta(directory)
    holder = Fork(hold, run_dir)
    while not (directory / "held").exists():
        time.sleep(0.005)
    ended = call(try_to_open, run_dir)
    assert not ended.error, ended.error
    waited_s, message = ended.value
    assert f"process {holder.pid} on {socket.gethostname()} since " in message
    assert re.search(r"since 20\d\d-\d\d-\d\dT\d\d:\d\d:\d\d", message)
    os.kill(holder.pid, signal.SIGKILL)
    assert holder.wait().was_killed
    assert_recovers(run_dir, oracle)
    return waited_s


def hold(run_dir: Path) -> None:
    with open_run(config_for(run_dir)):
        (run_dir.parent / "held").touch()
        time.sleep(600)


def try_to_open(run_dir: Path) -> tuple[float, str]:
    started_s = time.monotonic()
    try:
        with open_run(config_for(run_dir)):
            raise AssertionError("two runs are in one directory")
    except RunDirectoryBusyError as error:
        return time.monotonic() - started_s, str(error)
