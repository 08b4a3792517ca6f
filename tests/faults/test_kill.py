"""SIGKILL at any moment: the next run completes as if nothing had happened."""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path

import pytest

from tests.faults.compare import Outcome, assert_recovers, assert_untouched, committed_files
from tests.faults.figures import record_figure
from tests.faults.ops import CountingOps, KillingOps, install
from tests.faults.scenarios import SCENARIOS, copy_of, prepare
from tests.faults.trials import Fork, call
from tests.faults.workload import run_to_the_end, write_fasta

pytestmark = pytest.mark.slow

LONGEST_RUN_S = 0.1


def test_a_run_killed_at_any_operation_is_resumed(trials, oracle, scale) -> None:
    """Kill before each operation of each scenario, and halfway through each write."""
    num_trials = 0
    for scenario in SCENARIOS:
        template = trials.scratch / scenario.__name__
        num_operations = len(trials.once(prepare, scenario, template))
        every = range(1, num_operations + 1)
        chosen = random.Random(1).sample(every, min(num_operations, scale(10, num_operations)))
        num_trials += len(trials.run(kill_once, chosen, template, oracle))
    record_figure("SIGKILL at every durable operation", num_trials, "100 % identical")


def test_a_run_killed_many_times_is_resumed(trials, oracle, seeds, scale) -> None:
    """Kill up to twenty times in a row, with another number of shards each time."""
    num_kills = trials.run(kill_again_and_again, seeds(scale(20, 2_000)), oracle)
    record_figure(
        "random multi-kill, 1 to 20 kills a run",
        len(num_kills),
        f"0 mismatches after {sum(num_kills):,} kills",
    )


def kill_once(directory: Path, seed: int, template: Path, oracle: Outcome) -> None:
    """Kill the run at operation `seed`."""
    run_dir = copy_of(template, directory)
    assert call(run_with, KillingOps(seed), run_dir).was_killed
    assert_recovers(run_dir, oracle)


def kill_again_and_again(directory: Path, seed: int, oracle: Outcome) -> int:
    draw = random.Random(seed)
    run_dir = directory / "run"
    write_fasta(directory)
    num_kills = 0
    committed: dict[Path, str] = {}
    for _ in range(draw.randint(1, 20)):
        kill = draw.choice([kill_at_an_operation, kill_at_a_moment])
        num_kills += kill(run_dir, draw)
        assert_untouched(committed)
        committed |= committed_files(run_dir, oracle)
    assert_recovers(run_dir, oracle, shards=draw.randint(1, 3))
    return num_kills


def kill_at_an_operation(run_dir: Path, draw: random.Random) -> bool:
    """Kill early, so that work is left. Return whether it was still running."""
    kill_at = 1 + int(draw.expovariate(1 / 80))
    return call(run_with, KillingOps(kill_at), run_dir, shards=draw.randint(1, 3)).was_killed


def kill_at_a_moment(run_dir: Path, draw: random.Random) -> bool:
    fork = Fork(run_to_the_end, run_dir, shards=draw.randint(1, 3))
    time.sleep(draw.uniform(0, LONGEST_RUN_S))
    os.kill(fork.pid, signal.SIGKILL)
    return fork.wait().was_killed


def run_with(ops: CountingOps, run_dir: Path, *, shards: int = 2) -> None:
    install(ops)
    run_to_the_end(run_dir, shards=shards)
