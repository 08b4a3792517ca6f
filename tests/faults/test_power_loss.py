"""Power loss: what was reported as durable survives, and nothing wrong is accepted."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from tests.faults.compare import Outcome, assert_recovers, assert_rows_are_right, committed_ordinals
from tests.faults.disk import Disk, Event, read_record
from tests.faults.figures import record_figure
from tests.faults.ops import RecordingOps, install
from tests.faults.trials import call
from tests.faults.workload import run_to_the_end, write_fasta
from vnp_lib.dataset.reader import verify_dataset

pytestmark = pytest.mark.slow

STATES_PER_HISTORY = 20
ACKNOWLEDGED = "acknowledged"
ASSEMBLED = "assembled"


def test_a_power_cut_loses_nothing_that_was_called_durable(trials, oracle, seeds, scale) -> None:
    """Cut the power at any operation of consecutive runs, each killed before the next.

    Every state is read as by a run; all of them, or one in ten with `--faults=full`, are then run
    to the end.
    """
    run_every = scale(1, 10)
    num_states = sum(trials.run(cut_the_power, seeds(scale(5, 1_000)), run_every, oracle))
    record_figure(
        "power loss",
        num_states,
        f"0 acknowledged rows lost, 0 wrong accepted; {num_states // run_every:,} run to the end, "
        "100 % identical",
    )


def cut_the_power(directory: Path, seed: int, run_every: int, oracle: Outcome) -> int:
    """Cut the power at several points of a random history, and count the states."""
    draw = random.Random(seed)
    history = record_history(directory / "original", draw)
    for state in range(STATES_PER_HISTORY):
        after = directory / f"state-{state}"
        events = history[: draw.randint(1, len(history))]
        disk = Disk(directory / "original")
        for event in events:
            disk.apply(event)
        disk.write_after_power_loss(after, draw)
        write_fasta(after)
        assert_nothing_lost(after / "run", events, oracle)
        assert_rows_are_right(after / "run", oracle)
        shards = draw.randint(1, 3)
        if state % run_every == 0:
            assert_recovers(after / "run", oracle, shards=shards)
    return STATES_PER_HISTORY


def record_history(directory: Path, draw: random.Random) -> list[Event]:
    """Record up to two runs that are killed, and one that is not."""
    directory.mkdir()
    write_fasta(directory)
    record = directory.parent / "record"
    for _ in range(draw.randint(0, 2)):
        call(record_run, directory / "run", record, draw.randint(1, 3), **draw_kill(draw))
    ended = call(record_run, directory / "run", record, draw.randint(1, 3))
    assert not ended.error, ended.error
    return [*read_record(record)]


def draw_kill(draw: random.Random) -> dict[str, Any]:
    """Draw any operation, or, because much depends on it, the sync of a directory."""
    if draw.random() < 0.5:
        return {"kill_at": draw.randint(1, 600)}
    return {"kill_at": draw.randint(1, 60), "kill_name": "fsync_directory"}


def record_run(run_dir: Path, record: Path, shards: int, **kill: Any) -> None:
    ops = RecordingOps(record, **kill)
    install(ops)
    is_complete = run_to_the_end(
        run_dir, shards=shards, acknowledge=lambda ordinals: ops.note(ACKNOWLEDGED, ordinals, None)
    )
    if is_complete:
        ops.note(ASSEMBLED, None)


def assert_nothing_lost(run_dir: Path, events: list[Event], oracle: Outcome) -> None:
    acknowledged = {
        ordinal for name, *details in events if name == ACKNOWLEDGED for ordinal in details[0]
    }
    lost = acknowledged - committed_ordinals(run_dir, oracle)
    assert not lost, f"ordinals {sorted(lost)} were called durable"
    if any(event[0] == ASSEMBLED for event in events):
        assert not verify_dataset(run_dir)
