"""Exports: complete or absent, and equal to the dataset when read by the library they are for."""

from __future__ import annotations

import csv
import dataclasses
import os
import shutil
import signal
import subprocess
import sys
import tracemalloc
from collections import namedtuple
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from esm import FastaBatchedDataset
from numpy.typing import NDArray
from safetensors import safe_open

import vnp_lib.storage.durable
from tests.fake_runs import (
    DIM,
    Records,
    Run,
    embed,
    fake_records,
    finish_run,
    finished_run_of,
    identity_of,
    outputs_of,
    start_run,
    start_run_of,
    write_checkpoint,
    write_planned,
)
from tests.helpers import flip_bit
from vnp_lib.cli import main
from vnp_lib.dataset import open_dataset
from vnp_lib.dataset.export import Export, export_dataset
from vnp_lib.dataset.formats import base as formats_base
from vnp_lib.dataset.formats import torch_files
from vnp_lib.dataset.formats.base import ExportRows, Format
from vnp_lib.dataset.formats.hdf5 import accession
from vnp_lib.dataset.formats.registry import FORMATS, RAGGED_FORMATS
from vnp_lib.errors import ConfigError, StorageError
from vnp_lib.plan.outputs import RowLayout, StoreDtype
from vnp_lib.storage.durable import DurableOps

ODD_IDS = [
    "sp|P12345|NAME_HUMAN",
    "tr|A0A0",
    "NA",
    "1.0",
    "café|½",
    'a,"b"',
    "'",
    "{path}",
    "p:0\\1",
    "-inf",
]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """150 sequences in four parts, with identical ones and ids that confuse readers."""
    records = fake_records()
    records.ids[: len(ODD_IDS)] = ODD_IDS
    run = finish_run(start_run_of(tmp_path, records))
    run.assemble()
    return run


def export(run: Run, to: str, output: Path, **options: Any) -> Export:
    return export_dataset(run.paths.run_dir, to, output=output, **options)


def read_back(done: Export) -> dict[str, Any]:
    """Run the code that the export prints, and return its variables."""
    names: dict[str, Any] = {}
    exec(done.read, names)
    return names


def in_extract_file(file: dict[str, Any], output: str) -> torch.Tensor:
    """Return an output of a fair-esm file: `file["mean_representations"][6]` for `mean_6`."""
    kind, _, layer = output.rpartition("_")
    if not layer.isdigit():
        return file[output]
    return file["representations" if kind == "per_tok" else f"{kind}_representations"][int(layer)]


def rows_by_id(done: Export, run: Run, to: str, output: str = "mean_6") -> dict[str, NDArray[Any]]:
    """Read an export and return its rows; check the order of formats that have one."""
    names = read_back(done)
    if to == "hdf5-uniprot":
        return {sequence_id: names["embeddings"][accession(sequence_id)] for sequence_id in run.ids}
    if to == "esm-extract":
        files = {label.split()[0]: file for label, file in names["embeddings"].items()}
        return {id_: in_extract_file(file, output).numpy() for id_, file in files.items()}
    assert list(names["ids"]) == run.ids
    return {
        str(id_): np.asarray(row)
        for id_, row in zip(names["ids"], names["embeddings"], strict=True)
    }


def names_in(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


@pytest.mark.parametrize("to", FORMATS)
def test_what_is_read_back_is_the_dataset_row_by_row(run: Run, to: str, tmp_path: Path) -> None:
    """The code that reads it is the one that the command prints."""
    done = export(run, to, tmp_path / "out" / "it's {here}")
    rows = rows_by_id(done, run, to)
    assert len(rows) == 150
    for sequence_id, sequence in zip(run.ids, run.sequences, strict=True):
        assert rows[sequence_id].dtype == np.float32
        assert np.array_equal(rows[sequence_id], embed(sequence)), sequence_id
    assert not [name for name in names_in(tmp_path / "out") if name.startswith(".tmp")]


@pytest.mark.parametrize("to", [to for to in FORMATS if to not in ("csv", "virnucpro")])
def test_float16_is_the_nearest_float16(run: Run, to: str, tmp_path: Path) -> None:
    rows = rows_by_id(export(run, to, tmp_path / "out", dtype=StoreDtype.FLOAT16), run, to)
    for sequence_id, sequence in zip(run.ids, run.sequences, strict=True):
        assert rows[sequence_id].dtype == np.float16
        assert np.array_equal(rows[sequence_id], embed(sequence).astype(np.float16))


def test_csv_is_what_the_standard_library_reads_too(run: Run, tmp_path: Path) -> None:
    export(run, "csv", tmp_path / "x.csv", dtype=StoreDtype.FLOAT16)
    with (tmp_path / "x.csv").open(newline="", encoding="utf-8") as file:
        header, *lines = csv.reader(file)
    assert header == ["id", *(f"dim_{number}" for number in range(DIM))]
    assert [line[0] for line in lines] == run.ids
    values = np.array([line[1:] for line in lines], dtype=np.float16)
    assert np.array_equal(values, run.expected_rows().astype(np.float16))


@pytest.mark.parametrize("to", FORMATS)
def test_nothing_is_overwritten_without_force(run: Run, to: str, tmp_path: Path) -> None:
    """With it everything is, including a file of ids."""
    directory = tmp_path / "exports"
    for dtype in FORMATS[to].dtypes:
        export(run, to, directory / "x", dtype=dtype, replace=True)
    before = {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()}
    with pytest.raises(ConfigError, match="exists already: use --force"):
        export(run, to, directory / "x")
    assert {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()} == before
    rows_by_id(export(run, to, directory / "x", replace=True), run, to)
    assert {path for path in directory.rglob("*") if path.is_file()} == before.keys()


def test_force_removes_nothing_that_is_no_export(run: Run, tmp_path: Path) -> None:
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "thesis.tex").write_text("years")
    for to in ("virnucpro", "esm-extract"):
        with pytest.raises(ConfigError, match="holds more than an export"):
            export(run, to, tmp_path / "work", replace=True)
        with pytest.raises(ConfigError, match="holds more than an export"):
            export(run, to, tmp_path / "work" / "thesis.tex", replace=True)
        with pytest.raises(ConfigError, match="holds more than an export"):
            export(run, to, run.paths.run_dir, replace=True)
    (tmp_path / "x.npy").mkdir()
    with pytest.raises(ConfigError, match="is a directory"):
        export(run, "npy", tmp_path / "x", replace=True)
    assert (tmp_path / "work" / "thesis.tex").read_text() == "years"
    assert names_in(tmp_path / "work") == ["thesis.tex"]


KILLED_AT_THE_SECOND_BATCH = """
import os, signal, sys
from vnp_lib.cli import main
from vnp_lib.dataset.reader import EmbeddingDataset
whole = EmbeddingDataset.record_batches
def cut_short(*arguments):
    for number, batch in enumerate(whole(*arguments)):
        if number == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        yield batch
EmbeddingDataset.record_batches = cut_short
main(sys.argv[1:])
"""


@pytest.mark.parametrize("to", ["hdf5", "esm-extract"])
def test_a_killed_export_leaves_nothing_under_the_final_name(
    run: Run, to: str, tmp_path: Path
) -> None:
    """The next export removes its temporary files."""
    directory = tmp_path / "exports"
    arguments = ["export", str(run.paths.run_dir), "--to", to, "--output", str(directory / "x")]
    killed = subprocess.run(
        [sys.executable, "-c", KILLED_AT_THE_SECOND_BATCH, *arguments], check=False, timeout=120
    )
    assert killed.returncode == -signal.SIGKILL
    left = names_in(directory)
    assert left
    assert all(name.startswith(".tmp-") for name in left)

    assert main(arguments) == 0
    assert not [name for name in names_in(directory) if name.startswith(".tmp-")]
    assert len(rows_by_id(export(run, to, directory / "x", replace=True), run, to)) == 150


def test_a_matrix_never_exists_with_the_ids_of_another(
    run: Run, tmp_path: Path, monkeypatch: Any
) -> None:
    """The previous matrix is removed, durably, before the new ids are published."""
    export(run, "npy", tmp_path / "x")
    steps: list[str] = []

    class Recording(DurableOps):
        def unlink(self, path: Path) -> None:
            steps.append(f"unlink {path.name}")
            super().unlink(path)

        def replace(self, source: Path, target: Path) -> None:
            steps.append(f"place {target.name}")
            super().replace(source, target)

        def fsync_directory(self, path: Path) -> None:
            steps.append("sync")
            super().fsync_directory(path)

    monkeypatch.setattr(vnp_lib.storage.durable, "ops", Recording())
    export(run, "npy", tmp_path / "x", replace=True)
    assert steps[-6:] == ["unlink x.npy", "sync", "place x.ids.txt", "sync", "place x.npy", "sync"]


WITH_A_FILE_SIZE_LIMIT = """
import resource, sys
from vnp_lib.cli import main
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
run_dir, directory, column, *formats = sys.argv[1:]
for to in formats:
    options = ["--to", to, "--column", column, "--output", f"{directory}/{to}"]
    print(to, main(["export", run_dir, *options]))
"""


@pytest.mark.parametrize(
    ("of", "column", "formats"),
    [("run", "embedding", FORMATS), ("everything", "per_tok_6", RAGGED_FORMATS)],
)
def test_a_full_disk_is_one_error_and_leaves_nothing(
    request: pytest.FixtureRequest, tmp_path: Path, of: str, column: str, formats: dict[str, Format]
) -> None:
    """The system limits the size of every file of the process to 1,000 bytes."""
    run_dir, directory = request.getfixturevalue(of).paths.run_dir, tmp_path / "exports"
    command = [
        sys.executable,
        "-c",
        WITH_A_FILE_SIZE_LIMIT,
        run_dir,
        directory,
        column,
        *formats,
    ]
    ended = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    assert ended.stdout.splitlines() == [f"{to} 1" for to in formats]
    assert len(ended.stderr.splitlines()) == len(formats)
    assert ended.stderr.count("File too large); nothing is left of it: make room") == len(formats)
    assert names_in(directory) == []


def test_too_little_space_is_an_error_before_writing(
    run: Run, tmp_path: Path, monkeypatch: Any
) -> None:
    usage = namedtuple("usage", "total used free")(10**6, 10**6 - 999, 999)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(StorageError, match=r"999 bytes free and .* are needed: make room"):
        export(run, "npy", tmp_path / "exports" / "x")
    assert names_in(tmp_path / "exports") == []


@pytest.mark.parametrize("to", ["npy", "npz", "csv", "hdf5", "h5ad", "safetensors"])
def test_memory_does_not_grow_with_the_dataset(tmp_path: Path, to: str, monkeypatch: Any) -> None:
    dim, num_sequences = 1024, 6_000
    monkeypatch.setattr(formats_base, "_BATCH_BYTES", 1024**2)
    ids = [f"p{number}" for number in range(num_sequences)]
    run = start_run_of(tmp_path, Records(ids, [""] * num_sequences, ["MKV"] * num_sequences))
    rows = np.linspace(-1, 1, dim, dtype=np.float32)[np.newaxis]
    write_checkpoint(run.plan, run.paths.checkpoint(0, 0), run.plan.order, rows=rows)
    run.assemble(part_bytes=4 * 1024**2)

    assert (
        peak_bytes_of(FORMATS[to], run, "embedding", tmp_path / "x") < num_sequences * dim * 4 / 2
    )


def peak_bytes_of(chosen: Format, run: Run, column: str, path: Path) -> int:
    """Return the peak memory of an export."""
    rows = ExportRows(
        dataset=open_dataset(run.paths.run_dir), columns=(column,), dtype=StoreDtype.FLOAT32
    )
    tracemalloc.start()
    chosen.write(rows, path, False)
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return peak_bytes


def with_a_value_of(run: Run, value: float) -> Run:
    """Return a run in which the fourth row of each checkpoint has a large value."""
    for rank in range(run.plan.num_shards):
        ordinals = run.plan.shard_ordinals(rank)
        rows = np.stack([embed(run.sequences[ordinal]) for ordinal in ordinals])
        rows[3, 5] = value
        write_checkpoint(run.plan, run.paths.checkpoint(rank, 0), ordinals, rows=rows)
    run.assemble()
    return run


def test_float16_overflow_names_the_sequence(tmp_path: Path) -> None:
    run = with_a_value_of(start_run(tmp_path), -70_000.0)
    with pytest.raises(
        ConfigError,
        match=r"the embedding of 'p\d+' has a value of 70,000, and float16 ends at 65,504",
    ):
        export(run, "npy", tmp_path / "x", dtype=StoreDtype.FLOAT16)
    assert not list(tmp_path.glob("*x*.npy"))
    export(run, "npy", tmp_path / "x")


def test_virnucpro_takes_float32_only(run: Run, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="stores float32 only"):
        export(run, "virnucpro", tmp_path / "x", dtype=StoreDtype.FLOAT16)


def test_a_missing_library_is_named_with_its_command(
    run: Run, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(ConfigError, match=r"--to hdf5 needs h5py: pip install 'vnp\[export\]'"):
        export(run, "hdf5", tmp_path / "x")


def test_a_partial_dataset_is_exported_only_on_request(tmp_path: Path, capsys: Any) -> None:
    run = start_run(tmp_path)
    finish_run(run, without=[int(run.plan.order[0])])
    run.assemble(allow_missing=True)
    with pytest.raises(ConfigError, match="missing from the dataset; start the run again"):
        export(run, "npy", tmp_path / "x")
    arguments = ["export", str(run.paths.run_dir), "--to", "npy", "--allow-partial"]
    assert main(arguments) == 0
    assert (
        f"{len(open_dataset(run.paths.run_dir)):,} sequences exported, " in capsys.readouterr().out
    )


def test_the_command_reports_what_it_wrote_or_refused(
    run: Run, tmp_path: Path, capsys: Any
) -> None:
    arguments = ["export", str(run.paths.run_dir), "--to", "npy"]
    path = run.paths.run_dir / "exports" / "embeddings.npy"
    assert main(arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[:3] == ["150 sequences exported", f"export: {path} (5.6 kB)", "read it back:"]
    assert f'    embeddings = np.load({str(path)!r}, mmap_mode="r")' in lines
    assert names_in(path.parent) == ["embeddings.ids.txt", "embeddings.npy"]

    assert main(arguments) == 2
    assert "exists already" in capsys.readouterr().err
    assert main(["export", str(tmp_path), "--to", "npy"]) == 2
    assert "there is no complete dataset here" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["export", str(run.paths.run_dir), "--to", "xml"])


def test_a_damaged_dataset_is_not_exported(run: Run, tmp_path: Path, capsys: Any) -> None:
    part = run.paths.embeddings_dir / "part-00002.parquet"
    group = pq.ParquetFile(part).metadata.row_group(0)
    # The last column has the embeddings.
    flip_bit(part, 8 * (group.column(group.num_columns - 1).data_page_offset + 100))
    output = ["--output", str(tmp_path / "out" / "x")]
    assert main(["export", str(run.paths.run_dir), "--to", "npy", *output]) == 1
    assert "part-00002.parquet is damaged" in capsys.readouterr().err
    assert names_in(tmp_path / "out") == []


def test_too_many_rows_for_a_format_are_warned_of(
    run: Run, tmp_path: Path, monkeypatch: Any, caplog: Any
) -> None:
    few = dataclasses.replace(FORMATS["hdf5-uniprot"], num_rows_advised=149)
    monkeypatch.setitem(FORMATS, "hdf5-uniprot", few)
    export(run, "hdf5-uniprot", tmp_path / "x")
    assert "is meant for up to 149 sequences, and the dataset has 150" in caplog.text
    caplog.clear()
    export(run, "hdf5", tmp_path / "y")
    assert not caplog.records


OUTPUTS = ("mean_5", "mean_6", "bos_6", "max_6", "std_6", "per_tok_6", "contacts", "logits")
EVERYTHING = RowLayout.of_names(OUTPUTS, embed_dim=DIM)


@pytest.fixture(scope="module")
def everything(tmp_path_factory: pytest.TempPathFactory) -> Run:
    run = finished_run_of(tmp_path_factory.mktemp("everything"), EVERYTHING)
    run.assemble(part_bytes=400_000)
    return run


class TestSeveralOutputs:
    """Every column is exported in its own shape, or refused with the formats that hold it."""

    def assert_read_back(
        self, done: Export, run: Run, to: str, column: str, dtype: str = "float32"
    ) -> None:
        found = rows_by_id(done, run, to, column)
        assert len(found) == 150
        for sequence_id, sequence in zip(run.ids, run.sequences, strict=True):
            expected = outputs_of(EVERYTHING, sequence)[column].astype(dtype)
            assert found[sequence_id].dtype == expected.dtype
            assert np.array_equal(found[sequence_id], expected), sequence_id

    @pytest.mark.parametrize("column", ["mean_5", "max_6"])
    @pytest.mark.parametrize("to", FORMATS)
    def test_any_vector_is_exported_as_the_mean_is(
        self, everything: Run, to: str, column: str, tmp_path: Path
    ) -> None:
        self.assert_read_back(
            export(everything, to, tmp_path / "x", column=column), everything, to, column
        )

    @pytest.mark.parametrize("column", ["per_tok_6", "contacts", "logits"])
    @pytest.mark.parametrize("to", RAGGED_FORMATS)
    def test_values_of_residues_come_back_in_their_shapes(
        self, everything: Run, to: str, column: str, tmp_path: Path
    ) -> None:
        self.assert_read_back(
            export(everything, to, tmp_path / "x", column=column), everything, to, column
        )
        halved = export(everything, to, tmp_path / "y", column=column, dtype=StoreDtype.FLOAT16)
        self.assert_read_back(halved, everything, to, column, "float16")

    def test_the_files_of_esm_extract_hold_all_of_it(self, everything: Run, tmp_path: Path) -> None:
        files = read_back(export(everything, "esm-extract", tmp_path / "x"))["embeddings"]
        assert len(files) == 150
        for label, file in files.items():
            assert file.keys() == {
                "representations",
                *(f"{kind}_representations" for kind in ("mean", "bos", "max", "std")),
                "contacts",
                "logits",
            }
            sequence = everything.sequences[everything.ids.index(label.split()[0])]
            for name, values in outputs_of(EVERYTHING, sequence).items():
                tensor = in_extract_file(file, name)
                assert np.array_equal(tensor.numpy(), values), name
                assert tensor.untyped_storage().nbytes() == values.nbytes

    @pytest.mark.parametrize("to", sorted(FORMATS.keys() - RAGGED_FORMATS.keys()))
    def test_a_format_of_vectors_says_which_others_take_residues(
        self, everything: Run, to: str, tmp_path: Path
    ) -> None:
        message = (
            f"--to {to} holds one vector per sequence, and contacts has .* "
            "npz, hdf5-uniprot, safetensors, esm-extract"
        )
        with pytest.raises(ConfigError, match=message):
            export(everything, to, tmp_path / "out" / "x", column="contacts")
        assert not (tmp_path / "out").exists()

    def test_a_column_has_to_be_chosen_and_to_be_there(
        self, everything: Run, tmp_path: Path, capsys: Any
    ) -> None:
        output = ["--output", str(tmp_path / "x")]
        arguments = ["export", str(everything.paths.run_dir), "--to", "npy", *output]
        assert main(arguments) == 2
        message = (
            f"has the columns {', '.join(OUTPUTS)}, and --to npy holds one: "
            "choose it, for example with --column mean_5"
        )
        assert message in capsys.readouterr().err
        assert main([*arguments, "--column", "embedding"]) == 2
        assert "--column embedding: there is no such column; " in capsys.readouterr().err
        assert main([*arguments, "--column", "bos_6"]) == 0
        assert np.load(tmp_path / "x.npy").shape == (150, DIM)

    def test_each_column_has_a_place_of_its_own_by_default(self, everything: Run) -> None:
        done = [
            export_dataset(everything.paths.run_dir, to, column=column)
            for to in ("npz", "esm-extract")
            for column in ("mean_5", "mean_6")
        ]
        assert [export.path.name for export in done] == [
            "embeddings-mean_5.npz",
            "embeddings-mean_6.npz",
            "esm-extract-mean_5",
            "esm-extract-mean_6",
        ]

    def test_metadata_describes_the_exported_column(self, everything: Run, tmp_path: Path) -> None:
        for column, layer, kind in (
            ("mean_5", "5", "mean"),
            ("per_tok_6", "6", "per_tok"),
            ("contacts", None, "contacts"),
        ):
            with h5py.File(
                export(everything, "hdf5-uniprot", tmp_path / column, column=column).path
            ) as file:
                assert (file.attrs.get("layer"), file.attrs["pooling"]) == (layer, kind)
            with safe_open(
                export(everything, "safetensors", tmp_path / column, column=column).path,
                framework="np",
            ) as tensors:
                assert (tensors.metadata().get("layer"), tensors.metadata()["pooling"]) == (
                    layer,
                    kind,
                )


@pytest.mark.parametrize("names", [["mean_6", "per_tok_6"], ["per_tok_6"]])
def test_the_only_column_of_vectors_is_the_default(tmp_path: Path, names: list[str]) -> None:
    layout = RowLayout.of_names(names, embed_dim=DIM)
    run = finished_run_of(tmp_path, layout)
    run.assemble()
    found = rows_by_id(export(run, "npz", tmp_path / "x"), run, "npz")
    for sequence_id, sequence in zip(run.ids, run.sequences, strict=True):
        assert np.array_equal(found[sequence_id], outputs_of(layout, sequence)[names[0]])


@pytest.mark.parametrize("to", sorted(RAGGED_FORMATS))
def test_memory_is_for_the_longest_sequence_only(tmp_path: Path, to: str) -> None:
    """48 MB are repetitions of a few sequences of up to 2,400 residues."""
    layout = RowLayout.of_names(["per_tok_6"], embed_dim=DIM)
    lengths = [2_400 - number % 12 for number in range(600)]
    ids = [f"p{number}" for number in range(600)]
    run = start_run_of(
        tmp_path,
        Records(ids, [""] * 600, ["M" * length for length in lengths]),
        identity_of(layout),
    )
    write_planned(run, layout, run.paths.checkpoint(0, 0), run.plan.order)
    run.assemble(part_bytes=8 * 1024**2)
    whole_bytes = sum(lengths) * DIM * 4
    assert (
        peak_bytes_of(RAGGED_FORMATS[to], run, "per_tok_6", tmp_path / "x")
        < 16 * 1024**2
        < whole_bytes / 2
    )


def test_float16_overflow_in_a_residue_names_the_sequence(
    tmp_path: Path,
) -> None:
    layout = RowLayout.of_names(["per_tok_6"], embed_dim=DIM)
    run = start_run_of(
        tmp_path, Records(["a", "b"], ["", ""], ["MKV", "MKVA"]), identity_of(layout)
    )
    rows = np.ones(7 * DIM, dtype=np.float32)
    # The longest sequence, 'b', is the first in the checkpoint.
    rows[2] = 1e6
    offsets = np.array([0, 4 * DIM, 7 * DIM])
    write_checkpoint(
        run.plan, run.paths.checkpoint(0, 0), run.plan.order, rows=rows, offsets=offsets
    )
    run.assemble()
    with pytest.raises(
        ConfigError,
        match="the embedding of 'b' has a value of 1,000,000, and float16 ends at 65,504",
    ):
        export(run, "npz", tmp_path / "x", dtype=StoreDtype.FLOAT16)


@pytest.mark.parametrize("to", FORMATS)
def test_a_float16_dataset_is_exported_with_its_values(tmp_path: Path, to: str) -> None:
    run = finish_run(start_run(tmp_path, store_dtype=StoreDtype.FLOAT16))
    run.assemble()
    for dtype in FORMATS[to].dtypes:
        rows = rows_by_id(export(run, to, tmp_path / dtype, dtype=dtype), run, to)
        for sequence_id, sequence in zip(run.ids, run.sequences, strict=True):
            assert np.array_equal(
                rows[sequence_id].astype(np.float32),
                embed(sequence).astype(np.float16).astype(np.float32),
            )


class TestHdf5:
    def test_the_layout_is_that_of_virnucpro_broad(self, run: Run, tmp_path: Path) -> None:
        export(run, "hdf5", tmp_path / "x.hdf5")
        with h5py.File(tmp_path / "x.hdf5") as file:
            assert sorted(file) == ["embeddings", "sequence_ids"]
            assert (file["embeddings"].shape, file["embeddings"].dtype) == ((150, DIM), np.float32)
            assert file["embeddings"].chunks
            assert h5py.check_string_dtype(file["sequence_ids"].dtype).length is None
            assert file["sequence_ids"][0].decode("utf-8") == run.ids[0]
            assert file.attrs["model_name"] == "esm2_t6_8M_UR50D"
            assert file.attrs["fingerprint"] == run.plan.fingerprint

    def test_uniprot_keys_are_accessions_at_the_root(self, run: Run, tmp_path: Path) -> None:
        export(run, "hdf5-uniprot", tmp_path / "x.h5")
        with h5py.File(tmp_path / "x.h5") as file:
            assert set(file) == {"P12345", "A0A0", *run.ids[2:]}
            assert file["P12345"].shape == (DIM,)

    @pytest.mark.parametrize(
        ("ids", "what"),
        [
            (
                ["sp|P1|A", "tr|P1|B"],
                r"'tr\|P1\|B' is not the only sequence with the accession 'P1'",
            ),
            (["a/b"], "'a/b' cannot be a name in the root group"),
            (["."], r"'\.' cannot be a name in the root group"),
        ],
    )
    def test_an_id_without_a_unique_key_is_refused(
        self, tmp_path: Path, ids: list[str], what: str
    ) -> None:
        with pytest.raises(ConfigError, match=what):
            export(small_run(tmp_path, ids), "hdf5-uniprot", tmp_path / "x")
        assert not (tmp_path / "x.uniprot.h5").exists()


def small_run(tmp_path: Path, ids: list[str], descriptions: Sequence[str] = ()) -> Run:
    sequences = ["MKV" + "A" * number for number in range(len(ids))]
    run = start_run_of(tmp_path, Records(ids, list(descriptions) or [""] * len(ids), sequences))
    finish_run(run).assemble()
    return run


def test_anndata_reads_it_a_part_at_a_time_too(run: Run, tmp_path: Path) -> None:
    # Imported here, because the import takes seconds.
    import anndata

    export(run, "h5ad", tmp_path / "x.h5ad")
    table = anndata.read_h5ad(tmp_path / "x.h5ad", backed="r")
    assert table.shape == (150, DIM)
    assert np.array_equal(table[40:45].to_memory().X, run.expected_rows()[40:45])
    assert list(table.var_names) == [f"dim_{number}" for number in range(DIM)]
    table.file.close()


def test_safetensors_gives_slices_and_says_what_they_are(run: Run, tmp_path: Path) -> None:
    export(run, "safetensors", tmp_path / "x.safetensors")
    with safe_open(tmp_path / "x.safetensors", framework="np") as file:
        assert np.array_equal(file.get_slice("embeddings")[10:20], run.expected_rows()[10:20])
        assert file.metadata()["model"] == "esm2_t6_8M_UR50D"


def merge_as_virnucpro(
    nucleotide_file: dict[str, Any], esm_file: Path
) -> tuple[list[str], torch.Tensor]:
    """Merge a pair of files as VirNucPro does; return also the ids that it does not find."""
    of_esm = torch.load(esm_file)
    proteins = dict(zip(of_esm["proteins"], of_esm["data"], strict=True))
    missing, merged = [], []
    for sequence_id, vector in zip(
        nucleotide_file["nucleotide"], nucleotide_file["data"], strict=True
    ):
        if sequence_id in proteins:
            merged.append(
                torch.cat(
                    (torch.tensor(vector["mean_representation"]), proteins[sequence_id]), dim=-1
                )
            )
        else:
            missing.append(sequence_id)
    return missing, torch.stack(merged)


def test_virnucpros_merge_step_finds_every_protein(tmp_path: Path) -> None:
    """A quarantined sequence must not move others to another file.

    VirNucPro divides its input every 10,000 records, and joins files by number.
    """
    count = 10_030
    ids = [f"contig{i // 6}_chunk_1{'FR'[i % 6 // 3]}{i % 3 + 1}" for i in range(count)]
    residues = "LAGVSERTIDPKQNFYMHWC"
    sequences = [
        "MK" + "".join(residues[i // 20**place % 20] for place in range(4)) for i in range(count)
    ]
    run = start_run_of(tmp_path, Records(ids, [""] * count, sequences))
    finish_run(run, without=[5]).assemble(quarantined=[5])
    export(run, "virnucpro", tmp_path / "chunked_protein")
    assert names_in(tmp_path / "chunked_protein") == ["output_1_ESM.pt", "output_2_ESM.pt"]

    records = iter(ids)
    for number, missing in ((1, [ids[5]]), (2, [])):
        labels = list(islice(records, 10_000))
        nucleotide_file = {
            "nucleotide": labels,
            "data": [{"mean_representation": [float(len(id_))] * 3} for id_ in labels],
        }
        not_found, merged = merge_as_virnucpro(
            nucleotide_file, tmp_path / "chunked_protein" / f"output_{number}_ESM.pt"
        )
        assert not_found == missing
        start = (number - 1) * 10_000
        kept = [i for i in range(start, start + len(labels)) if ids[i] not in missing]
        assert merged.dtype == torch.float32
        assert np.array_equal(merged[:, 3:].numpy(), np.stack([embed(sequences[i]) for i in kept]))
        assert merged[:, 0].tolist() == [len(ids[i]) for i in kept]


def test_virnucpro_gets_a_tensor_of_its_own_for_each_protein(run: Run, tmp_path: Path) -> None:
    export(run, "virnucpro", tmp_path / "x")
    file = torch.load(tmp_path / "x" / "output_1_ESM.pt")
    assert list(file) == ["proteins", "data"]
    assert (type(file["proteins"]), type(file["data"])) == (list, list)
    assert {
        (tensor.shape, tensor.dtype, tensor.untyped_storage().nbytes()) for tensor in file["data"]
    } == {(torch.Size([DIM]), torch.float32, 4 * DIM)}


def test_virnucpro_gets_a_file_for_quarantined_sequences_too(
    tmp_path: Path, monkeypatch: Any
) -> None:
    """Without it, later files would be joined with those of another number."""
    monkeypatch.setattr(torch_files, "_VIRNUCPRO_FILE_SEQUENCES", 2)
    records = Records(list("abcde"), [""] * 5, ["MKV", "MKVA", "MKVL", "MKVS", "MKVT"])
    run = start_run_of(tmp_path, records)
    finish_run(run, without=[2, 3]).assemble(quarantined=[2, 3])
    export(run, "virnucpro", tmp_path / "x")
    held = [
        torch.load(tmp_path / "x" / f"output_{number}_ESM.pt")["proteins"] for number in (1, 2, 3)
    ]
    assert held == [["a", "b"], [], ["e"]]


def test_esm_extract_has_the_files_that_fair_esm_would_write(tmp_path: Path) -> None:
    """The labels are those of fair-esm's FASTA reader; a slash in one makes a directory."""
    run = small_run(
        tmp_path,
        ["sp|P1|A", "plain", "50S/30S", "deep/er"],
        ["Protein A OS=Homo sapiens", "", "ribosomal / both", "is fine/in words"],
    )
    labels = FastaBatchedDataset.from_file(tmp_path / "x.fasta").sequence_labels
    export(run, "esm-extract", tmp_path / "out")
    expected = {
        tmp_path / "out" / f"{label}.pt": (label, row)
        for label, row in zip(labels, run.expected_rows(), strict=True)
    }
    assert {path for path in (tmp_path / "out").rglob("*") if path.is_file()} == expected.keys()
    for path, (label, row) in expected.items():
        result = torch.load(path)
        assert list(result) == ["label", "mean_representations"]
        assert result["label"] == label
        assert list(result["mean_representations"]) == [6]
        tensor = result["mean_representations"][6]
        assert np.array_equal(tensor.numpy(), row)
        assert tensor.untyped_storage().nbytes() == 4 * DIM


@pytest.mark.parametrize(
    "ids",
    [
        ["../escaped"],
        ["a/../../escaped"],
        ["/tmp/escaped"],
        ["a//b"],
        ["./a"],
        ["x" * 300],
        ["a.pt/b", "a"],
        ["a", "a.pt/b"],
        ["a", "a.pt/b/c"],
    ],
)
def test_a_header_that_leads_out_of_the_directory_is_refused(
    tmp_path: Path, ids: list[str]
) -> None:
    run = small_run(tmp_path, ids)
    before = {path for path in tmp_path.rglob("*")}
    with pytest.raises(ConfigError, match="choose another format"):
        export(run, "esm-extract", tmp_path / "out")
    assert {path for path in tmp_path.rglob("*")} == before
    assert not os.path.lexists("/tmp/escaped.pt")
