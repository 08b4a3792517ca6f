"""`vnp esm-extract` writes the files of fair-esm's script for the same arguments, and no others."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

import benchmarks.extract
from benchmarks.networks import FAIR_ESM_ENVIRONMENT, write_weights
from tests.helpers import ROOT
from vnp_lib import embed
from vnp_lib.cli import main
from vnp_lib.dataset.export import export_dataset
from vnp_lib.errors import ExitCode

MODEL = "esm2_t6_8M_UR50D"
ALPHABET = "ACDEFGHIKLMNPQRSTVWYBUZOX"
INPUT = {
    "P1 the first, with a description": ALPHABET * 2,
    "P2\twith a tab  and two blanks ": "MKV",
    "P1 the same id, and another header": "MKLAWERT" * 6,
    "sp|P3|A_B/directory/of its own": "W",
    "ärger über Umlaute": "MKVLATTWQERS",
    "P4": ALPHABET * 45,  # 1,125 residues
}


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    path = write_weights(tmp_path_factory.mktemp("weights"), MODEL)
    draw = torch.Generator().manual_seed(0)
    regression = {
        "contact_head.regression.weight": torch.randn(1, 6 * 20, generator=draw),
        "contact_head.regression.bias": torch.randn(1, generator=draw),
    }
    torch.save({"model": regression}, path.with_name(f"{MODEL}-contact-regression.pt"))
    return path


@pytest.fixture
def fasta(tmp_path) -> Path:
    path = tmp_path / "in.fasta"
    path.write_text("".join(f">{header}\n{sequence}\n" for header, sequence in INPUT.items()))
    return path


def run_fair_esm(*arguments: object) -> None:
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings(action="ignore"):
        for name, value in FAIR_ESM_ENVIRONMENT.items():
            patch.setenv(name, value)  # torch says that it has seen it
        patch.setattr(sys, "argv", ["extract.py", *map(str, arguments)])
        benchmarks.extract.main()


def extract(*arguments: object) -> int:
    return main(["esm-extract", *map(str, arguments)])


def files_in(directory: Path) -> dict[str, Any]:
    """What each file holds, by its path below the directory."""
    paths = [path for path in directory.rglob("*") if not path.is_dir()]
    return {str(path.relative_to(directory)): torch.load(path, weights_only=True) for path in paths}


def assert_same(ours: Any, theirs: Any, where: str) -> None:
    assert type(ours) is type(theirs), where
    if isinstance(theirs, dict):
        assert ours.keys() == theirs.keys(), where
        for key in theirs:
            assert_same(ours[key], theirs[key], f"{where}, {key}")
    elif isinstance(theirs, torch.Tensor):
        assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype), where
        assert (ours - theirs).abs().max() <= 2e-5 * theirs.abs().max(), where
        assert ours.untyped_storage().nbytes() == theirs.untyped_storage().nbytes(), (
            f"{where}: a view of more"
        )
    else:
        assert ours == theirs, where


@pytest.mark.parametrize(
    "options",
    [
        pytest.param(["--include", "mean"], id="one word changed"),
        pytest.param(
            [
                "--include",
                "bos",
                "mean",
                "per_tok",
                "--repr_layers",
                "0",
                "-2",
                "6",
                "--toks_per_batch",
                "64",
            ],
            id="kinds and layers",
        ),
        pytest.param(["--include", "contacts", "mean", "--toks_per_batch", "200"], id="contacts"),
        pytest.param(["--include", "per_tok", "mean", "--truncation_seq_length", "20"], id="cut"),
    ],
)
def test_every_file_is_fair_esms(tmp_path, weights, fasta, options):
    """Names, keys, shapes, dtypes, values and sizes: no file holds the tensor of a batch."""
    run_fair_esm(weights, fasta, tmp_path / "theirs", *options, "--nogpu")
    assert extract(weights, fasta, tmp_path / "ours", *options, "--nogpu") == ExitCode.DONE
    theirs = files_in(tmp_path / "theirs")
    assert len(theirs) == len(INPUT)
    assert_same(files_in(tmp_path / "ours"), theirs, "file")


def test_the_export_of_a_run_has_fair_esms_files_too(tmp_path, weights):
    """Of all that it computed, from a dataset on disk: names, keys, shapes, dtypes and values."""
    fasta = tmp_path / "in.fasta"
    fasta.write_text(
        f">P1 the first\n{ALPHABET * 2}\n>sp|P3|A_B/directory\nW\n>P4\nMKVLATTWQERS\n>copy\nW\n"
    )
    kinds = ["mean", "bos", "per_tok", "contacts"]
    run_fair_esm(
        weights,
        fasta,
        tmp_path / "theirs",
        "--include",
        *kinds,
        "--repr_layers",
        "0",
        "3",
        "6",
        "--nogpu",
    )
    embed(
        fasta,
        model=MODEL,
        weights=weights,
        device="cpu",
        include=kinds,
        repr_layers=[0, 3, 6],
        output_dir=tmp_path / "run",
        progress=False,
    )
    export_dataset(tmp_path / "run", "esm-extract", output=tmp_path / "ours")
    theirs = files_in(tmp_path / "theirs")
    assert len(theirs) == 4
    assert_same(files_in(tmp_path / "ours"), theirs, "file")


def test_what_is_cut_is_counted_on_standard_error(tmp_path, weights, fasta):
    ended = subprocess.run(
        [
            sys.executable,
            "-m",
            "vnp_lib",
            "esm-extract",
            weights,
            fasta,
            tmp_path / "out",
            "--include",
            "mean",
            "--nogpu",
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    assert ended.stderr.startswith(
        "1 of 6 sequences are longer than 1022 residues: the rest of each is omitted"
    )
    assert ended.stdout == f"6 files are in {tmp_path}/out\n"


def test_contacts_without_parameters_are_refused_up_front(tmp_path, weights, fasta, capsys):
    alone = tmp_path / "alone" / weights.name
    alone.parent.mkdir()
    alone.symlink_to(weights)
    assert (
        extract(alone, fasta, tmp_path / "out", "--include", "contacts") == ExitCode.UNUSABLE_INPUT
    )
    assert "need its contact regression" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_file_of_an_earlier_input_is_not_trusted(tmp_path, weights, fasta):
    """The same header with another sequence; and what a killed run has left behind goes."""
    arguments = (weights, fasta, tmp_path / "out", "--include", "mean", "--nogpu")
    extract(*arguments)
    before = files_in(tmp_path / "out")
    left_behind = tmp_path / "out" / f".tmp-file-{os.uname().nodename}-4194000-0123abcd"
    left_behind.write_bytes(b"half a fi")
    fasta.write_text(fasta.read_text().replace("MKVLATTWQERS", "MKVLATTWQERSMKV"))
    extract(*arguments)
    after = files_in(tmp_path / "out")
    last = 6
    changed = [
        name
        for name in before
        if not torch.equal(
            before[name]["mean_representations"][last], after[name]["mean_representations"][last]
        )
    ]
    assert (after.keys(), changed) == (before.keys(), ["ärger über Umlaute.pt"])


@pytest.mark.parametrize(
    ("header", "reason"),
    [
        ("../../evil", "leads out of"),
        ("/etc/evil", "leads out of"),
        ("a/../../evil", "leads out of"),
        ("x" * 253, "is too long for a file name"),
        ("P1 " + "ä" * 126, "is too long for a file name"),
        ("P4", "2 sequences have the header 'P4'"),
    ],
)
def test_a_header_without_a_file_name_of_its_own_is_refused(
    tmp_path, weights, fasta, capsys, header, reason
):
    fasta.write_text(fasta.read_text() + f">{header}\nMKV\n")
    assert (
        extract(weights, fasta, tmp_path / "deep/out", "--include", "mean")
        == ExitCode.UNUSABLE_INPUT
    )
    assert reason in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["in.fasta"]


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (
            ["--include", "mean", "--repr_layers", "7"],
            "layers 7 are requested: this model has the layers 0 (its embedding) to 6",
        ),
        (["--include", "mean", "--repr_layers", "-8"], "layers -8 are requested"),
        (
            ["--include", "mean", "--toks_per_batch", "0"],
            "--toks_per_batch is 0; it must be at least 1",
        ),
        (["--include", "mean", "--truncation_seq_length", "0"], "--truncation_seq_length is 0"),
    ],
)
def test_invalid_options_are_reported_in_one_sentence(
    tmp_path, weights, fasta, capsys, options, reason
):
    assert extract(weights, fasta, tmp_path / "out", *options) == ExitCode.UNUSABLE_INPUT
    assert reason in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_model_that_is_none_of_the_six_is_refused(tmp_path, fasta, capsys):
    for model in ("esm1b_t33_650M_UR50S", tmp_path / "absent.pt"):
        assert (
            extract(model, fasta, tmp_path / "out", "--include", "mean") == ExitCode.UNUSABLE_INPUT
        )
    stderr = capsys.readouterr().err
    assert "there is no model 'esm1b_t33_650M_UR50S'; choose one of esm2_t6_8M_UR50D" in stderr
    assert "absent.pt" in stderr


def test_a_full_disk_ends_it_with_a_sentence_and_whole_files(tmp_path, weights, fasta, capsys):
    """Here a directory stands where a file is to be."""
    (tmp_path / "out" / "P4.pt").mkdir(parents=True)
    assert (
        extract(weights, fasta, tmp_path / "out", "--include", "mean", "--nogpu") == ExitCode.FAILED
    )
    assert "P4.pt" in capsys.readouterr().err
    assert not list(tmp_path.rglob(".tmp-*"))


def test_ctrl_c_leaves_whole_files_only(tmp_path, weights, fasta, monkeypatch, capsys):
    """It comes while the second batch is in the model."""
    monkeypatch.setattr("vnp_lib.model.esm2.ESM2.forward_packed", _interrupted_at_the_second_pass())
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        ended = extract(
            weights,
            fasta,
            tmp_path / "out",
            "--include",
            "mean",
            "--nogpu",
            "--toks_per_batch",
            "60",
        )
    finally:
        signal.signal(signal.SIGINT, before)
    assert ended == ExitCode.INTERRUPTED
    assert "interrupted" in capsys.readouterr().err
    assert list(files_in(tmp_path / "out")) == ["P4.pt"]  # the longest is the first


def _interrupted_at_the_second_pass() -> Any:
    from vnp_lib.model.esm2 import ESM2

    original, passes = ESM2.forward_packed, []

    def forward_packed(*arguments: Any, **options: Any) -> Any:
        passes.append(arguments)
        if len(passes) == 2:
            signal.raise_signal(signal.SIGINT)
        return original(*arguments, **options)

    return forward_packed
