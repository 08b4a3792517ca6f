"""From every kind of input to the dataset, by the real flow."""

from __future__ import annotations

import asyncio
import csv
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import dnaio
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from esm.data import Alphabet
from esm.model.esm2 import ESM2 as FairESM2

import vnp_lib
from flows.embed import embed
from flows.program import report_outcome
from tests.helpers import EXAMPLE, assert_same_rows, embed_alone, small_config
from vnp_lib.dataset import open_dataset
from vnp_lib.errors import ConfigError, ExitCode, FastaError, FingerprintMismatchError
from vnp_lib.inputs.policy import InputCounts
from vnp_lib.model.esm2 import MODELS
from vnp_lib.model.weights import random_tensors
from vnp_lib.plan.paths import RunPaths
from vnp_lib.report.status import open_status

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("prefect_server")]

ARCHITECTURE_NAME = "esm2_t6_8M_UR50D"
ARCHITECTURE = MODELS[ARCHITECTURE_NAME]
MOST = 60  # residues


@contextmanager
def standard_input(text: bytes | None) -> Iterator[None]:
    """Return what is piped to this process; None if nothing is."""
    if text is None:
        descriptor = os.open(os.devnull, os.O_RDONLY)
    else:
        descriptor, write_end = os.pipe()
        with open(write_end, "wb") as file:
            file.write(text)
    with open(descriptor) as stream, pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdin", stream)
        yield


def run_flow(given: Path, run_dir: Path, **settings):
    return asyncio.run(
        embed(small_config(given, run_dir, shards=1, devices="cpu", **settings), return_state=True)
    )


def mean_rows(records: list[tuple[str, str]]) -> list[np.ndarray]:
    """Compute the mean as extract.py does with --truncation_seq_length 60."""
    model = FairESM2(ARCHITECTURE.num_layers, ARCHITECTURE.embed_dim, ARCHITECTURE.attention_heads)
    assert not model.load_state_dict(
        dict(random_tensors(ARCHITECTURE)), strict=False
    ).unexpected_keys
    model.eval()
    to_tokens = Alphabet.from_architecture("ESM-1b").get_batch_converter(truncation_seq_length=MOST)
    last = ARCHITECTURE.num_layers
    rows = []
    for record in records:
        with torch.inference_mode():
            states = model(to_tokens([record])[2], repr_layers=[last])["representations"][last]
        rows.append(states[0, 1 : min(MOST, len(record[1])) + 1].mean(dim=0).numpy())
    return rows


def test_a_table_with_long_sequences_and_duplicate_ids(tmp_path: Path, caplog) -> None:
    """Each row of the table has a row in the dataset, which equals that of fair-esm."""
    with dnaio.open(EXAMPLE) as file:
        records = [(record.id, record.sequence) for record, _ in zip(file, range(12), strict=False)]
    records[5] = (records[2][0], records[5][1])
    records[7] = (records[7][0], records[3][1])
    with (tmp_path / "x.csv").open("w", newline="") as file:
        csv.writer(file).writerows(
            [("accession", "organism", "aa"), *((name, "?", aa) for name, aa in records)]
        )

    settings = {"duplicate_ids": "keep", "long": "truncate", "max_length": MOST}
    outcome = run_flow(
        tmp_path / "x.csv",
        tmp_path / "run",
        id_column="accession",
        sequence_column="aa",
        **settings,
    )
    assert outcome.is_completed(), outcome.message

    dataset = open_dataset(tmp_path / "run")
    assert dataset.ids == [name for name, _ in records]
    for ordinal, expected in enumerate(mean_rows(records)):
        np.testing.assert_allclose(dataset.row(ordinal), expected, atol=1e-4, rtol=0)
    with pytest.raises(KeyError, match=r"occurs more than once in .*: use row\(ordinal\)"):
        dataset[records[2][0]]
    np.testing.assert_array_equal(dataset[records[7][0]], dataset.row(7))
    table = pq.read_table(tmp_path / "run" / "embeddings")
    assert table.column("original_length").to_pylist() == [len(aa) for _, aa in records]
    assert table.column("length").to_pylist() == [min(MOST, len(aa)) for _, aa in records]
    num_cut = sum(len(aa) > MOST for _, aa in records)
    assert num_cut > 0
    assert dataset.metadata["input"]["num_cut"] == num_cut
    counts = f"{num_cut} sequences cut short, 1 duplicate not computed again"
    assert outcome.message.startswith(f"12 sequences embedded, {counts}, shards:")
    assert f"input: {counts}" in caplog.text
    status = open_status(tmp_path / "run")()
    assert status.input == InputCounts.from_json(dataset.metadata["input"])
    assert status.input.describe() == counts
    assert f"Input: {counts}." in RunPaths(tmp_path / "run").report.read_text()


def test_renamed_records_have_rows_and_short_ones_none(tmp_path: Path) -> None:
    """They are in the dataset under the new ids."""
    records = [
        ("x one", "MKVLATTW"),
        ("x two", "MKLWWW"),
        ("y", "MK"),
        ("x_2", "ACDEFGHIK"),
        ("x", "MKVLATTW"),
    ]
    fasta = tmp_path / "in.fasta"
    fasta.write_text("".join(f">{header}\n{sequence}\n" for header, sequence in records))
    counts = "4 sequences embedded, 1 record skipped, 2 ids renamed, 1 duplicate not computed again"
    for _ in range(2):
        outcome = run_flow(fasta, tmp_path / "run", duplicate_ids="rename", min_length=3)
        assert outcome.message.startswith(counts)
    dataset = open_dataset(tmp_path / "run")
    named = {"x": "MKVLATTW", "x_3": "MKLWWW", "x_2": "ACDEFGHIK", "x_4": "MKVLATTW"}
    assert dataset.ids == list(named)
    for name, row in vnp_lib.embed(
        named, model=ARCHITECTURE_NAME, weights="random", device="cpu", progress=False
    ):
        np.testing.assert_allclose(dataset[name], row, atol=1e-5)


def test_a_run_without_sequences_completes_without_a_worker(tmp_path: Path, capsys) -> None:
    """And prints only code that works without a row."""
    fasta = tmp_path / "in.fasta"
    fasta.touch()
    with pytest.raises(FastaError, match=r"there is no sequence in it; .* --allow-empty"):
        run_flow(fasta, tmp_path / "run").result()
    for name in ("Completed", "Cached"):
        outcome = run_flow(fasta, tmp_path / "run", allow_empty=True)
        assert outcome.message == f"0 sequences embedded, shards: 1 {name}"
    assert len(open_dataset(tmp_path / "run")) == 0
    assert RunPaths(tmp_path / "run").report.exists()
    assert not RunPaths(tmp_path / "run").worker_log(0).exists()
    assert report_outcome(small_config(fasta, tmp_path / "run"), outcome, 1.0) == ExitCode.DONE
    assert "    print(len(dataset))\n" in capsys.readouterr().out


def test_piped_input_is_resumed_without_a_pipe(tmp_path: Path, tiny_fasta: Path) -> None:
    """It is not mixed with other input; the next run has nothing to compute."""
    run_dir = tmp_path / "run"
    text = tiny_fasta.read_bytes() + b">bad\nMK1\n"
    with standard_input(None), pytest.raises(ConfigError, match="nothing is piped"):
        run_flow(Path("-"), run_dir).result()
    with (
        standard_input(text),
        pytest.raises(FastaError, match=r"^standard input, line 81: sequence 'bad' has '1'"),
    ):
        run_flow(Path("-"), run_dir).result()
    assert not run_dir.exists()

    with standard_input(text):
        outcome = run_flow(Path("-"), run_dir, invalid_residues="skip")
    assert outcome.message.startswith("40 sequences embedded, 1 record skipped")
    (line,) = RunPaths(run_dir).skipped.read_text().splitlines()
    assert json.loads(line)["file"] == "standard input"
    assert_same_rows(run_dir, embed_alone(tiny_fasta, tmp_path / "oracle"))

    with standard_input(None):
        assert "1 Cached" in run_flow(Path("-"), run_dir, invalid_residues="skip").message
    with (
        standard_input(text + b">more\nMKV\n"),
        pytest.raises(FingerprintMismatchError, match="the piped input is not the one"),
    ):
        run_flow(Path("-"), run_dir, invalid_residues="skip").result()
