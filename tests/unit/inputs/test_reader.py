"""Files, tables and standard input as input lead to the same plan."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from backports import zstd

from tests.helpers import ROOT
from vnp_lib.errors import ConfigError, FastaError, FingerprintMismatchError
from vnp_lib.inputs import standard_input
from vnp_lib.inputs.policy import InputPolicy
from vnp_lib.inputs.reader import read_records
from vnp_lib.inputs.sources import find_sources
from vnp_lib.plan.paths import RunPaths
from vnp_lib.plan.plan import ModelIdentity, RunPlan
from vnp_lib.plan.planner import make_plan

MODEL = ModelIdentity(model="m", weights_digest="w", layer=6, dtype="float32")
COMPRESSORS: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": zstd.compress,
}


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def found(*given: Path) -> list[Path]:
    return [source.path for source in find_sources(given, stdin=Path("kept"))]


def records_of(*given: Path, chunk_size: int = 8192, **policy: Any) -> list[tuple[str, str, str]]:
    return [
        record
        for source in find_sources(given, stdin=Path("kept"))
        for chunk in read_records(source, InputPolicy(**policy), chunk_size=chunk_size)
        for record in zip(
            chunk.usable.ids, chunk.usable.descriptions, chunk.usable.sequences, strict=True
        )
    ]


def refusal(*given: Path, **policy: Any) -> str:
    with pytest.raises(FastaError) as caught:
        records_of(*given, **policy)
    return str(caught.value)


def plan_of(run_dir: Path, *fasta: Path, **policy: Any) -> RunPlan:
    paths = RunPaths(run_dir)
    return make_plan(
        paths, fasta, MODEL, num_shards=1, token_budget=500, policy=InputPolicy(**policy)
    )


class TestFiles:
    def test_a_pattern_stands_for_the_files_that_match_in_order(self, tmp_path: Path) -> None:
        paths = [write(tmp_path / f"{name}.fa", ">a\nM\n") for name in ("b", "c", "a")]
        (tmp_path / "deep" / "er").mkdir(parents=True)
        deep = write(tmp_path / "deep" / "er" / "x.fa", ">a\nM\n")
        assert found(tmp_path / "*.fa") == sorted(paths)
        assert found(paths[1], tmp_path / "[ab].fa") == [paths[1], *sorted([paths[0], paths[2]])]
        assert found(tmp_path / "**" / "x.fa") == [deep]

    def test_a_file_whose_name_looks_like_a_pattern_is_that_file(self, tmp_path: Path) -> None:
        path = write(tmp_path / "x[1].fa", ">a\nM\n")
        write(tmp_path / "x1.fa", ">a\nM\n")
        assert found(path) == [path]

    def test_a_directory_stands_for_the_fasta_files_in_it_in_order(self, tmp_path: Path) -> None:
        names = ["1.fasta", "2.FA", "3.faa.gz", "4.fna.zst", "5.pep.xz", "6.ffn.bz2"]
        for name in [*names, "README.md", "x.gz", "y.csv", "fa"]:
            write(tmp_path / name, ">a\nM\n")
        (tmp_path / "7.fasta").mkdir()
        assert [path.name for path in found(tmp_path)] == names

    def test_a_pattern_or_directory_without_files_is_refused(self, tmp_path: Path) -> None:
        assert refusal(tmp_path / "*.fa") == (
            f"{tmp_path / '*.fa'}: nothing matches this pattern; correct it, or give the files "
            "by name"
        )
        write(tmp_path / "x.txt", "x")
        assert refusal(tmp_path).startswith(
            f"{tmp_path}: there is no FASTA file in this directory; wanted are names"
        )

    def test_standard_input_is_its_saved_file(self, tmp_path: Path) -> None:
        write(tmp_path / "x.fa", ">a\nM\n")
        assert found(tmp_path / "x.fa", Path("-")) == [tmp_path / "x.fa", Path("kept")]


TABLE = "id,n,sequence\nβ1 of two,1,MKVL\nb,2,mkj*\n007,3,NA\n"
IN_TABLE = [("β1", "of two", "MKVL"), ("b", "", "MKX"), ("007", "", "NA")]


class TestTables:
    @pytest.mark.parametrize("compression", COMPRESSORS)
    @pytest.mark.parametrize("chunk_size", [1, 2, 8192])
    def test_csv_and_tsv_are_read_in_every_compression(
        self, tmp_path: Path, compression: str, chunk_size: int
    ) -> None:
        compress = COMPRESSORS[compression]
        comma = write(tmp_path / f"x.csv{compression}", compress(TABLE.encode()))
        tab = write(tmp_path / f"x.TSV{compression}", compress(TABLE.replace(",", "\t").encode()))
        assert (
            records_of(comma, chunk_size=chunk_size)
            == records_of(tab, chunk_size=chunk_size)
            == IN_TABLE
        )

    @pytest.mark.parametrize(
        "text",
        [
            pytest.param(TABLE.replace("\n", "\r\n"), id="Windows"),
            pytest.param("\ufeff" + TABLE, id="byte order mark"),
            pytest.param(TABLE.rstrip(), id="no newline at the end"),
            pytest.param("\n" + TABLE + "\n\n", id="blank lines"),
            pytest.param(
                TABLE.replace("MKVL", '"MK\nVL"').replace("β1 of two", '"β1\nof two"'),
                id="line breaks in cells",
            ),
        ],
    )
    def test_csv_is_written_in_many_ways(self, tmp_path: Path, text: str) -> None:
        assert records_of(write(tmp_path / "x.csv", text)) == IN_TABLE

    @pytest.mark.parametrize(
        "text_type", [pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())]
    )
    @pytest.mark.parametrize("suffix", [".parquet", ".pq"])
    def test_parquet_is_read_with_every_type_of_text(
        self, tmp_path: Path, text_type: pa.DataType, suffix: str
    ) -> None:
        columns = [
            [f"{id_} {rest}".strip() for id_, rest, _ in IN_TABLE],
            [text for _, _, text in IN_TABLE],
        ]
        table = pa.table(
            [pa.array(column).cast(text_type) for column in columns], names=["name", "aa"]
        )
        pq.write_table(table, tmp_path / f"x{suffix}", row_group_size=2)
        assert (
            records_of(tmp_path / f"x{suffix}", id_column="name", sequence_column="aa") == IN_TABLE
        )

    def test_ids_that_are_numbers_are_read_as_they_are_written(self, tmp_path: Path) -> None:
        pq.write_table(pa.table({"id": [7, 8], "sequence": ["MK", "MV"]}), tmp_path / "x.parquet")
        assert records_of(tmp_path / "x.parquet") == [("7", "", "MK"), ("8", "", "MV")]
        assert records_of(write(tmp_path / "x.csv", "id,sequence\n007,MK\n")) == [("007", "", "MK")]

    def test_a_table_makes_the_same_run_as_a_fasta_file(self, tmp_path: Path) -> None:
        rng = np.random.default_rng(0)
        sequences = [
            ("".join(rng.choice(list("MKVLAX"), rng.integers(1, 99)))) for _ in range(9000)
        ]
        ids = [f"p{number}" + (" about it" if number % 2 else "") for number in range(9000)]
        rows = list(zip(ids, sequences, strict=True))
        fasta = write(tmp_path / "x.fasta", "".join(f">{each}\n{text}\n" for each, text in rows))
        comma = write(
            tmp_path / "x.csv.gz",
            gzip.compress("".join(f"{a},{b}\n" for a, b in [("id", "sequence"), *rows]).encode()),
        )
        pq.write_table(pa.table({"id": ids, "sequence": sequences}), tmp_path / "x.parquet")
        files = (fasta, comma, tmp_path / "x.parquet")
        assert (
            len({plan_of(tmp_path / f"run-{path.name}", path).fingerprint for path in files}) == 1
        )

    @pytest.mark.parametrize(
        ("text", "what"),
        [
            ("id,sequence\na,MK\nb,M-\n", ", row 3: sequence 'b' has '-' at position 2"),
            ("id,sequence\na,MK\nb,\n", ", row 3: sequence 'b' has no residues"),
            ("id,sequence\na,MK\n,MK\n", ", row 3: a record has no id"),
            ("id,sequence\na,MK\n   ,MK\n", ", row 3: a record has no id"),
            (
                "name,sequence\na,MK\n",
                ": there is no column 'id', but 'name', 'sequence'; name the columns with --id",
            ),
            ("id,seq\na,MK\n", ": there is no column 'sequence', but 'id', 'seq'; name the"),
            (
                "id,sequence\na,MK\nb\n",
                ": this cannot be read as csv (CSV parse error: Row #3: Expected 2 columns, got 1",
            ),
            ("id,sequence\n", ": there is no sequence in it"),
            ("", ": there is no sequence in it"),
            (
                b"id,sequence\na\xe9,MK\n",
                ": this cannot be read as csv (In CSV column #0: Row #2: CSV conversion error to",
            ),
            ("id,sequence\na,ACGTACGT\n", ": this looks like nucleotides"),
        ],
    )
    def test_faults_of_csv_are_reported_by_file_and_row(
        self, tmp_path: Path, text: str | bytes, what: str
    ) -> None:
        path = write(tmp_path / "x.csv", text)
        assert refusal(path).startswith(f"{path}{what}")

    def test_faults_of_parquet_are_reported_by_file_and_row(self, tmp_path: Path) -> None:
        path = tmp_path / "x.parquet"
        pq.write_table(pa.table({"id": ["a", None, "b"], "sequence": ["MK", "MK", None]}), path)
        assert refusal(path).splitlines()[0].startswith(f"{path}, row 2: a record has no id")
        assert (
            refusal(path).splitlines()[1].startswith(f"{path}, row 3: sequence 'b' has no residues")
        )
        assert refusal(path, id_column="x").startswith(
            f"{path}: there is no column 'x', but 'id', 'sequence'"
        )
        pq.write_table(pa.table({"id": ["a"], "sequence": [["MK"]]}), path)
        assert refusal(path).startswith(
            f"{path}: this cannot be read as parquet (Unsupported cast from list"
        )
        assert refusal(write(path, "MK")).startswith(f"{path}: this cannot be read as parquet")

    @pytest.mark.parametrize("kept", [0.3, 0.9])
    def test_a_table_that_is_cut_is_refused(self, tmp_path: Path, kept: float) -> None:
        rows = "".join(f"p{number},MKVLAT\n" for number in range(20_000))
        data = gzip.compress(f"id,sequence\n{rows}".encode())
        path = write(tmp_path / "x.csv.gz", data[: int(len(data) * kept)])
        assert refusal(path).startswith(f"{path}: the compressed file is cut short or damaged")
        pq.write_table(pa.table({"id": ["a"] * 2000, "sequence": ["MK"] * 2000}), tmp_path / "x.pq")
        data = (tmp_path / "x.pq").read_bytes()
        path = write(tmp_path / "x.pq", data[: int(len(data) * kept)])
        assert refusal(path).startswith(f"{path}: this cannot be read as parquet")


class TestStandardInput:
    """A pipe as a shell makes it: a file descriptor."""

    @pytest.fixture
    def kept(self, tmp_path: Path) -> Path:
        return RunPaths(tmp_path / "run").stdin

    @staticmethod
    def piped(data: bytes) -> io.BufferedReader:
        read_end, write_end = os.pipe()
        with open(write_end, "wb") as pipe:
            pipe.write(data)
        return open(read_end, "rb")

    def test_piped_input_is_saved_and_not_needed_again(self, kept: Path) -> None:
        with self.piped(b">a\nMKV\n") as pipe, open(os.devnull, "rb") as nothing:
            assert standard_input.save_stdin(pipe, kept)
            assert kept.read_bytes() == b">a\nMKV\n"
            assert not standard_input.save_stdin(nothing, kept)
        with self.piped(b">a\nMKV\n") as same, self.piped(b"") as empty:
            assert not standard_input.save_stdin(same, kept)
            assert not standard_input.save_stdin(empty, kept)

    def test_other_input_in_the_same_run_is_refused(self, kept: Path) -> None:
        """The saved input stays."""
        with self.piped(b">a\nMKV\n") as pipe, self.piped(b">a\nMKL\n") as other:
            standard_input.save_stdin(pipe, kept)
            with pytest.raises(
                FingerprintMismatchError,
                match="the piped input is not the one that this run was started",
            ):
                standard_input.save_stdin(other, kept)
        assert kept.read_bytes() == b">a\nMKV\n"

    @pytest.mark.parametrize(
        "piped", [b">a\nM", b">a\nMKV\n>b\nM\n", b">b\n"], ids=["less", "more", "else"]
    )
    def test_a_part_of_it_and_more_than_it_are_other_input_too(
        self, kept: Path, piped: bytes
    ) -> None:
        with self.piped(b">a\nMKV\n") as pipe, self.piped(piped) as other:
            standard_input.save_stdin(pipe, kept)
            with pytest.raises(FingerprintMismatchError):
                standard_input.save_stdin(other, kept)

    @pytest.mark.parametrize("begun", [b"", b">a\n"], ids=["silent", "begun"])
    def test_a_silent_pipe_does_not_block_a_resume(
        self,
        kept: Path,
        begun: bytes,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        """As that of ssh, of `docker run -i` or of CI. Both the wait and its end are reported."""
        for name in ("_NOTICE_AFTER_S", "_FIRST_BYTE_S", "_NEXT_BYTE_S"):
            monkeypatch.setattr(standard_input, name, 0.05)
        with self.piped(b">a\nMKV\n") as pipe:
            standard_input.save_stdin(pipe, kept)
        read_end, write_end = os.pipe()
        with open(read_end, "rb") as stream, open(write_end, "wb", buffering=0) as writer:
            writer.write(begun)
            assert not standard_input.save_stdin(stream, kept)
        waiting, resuming = capsys.readouterr().err.splitlines()
        assert "waiting for FASTA on standard input" in waiting
        assert f"continues with the input saved in {kept}" in resuming

    def test_a_new_run_waits_for_late_input(
        self, kept: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """It reports that it waits."""
        monkeypatch.setattr(standard_input, "_NOTICE_AFTER_S", 0.05)
        read_end, write_end = os.pipe()
        with open(read_end, "rb") as stream:
            writer = open(write_end, "wb")  # noqa: SIM115  # closed by the timer
            timer = threading.Timer(0.3, lambda: (writer.write(b">a\nMKV\n"), writer.close()))
            timer.start()
            assert standard_input.save_stdin(stream, kept)
            timer.join()
        assert kept.read_bytes() == b">a\nMKV\n"
        assert capsys.readouterr().err.count("waiting for FASTA") == 1

    def test_a_terminal_is_refused_with_what_to_do(self, kept: Path) -> None:
        controller, terminal = os.openpty()
        is_refused = pytest.raises(
            ConfigError, match="nothing is piped to standard input; pipe FASTA to it"
        )
        with open(terminal, "rb") as stream, open(controller, "rb"), is_refused:
            standard_input.save_stdin(stream, kept)
        assert not kept.exists()

    def test_errors_name_it_standard_input(self, tmp_path: Path) -> None:
        write(tmp_path / "kept", ">a\nMK\n>b\nM-\n")
        (source,) = find_sources([Path("-")], stdin=tmp_path / "kept")
        with pytest.raises(FastaError, match=r"^standard input, line 3: sequence 'b' has '-'"):
            list(read_records(source, InputPolicy()))
        write(tmp_path / "kept", "")
        with pytest.raises(FastaError, match=r"^standard input: there is no sequence in it"):
            list(read_records(source, InputPolicy()))

    def test_a_plan_is_made_of_it(self, tmp_path: Path, kept: Path) -> None:
        with self.piped(gzip.compress(b">a\nMKV\n")) as pipe:
            standard_input.save_stdin(pipe, kept)
        assert plan_of(tmp_path / "run", Path("-")).fetch(np.array([0])) == (["a"], ["MKV"])

    def test_vnp_plan_counts_it_and_saves_nothing(self, tmp_path: Path) -> None:
        command = [
            sys.executable,
            "-m",
            "vnp_lib",
            "plan",
            "--json",
            "--fasta",
            "-",
            "--model",
            "esm2_t6_8M_UR50D",
        ]
        command += ["--devices", "cpu", "--output-dir", str(tmp_path / "run")]
        text = b">a\nMKV\n>b\nM-\n"
        estimate = json.loads(
            subprocess.run(command, input=text, cwd=ROOT, capture_output=True, check=False).stdout
        )
        assert (estimate["num_sequences"], estimate["num_refused"]) == (1, 1)
        assert estimate["refusals"][0].startswith("standard input, line 3:")
        assert list(tmp_path.iterdir()) == []
