"""Assertions about a run directory after a fault."""

from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from tests.faults.trials import call
from tests.faults.workload import run_to_the_end, write_fasta
from vnp_lib.checkpoint.file import load_checkpoint
from vnp_lib.checkpoint.survey import survey_checkpoints
from vnp_lib.dataset.reader import open_dataset, verify_dataset
from vnp_lib.plan.paths import RunPaths

_MOST_ROUNDS = 3  # as in the flow


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """The results of a run that depend only on the input."""

    fingerprint: str
    rows: list[tuple[str, bytes]]  # id and embedding, in input order
    part_digests: dict[str, str]  # by the name of the part


def outcome_of(directory: Path) -> Outcome:
    """Read the dataset of a run, row by row with its id, and byte by byte."""
    assert not verify_dataset(directory)
    dataset = open_dataset(directory)
    return Outcome(
        fingerprint=dataset.metadata["fingerprint"],
        rows=[
            (sequence_id, row.tobytes())
            for ids, rows in dataset.batches(16)
            for sequence_id, row in zip(ids, rows, strict=True)
        ],
        part_digests={
            path.name: _sha256(path) for path in RunPaths(directory).embeddings_dir.glob("part-*")
        },
    )


def uninterrupted_run(directory: Path) -> Outcome:
    """Make a run in `directory` and return its outcome."""
    write_fasta(directory)
    assert run_to_the_end(directory / "run")
    return outcome_of(directory / "run")


def assert_as_uninterrupted(directory: Path, oracle: Outcome) -> None:
    """Assert the oracle's dataset, no ordinal in two checkpoints, and no temporary file."""
    outcome = outcome_of(directory)
    assert outcome.rows == oracle.rows
    assert outcome == oracle
    held = Counter(
        ordinal
        for record in _valid_records(directory, oracle)
        for ordinal in record.ordinals.tolist()
    )
    assert held.most_common(1)[0][1] == 1, f"ordinals in more than one checkpoint: {held}"
    assert not [*directory.rglob(".tmp-*")], f"left behind: {[*directory.rglob('.tmp-*')]}"


def assert_recovers(directory: Path, oracle: Outcome, *, shards: int = 2) -> None:
    """Assert that the next run completes, and does not change committed checkpoints."""
    committed = committed_files(directory, oracle)
    for _ in range(_MOST_ROUNDS):
        ended = call(_run_and_compare, directory, shards, oracle)
        assert not ended.error, ended.error
        assert_untouched(committed)
        if ended.value:
            return
    raise AssertionError(f"no dataset after {_MOST_ROUNDS} runs")


def committed_files(directory: Path, oracle: Outcome) -> dict[Path, str]:
    """Return the sha256 of every valid checkpoint, and of its marker."""
    checkpoints = [record.path for record in _valid_records(directory, oracle)]
    return {
        path: _sha256(path) for pt in checkpoints for path in (pt, pt.with_name(pt.name + ".done"))
    }


def committed_ordinals(directory: Path, oracle: Outcome) -> set[int]:
    """Return the ordinals in valid checkpoints."""
    return {
        ordinal
        for record in _valid_records(directory, oracle)
        for ordinal in record.ordinals.tolist()
    }


def assert_rows_are_right(directory: Path, oracle: Outcome) -> None:
    """Assert that each row of each valid checkpoint is the oracle's for its ordinal and id."""
    for record in _valid_records(directory, oracle):
        checkpoint = load_checkpoint(record.path, fingerprint=oracle.fingerprint)
        rows = [row.tobytes() for row in checkpoint.embeddings]
        held = list(zip(checkpoint.sequence_ids, rows, strict=True))
        assert held == [oracle.rows[ordinal] for ordinal in record.ordinals.tolist()], record.path


def assert_untouched(committed: dict[Path, str]) -> None:
    """Assert that every one of `committed_files` is unchanged."""
    assert {path: _sha256(path) for path in committed if path.exists()} == committed


def _run_and_compare(directory: Path, shards: int, oracle: Outcome) -> bool:
    is_complete = run_to_the_end(directory, shards=shards)
    if is_complete:
        assert_as_uninterrupted(directory, oracle)
    return is_complete


def _valid_records(directory: Path, oracle: Outcome):
    checkpoints_dir = RunPaths(directory).checkpoints_dir
    return survey_checkpoints(checkpoints_dir, oracle.fingerprint, verify_digests=True).valid


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
