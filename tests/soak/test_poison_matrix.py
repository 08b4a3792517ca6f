"""Exactly the bad proteins are quarantined, wherever they are, and few workers crash on them.

Those at which a worker hangs are not quarantined, because a slow machine looks the same: their
shard fails, everything else is saved.

Without Prefect: a loop of attempt, failure and recovery does what the flow's task and hook do.
Workers, recovery, manifest and dataset are the real ones; the network is ESM-2 with one layer.
"""

from __future__ import annotations

import asyncio
import os
import random
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from tests.faults.figures import record_figure
from tests.helpers import small_config, workers_of
from tests.poison import Way, draw_protein, marked_as, patch
from tests.soak.machine import slowness
from tests.soak.workers import SMALL_NETWORK, sabotaged
from vnp_lib.dataset import open_dataset
from vnp_lib.failures import FailureCause, ShardFailedError
from vnp_lib.run.assembly import assemble
from vnp_lib.run.directory import open_run
from vnp_lib.run.run import Run
from vnp_lib.storage.durable import write_file
from vnp_lib.worker.recovery import handle_failure
from vnp_lib.worker.supervisor import run_worker

pytestmark = [pytest.mark.soak, pytest.mark.timeout(1800)]

COUNT = 48
RESIDUES = 30  # all of them: the plan's order is that of the input
LETHAL = (Way.EXCEPTION, Way.EXIT, Way.SEGFAULT, Way.HANG)
CAUSES = {
    Way.EXCEPTION: FailureCause.COMPUTE_ERROR,
    Way.EXIT: FailureCause.SILENT_EXIT,
    Way.SEGFAULT: FailureCause.NATIVE_CRASH,
    Way.HANG: FailureCause.HANG,
    Way.NAN: FailureCause.NUMERICAL_INSTABILITY,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """Which of 48 proteins are bad, and in which way."""

    story: str
    marked: Mapping[int, Way]  # by ordinal
    shards: int = 1
    batch_size: int = 8

    def __str__(self) -> str:
        places = "-".join(f"{ordinal}{way}" for ordinal, way in self.marked.items())
        return f"{self.story.replace(' ', '-')}-{places}-in-{self.shards}x{self.batch_size}"

    @property
    def most_workers(self) -> int:
        """Two strikes per bad batch, two per bad protein alone, and a last worker per shard.

        A bisection would need up to ceil(log2 n) + 2 for each. One worker computes the suspects
        alone, one after the other, and its crash names the culprit.
        """
        lethal = [ordinal for ordinal, way in self.marked.items() if way in LETHAL]
        batches = {
            (ordinal % self.shards, ordinal // self.shards // self.batch_size) for ordinal in lethal
        }
        strikes_of_batches = 2 * len(batches) if self.batch_size > 1 else 0
        return strikes_of_batches + 2 * len(lethal) + self.shards


def at_random(seed: int) -> Case:
    draw = random.Random(seed)
    ordinals = sorted(draw.sample(range(COUNT), draw.randint(1, 5)))
    ways = [draw.choice((Way.EXCEPTION, Way.EXIT, Way.SEGFAULT, Way.NAN)) for _ in ordinals]
    return Case(
        story="at random",
        marked=dict(zip(ordinals, ways, strict=True)),
        shards=draw.randint(1, 3),
        batch_size=draw.choice((2, 5, 8, 16)),
    )


E, Q, S, H, N = Way.EXCEPTION, Way.EXIT, Way.SEGFAULT, Way.HANG, Way.NAN
CASES = (
    Case(story="none", marked={}),
    *(Case(story="one", marked={20: way}) for way in (E, Q, S, H, N)),
    Case(story="one", marked={0: Q}),
    Case(story="one", marked={COUNT - 1: S}),
    Case(story="one, its batch", marked={20: E}, batch_size=1),
    Case(story="one of a large batch", marked={30: S}, batch_size=COUNT),
    *(Case(story="pair in a batch", marked={18: way, 19: way}) for way in (E, Q, S, N)),
    Case(story="pair in a batch", marked={18: H, 19: E}),
    Case(story="pair in a batch", marked={18: N, 19: Q}),
    Case(story="pair over two batches", marked={15: Q, 16: Q}),
    Case(story="pair over two batches", marked={15: S, 16: N}),
    *(Case(story="pair in two shards", marked={20: way, 21: way}, shards=2) for way in (E, S)),
    Case(story="three in a batch", marked={17: Q, 20: Q, 23: Q}),
    Case(story="all of a batch", marked={20: E, 21: S}, batch_size=2),
    Case(story="five in a batch", marked={16: E, 17: Q, 19: S, 22: H, 23: N}),
    Case(story="five scattered", marked={2: E, 13: Q, 22: S, 29: N, 44: Q}),
    Case(
        story="five scattered in three shards",
        marked={1: S, 11: E, 21: Q, 31: N, 41: H},
        shards=3,
        batch_size=4,
    ),
    *(at_random(seed) for seed in (1, 2, 3)),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Ending:
    """The result of a case."""

    run_dir: Path
    quarantined: dict[int, tuple[str, str, int]]  # by ordinal: id, cause, attempts
    accused: list[bool]  # per failed attempt: whether it accuses a batch
    num_workers: int
    reasons: list[str]  # of shards that have failed


@dataclass(slots=True)
class Tally:
    """The results, for the table."""

    endings: dict[str, list[tuple[Case, int]]] = field(default_factory=lambda: defaultdict(list))

    def record(self) -> None:
        for story, held in self.endings.items():
            culprits = sum(len(case.marked) for case, _ in held)
            workers, most = (
                sum(count for _, count in held),
                sum(case.most_workers for case, _ in held),
            )
            result = (
                f"{culprits} quarantined or named, no other; {workers} workers, at most {most} "
                "allowed"
            )
            record_figure(f"poison: {story}", len(held), result)


@pytest.fixture(scope="module")
def tally() -> Iterator[Tally]:
    tally = Tally()
    yield tally
    tally.record()


@pytest.fixture(scope="module")
def directory(tmp_path_factory) -> Iterator[Path]:
    """Make a directory in which workers fail on bad proteins."""
    directory = tmp_path_factory.mktemp("matrix")
    with sabotaged(directory / "sabotage", SMALL_NETWORK + patch(*CAUSES)):
        yield directory


@pytest.fixture(scope="module")
def oracle(directory) -> dict[str, NDArray[np.float32]]:
    """Compute the rows of the same proteins without marks, each alone, by id."""
    dataset = open_dataset(
        embed_all(Case(story="oracle", marked={}, batch_size=1), directory / "oracle").run_dir
    )
    assert len(dataset) == COUNT
    return {sequence_id: dataset[sequence_id] for sequence_id in dataset.ids}


@pytest.fixture(scope="module")
def endings(request, directory, oracle) -> Iterator[dict[str, Future[Ending]]]:
    """Run all requested cases, each as soon as a core is free."""
    requested = {item.callspec.id for item in request.session.items if item.path == request.path}
    pool = ThreadPoolExecutor(max_workers=len(os.sched_getaffinity(0)))
    yield {
        str(case): pool.submit(embed_all, case, directory / str(number))
        for number, case in enumerate(CASES)
        if str(case) in requested
    }
    pool.shutdown(cancel_futures=True)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_exactly_the_bad_ones_are_quarantined(case, endings, oracle, tally):
    """Ids and causes are right, every other row is right, and no worker starts in vain."""
    ending = endings[str(case)].result()
    assert ending.quarantined == {
        ordinal: (f"protein_{ordinal}", CAUSES[way], 2)
        for ordinal, way in case.marked.items()
        if way != Way.HANG
    }
    silent = [f"protein_{ordinal}" for ordinal, way in case.marked.items() if way == Way.HANG]
    assert len(ending.reasons) == len(silent)
    for sequence_id, reason in zip(silent, ending.reasons, strict=True):
        assert (
            f"{sequence_id!r} (30 residues), computed alone and last, gave no sign of life"
            in reason
        )
    assert_all_other_rows(ending.run_dir, case, oracle)
    assert all(ending.accused), (
        "a failure that no protein is blamed for: is the machine too busy for the silence limit?"
    )
    assert ending.num_workers <= case.most_workers
    assert workers_of(ending.run_dir) == []
    tally.endings[case.story].append((case, ending.num_workers))


def assert_all_other_rows(
    run_dir: Path, case: Case, oracle: dict[str, NDArray[np.float32]]
) -> None:
    dataset = open_dataset(run_dir)
    assert dataset.ids == [
        f"protein_{ordinal}" for ordinal in range(COUNT) if ordinal not in case.marked
    ]
    for ordinal in set(range(COUNT)) - set(case.marked):
        row = dataset[f"protein_{ordinal}"]
        assert abs(row - oracle[f"protein_{ordinal}"]).max() < 1e-5, ordinal
        assert (row == dataset.row(ordinal)).all()


def write_input(path: Path, marked: Mapping[int, Way]) -> None:
    draw = random.Random(20_260_101)
    with path.open("w") as file:
        for ordinal in range(COUNT):
            protein = draw_protein(draw, RESIDUES)
            way = marked.get(ordinal)
            file.write(
                f">protein_{ordinal}\n{protein if way is None else marked_as(protein, way)}\n"
            )


def embed_all(case: Case, directory: Path) -> Ending:
    """Embed a case's proteins until all shards are complete, and assemble the dataset."""
    directory.mkdir()
    write_input(directory / "in.fasta", case.marked)
    hangs = Way.HANG in case.marked.values()
    config = small_config(
        directory / "in.fasta",
        directory / "run",
        shards=case.shards,
        token_budget=case.batch_size * (RESIDUES + 2),
        runtime={
            "checkpoint_seq_threshold": 10,
            "silence_limit_s": 4.0 * slowness() if hangs else 120.0,
            "grace_s": 0.5 * slowness() if hangs else 30.0,
        },
    )
    with open_run(config) as run:
        workers: Counter[int] = Counter()
        reasons = asyncio.run(embed_shards(run, workers, most=case.most_workers))
        paths, ordinals = run.paths, run.quarantine.ordinals()
        assemble(
            run.plan,
            paths,
            run.checkpoints().valid,
            quarantined=ordinals,
            allow_missing=bool(reasons),
        )
        return Ending(
            run_dir=paths.run_dir,
            quarantined={
                each.ordinal: (each.id, each.cause, each.attempts) for each in run.quarantine.read()
            },
            accused=[
                record["accuses_batch"]
                for rank in range(case.shards)
                for record in run.manifest.failures(rank)
            ],
            num_workers=workers.total(),
            reasons=reasons,
        )


async def embed_shards(run: Run, workers: Counter[int], *, most: int) -> list[str]:
    """Embed all shards, and return why some have failed."""
    async with asyncio.TaskGroup() as group:
        tasks = [
            group.create_task(embed_shard(run, rank, workers, most=most))
            for rank in range(run.plan.num_shards)
        ]
    return [reason for task in tasks if (reason := task.result())]


async def embed_shard(run: Run, rank: int, workers: Counter[int], *, most: int) -> str:
    """Attempt a shard until it completes or fails, and count the workers.

    Returns:
        Why the shard has failed, if a worker was silent; else nothing.

    Raises:
        AssertionError: After more than `most` workers.
    """
    while True:
        workers[rank] += 1
        assert workers[rank] <= most, (
            f"{most} workers were not enough: {run.manifest.failures(rank)}"
        )
        run.prepare_shard(rank)
        run.manifest.start_attempt(rank, device="cpu")
        write_file(
            run.paths.job(rank), run.shard_job(rank, "cpu").model_dump_json().encode(), replace=True
        )
        try:
            await attempt(run, rank)
            return ""
        except ShardFailedError as error:
            decision = handle_failure(run, rank, error.failure, session="matrix")
            if not decision.retry and error.failure.is_silence:
                return decision.reason
            assert decision.retry, decision.reason


async def attempt(run: Run, rank: int) -> None:
    async def on_event(event: object) -> None:
        pass

    runtime = run.config.runtime
    await run_worker(
        run.paths.job(rank),
        device="cpu",
        log_path=run.paths.worker_log(rank),
        on_event=on_event,
        startup_limit_s=runtime.startup_limit_s,
        silence_limit_s=runtime.silence_limit_s,
        grace_s=runtime.grace_s,
    )
