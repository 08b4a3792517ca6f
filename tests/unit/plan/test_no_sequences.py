"""Input without sequences: with `--allow-empty` a complete, empty dataset; otherwise an error."""

from __future__ import annotations

import gzip
import json
import os
import sys
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.helpers import SMALL_MODEL, small_config
from vnp_lib import embed, open_dataset
from vnp_lib.cli import main
from vnp_lib.dataset.export import export_dataset
from vnp_lib.dataset.formats.registry import FORMATS, RAGGED_FORMATS
from vnp_lib.errors import FastaError, FingerprintMismatchError
from vnp_lib.inputs.policy import InputPolicy
from vnp_lib.plan.outputs import StoreDtype
from vnp_lib.plan.paths import RunPaths
from vnp_lib.plan.plan import ModelIdentity, load_plan
from vnp_lib.plan.planner import make_plan
from vnp_lib.report.status import open_status
from vnp_lib.report.verify import verify_run
from vnp_lib.run.assembly import assemble
from vnp_lib.run.directory import open_run, validate_config

SMALL: dict[str, Any] = {
    "model": "esm2_t6_8M_UR50D",
    "weights": "random",
    "device": "cpu",
    "progress": False,
}
MODEL = ModelIdentity(
    model="esm2_t6_8M_UR50D", weights_digest="random:seed=0", layer=6, dtype="float32"
)
DIM = 320
EMPTY_FILES = {
    "nothing.fasta": b"",
    "nothing.fasta.gz": gzip.compress(b""),
    "no_bytes.fasta.gz": b"",
    "no_bytes.fasta.zst": b"",
    "blank.fasta": b"\n\n \n",
    "comments.fasta": b"# nothing\n# here\n",
    "no_bytes.csv": b"",
    "header.csv": b"id,sequence\n",
    "header.tsv.gz": gzip.compress(b"id\tsequence\n"),
    "no_bytes.parquet": b"",
}
NOTHING_LEFT: dict[str, tuple[str, dict[str, Any]]] = {
    "all invalid": (">a\nM1V\n>b\nM-V\n", {"invalid_residues": "skip"}),
    "all short": (">a\nMKV\n>b\nMK\n", {"min_length": 4}),
    "all long": (">a\nMKV\n>b\nMKL\n", {"long": "skip", "max_length": 2}),
    "no open frame": (">a\nAC\n", {"translate": "six-frame"}),
    "short proteins": (">a\nATGGCAGCA\n", {"translate": "six-frame", "min_length": 40}),
}


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run without sequences."""
    directory = tmp_path_factory.mktemp("empty")
    (directory / "x.fasta").touch()
    embed(directory / "x.fasta", **SMALL, allow_empty=True, output_dir=directory / "run")
    return directory / "run"


@pytest.mark.parametrize("name", EMPTY_FILES)
def test_a_file_without_sequences_is_an_empty_run_if_allowed(tmp_path, name):
    path = tmp_path / name
    path.write_bytes(EMPTY_FILES[name])
    with pytest.raises(
        FastaError, match=f"{name}: there is no sequence in it; give .* with --allow-empty"
    ):
        validate_config(small_config(path, tmp_path / "run"))
    config = small_config(path, tmp_path / "run", allow_empty=True)
    validate_config(config)
    with open_run(config) as run:
        assert (run.plan.num_sequences, run.plan.num_computed, run.plan.num_shards) == (0, 0, 1)
        assert run.shard_progress(0).is_complete


@pytest.mark.parametrize("name", NOTHING_LEFT)
def test_skipping_all_records_is_an_empty_run_if_allowed(tmp_path, name):
    text, policy = NOTHING_LEFT[name]
    path, paths = tmp_path / "x.fasta", RunPaths(tmp_path / "run")
    path.write_text(text)

    def plan(**more: Any) -> Any:
        return make_plan(
            paths,
            [path],
            MODEL,
            num_shards=2,
            token_budget=99,
            policy=InputPolicy(**policy, **more),
        )

    with pytest.raises(
        FastaError, match=r"there is (nothing|no protein) to embed; .* with --allow-empty"
    ):
        plan()
    assert not paths.plan_json.exists()
    made = plan(allow_empty=True)
    assert made.num_sequences == 0
    assert load_plan(paths).fingerprint == made.fingerprint == plan(allow_empty=True).fingerprint
    assert made.counts.num_skipped == (
        len(paths.skipped.read_text().splitlines()) if paths.skipped.exists() else 0
    )


def test_an_empty_file_among_others_adds_nothing(tmp_path):
    for name, text in (("1.fasta", ">a\nMKL\n"), ("2.fasta", ""), ("3.fasta", ">b\nW\n")):
        (tmp_path / name).write_text(text)
    paths = [tmp_path / f"{number}.fasta" for number in (1, 2, 3)]
    with pytest.raises(FastaError, match=r"2\.fasta: there is no sequence in it"):
        embed(paths, **SMALL)
    assert embed(paths, **SMALL, allow_empty=True).ids == ["a", "b"]


def test_a_directory_without_fasta_stays_an_error(tmp_path):
    with pytest.raises(FastaError, match="there is no FASTA file in this directory"):
        embed(tmp_path, **SMALL, allow_empty=True)


@pytest.mark.parametrize("given", [[], {}, pd.DataFrame({"id": [], "sequence": []}), iter(())])
@pytest.mark.parametrize("in_memory", [True, False])
def test_python_gives_no_rows_for_no_sequences(tmp_path, given, in_memory):
    embeddings = embed(
        given, **SMALL, allow_empty=True, output_dir=None if in_memory else tmp_path / "run"
    )
    assert (embeddings.ids, embeddings.embeddings.shape, embeddings.embeddings.dtype) == (
        [],
        (0, DIM),
        np.float32,
    )
    assert embeddings.to_dataframe().shape == (0, DIM)
    outputs = embed([], **SMALL, allow_empty=True, include=["mean", "per_tok"])
    assert outputs.arrays["mean_6"].shape == (0, DIM)
    assert outputs.arrays["per_tok_6"] == []


def test_its_dataset_is_complete_and_has_no_rows(run_dir):
    dataset = open_dataset(run_dir)
    assert (len(dataset), dataset.ids, dataset.dim, dataset.metadata["num_sequences"]) == (
        0,
        [],
        DIM,
        0,
    )
    ids, rows = dataset.to_numpy()
    assert (ids, rows.shape) == ([], (0, DIM))
    assert list(dataset.batches(10)) == []
    assert len(dataset.as_torch_dataset()) == 0
    assert "a" not in dataset
    for look in (lambda: dataset["a"], lambda: dataset.row(0)):
        with pytest.raises(KeyError):
            look()


def test_plain_readers_find_its_columns(run_dir):
    pattern = str(run_dir / "embeddings" / "*.parquet")
    columns = ["ordinal", "id", "description", "length", "original_length", "embedding"]
    assert pl.read_parquet(pattern).shape == (0, 6)
    assert pl.read_parquet(pattern).columns == columns
    assert list(pd.read_parquet(run_dir / "embeddings").columns) == columns
    assert duckdb.sql(f"SELECT * FROM '{pattern}'").columns == columns
    (part,) = (run_dir / "embeddings").glob("*.parquet")
    assert pq.read_schema(part).field("embedding").type == pa.list_(
        pa.field("element", pa.float32(), nullable=False), DIM
    )


def test_every_command_takes_it(run_dir, capsys):
    report = verify_run(run_dir)
    assert report.is_well
    assert report.has_dataset
    status = open_status(run_dir)()
    assert (status.percent, status.dataset, status.num_sequences) == (
        100.0,
        "complete: 0 sequences embedded",
        0,
    )
    for command in ("status", "verify", "report"):
        assert main([command, str(run_dir)]) == 0
        assert main([command, str(run_dir), "--json"]) == 0 if command != "report" else True
    page = (run_dir / "report.html").read_text()
    assert "No sequences." in page
    assert "dataset.ids[0]" not in page
    assert "Traceback" not in capsys.readouterr().err


def test_an_estimate_names_allow_empty(tmp_path, capsys):
    path = tmp_path / "x.fasta"
    path.touch()
    arguments = ["plan", "--fasta", str(path), *SMALL_MODEL, "--output-dir", str(tmp_path / "run")]
    assert main(arguments) == 1
    assert "--allow-empty" in capsys.readouterr().out.replace("\n", " ")
    assert main([*arguments, "--allow-empty", "--json"]) == 0
    estimate = json.loads(capsys.readouterr().out)
    assert (estimate["num_sequences"], estimate["num_batches"]) == (0, 0)
    assert estimate["can_begin"] is True
    path.write_text(">a\nMK\n")
    assert main([*arguments, "--min-length", "3"]) == 1
    assert "all 1 records are skipped" in capsys.readouterr().out.replace("\n", " ")
    assert main([*arguments, "--min-length", "3", "--allow-empty"]) == 0


def read_back(run_dir: Path, to: str, output: Path, **options: Any) -> tuple[Path, dict[str, Any]]:
    done = export_dataset(run_dir, to, output=output, **options)
    names: dict[str, Any] = {}
    exec(done.read, names)
    return done.path, names


@pytest.mark.parametrize("dtype", StoreDtype)
@pytest.mark.parametrize("to", FORMATS)
def test_every_export_is_read_by_its_printed_code(run_dir, tmp_path, to, dtype):
    if dtype not in FORMATS[to].dtypes:
        return
    path, names = read_back(run_dir, to, tmp_path / "out", dtype=dtype)
    assert len(names["embeddings"]) == len(names.get("ids", ())) == 0
    if to in ("npy", "npz", "csv", "hdf5", "h5ad", "safetensors"):
        assert names["embeddings"].shape == (0, DIM)
    if to == "csv":
        assert path.read_text().startswith('"id","dim_0","dim_1",')
        assert len(path.read_text().splitlines()) == 1
    if to in ("virnucpro", "esm-extract"):
        assert list(path.iterdir()) == []


@pytest.fixture(scope="module")
def run_of_residues(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("residues")
    embed(
        [], **SMALL, include=["per_tok", "contacts"], allow_empty=True, output_dir=directory / "run"
    )
    return directory / "run"


@pytest.mark.parametrize("column", ["per_tok_6", "contacts"])
@pytest.mark.parametrize("to", RAGGED_FORMATS)
def test_exports_of_residues_are_read_too(run_of_residues, tmp_path, to, column):
    assert len(open_dataset(run_of_residues)) == 0
    _, names = read_back(run_of_residues, to, tmp_path / "out", column=column)
    assert len(names["embeddings"]) == len(names.get("ids", ())) == 0


@pytest.mark.parametrize(
    ("settings", "outputs"),
    [
        ({"store_dtype": "float16"}, ("mean_6",)),
        ({"store_dtype": "float16", "include": ("mean", "per_tok")}, ("mean_6", "per_tok_6")),
        ({"include": ("bos", "max"), "repr_layers": (0, 6)}, ("bos_0", "bos_6", "max_0", "max_6")),
        ({"long": "window", "max_length": 10}, ("mean_6",)),
        ({"deterministic": True}, ("mean_6",)),
        ({"executor": "work-pool", "shards": 4}, ("mean_6",)),
    ],
)
def test_every_kind_of_run_can_be_empty(tmp_path, settings, outputs):
    """The second assembly finds the dataset intact. The input is a byte order mark alone."""
    path = tmp_path / "x.fasta"
    path.write_bytes(b"\xef\xbb\xbf")
    with open_run(small_config(path, tmp_path / "run", allow_empty=True, **settings)) as run:
        first, second = (assemble(run.plan, run.paths, run.checkpoints().valid) for _ in range(2))
    assert (first.num_rows, first.num_parts) == (second.num_rows, second.num_parts) == (0, 1)
    assert open_dataset(tmp_path / "run").outputs == outputs


def test_an_empty_run_resumes_and_real_input_is_another_run(tmp_path):
    empty, real = tmp_path / "empty.fasta", tmp_path / "real.fasta"
    empty.touch()
    real.write_text(">a\nMKL\n")
    for _ in range(2):
        assert len(embed(empty, **SMALL, allow_empty=True, output_dir=tmp_path / "run")) == 0
    with pytest.raises(FingerprintMismatchError, match="num_sequences is 0 there and 1 here"):
        embed(real, **SMALL, allow_empty=True, output_dir=tmp_path / "run")
    assert verify_run(tmp_path / "run").is_well


def test_the_option_does_not_make_another_run_of_real_input(tmp_path):
    path = tmp_path / "x.fasta"
    path.write_text(">a\nMKL\n")
    before = embed(path, **SMALL, output_dir=tmp_path / "run")
    after = embed(path, **SMALL, allow_empty=True, output_dir=tmp_path / "run")
    np.testing.assert_array_equal(before.embeddings, after.embeddings)


def test_empty_standard_input_is_an_empty_run_if_allowed(tmp_path, monkeypatch):
    """A second empty pipe resumes the run."""
    for allow_empty in (False, True, True):
        config = small_config(Path("-"), tmp_path / "run", allow_empty=allow_empty)
        read_end, write_end = os.pipe()
        os.close(write_end)
        with open(read_end) as stdin:
            monkeypatch.setattr(sys, "stdin", stdin)
            if allow_empty:
                with open_run(config) as run:
                    assert run.plan.num_sequences == 0
                continue
            refused = pytest.raises(
                FastaError, match=r"standard input: there is no sequence in it; .*--allow-empty"
            )
            with refused, open_run(config):
                pass
            assert not (tmp_path / "run").exists()
