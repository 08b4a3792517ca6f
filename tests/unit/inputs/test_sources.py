"""Files that paths, patterns and directories stand for, and reports of what is left out."""

from __future__ import annotations

import gzip
import logging
import os
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path

import pytest
from rich.console import Console

from tests.helpers import ROOT
from vnp_lib import embed
from vnp_lib.config import EmbedConfig
from vnp_lib.errors import ConfigError, FastaError
from vnp_lib.inputs.files import FASTA_SUFFIXES
from vnp_lib.inputs.policy import InputPolicy
from vnp_lib.inputs.reader import read_records
from vnp_lib.inputs.sources import describe_left_out, find_files, find_sources
from vnp_lib.options import EstimateConfig
from vnp_lib.report.estimate import estimate_run, render_estimate
from vnp_lib.run.directory import validate_config
from vnp_lib.user_paths import user_inputs

CASES = ROOT / "tests/data/cases"
PROTEIN = ">a\nMKVLATTWQERS\n"
NUCLEOTIDES = ">n\n" + "ACGTTGCA" * 9 + "\n"
NOT_UTF8 = os.fsdecode(b"prot\xe9ine.fasta")
SMALLEST = {"model": "esm2_t6_8M_UR50D", "weights": "random", "devices": "cpu"}


def write(path: Path, content: str = PROTEIN) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content)
    return path


def names(given: Path) -> list[str]:
    return [path.name for path in find_files(given).paths]


def refusal(*given: Path) -> str:
    with pytest.raises(FastaError) as caught:
        list(
            chain.from_iterable(
                read_records(source, InputPolicy())
                for source in find_sources(given, stdin=Path("kept"))
            )
        )
    (line,) = str(caught.value).splitlines()
    return line


@contextmanager
def without_rights() -> Iterator[None]:
    """Run the block as another user than root, who is subject to permissions."""
    before = os.getresuid()
    if 0 in before:
        os.setresuid(65534, 65534, 0)
    try:
        yield
    finally:
        os.setresuid(*before)


def open_to_everybody(directory: Path) -> None:
    """Let every user into a test's directory; pytest restricts its parents to their owner."""
    for each in (directory, *directory.parents):
        if each == Path(tempfile.gettempdir()):
            break
        each.chmod(0o755)


class TestDirectory:
    @pytest.mark.parametrize("suffix", FASTA_SUFFIXES)
    @pytest.mark.parametrize("compression", ["", ".gz", ".ZST"])
    def test_names_of_fasta_files_are_taken(
        self, tmp_path: Path, suffix: str, compression: str
    ) -> None:
        name = f"x{suffix.upper()}{compression}"
        write(tmp_path / name)
        assert names(tmp_path) == [name]

    def test_other_entries_are_reported_by_name_and_number(self, tmp_path: Path) -> None:
        for name in [
            "a.faa",
            "b.txt",
            "c.csv",
            "README",
            "old/x.faa",
            "z.faa/x",
            ".DS_Store",
            "._a.faa",
            ".hidden.faa",
        ]:
            write(tmp_path / name)
        os.mkfifo(tmp_path / "pipe.faa")
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(os.path.relpath(tmp_path / "sock.faa"))
        assert names(tmp_path) == ["a.faa"]
        assert find_files(tmp_path).describe_left_out() == (
            f"{tmp_path}: 1 file is read, 10 are left out: README, b.txt, c.csv, old/, "
            "pipe.faa and 2 more, 3 hidden"
        )

    def test_a_directory_of_fasta_files_alone_leaves_nothing_out(self, tmp_path: Path) -> None:
        write(tmp_path / "a.faa")
        assert find_files(tmp_path).describe_left_out() == ""

    def test_hidden_files_alone_are_counted(self, tmp_path: Path) -> None:
        write(tmp_path / "a.faa")
        write(tmp_path / "._a.faa")
        assert (
            find_files(tmp_path).describe_left_out()
            == f"{tmp_path}: 1 file is read, 1 is left out: 1 hidden"
        )

    def test_one_without_fasta_files_is_refused_with_what_it_holds(self, tmp_path: Path) -> None:
        write(tmp_path / "x.csv")
        message = refusal(tmp_path)
        assert message.startswith(
            f"{tmp_path}: there is no FASTA file in this directory; wanted are names that "
            "end in .fa, "
        )
        assert message.endswith("; it holds x.csv")

    def test_a_dangling_link_in_it_is_refused(self, tmp_path: Path) -> None:
        """A file with proteins was meant to be there."""
        write(tmp_path / "a.faa")
        (tmp_path / "b.faa").symlink_to("gone.faa")
        assert refusal(tmp_path) == (
            f"{tmp_path}/b.faa: this is a link to gone.faa, and there is no such file; "
            "correct the link"
        )

    def test_a_name_in_it_that_is_not_utf8_is_refused(self, tmp_path: Path) -> None:
        write(tmp_path / NOT_UTF8)
        assert refusal(tmp_path) == (
            rf"{tmp_path}/prot\xe9ine.fasta: this name is not UTF-8 text; rename the file, or "
            "give a link to it whose name is"
        )
        assert refusal(tmp_path / "*.fasta") == refusal(tmp_path)

    def test_one_that_cannot_be_read_is_refused(self, tmp_path: Path) -> None:
        write(tmp_path / "in/a.faa")
        tmp_path.chmod(0o700)
        with without_rights():
            assert (
                refusal(tmp_path / "in")
                == f"{tmp_path}/in: this cannot be read (Permission denied)"
            )


class TestPattern:
    def test_matching_directories_are_left_out_and_reported(self, tmp_path: Path) -> None:
        for name in ["a.faa", "b/x.faa", "c.faa/x"]:
            write(tmp_path / name)
        assert names(tmp_path / "*") == ["a.faa"]
        assert (
            find_files(tmp_path / "*").describe_left_out()
            == f"{tmp_path}/*: 1 file is read, 2 are left out: b/, c.faa/"
        )
        assert names(tmp_path / "**") == ["a.faa", "x.faa", "x"]

    def test_a_pattern_of_directories_is_refused(self, tmp_path: Path) -> None:
        """The error gives a deeper pattern."""
        write(tmp_path / "s1/x.faa")
        assert refusal(tmp_path / "s*") == (
            f"{tmp_path}/s*: only directories match this pattern; say which files in them, as "
            f"in '{tmp_path}/s*/*.faa'"
        )

    @pytest.mark.parametrize("name", ["x[1].fa", "a*b.fa", "why?.fa", "[", "x[1]"])
    def test_an_existing_name_is_no_pattern(self, tmp_path: Path, name: str) -> None:
        write(tmp_path / name)
        write(tmp_path / "dir" / name / "in.fa")
        write(tmp_path / "x1.fa")
        assert names(tmp_path / name) == [name]
        assert names(tmp_path / "dir" / name) == ["in.fa"]


class TestFile:
    @pytest.mark.parametrize(
        ("there", "given", "message"),
        [
            ("x.fasta.gz", "x.fasta", "x.fasta: there is no such file; is it x.fasta.gz?"),
            ("Proteins.fasta", "proteins.fasta", "; is it Proteins.fasta?"),
            (
                "cafe\u0301.fasta",
                "caf\u00e9.fasta",
                "; is it cafe\u0301.fasta, whose accents are other characters that look the same?",
            ),
            ("other.fasta", "x.csv", "x.csv: there is no such file"),
        ],
    )
    def test_a_missing_file_is_refused_with_a_similar_name(
        self, tmp_path, there, given, message
    ) -> None:
        write(tmp_path / there)
        assert refusal(tmp_path / given).endswith(message)

    @pytest.mark.parametrize("separator", [" ", ";", ":", "\t", "; "])
    def test_files_without_commas_between_are_refused(self, tmp_path: Path, separator: str) -> None:
        """The error advises commas."""
        files = [str(write(tmp_path / name)) for name in ("a.faa", "b.faa")]
        assert refusal(Path(separator.join(files))).endswith(
            "there is no such file; put commas between several files"
        )

    def test_braces_are_refused_with_what_to_do(self, tmp_path: Path) -> None:
        for given in user_inputs(f"{tmp_path}/{{a,b}}.faa"):
            assert "braces are expanded by a shell only" in refusal(given)

    def test_a_missing_directory_is_named(self, tmp_path: Path) -> None:
        assert refusal(tmp_path / "data/x.faa").endswith(
            f"there is no such file, nor a directory {tmp_path}/data"
        )

    def test_a_relative_path_is_refused_with_its_directory(
        self, tmp_path: Path, monkeypatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        assert refusal(Path("x.faa")) == f"x.faa: there is no such file in {tmp_path}"

    def test_a_dangling_link_is_named_as_one(self, tmp_path: Path) -> None:
        (tmp_path / "x.faa").symlink_to(tmp_path / "gone")
        assert refusal(tmp_path / "x.faa").startswith(
            f"{tmp_path}/x.faa: this is a link to {tmp_path}/gone, and there is no"
        )

    def test_a_link_to_itself_is_refused(self, tmp_path: Path) -> None:
        (tmp_path / "x.faa").symlink_to("x.faa")
        message = f"{tmp_path}/x.faa: the file cannot be read (Too many levels of symbolic links)"
        assert refusal(tmp_path / "x.faa") == refusal(tmp_path) == message

    def test_a_pipe_and_a_socket_are_refused(self, tmp_path: Path) -> None:
        os.mkfifo(tmp_path / "pipe")
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(os.path.relpath(tmp_path / "sock"))
        for name in ("pipe", "sock"):
            assert refusal(tmp_path / name).startswith(
                f"{tmp_path}/{name}: this is a pipe or a device"
            )

    def test_one_that_cannot_be_read_is_refused(self, tmp_path: Path) -> None:
        path = write(tmp_path / "x.faa")
        path.chmod(0)
        open_to_everybody(tmp_path)
        with without_rights():
            assert refusal(path) == f"{path}: the file cannot be read (Permission denied)"

    def test_one_in_a_file_is_refused(self, tmp_path: Path) -> None:
        path = write(tmp_path / "x.faa") / "y"
        assert refusal(path) == f"{path}: this cannot be read (Not a directory)"


class TestTwice:
    def test_the_same_name_is_refused(self, tmp_path: Path) -> None:
        path = write(tmp_path / "x.faa")
        assert refusal(path, path) == f"{path}: this is given twice; give it once"

    @pytest.mark.parametrize("make", [os.symlink, os.link])
    def test_another_name_of_the_same_file_is_refused(self, tmp_path: Path, make) -> None:
        """Even if ids may be repeated: all ids of a file would be."""
        path = write(tmp_path / "x.faa")
        make(path, tmp_path / "y.faa")
        expected = f"{tmp_path}/y.faa: this is the same file as {path}; give one of them"
        assert (
            refusal(tmp_path)
            == refusal(path, tmp_path / "y.faa")
            == refusal(tmp_path / "?.faa")
            == expected
        )

    def test_a_file_of_a_pattern_and_a_path_is_refused(self, tmp_path: Path) -> None:
        path = write(tmp_path / "x.faa")
        assert (
            refusal(path, tmp_path / "*.faa")
            == refusal(tmp_path, path)
            == f"{path}: this is given twice; give it once"
        )
        assert refusal(
            tmp_path / "." / "x.faa", tmp_path / "../" / tmp_path.name / "x.faa"
        ).endswith("give one of them")

    def test_other_files_with_the_same_content_are_two(self, tmp_path: Path) -> None:
        write(tmp_path / "1/x.faa")
        write(tmp_path / "2/x.faa")
        assert len(find_sources([tmp_path / "1", tmp_path / "2"], stdin=Path("kept"))) == 2


class TestKinds:
    @pytest.mark.parametrize(
        ("files", "given", "advice"),
        [
            (["p.faa", "p.ffn", "p.fna"], "", "'{dir}/*.faa'"),
            (["p.faa", "p.ffn"], "*", "'{dir}/*.faa'"),
            (["q.fna.gz", "z.faa.gz", "z.pep"], "", "'{dir}/*.faa.gz,{dir}/*.pep'"),
            (["a.fasta", "b.frn"], "", "'{dir}/*.fasta'"),
        ],
    )
    def test_nucleotides_among_proteins_are_refused(
        self, tmp_path: Path, files: list[str], given: str, advice: str
    ) -> None:
        """The error gives the pattern of the proteins."""
        for name in files:
            is_protein = any(part in name for part in (".faa", ".pep", ".fasta"))
            text = (PROTEIN if is_protein else NUCLEOTIDES).encode()
            (tmp_path / name).write_bytes(gzip.compress(text) if name.endswith(".gz") else text)
        message = refusal(tmp_path / given)
        assert "looks like nucleotides" in message
        assert message.endswith("; or give the other files: " + advice.format(dir=tmp_path))

    def test_proteins_among_nucleotides_are_refused(self, tmp_path: Path) -> None:
        """The error gives the pattern of the nucleotides to translate."""
        write(tmp_path / "p.faa")
        write(tmp_path / "p.fna", NUCLEOTIDES)
        sources = find_sources([tmp_path], stdin=Path("kept"))
        with pytest.raises(
            FastaError,
            match=rf"looks like proteins .*; or give the other files: '{tmp_path}/\*.fna'$",
        ):
            list(read_records(sources[0], InputPolicy(translate="six-frame")))

    def test_nucleotides_alone_are_refused_without_it(self, tmp_path: Path) -> None:
        assert refusal(write(tmp_path / "p.fna", NUCLEOTIDES)).endswith(
            "with --translate six-frame"
        )


class TestReported:
    """Files that are left out are reported by everything that reads a directory."""

    LEFT_OUT = "1 file is read, 2 are left out: d.txt, old/"

    @pytest.fixture
    def directory(self, tmp_path: Path) -> Path:
        for name in ["in/a.faa", "in/d.txt", "in/old/b.faa"]:
            write(tmp_path / name)
        return tmp_path / "in"

    def test_a_run_warns_before_anything_is_made(
        self, directory: Path, tmp_path: Path, caplog
    ) -> None:
        validate_config(EmbedConfig(fasta=(directory,), output_dir=tmp_path / "run", **SMALLEST))
        assert caplog.messages == [f"{directory}: {self.LEFT_OUT}"]
        assert not (tmp_path / "run").exists()

    def test_vnp_plan_reports_it(self, directory: Path, tmp_path: Path) -> None:
        seen = estimate_run(
            EstimateConfig(fasta=(directory,), output_dir=tmp_path / "run", **SMALLEST)
        )
        assert seen.to_json()["left_out"] == (f"{directory}: {self.LEFT_OUT}",)
        with (console := Console(width=1000)).capture() as shown:
            console.print(render_estimate(seen))
        assert f"{directory}: {self.LEFT_OUT}" in shown.get()

    def test_embed_warns_of_it(self, directory: Path, caplog) -> None:
        with caplog.at_level(logging.WARNING, "vnp_lib.api"):
            embed(
                directory, model=SMALLEST["model"], weights="random", device="cpu", progress=False
            )
        assert f"{directory}: {self.LEFT_OUT}" in caplog.messages

    def test_refused_inputs_leave_nothing_out(self, tmp_path: Path) -> None:
        assert describe_left_out([tmp_path / "absent", Path("-")]) == []

    def test_the_case_of_five_files(self) -> None:
        """The files are refused when they are read; the text file is left out."""
        found = find_files(CASES / "directory")
        assert {"a.faa", "c.aa", "e.fsa_aa"} <= {path.name for path in found.paths}
        assert "d.txt" in found.left_out


def test_vnp_plan_counts_a_repeated_file_once(tmp_path: Path) -> None:
    """It refuses the second occurrence."""
    path = write(tmp_path / "x.faa")
    seen = estimate_run(
        EstimateConfig(fasta=(path, tmp_path / "*.faa"), output_dir=tmp_path / "run", **SMALLEST)
    )
    assert (seen.num_sequences, seen.refusals) == (
        1,
        (f"{path}: this is given twice; give it once",),
    )


class TestOutput:
    def validate(self, fasta: Path, output_dir: Path) -> None:
        validate_config(EmbedConfig(fasta=(fasta,), output_dir=output_dir, **SMALLEST))

    def refusal(self, fasta: Path, output_dir: Path) -> str:
        with pytest.raises(ConfigError) as caught:
            self.validate(fasta, output_dir)
        (line,) = str(caught.value).splitlines()
        return line

    def test_a_file_or_what_is_in_one_cannot_be_a_run_directory(self, tmp_path: Path) -> None:
        path = write(tmp_path / "x.faa")
        for output_dir in (path, path / "run", path / "a/b"):
            assert self.refusal(path, output_dir) == (
                f"--output-dir {output_dir}: {path} is not a directory that can be written"
            )

    def test_the_directory_of_the_input_cannot_be_one(self, tmp_path: Path) -> None:
        """A run would write into it, and --force-restart would empty it."""
        path = write(tmp_path / "in/x.faa")
        (tmp_path / "link").symlink_to("in")
        for output_dir in (path.parent, tmp_path / "link"):
            assert "this is the directory of the input too" in self.refusal(path.parent, output_dir)
            self.validate(path.parent, output_dir / "run")
            self.validate(path, output_dir)

    def test_a_dangling_link_cannot_be_one(self, tmp_path: Path) -> None:
        path = write(tmp_path / "x.faa")
        (tmp_path / "run").symlink_to("/scratch/gone")
        assert self.refusal(path, tmp_path / "run").startswith(
            f"--output-dir {tmp_path}/run: this is a link to /scratch/gone, and there is no "
            "such directory; make it"
        )

    def test_a_forbidden_directory_cannot_be_one(self, tmp_path: Path) -> None:
        path = write(tmp_path / "in/x.faa")
        (tmp_path / "closed").mkdir(mode=0o700)
        open_to_everybody(tmp_path)
        with without_rights():
            for output_dir in (tmp_path / "closed", tmp_path / "closed/run"):
                assert self.refusal(path, output_dir).endswith(
                    "closed is not a directory that can be written"
                )
