"""The whole program under random faults, in rounds, each until the run is complete."""

from __future__ import annotations

import random
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from tests.faults.figures import record_figure
from tests.helpers import ROOT, CommandLine, wait_until, workers_of
from tests.poison import Way, draw_protein, marked_as, patch
from tests.soak.machine import slowness
from tests.soak.storm import ORPHANS_EXIT_WITHIN_S, Fault, Storm, Struck
from tests.soak.workers import Journal, journalling, read_journal, sabotaged
from vnp_lib.checkpoint.quarantine import Quarantine
from vnp_lib.checkpoint.survey import survey_checkpoints
from vnp_lib.checkpoint.writer import MAX_IN_FLIGHT
from vnp_lib.dataset import open_dataset
from vnp_lib.plan.paths import RunPaths
from vnp_lib.plan.plan import RunPlan, load_plan

pytestmark = [pytest.mark.soak, pytest.mark.timeout(0)]

COUNT = 400
SHORTEST = 20  # residues
TOKEN_BUDGET = 256
CHECKPOINT_ROWS = 16
PAUSE_S = 0.1  # per forward pass: long enough to be struck
# These fit alone, and run out of memory in a batch in most rounds.
OUT_OF_MEMORY = range(25, COUNT, 100)
MODEL = (
    "--model",
    "esm2_t6_8M_UR50D",
    "--weights",
    "random",
    "--devices",
    "cpu,cpu",
    "--shards",
    3,
)
RUNTIME = {
    "checkpoint-seq-threshold": CHECKPOINT_ROWS,
    "spot-retry-poll-interval": 0.1,
    "backoff-base-s": 0.1,
    "backoff-max-s": 0.5,
    # A worker may be frozen before its first batch, too.
    "startup-limit-s": 90,
    "silence-limit-s": 10,
    "grace-s": 10,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Round:
    """The faults and bad proteins of a round, drawn from its seed."""

    seed: int
    poison: Mapping[int, Way]  # by ordinal
    runs_out_of_memory: bool
    faults: tuple[Fault, ...]

    @classmethod
    def drawn(cls, seed: int) -> Round:
        draw = random.Random(seed)
        places = sorted(
            draw.sample(sorted(set(range(COUNT)) - set(OUT_OF_MEMORY)), draw.randint(0, 3))
        )
        ways = (Way.EXCEPTION, Way.EXIT, Way.SEGFAULT, Way.NAN, Way.NAN)
        faults = draw.choices(list(Fault), k=draw.randint(3, 6))
        first_stop = faults.index(Fault.WORKER_STOP) if Fault.WORKER_STOP in faults else 0
        return cls(
            seed=seed,
            poison={place: draw.choice(ways) for place in places},
            runs_out_of_memory=draw.random() < 0.7,
            # A frozen worker accuses the sequences in the model: two could accuse the same one.
            faults=tuple(
                f for i, f in enumerate(faults) if f != Fault.WORKER_STOP or i == first_stop
            ),
        )


@dataclass(slots=True)
class Totals:
    """The totals of all rounds."""

    rounds: int = 0
    faults: Counter[Fault] = field(default_factory=Counter)
    poison: Counter[Way] = field(default_factory=Counter)
    counts: Counter[str] = field(default_factory=Counter)
    worker_stops_s: list[float] = field(default_factory=list)
    flow_stops_s: list[float] = field(default_factory=list)
    orphans_s: list[float] = field(default_factory=list)

    def add(self, round_: Round, struck: Struck, journal: Journal) -> None:
        self.rounds += 1
        self.faults += struck.faults
        self.poison.update(round_.poison.values())
        num_good = COUNT - len(round_.poison)
        self.counts.update(
            starts=struck.starts,
            workers=journal.num_workers,
            good=num_good,
            again=journal.rows_computed - num_good,
            allowed=most_rework(round_, struck, journal),
            out_of_memory=journal.out_of_memory,
        )
        self.worker_stops_s += struck.worker_stops_s
        self.flow_stops_s += struck.flow_stops_s
        self.orphans_s += struck.orphans_s

    def record(self) -> None:
        counts = self.counts
        whole = "every row right, only the bad in quarantine, none twice, no orphan, verified"
        record_figure("soak: rounds", self.rounds, whole)
        notes = {
            Fault.WORKER_TERM: f"slowest exit after {max(self.worker_stops_s, default=0):.1f} s",
            Fault.FLOW_TERM: f"slowest exit, also of SIGINT, after "
            f"{max(self.flow_stops_s, default=0):.1f} s",
            Fault.FLOW_KILL: f"slowest orphan left {max(self.orphans_s, default=0):.1f} s after it",
        }
        for fault in Fault:
            record_figure(f"soak: {fault}", self.faults[fault], notes.get(fault, ""))
        record_figure("soak: out of memory", counts["out_of_memory"], "met with smaller batches")
        for way in (Way.EXCEPTION, Way.EXIT, Way.SEGFAULT, Way.NAN):
            record_figure(f"soak: poison, {way.name.lower()}", self.poison[way], "in quarantine")
        record_figure("soak: starts of the flow", counts["starts"], f"{counts['workers']} workers")
        again = f"of {counts['good']:,} embedded; at most {counts['allowed']:,} allowed"
        record_figure("soak: rows computed again", counts["again"], again)


def test_whatever_strikes_when_nothing_is_lost(request, served_command_line, tmp_path):
    """A failed round prints its seed: `--soak-seed` with it repeats that round first."""
    seed = request.config.getoption("--soak-seed", default=1)
    until = time.monotonic() + 60 * request.config.getoption("--soak-minutes", default=10.0)
    oracle = rows_of(run_unharmed(served_command_line, tmp_path / "oracle"))
    totals = Totals()
    while totals.rounds == 0 or time.monotonic() < until:
        round_ = Round.drawn(seed + totals.rounds)
        directory = tmp_path / f"round_{round_.seed}"
        try:
            struck = run_in_a_storm(served_command_line, directory, round_)
            assert_nothing_is_lost(directory, round_, struck, oracle)
        except AssertionError as error:
            raise AssertionError(f"{round_} in {directory}: {error}") from error
        totals.add(round_, struck, read_journal(directory))
    totals.record()


def run_unharmed(command_line: CommandLine, directory: Path) -> Path:
    """Each protein is computed alone, where none can be taken for another."""
    ended = command_line.run(
        *arguments_for(directory, {}, token_budget=1), timeout_s=600.0 * slowness()
    )
    assert ended.returncode == 0, ended.stderr
    return directory / "run"


def run_in_a_storm(command_line: CommandLine, directory: Path, round_: Round) -> Struck:
    arguments = arguments_for(directory, round_.poison)
    active = set(round_.poison.values()) | ({Way.MEMORY} if round_.runs_out_of_memory else set())
    with sabotaged(
        directory / "sabotage", patch(*active) + journalling(directory, pause_s=PAUSE_S)
    ):
        storm = Storm(command_line, arguments, directory / "run", directory, round_.seed)
        return storm.rage(round_.faults)


def arguments_for(
    directory: Path, poison: Mapping[int, Way], *, token_budget: int = TOKEN_BUDGET
) -> tuple[object, ...]:
    """Write the input, and give the command line."""
    directory.mkdir()
    marked = dict.fromkeys(OUT_OF_MEMORY, Way.MEMORY) | dict(poison)
    draw = random.Random(20_260_101)
    with (directory / "in.fasta").open("w") as file:
        for ordinal in range(COUNT):
            protein = draw_protein(
                draw, 30 if ordinal in OUT_OF_MEMORY else draw.randint(SHORTEST, 60)
            )
            way = marked.get(ordinal)
            file.write(
                f">protein_{ordinal}\n{protein if way is None else marked_as(protein, way)}\n"
            )
    runtime = [word for name, value in RUNTIME.items() for word in (f"--runtime.{name}", value)]
    paths = ("--fasta", directory / "in.fasta", "--output-dir", directory / "run")
    return (*paths, *MODEL, "--token-budget", token_budget, *runtime)


def assert_nothing_is_lost(
    directory: Path, round_: Round, struck: Struck, oracle: Mapping[str, NDArray[np.float32]]
) -> None:
    run_dir = directory / "run"
    wait_until(lambda: not workers_of(run_dir), timeout_s=ORPHANS_EXIT_WITHIN_S * slowness())
    plan = load_plan(RunPaths(run_dir))
    assert quarantined(run_dir, plan) == set(round_.poison)
    assert_rows(run_dir, round_, oracle)
    assert_computed_once(run_dir, plan)
    assert_verified(run_dir)
    journal = read_journal(directory)
    longest_batch = (
        most_rows_of_a_batch() if round_.runs_out_of_memory else 1
    )  # in forward passes: it may go in pieces
    assert journal.orphaned_passes <= longest_batch + 1, (
        f"{journal.orphaned_passes} passes after the parent's end"
    )
    again = journal.rows_computed - (COUNT - len(round_.poison))
    assert 0 <= again <= most_rework(round_, struck, journal), (
        f"{again} rows computed again, {struck}, {journal}"
    )


def quarantined(run_dir: Path, plan: RunPlan) -> set[int]:
    return set(Quarantine.of(plan, RunPaths(run_dir)).ordinals())


def rows_of(run_dir: Path) -> dict[str, NDArray[np.float32]]:
    dataset = open_dataset(run_dir)
    assert dataset.ids == [f"protein_{ordinal}" for ordinal in range(COUNT)]
    return {sequence_id: dataset[sequence_id] for sequence_id in dataset.ids}


def assert_rows(run_dir: Path, round_: Round, oracle: Mapping[str, NDArray[np.float32]]) -> None:
    """Assert all rows but those of bad proteins, by id and position, as in a normal run."""
    dataset = open_dataset(run_dir)
    good = [ordinal for ordinal in range(COUNT) if ordinal not in round_.poison]
    assert dataset.ids == [f"protein_{ordinal}" for ordinal in good]
    for ordinal in good:
        row = dataset[f"protein_{ordinal}"]
        assert abs(row - oracle[f"protein_{ordinal}"]).max() < 1e-5, ordinal
        assert (row == dataset.row(ordinal)).all()


def assert_computed_once(run_dir: Path, plan: RunPlan) -> None:
    survey = survey_checkpoints(
        RunPaths(run_dir).checkpoints_dir, plan.fingerprint, verify_digests=True
    )
    assert not survey.damaged
    held = Counter(ordinal for record in survey.valid for ordinal in record.ordinals.tolist())
    assert set(held.values()) == {1}, (
        f"in more than one checkpoint: {[each for each in held if held[each] > 1]}"
    )


def assert_verified(run_dir: Path) -> None:
    command = [sys.executable, "-m", "vnp_lib", "verify", str(run_dir)]
    verified = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert verified.returncode == 0, verified.stdout + verified.stderr


def most_rework(round_: Round, struck: Struck, journal: Journal) -> int:
    """Return how many rows may be computed twice: what workers that could not save had in memory.

    These are the rows for the next checkpoint, those of the writer, and the batch in the model. A
    worker that is stopped, or whose supervisor is gone, saves its rows. One that raises at a bad
    protein loses none either, unless memory is short: then the batch is split, and the pieces
    before the bad one are lost.
    """
    batch = most_rows_of_a_batch()
    checkpoint = CHECKPOINT_ROWS - 1 + batch
    lost_workers = len(struck.lost_workers | journal.met_a_full_disk) + journal.lethal_passes
    strikes = (
        2 * list(round_.poison.values()).count(Way.EXCEPTION) if round_.runs_out_of_memory else 0
    )
    return lost_workers * ((1 + MAX_IN_FLIGHT) * checkpoint + batch) + strikes * (batch - 1)


def most_rows_of_a_batch() -> int:
    return TOKEN_BUDGET // (SHORTEST + 2)
