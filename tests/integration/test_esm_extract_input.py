"""Input of `vnp esm-extract`: unusual files as in fair-esm's own loop, pipes and devices."""

from __future__ import annotations

import gzip
import os
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from esm import pretrained

import benchmarks.extract
from benchmarks.networks import FAIR_ESM_ENVIRONMENT, write_weights
from tests.helpers import ROOT
from vnp_lib import esm_extract
from vnp_lib.cli import main
from vnp_lib.errors import ExitCode

MODEL = "esm2_t6_8M_UR50D"
CASES = ROOT / "tests/data/cases"

# What both take, with the same files and values.
TAKEN_BY_BOTH = {
    "gaps": b">a\nMK-V\n>b\nM.K.V\n>c\n-\n>d\n...MKV---\n",
    "rare residues": b">a\nBZXUO\n>b\nXXXX\n",
    "blank lines": b"\n\n>a\n\nMK\n\n\nVL\n\n>b\nMKV\n\n",
    "ends of lines as on Windows": b">a one\r\nMK\r\nVL\r\n>b\r\nMKV\r\n",
    "ends of lines as on an old Macintosh": b">a one\rMK\rVL\r>b\rMKV\r",
    "no line end at the end": b">a\nMKVL\n>b\nMKV",
    "lines of many lengths": b">a\nM\nKVLATTWQERS\nM\n>b\n" + b"MKV\n" * 30,
    "blanks around lines": b">a  \n  MKVL \t\n>b\n\tMKV \n",
    "unicode white space around lines": ">a\u00a0\n\u00a0MKVL\u2003\n".encode(),
    "descriptions": b">a with  two blanks and\ta tab \nMKVL\n>b|c=1 OS=Homo sapiens\nMKV\n",
    "a blank before the name": b"> a one\nMKVL\n>\tb\nMKV\n",
    "the same id under other headers": b">a one\nMKVL\n>a two\nMKV\n>a\nMKV\n",
    "names that are not ASCII": (
        ">β-lactamase é\nMKVL\n>Ångström\nMKV\n>蛋白\nMK\n>e\u0301\nMK\n".encode()
    ),
    "odd characters in headers": (
        b">sp|P1|A_B\nMKVL\n>a;b,c\nMKV\n>'q\" [x] {y} $Z *\nMK\n>a>b\nMKV\n>.hidden\nMK\n"
    ),
    "a slash in the header": b">a/b c\nMKVL\n",
    "identical sequences": b">a\nMKVL\n>b\nMKVL\n",
    "longer than what is kept": b">a\n" + b"MK-VLATTWQERS" * 80 + b"\n>b\nMKV\n",
    "one residue": b">a\nM\n",
}
# What is refused here, and fair-esm takes; the words that say why, and what fair-esm gives.
TAKEN_BY_FAIR_ESM = {
    "no residues": (
        b">a\n>b\nMKV\n",
        "sequence 'a' has no residues",
        "a mean that is not a number",
    ),
    "a header without a name": (
        b">\nMKV\n",
        "a record has no id",
        "a name made of the line's number",
    ),
    "tokens": (b">a\nMK<mask>V\n", "'<' at position 3", "a mean over EOS and padding too"),
    "a token that is no amino acid": (
        b">a\nMK<unk>V\n",
        "'<' at position 3",
        "a mean over EOS and padding too",
    ),
    "text before the first header": (
        b"MKV\n>a\nMKVL\n",
        "its first line must start with '>'",
        "MKVMKVL under the name a",
    ),
    "an NBRF header": (b">P1;a\nMKV\n", "NBRF/PIR", "the title read as residues, if it can be"),
    "a control character in a header": (
        b">a\x01\nMKV\n",
        "control character",
        "a file with it in its name",
    ),
    "nucleotides": (
        b">a\nACGTACGTACGTACGT\n",
        "looks like nucleotides",
        "vectors that mean nothing",
    ),
    "an empty file": (b"", "there is no sequence in it", "no files"),
    "FASTQ": (b"@a\nMKV\n+\nIII\n", "this is FASTQ", "no files"),
    "a header with a path out of the directory": (
        b">../a\nMKV\n",
        "leads out of",
        "a file in another directory",
    ),
}
# What fair-esm cannot read, and is read here.
TAKEN_BY_US = {
    "lower case": b">a\nmkVL\n",
    "J": b">a\nMKJV\n",
    "a final stop": b">a\nMKV*\n",
    "comments": b"# made by x\n>a\n;the first\nMKV\n#more\nL\n",
    "a byte order mark in the midst": b">a\nMKV\n\xef\xbb\xbf>b\nMKV\n",
    "invisible characters": ">a\nMK\u200bV\n".encode(),
    "gzip": gzip.compress(b">a\nMKV\n"),
    "UTF-16": ">a\nMKV\n".encode("utf-16"),
}
TAKEN_BY_NEITHER = {
    "the same header twice": (
        b">a one\nMKV\n>a one\nMKVL\n",
        "2 sequences have the header 'a one'",
    ),
    "an inner stop": (b">a\nMK*V\n", "'*' at position 3; a stop codon inside a protein"),
    "digits": (b">a\n1 MKV\n", "'1' at position 1"),
    "two chains": (b">a\nMKV:MKV\n", "':' at position 4"),
    "a line break that is missing": (
        b">a\nMKV>b\nMKV\n",
        "'>' at position 4; a line break is missing",
    ),
    "a header that is not UTF-8": (b">a \xe9\nMKV\n", "not UTF-8"),
    "a name too long for a file": (b">" + b"x" * 300 + b"\nMKV\n", "too long for a file name"),
}


@pytest.fixture(scope="module", autouse=True)
def _loaded_once(weights: Path) -> Iterator[None]:
    """Each program loads the model; there are many files."""
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings(action="ignore"):
        for name, value in FAIR_ESM_ENVIRONMENT.items():
            patch.setenv(name, value)  # torch says that it has seen it
        theirs = pretrained.load_model_and_alphabet(str(weights))
        patch.setattr(pretrained, "load_model_and_alphabet", lambda location: theirs)
        found = esm_extract.resolve_weights(MODEL, str(weights))
        network = esm_extract.load_model(found, dtype=torch.float32, device=torch.device("cpu"))
        patch.setattr(esm_extract, "model_of", lambda path: MODEL)
        patch.setattr(esm_extract, "resolve_weights", lambda model, weights: found)
        patch.setattr(esm_extract, "load_model", lambda *arguments, **options: network)
        yield


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    return write_weights(tmp_path_factory.mktemp("weights"), MODEL)


@pytest.fixture
def run_both(tmp_path: Path, weights: Path, capsys) -> Callable[[bytes], tuple[Any, Any, str]]:
    """Return the files of each program, None on an error, and the messages of ours."""
    options = ["--include", "mean", "per_tok", "bos", "--repr_layers", "0", "6", "--nogpu"]

    def run(content: bytes) -> tuple[Any, Any, str]:
        fasta = tmp_path / "in.fasta"
        fasta.write_bytes(content)
        with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings(action="ignore"):
            patch.setattr(
                sys,
                "argv",
                ["extract.py", str(weights), str(fasta), str(tmp_path / "theirs/x"), *options],
            )
            try:
                benchmarks.extract.main()
                theirs = written(tmp_path / "theirs")
            except (KeyError, AssertionError, UnicodeDecodeError, OSError, RuntimeError):
                theirs = None
        ended = main(["esm-extract", str(weights), str(fasta), str(tmp_path / "ours/x"), *options])
        assert ended in (ExitCode.DONE, ExitCode.UNUSABLE_INPUT)
        stderr = capsys.readouterr().err
        return written(tmp_path / "ours") if ended == ExitCode.DONE else None, theirs, stderr

    return run


def written(directory: Path) -> dict[str, Any]:
    paths = [path for path in directory.rglob("*") if path.is_file()]
    return {str(path.relative_to(directory)): torch.load(path, weights_only=True) for path in paths}


def values_of(result: dict[str, Any]) -> dict[tuple[str, int], torch.Tensor]:
    return {
        (kind, layer): tensor
        for kind, by in result.items()
        if kind != "label"
        for layer, tensor in by.items()
    }


def assert_same(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    assert ours.keys() == theirs.keys()
    for name in theirs:
        assert ours[name]["label"] == theirs[name]["label"]
        mine, expected = values_of(ours[name]), values_of(theirs[name])
        assert mine.keys() == expected.keys()
        for key, tensor in expected.items():
            assert mine[key].shape == tensor.shape, (name, key)
            assert (mine[key] - tensor).abs().max() <= 2e-5 * tensor.abs().max().clamp(min=1), (
                name,
                key,
            )


@pytest.mark.parametrize("name", TAKEN_BY_BOTH)
def test_what_both_take_gives_the_same_files(run_both, name: str) -> None:
    """Labels, names of files, shapes and values."""
    ours, theirs, stderr = run_both(TAKEN_BY_BOTH[name])
    assert ours is not None, stderr
    assert theirs
    assert_same(ours, theirs)


@pytest.mark.parametrize("name", TAKEN_BY_FAIR_ESM)
def test_what_fair_esm_alone_takes_is_refused_with_the_reason(run_both, name: str) -> None:
    content, reason, _ = TAKEN_BY_FAIR_ESM[name]
    ours, theirs, stderr = run_both(content)
    assert (ours, theirs is None) == (None, False)
    assert reason in stderr
    assert "--fasta" not in stderr
    assert "--translate" not in stderr


@pytest.mark.parametrize("name", TAKEN_BY_US)
def test_what_fair_esm_cannot_read_is_read(run_both, name: str) -> None:
    ours, theirs, stderr = run_both(TAKEN_BY_US[name])
    assert ours, stderr
    assert not theirs


@pytest.mark.parametrize("name", TAKEN_BY_NEITHER)
def test_what_neither_takes_is_refused_with_the_reason(run_both, name: str) -> None:
    content, reason = TAKEN_BY_NEITHER[name]
    ours, theirs, stderr = run_both(content)
    assert (ours, theirs) == (None, None)
    assert reason in stderr


@pytest.mark.parametrize("blank", [" ", "\t", "\u00a0"])
def test_white_space_in_a_line_is_no_residue(run_both, blank: str) -> None:
    """fair-esm counts it, so that EOS and padding are part of its mean. Ours omits it."""
    with_blank, theirs_with_blank, _ = run_both(f">a\nMK{blank}VL\n".encode())
    _, theirs_without, _ = run_both(b">a\nMKVL\n")
    assert_same(with_blank, theirs_without)
    (name,) = with_blank
    assert theirs_with_blank[name]["representations"][6].shape[0] == 5


def test_a_byte_order_mark_does_not_cost_the_first_protein(run_both) -> None:
    """fair-esm takes its header for residues, and writes nothing."""
    ours, theirs, _ = run_both(b"\xef\xbb\xbf>a\nMKV\n")
    assert [file["label"] for file in ours.values()] == ["a"]
    assert theirs == {}


def test_every_difference_is_documented() -> None:
    """The guide has a row for each, under the name that it has here."""
    guide = (ROOT / "docs/how-to/from-esm-extract.md").read_text()
    for name, (_, _, given) in TAKEN_BY_FAIR_ESM.items():
        assert f"| {name} | {given} |" in guide, name


def test_gaps_for_unknown_residues_give_what_fair_esm_gives(tmp_path: Path, weights: Path) -> None:
    arguments = [
        weights,
        CASES / "gap_for_unknown.fasta",
        tmp_path / "out",
        "--include",
        "mean",
        "--nogpu",
    ]
    assert main(["esm-extract", *map(str, arguments)]) == ExitCode.DONE
    mean = torch.load(tmp_path / "out/x_chain_0.pt", weights_only=True)["mean_representations"][6]
    assert mean[:4].tolist() == pytest.approx([-0.02493, 0.43785, 0.16260, 0.23107], abs=2e-5)


def write_to(pipe: int | Path, content: bytes) -> None:
    with open(pipe, "wb") as opened:
        opened.write(content)


class TestWhatIsAFile:
    def extract(self, weights: Path, fasta: object, output_dir: Path) -> int:
        arguments = [weights, fasta, output_dir, "--include", "mean", "--nogpu"]
        return main(["esm-extract", *map(str, arguments)])

    def test_a_pipe_is_read_once(self, tmp_path: Path, weights: Path) -> None:
        """As a shell gives it for `<(zcat x.fasta.gz)`, and one with a name."""
        content = gzip.compress(b">a\nMK-V\n>b\nMKV\n")
        os.mkfifo(tmp_path / "pipe")
        read_end, write_end = os.pipe()
        for fasta, opened in (
            (f"/dev/fd/{read_end}", write_end),
            (tmp_path / "pipe", tmp_path / "pipe"),
        ):
            writer = threading.Thread(target=write_to, args=(opened, content))
            writer.start()
            assert self.extract(weights, fasta, tmp_path / "out") == ExitCode.DONE
            writer.join()
            assert written(tmp_path / "out").keys() == {"a.pt", "b.pt"}
        os.close(read_end)

    def test_a_fault_in_a_pipe_is_reported_with_its_name(
        self, tmp_path: Path, weights: Path, capsys
    ) -> None:
        read_end, write_end = os.pipe()
        os.write(write_end, b">a\nMKV\n>b\nMK*V\n")
        os.close(write_end)
        assert (
            self.extract(weights, f"/dev/fd/{read_end}", tmp_path / "out")
            == ExitCode.UNUSABLE_INPUT
        )
        assert capsys.readouterr().err.startswith(
            f"/dev/fd/{read_end}, line 3: sequence 'b' has '*'"
        )
        os.close(read_end)

    def test_standard_input_is_a_file_too(self, tmp_path: Path, weights: Path) -> None:
        program = [
            sys.executable,
            "-m",
            "vnp_lib",
            "esm-extract",
            weights,
            "-",
            tmp_path / "out",
            "--include",
            "mean",
        ]
        subprocess.run(
            [*program, "--nogpu"],
            input=b">a\nMKV\n",
            cwd=ROOT,
            check=True,
            capture_output=True,
            timeout=120,
        )
        assert written(tmp_path / "out").keys() == {"a.pt"}

    @pytest.mark.parametrize(
        ("fasta", "message"),
        [
            ("/dev/null", "/dev/null: this is a device; give a file or a pipe"),
            ("absent.fasta", "absent.fasta: there is no such file"),
            (
                "https://host/x.fasta",
                "https://host/x.fasta: addresses are not fetched; download it, and give the path",
            ),
            ("$ABSENT/x", "$ABSENT/x: the environment variable ABSENT is not set"),
            ("", "'': the path is empty"),
        ],
    )
    def test_what_is_none_is_refused_with_advice_that_fits(
        self, tmp_path, weights, capsys, monkeypatch, fasta, message
    ) -> None:
        monkeypatch.delenv("ABSENT", raising=False)
        assert self.extract(weights, fasta, tmp_path / "out") == ExitCode.UNUSABLE_INPUT
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(message)
        assert "--" not in line
        assert not (tmp_path / "out").exists()

    def test_home_is_expanded(self, tmp_path: Path, weights: Path, monkeypatch) -> None:
        monkeypatch.setenv("HOME", str(tmp_path))
        (tmp_path / "in.fasta").write_text(">a\nMKV\n")
        assert self.extract(weights, "~/in.fasta", Path("~/out")) == ExitCode.DONE
        assert written(tmp_path / "out").keys() == {"a.pt"}

    def test_an_output_directory_that_is_a_file_is_refused_up_front(
        self, tmp_path, weights, capsys
    ) -> None:
        (tmp_path / "in.fasta").write_text(">a\nMKV\n")
        assert (
            self.extract(weights, tmp_path / "in.fasta", tmp_path / "in.fasta")
            == ExitCode.UNUSABLE_INPUT
        )
        assert "in.fasta: this is a file; give a directory" in capsys.readouterr().err
