"""Cut, grown and misplaced files are refused, and no valid file is lost."""

from __future__ import annotations

import random
import struct
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from tests.faults.compare import (
    Outcome,
    assert_recovers,
    committed_files,
    committed_ordinals,
    outcome_of,
)
from tests.faults.damage import KINDS, assert_refused, assert_repaired, copy_of, file_of, whole_run
from tests.faults.figures import record_figure
from tests.faults.trials import call
from tests.faults.workload import run_to_the_end
from vnp_lib.checkpoint.file import load_checkpoint
from vnp_lib.checkpoint.survey import survey_checkpoints
from vnp_lib.checkpoint.writer import AsyncCheckpointWriter
from vnp_lib.plan.paths import RunPaths
from vnp_lib.storage.durable import marker_path

pytestmark = pytest.mark.slow

GROWTHS = sorted(
    {
        *range(1, 18),
        *(
            2**power + step
            for power in range(5, 13)
            for step in (-1, 0, 1)
            if 2**power + step <= 4096
        ),
    }
)


def lengths(path: Path) -> list[int]:
    """Return the lengths, of every class, to which a file is cut or grown."""
    size = path.stat().st_size
    cuts = {0, 1, size - 1, *range(512, size, 512)}
    if path.suffix == ".pt":
        cuts |= {boundary + step for boundary in zip_boundaries(path) for step in (-1, 0, 1)}
    return sorted(length for length in cuts if 0 <= length < size) + [
        size + growth for growth in GROWTHS
    ]


def zip_boundaries(path: Path) -> Iterator[int]:
    """Yield the offsets of each member's header, data and end, the directory and the end record."""
    data = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        yield from (archive.start_dir, len(data) - 22, len(data) - 42, len(data) - 98)
        for member in archive.infolist():
            name, extra = struct.unpack(
                "<HH", data[member.header_offset + 26 : member.header_offset + 30]
            )
            start = member.header_offset + 30 + name + extra
            yield from (member.header_offset, start, start + member.file_size)


def test_no_file_of_another_length_is_believed(trials, oracle, scale) -> None:
    """All lengths are refused; after some, another run recomputes the file."""
    template = trials.scratch / "lengths" / "run"
    trials.once(whole_run, template)
    num_lengths = sum(trials.run(cut_and_grow, range(len(KINDS) * scale(1, 8)), template, oracle))
    record_figure(
        "cuts and growth at every length class",
        num_lengths,
        "0 accepted, 0 good checkpoints computed again",
    )


def cut_and_grow(directory: Path, seed: int, template: Path, oracle: Outcome) -> int:
    """Try all lengths of one file, keep one of them, and return how many there were."""
    draw = random.Random(seed)
    kind = KINDS[seed % len(KINDS)]
    run_dir = copy_of(template, directory, with_dataset=kind in ("part", "_SUCCESS.json"))
    path = file_of(kind, run_dir, draw)
    chosen = draw.sample(lengths(path), len(lengths(path)))
    ended = call(refuse_lengths, run_dir, kind, path, chosen, seed, oracle)
    assert not ended.error, ended.error
    assert_repaired(run_dir, kind, template, oracle)
    return len(chosen)


def refuse_lengths(
    run_dir: Path, kind: str, path: Path, chosen: list[int], seed: int, oracle: Outcome
) -> None:
    whole = path.read_bytes()
    draw = random.Random(seed)
    for length in chosen:
        growth = max(0, length - len(whole))
        more = draw.choice(
            [bytes(growth), draw.randbytes(growth), (whole * (1 + growth // len(whole)))[:growth]]
        )
        path.write_bytes(whole[:length] + more)
        try:
            assert_refused(run_dir, kind, path, oracle)
        except Exception as error:
            raise AssertionError(f"{path} of {len(whole)} bytes at {length}") from error


# --- files in the wrong place ---


def swap_files(ours: Path, theirs: Path) -> None:
    aside = ours.with_name("aside")
    ours.rename(aside)
    theirs.rename(ours)
    aside.rename(theirs)


def swap_with_markers(ours: Path, theirs: Path) -> None:
    """Both stay valid: a row is known by its ordinal, not by the number of its checkpoint."""
    swap_files(ours, theirs)
    swap_files(marker_path(ours), marker_path(theirs))


def swap_markers(ours: Path, theirs: Path) -> None:
    swap_files(marker_path(ours), marker_path(theirs))


def copy_over(ours: Path, theirs: Path) -> None:
    ours.write_bytes(theirs.read_bytes())


def copy_over_with_marker(ours: Path, theirs: Path) -> None:
    """Duplicate the rows of the other checkpoint, and lose those of this one."""
    copy_over(ours, theirs)
    marker_path(ours).write_bytes(marker_path(theirs).read_bytes())


def lose_file(ours: Path, theirs: Path) -> None:
    ours.unlink()


def lose_marker(ours: Path, theirs: Path) -> None:
    marker_path(ours).unlink()


def lose_both(ours: Path, theirs: Path) -> None:
    lose_file(ours, theirs)
    lose_marker(ours, theirs)


def empty_marker(ours: Path, theirs: Path) -> None:
    """Write an empty marker, as by `touch`."""
    marker_path(ours).write_bytes(b"")


def of_another_run(ours: Path, theirs: Path) -> None:
    """Write the file of a run with the same sequences and other weights, with our marker."""
    marker = marker_path(ours).read_bytes()
    of_another_run_with_marker(ours, theirs)
    marker_path(ours).write_bytes(marker)


def of_another_run_without_marker(ours: Path, theirs: Path) -> None:
    of_another_run_with_marker(ours, theirs)
    lose_marker(ours, theirs)


def of_another_run_with_marker(ours: Path, theirs: Path) -> None:
    held = load_checkpoint(ours, fingerprint=None)
    lose_both(ours, theirs)
    with AsyncCheckpointWriter() as writer:
        rows = torch.from_numpy(held.embeddings + 1)
        writer.write_checkpoint_async(
            ours, rows, held.sequence_ids, held.metadata | {"fingerprint": "0" * 64}
        )


def a_directory(ours: Path, theirs: Path) -> None:
    ours.unlink()
    ours.mkdir()


# The number of checkpoints that each change costs.
CHANGES: dict[Callable[[Path, Path], None], int] = {
    swap_files: 2,
    swap_with_markers: 0,
    swap_markers: 2,
    copy_over: 1,
    copy_over_with_marker: 1,
    lose_file: 1,
    lose_marker: 1,
    lose_both: 1,
    empty_marker: 1,
    of_another_run: 1,
    of_another_run_without_marker: 1,
    of_another_run_with_marker: 1,
    a_directory: 1,
}


def test_no_checkpoint_in_the_wrong_place_is_believed(trials, oracle, scale) -> None:
    template = trials.scratch / "places" / "run"
    trials.once(whole_run, template)
    num_trials = len(trials.run(misplace, range(len(CHANGES) * scale(1, 20)), template, oracle))
    record_figure(
        "two checkpoints swapped, one of another run, file or marker alone",
        num_trials,
        "0 accepted, 0 good checkpoints computed again",
    )


def misplace(directory: Path, seed: int, template: Path, oracle: Outcome) -> None:
    """Apply one of the changes to two checkpoints of a run, of one shard or of two."""
    change, num_lost = list(CHANGES.items())[seed % len(CHANGES)]
    run_dir = copy_of(template, directory, with_dataset=False)
    checkpoints_dir = RunPaths(run_dir).checkpoints_dir
    ours, theirs = random.Random(seed).sample(sorted(checkpoints_dir.glob("shard_*/batch_*.pt")), 2)
    ended = call(change, ours, theirs)
    assert not ended.error, ended.error
    is_doubled = change is copy_over_with_marker
    good = committed_files(run_dir, oracle)
    assert len(good) == len(committed_files(template, oracle)) - 2 * (num_lost - is_doubled), (
        change.__name__
    )
    lost = committed_ordinals(template, oracle) - committed_ordinals(run_dir, oracle)
    assert bool(lost) == bool(num_lost), change.__name__

    if is_doubled:
        ended = call(run_to_the_dataset, run_dir)
        assert ended.value == oracle, ended.error
    else:
        assert_recovers(run_dir, oracle)

    after = survey_checkpoints(checkpoints_dir, oracle.fingerprint, verify_digests=True)
    assert not after.damaged, change.__name__
    computed = [record.ordinals.tolist() for record in after.valid if record.path not in good]
    assert {ordinal for ordinals in computed for ordinal in ordinals} == lost, change.__name__


def run_to_the_dataset(run_dir: Path) -> Outcome:
    """Run with the same ordinals in two checkpoints, of which one counts."""
    assert run_to_the_end(run_dir)
    return outcome_of(run_dir)
