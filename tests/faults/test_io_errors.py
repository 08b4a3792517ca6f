"""Refused operations give a clear error, lose nothing, and the next run completes."""

from __future__ import annotations

import errno
import os
import random
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests.faults.compare import (
    Outcome,
    assert_as_uninterrupted,
    assert_recovers,
    assert_untouched,
    committed_files,
    committed_ordinals,
)
from tests.faults.figures import record_figure
from tests.faults.ops import DenyingOps, ShortWritingOps, WatchedOps, install
from tests.faults.scenarios import copy_of, damage_in_the_middle, new_directory, prepare
from tests.faults.trials import call
from tests.faults.workload import run_to_the_end, write_fasta
from vnp_lib.errors import ConfigError, StorageError
from vnp_lib.plan.paths import RunPaths
from vnp_lib.storage.locks import FileLock

pytestmark = pytest.mark.slow

CODES = (errno.ENOSPC, errno.EIO, errno.EDQUOT, errno.EROFS, errno.EMFILE, errno.EACCES)


class Refusal(NamedTuple):
    """An errno, and the operation from which it occurs."""

    operation: int  # from 1
    code: int
    for_good: bool


@pytest.mark.parametrize("scenario", [new_directory, damage_in_the_middle])
def test_a_refused_operation_is_a_clear_error_at_worst(trials, oracle, scale, scenario) -> None:
    """Each errno occurs at each operation; at writes, which are many, they alternate."""
    template = trials.scratch / f"refused-{scenario.__name__}"
    refusals = list(all_refusals(trials.once(prepare, scenario, template)))
    chosen = random.Random(2).sample(
        range(len(refusals)), min(len(refusals), scale(35, len(refusals)))
    )
    ended_well = trials.run(refuse, chosen, refusals, template, oracle)
    assert any(ended_well) or len(ended_well) == 1, "no run survived an error"
    names = ", ".join(errno.errorcode[code] for code in CODES)
    record_figure(
        f"{names}, once and for good ({scenario.__name__})",
        len(ended_well),
        f"never wrong, never rows missing; {sum(ended_well):,} runs ended well",
    )


def test_short_writes_are_completed(trials, oracle, scale) -> None:
    """One byte of one write is written, or half of each write from then on."""
    operations = trials.once(prepare, new_directory, trials.scratch / "short")
    writes = [number for number, name in enumerate(operations, start=1) if name == "write"]
    chosen = random.Random(3).sample(writes, min(len(writes), scale(15, len(writes))))
    for for_good in (False, True):
        trials.run(write_short, chosen, for_good, oracle)
    record_figure("short write, once and for good", 2 * len(chosen), "100 % identical")


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS])
def test_a_manifest_that_takes_nothing_costs_nothing(trials, oracle, code) -> None:
    """It is only a record: no attempt fails without it, and the next run rebuilds it."""
    trials.run(run_without_manifest, [code], oracle)
    record_figure(f"manifest: {errno.errorcode[code]} at every write of it", 1, "100 % identical")


def test_a_manifest_lock_held_by_another_costs_nothing(trials, oracle) -> None:
    trials.run(run_with_a_held_lock, [0], oracle)
    record_figure("manifest: its lock held by another process", 1, "100 % identical")


def run_without_manifest(directory: Path, code: int, oracle: Outcome) -> None:
    write_fasta(directory)
    ended = call(run_denied_the_manifest, directory / "run", code, oracle)
    assert not ended.error, ended.error
    assert not RunPaths(directory / "run").manifest.exists()
    assert_recovers(directory / "run", oracle)


def run_denied_the_manifest(run_dir: Path, code: int, oracle: Outcome) -> None:
    class DenyingTheManifest(WatchedOps):
        def perform(self, name: str, act: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
            if name == "replace" and arguments[-1].name == "manifest.json":
                raise OSError(code, os.strerror(code))
            return act(*arguments)

    install(DenyingTheManifest())
    assert run_to_the_end(run_dir)
    assert_as_uninterrupted(run_dir, oracle)


def run_with_a_held_lock(directory: Path, seed: int, oracle: Outcome) -> None:
    write_fasta(directory)
    lock = RunPaths(directory / "run").manifest.with_suffix(".lock")
    lock.parent.mkdir(parents=True)
    with FileLock(lock, purpose="hang").held(timeout_s=0):
        ended = call(run_to_the_end, directory / "run")
    assert ended.value, ended.error
    assert_recovers(directory / "run", oracle)


def all_refusals(operations: list[str]) -> Iterator[Refusal]:
    for number, name in enumerate(operations, start=1):
        codes = (CODES[number % len(CODES)],) if name == "write" else CODES
        for code, for_good in product(codes, (False, True)):
            yield Refusal(number, code, for_good)


def refuse(
    directory: Path, seed: int, refusals: list[Refusal], template: Path, oracle: Outcome
) -> bool:
    """Refuse `refusals[seed]`. Return whether the run completed nevertheless."""
    run_dir = copy_of(template, directory)
    committed = committed_files(run_dir, oracle)
    ended = call(run_refused, run_dir, refusals[seed], oracle)
    assert not ended.error, f"{refusals[seed]}: {ended.error}"
    is_complete, acknowledged = ended.value
    assert_untouched(committed)
    assert acknowledged <= committed_ordinals(run_dir, oracle), refusals[seed]
    assert_recovers(run_dir, oracle)
    return is_complete


def run_refused(run_dir: Path, refusal: Refusal, oracle: Outcome) -> tuple[bool, set[int]]:
    """Return whether the run completed, and which ordinals it reported as durable."""
    ops = DenyingOps(refusal.operation, refusal.code, for_good=refusal.for_good)
    install(ops)
    acknowledged: set[int] = set()
    is_complete = False
    try:
        is_complete = run_to_the_end(run_dir, acknowledge=acknowledged.update)
    except (StorageError, ConfigError):
        pass
    except OSError as error:
        if error.errno != refusal.code:
            raise
    assert not ops.synced_again, "a descriptor was synced again after a sync of it had failed"
    if is_complete:
        assert_as_uninterrupted(run_dir, oracle)
    return is_complete, acknowledged


def write_short(directory: Path, seed: int, for_good: bool, oracle: Outcome) -> None:
    """Cut the write that is operation `seed`."""
    write_fasta(directory)
    ended = call(run_short, directory / "run", ShortWritingOps(seed, for_good=for_good), oracle)
    assert not ended.error, ended.error


def run_short(run_dir: Path, ops: ShortWritingOps, oracle: Outcome) -> None:
    install(ops)
    assert run_to_the_end(run_dir)
    assert_as_uninterrupted(run_dir, oracle)
