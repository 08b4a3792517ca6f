"""Tests of checkpoints with rows of different widths: their offsets are validated too."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.checkpoints import vouch_for
from vnp_lib.checkpoint.file import load_checkpoint
from vnp_lib.checkpoint.resume import resume_from_checkpoints, validate_checkpoint_pt
from vnp_lib.checkpoint.survey import heal_shard, survey_checkpoints
from vnp_lib.checkpoint.writer import AsyncCheckpointWriter
from vnp_lib.errors import CheckpointError, NumericalInstabilityError
from vnp_lib.storage.durable import marker_path

VALUES = np.arange(9, dtype=np.float32)
OFFSETS = [0, 2, 3, 9]
IDS = ["a", "b", "c"]
METADATA: dict[str, Any] = {"ordinals": [4, 0, 2], "fingerprint": "f", "offsets": OFFSETS}


def write(
    path: Path, values: np.ndarray[Any, Any] = VALUES, ids: list[str] = IDS, **changes: Any
) -> None:
    with AsyncCheckpointWriter() as writer:
        writer.write_checkpoint_async(path, values, ids, METADATA | changes)


def forge(path: Path, **changes: Any) -> None:
    """What no writer of ours writes, under a marker that fits it."""
    content = {
        "embeddings": torch.from_numpy(VALUES),
        "sequence_ids": IDS,
        "metadata": METADATA | changes,
    }
    torch.save(content, path)
    vouch_for(path, width=0, ordinals=METADATA["ordinals"], fingerprint=METADATA["fingerprint"])


@pytest.fixture
def path(tmp_path: Path) -> Path:
    directory = tmp_path / "shard_0"
    directory.mkdir()
    return directory / "batch_00000.pt"


def test_rows_of_different_widths_come_back_with_their_offsets(path: Path) -> None:
    write(path)
    assert validate_checkpoint_pt(path) == (True, "")
    kept = load_checkpoint(path, fingerprint="f")
    assert np.array_equal(kept.embeddings, VALUES)
    assert (kept.sequence_ids, kept.metadata) == (IDS, METADATA)
    [record] = survey_checkpoints(path.parents[1], "f", verify_digests=True).valid
    assert (record.rows, record.width, record.ordinals.tolist()) == (3, 0, [4, 0, 2])


BAD_OFFSETS = [
    pytest.param([0, 2, 9], "2 rows, 3 sequence_ids", id="a row too few"),
    pytest.param([0, 2, 3, 4, 9], "4 rows, 3 sequence_ids", id="a row too many"),
    pytest.param([0, 3, 2, 9], "does not ascend from 0 to 9", id="backwards"),
    pytest.param([0, 2, 2, 9], "does not ascend from 0 to 9", id="a row of nothing"),
    pytest.param([1, 2, 3, 9], "does not ascend from 0 to 9", id="not from the first value"),
    pytest.param([0, 2, 3, 8], "does not ascend from 0 to 9", id="not to the last value"),
    pytest.param([0, 2, 3, 10], "does not ascend from 0 to 9", id="past the last value"),
    pytest.param([], "does not ascend from 0 to 9", id="empty"),
    pytest.param([0, 2.0, 3, 9], "no list of whole numbers", id="not whole"),
    pytest.param("0239", "no list of whole numbers", id="no list"),
]


@pytest.mark.parametrize(("offsets", "reason"), BAD_OFFSETS)
def test_offsets_that_do_not_fit_the_values_are_not_written(
    path: Path, offsets: Any, reason: str
) -> None:
    with pytest.raises(ValueError, match=reason):
        write(path, offsets=offsets)
    assert not path.exists()


@pytest.mark.parametrize(("offsets", "reason"), BAD_OFFSETS)
def test_offsets_that_do_not_fit_the_values_are_damage(
    path: Path, offsets: Any, reason: str
) -> None:
    forge(path, offsets=offsets)
    is_valid, found = validate_checkpoint_pt(path)
    assert not is_valid
    assert reason in found


def test_forged_offsets_alone_are_the_reason(path: Path) -> None:
    """What is forged in the tests above is refused for its offsets alone."""
    forge(path)
    assert validate_checkpoint_pt(path) == (True, "")


def test_values_without_offsets_are_no_checkpoint(path: Path) -> None:
    with (
        pytest.raises(ValueError, match=r"shape mismatch: embeddings is \(9,\)"),
        AsyncCheckpointWriter() as writer,
    ):
        writer.write_checkpoint_async(path, VALUES, IDS, {"fingerprint": "f"})


def test_a_flipped_byte_of_a_ragged_checkpoint_is_damage(path: Path) -> None:
    """Every flipped byte of a ragged checkpoint is noticed and moved aside."""
    write(path)
    whole, marker = path.read_bytes(), marker_path(path).read_bytes()
    for place in range(0, len(whole), 37):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        with pytest.raises(CheckpointError, match="sha256 is not what its marker says"):
            load_checkpoint(path, fingerprint="f")
    assert heal_shard(path.parents[1], 0, "f") == 0
    assert not path.exists()
    write(path)
    assert (path.read_bytes(), marker_path(path).read_bytes()) == (
        whole,
        marker,
    )  # the same content, the same bytes


def test_a_row_that_is_not_finite_is_named(path: Path) -> None:
    values = VALUES.copy()
    values[2] = np.inf
    with pytest.raises(NumericalInstabilityError, match=r"not finite: b$"):
        write(path, values)


def test_resumed_rows_lie_end_to_end_in_the_order_of_their_ids(path: Path) -> None:
    write(path)
    write(path.with_name("batch_00001.pt"), VALUES[:2] + 100, ["d"], ordinals=[7], offsets=[0, 2])
    resumed = resume_from_checkpoints(path.parents[1], 0)
    assert resumed.ids == ["a", "b", "c", "d"]
    assert resumed.embeddings.tolist() == [*range(9), 100, 101]


def test_fixed_and_ragged_checkpoints_are_not_mixed(
    path: Path,
) -> None:
    """A checkpoint of equal widths is not resumed together with one of different widths."""
    write(path)
    write(path.with_name("batch_00001.pt"), VALUES.reshape(3, 3), ["d", "e", "f"])
    assert resume_from_checkpoints(path.parents[1], 0).ids == IDS
