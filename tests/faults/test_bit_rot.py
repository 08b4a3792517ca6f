"""A flipped bit in any file is detected, and the next run recomputes exactly that file."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from tests.faults.compare import Outcome
from tests.faults.damage import KINDS, assert_refused, assert_repaired, copy_of, file_of, whole_run
from tests.faults.figures import record_figure
from tests.faults.trials import call

pytestmark = pytest.mark.slow

FLIPS_PER_RUN = 4


def test_no_flipped_bit_is_accepted_in_silence(trials, oracle, seeds, scale) -> None:
    """In a file of each kind, at any position. Every fourth is followed by another run."""
    template = trials.scratch / "flips" / "run"
    trials.once(whole_run, template)
    num_runs = len(trials.run(flip_bits, seeds(scale(40, 1_250)), template, oracle))
    record_figure(
        "bit flips in `.pt`, marker, manifest, plan, dataset",
        num_runs * FLIPS_PER_RUN,
        f"0 accepted silently; {num_runs:,} followed by a resume, which computes exactly the "
        "damaged checkpoint",
    )


def flip_bits(directory: Path, seed: int, template: Path, oracle: Outcome) -> None:
    """Flip bits of one file in a copy of a run, one by one, and keep the last one flipped."""
    draw = random.Random(seed)
    kind = draw.choice(KINDS)
    run_dir = copy_of(template, directory, with_dataset=kind in ("part", "_SUCCESS.json"))
    path = file_of(kind, run_dir, draw)
    positions = [draw.randrange(path.stat().st_size * 8) for _ in range(FLIPS_PER_RUN)]
    ended = call(refuse_flips, run_dir, kind, path, positions, oracle)
    assert not ended.error, ended.error
    assert_repaired(run_dir, kind, template, oracle)


def refuse_flips(
    run_dir: Path, kind: str, path: Path, positions: list[int], oracle: Outcome
) -> None:
    whole = path.read_bytes()
    for position in positions:
        data = bytearray(whole)
        data[position // 8] ^= 1 << position % 8
        path.write_bytes(data)
        try:
            assert_refused(run_dir, kind, path, oracle)
        except Exception as error:
            raise AssertionError(f"bit {position} of {path}") from error
