"""Files of users of other tools, and the rows that fair-esm's network gives for their records."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from vnp_lib import embed
from vnp_lib.errors import FastaError
from vnp_lib.inputs.policy import InputPolicy
from vnp_lib.inputs.reader import read_records
from vnp_lib.inputs.sources import Source

CASES = Path(__file__).parents[2] / "data" / "cases"
# The first four numbers of the mean of each made-up protein, with `--weights random`.
A = (-0.13105, 0.47241, 0.14314, 0.20045)
B = (-0.26078, 0.31059, 0.19554, -0.01328)
C = (-0.55778, 0.35835, 0.17117, -0.28192)


def rows_of(path: Path) -> dict[str, np.ndarray]:
    rows = embed(path, model="esm2_t6_8M_UR50D", weights="random", device="cpu", progress=False)
    return {sequence_id: rows[sequence_id][:4] for sequence_id in rows.ids}


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("semicolon_mid.fasta", {"a": A, "b": B}),
        ("semicolon_first.fasta", {"a": A, "b": B, "c": C}),
        ("utf8_ids.fasta", {"β-lact_é": A, "Ångström2": B}),
        ("bom.fasta", {"a": A, "b": B, "c": C}),
        ("protein.zip", {"a": A, "b": B, "c": C}),
        ("trailing_garbage.fasta.gz", {"a": A, "b": B, "c": C}),
        ("space_first.fasta", {"a": A, "b": B}),
    ],
)
def test_each_record_has_the_row_of_its_residues(
    name: str, expected: dict[str, tuple[float, ...]]
) -> None:
    rows = rows_of(CASES / name)
    assert list(rows) == list(expected)
    for sequence_id, values in expected.items():
        np.testing.assert_allclose(rows[sequence_id], values, atol=2e-5, err_msg=sequence_id)


def test_a_joined_file_gives_its_rows_once_corrected(
    tmp_path: Path,
) -> None:
    """After insertion of the missing line break."""
    text = (CASES / "cat_no_newline.fasta").read_text(encoding="utf-8")
    corrected = tmp_path / "corrected.fasta"
    corrected.write_text(text.replace("V>b", "V\n>b"), encoding="utf-8")
    rows = rows_of(corrected)
    for sequence_id, values in {"a": A, "b": B, "c": C}.items():
        np.testing.assert_allclose(rows[sequence_id], values, atol=2e-5)


@pytest.mark.parametrize("policy", ["error", "map"])
def test_a_file_joined_without_a_line_break_is_refused(policy: str) -> None:
    """The error says what is missing."""
    path = CASES / "cat_no_newline.fasta"
    input_policy = InputPolicy(invalid_residues=policy)  # type: ignore[arg-type]
    with pytest.raises(
        FastaError,
        match="line 1: sequence 'a' has '>' at position 41; a line break is missing before",
    ):
        list(read_records(Source(path=path, name=path.name), input_policy))


def test_a_joined_file_loses_no_record_unlisted() -> None:
    """A skipped record is listed."""
    path = CASES / "cat_no_newline.fasta"
    (chunk,) = read_records(Source(path=path, name=path.name), InputPolicy(invalid_residues="skip"))
    assert chunk.usable.ids == ["c"]
    assert ["a line break is missing" in fault.reason for fault in chunk.skipped] == [True]
