"""Proteins in Python objects: each gets the row of its own sequence, under its own id."""

from __future__ import annotations

import csv
import io
import sqlite3
import sys
from collections import UserString
from collections.abc import Iterator
from contextlib import closing, nullcontext
from pathlib import Path
from typing import Any

import dnaio
import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pytest
from Bio import SeqIO
from Bio.Align import MultipleSeqAlignment
from Bio.Seq import MutableSeq, Seq
from Bio.SeqRecord import SeqRecord

from vnp_lib import embed, open_dataset
from vnp_lib.errors import ConfigError, FastaError
from vnp_lib.inputs.in_memory import RecordsInMemory, files_or_records

NAMED = {"p": "MKVLATTWQERS", "q": "MKL", "r": "ACDEFGHIKLMNPQRSTVWYX", "s": "W"}
IDS, SEQUENCES = list(NAMED), list(NAMED.values())
NUMBERED = ["0", "1", "2", "3"]
SMALL: dict[str, Any] = {
    "model": "esm2_t6_8M_UR50D",
    "weights": "random",
    "device": "cpu",
    "progress": False,
}
TABLE = {"id": IDS, "sequence": SEQUENCES}


@pytest.fixture(scope="module")
def oracle() -> dict[str, np.ndarray]:
    """Return the row of each sequence, by its residues, from a dictionary of texts."""
    return {NAMED[name]: vector for name, vector in embed(NAMED, **SMALL)}


@pytest.fixture
def fasta(tmp_path: Path) -> Path:
    path = tmp_path / "in.fasta"
    path.write_text("".join(f">{name} of a kind\n{sequence}\n" for name, sequence in NAMED.items()))
    return path


def parsed(fasta: Path) -> Iterator[SeqRecord]:
    return SeqIO.parse(io.StringIO(fasta.read_text()), "fasta")


def dnaio_records(fasta: Path) -> list[dnaio.SequenceRecord]:
    with dnaio.open(fasta) as opened:
        return list(opened)


def held(given: Any, **columns: str) -> dict[str, str]:
    """Return the sequences found in an object, by id."""
    found = files_or_records(given, **columns)
    assert isinstance(found, RecordsInMemory)
    assert all(type(text) is str for text in (*found.ids, *found.sequences))
    return dict(zip(found.ids, found.sequences, strict=True))


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(lambda path: parsed(path), id="SeqIO.parse"),
        pytest.param(lambda _: pd.Series(SEQUENCES, index=IDS), id="pandas Series"),
        pytest.param(
            lambda _: pd.DataFrame({"length": 1, "sequence": SEQUENCES, "id": IDS}),
            id="pandas DataFrame",
        ),
        pytest.param(
            lambda _: pl.DataFrame({"id": IDS, "sequence": SEQUENCES}), id="polars DataFrame"
        ),
        pytest.param(lambda _: pa.table({"sequence": SEQUENCES, "id": IDS}), id="pyarrow Table"),
        pytest.param(lambda path: [str(path)], id="a list of paths as text"),
    ],
)
@pytest.mark.parametrize("in_memory", [True, False])
def test_each_row_is_that_of_the_sequence_with_its_id(tmp_path, fasta, oracle, make, in_memory):
    """The rows are those of a dictionary of texts."""
    embeddings = embed(make(fasta), **SMALL, output_dir=None if in_memory else tmp_path / "run")
    assert embeddings.ids == IDS
    for name, vector in embeddings:
        np.testing.assert_allclose(vector, oracle[NAMED[name]], atol=1e-5)


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(lambda path: list(parsed(path)), id="list of SeqRecord"),
        pytest.param(lambda path: SeqIO.to_dict(parsed(path)), id="SeqIO.to_dict"),
        pytest.param(lambda path: SeqIO.index(str(path), "fasta"), id="SeqIO.index"),
        pytest.param(lambda path: (record for record in parsed(path)), id="generator of SeqRecord"),
        pytest.param(lambda path: dnaio_records(path), id="dnaio's records"),
        pytest.param(lambda _: {name: Seq(text) for name, text in NAMED.items()}, id="dict of Seq"),
        pytest.param(
            lambda _: {name: text.encode() for name, text in NAMED.items()}, id="dict of bytes"
        ),
        pytest.param(
            lambda _: [(name, Seq(text)) for name, text in NAMED.items()], id="pairs with Seq"
        ),
        pytest.param(lambda _: zip(IDS, SEQUENCES, strict=True), id="zip"),
        pytest.param(lambda _: [[name, text] for name, text in NAMED.items()], id="pairs as lists"),
        pytest.param(lambda _: NAMED.items(), id="items of a dict"),
        pytest.param(lambda _: np.array(list(NAMED.items())), id="NumPy, two columns"),
        pytest.param(
            lambda _: np.array(list(NAMED.items()), dtype=[("id", "U9"), ("sequence", "U99")]),
            id="NumPy, named",
        ),
        pytest.param(lambda _: pd.DataFrame(TABLE).set_index("id"), id="DataFrame, id as index"),
        pytest.param(lambda _: pd.DataFrame(TABLE, dtype="string"), id="DataFrame of strings"),
        pytest.param(lambda _: pd.DataFrame(TABLE, dtype="category"), id="DataFrame of categories"),
        pytest.param(
            lambda _: pd.DataFrame({"id": IDS, "sequence": list(map(Seq, SEQUENCES))}),
            id="DataFrame of Seq",
        ),
        pytest.param(lambda _: pd.DataFrame(TABLE).to_dict("records"), id="a dict for each record"),
        pytest.param(lambda _: pd.DataFrame(TABLE).itertuples(), id="itertuples"),
        pytest.param(lambda _: pl.DataFrame(TABLE).iter_rows(), id="rows of polars"),
        pytest.param(
            lambda _: pl.DataFrame(TABLE).iter_rows(named=True), id="named rows of polars"
        ),
        pytest.param(lambda _: pa.table(TABLE).to_batches()[0], id="pyarrow RecordBatch"),
        pytest.param(
            lambda _: pd.Series(SEQUENCES, index=pd.Index(IDS, name="id")), id="Series, named index"
        ),
        pytest.param(
            lambda _: pd.Series(SEQUENCES, index=["id", "seq", "columns", "s"]),
            id="Series, odd index",
        ),
        pytest.param(
            lambda _: csv.DictReader(
                io.StringIO("id,sequence\n" + "".join(f"{i},{s}\n" for i, s in NAMED.items()))
            ),
            id="csv.DictReader",
        ),
    ],
)
def test_objects_with_ids_keep_them(fasta, make):
    given = make(fasta)
    with closing(given) if hasattr(given, "close") else nullcontext():
        found = held(given)
    assert list(found.values()) == SEQUENCES
    assert list(found) in (IDS, ["id", "seq", "columns", "s"])


@pytest.mark.parametrize(
    "given",
    [
        pytest.param(list(map(Seq, SEQUENCES)), id="Seq"),
        pytest.param(list(map(MutableSeq, SEQUENCES)), id="MutableSeq"),
        pytest.param([text.encode() for text in SEQUENCES], id="bytes"),
        pytest.param(list(map(UserString, SEQUENCES)), id="UserString"),
        pytest.param(
            [SEQUENCES[0], Seq(SEQUENCES[1]), SEQUENCES[2].encode(), SEQUENCES[3]], id="mixed"
        ),
        pytest.param(NAMED.values(), id="values of a dict"),
        pytest.param(np.array(SEQUENCES), id="NumPy of str"),
        pytest.param(np.array(SEQUENCES, dtype=object), id="NumPy of objects"),
        pytest.param(np.array(SEQUENCES, dtype="S"), id="NumPy of bytes"),
        pytest.param(pd.Series(SEQUENCES), id="Series without an index of its own"),
        pytest.param(pd.Series(SEQUENCES, dtype="string[pyarrow]"), id="Series of Arrow's strings"),
        pytest.param(pd.Index(SEQUENCES), id="Index"),
        pytest.param(pd.Series(SEQUENCES).array, id="array of pandas"),
        pytest.param(pl.Series(SEQUENCES), id="polars Series"),
        pytest.param(pa.array(SEQUENCES), id="pyarrow Array"),
        pytest.param(pa.chunked_array([SEQUENCES[:1], SEQUENCES[1:]]), id="pyarrow ChunkedArray"),
        pytest.param(pa.array(SEQUENCES).dictionary_encode(), id="pyarrow DictionaryArray"),
        pytest.param(list(pa.array(SEQUENCES)), id="scalars of pyarrow"),
    ],
)
def test_sequences_without_ids_have_their_positions(given):
    assert held(given) == dict(zip(NUMBERED, SEQUENCES, strict=True))


def test_a_stop_at_the_end_makes_no_pattern_of_a_sequence(tmp_path, monkeypatch):
    """It does not stand for files whose names begin like it, nor a chain for a directory."""
    (tmp_path / "MKL.fasta").write_text(">a\nW\n")
    monkeypatch.chdir(tmp_path)
    assert held(["MK*"]) == {"0": "MK*"}
    assert held(["MKV", "MKV/MKL"]) == {"0": "MKV", "1": "MKV/MKL"}
    with pytest.raises(
        FastaError, match=r"MK\*: there is no such file; a single sequence goes into a list"
    ):
        files_or_records("MK*")


class Residues:
    """A sequence of another library, such as scikit-bio: iteration gives single residues."""

    def __init__(self, residues: str) -> None:
        self._residues = residues

    def __str__(self) -> str:
        return self._residues

    def __len__(self) -> int:
        return len(self._residues)

    def __getitem__(self, place: int) -> Residues:
        return Residues(self._residues[place])


def test_a_sequence_of_another_library_is_one_protein():
    assert held([Residues("MKVL"), Residues("W")]) == {"0": "MKVL", "1": "W"}
    assert held({"a": Residues("MKVL")}) == {"a": "MKVL"}
    assert held(Residues("MKVL")) == {"0": "MKVL"}


def test_records_of_a_database_are_taken_by_their_column_names():
    connection = sqlite3.connect(":memory:")
    connection.row_factory = sqlite3.Row
    with closing(connection):
        rows = connection.execute("SELECT 'MKL' AS sequence, 7 AS id, 1 AS other")
        assert held(rows) == {"7": "MKL"}


def test_one_record_of_biopythons_is_one_protein():
    """A `Seq` iterates over its residues like a list, but is one protein."""
    assert held(Seq("MKVL")) == {"0": "MKVL"}
    assert held(SeqRecord(Seq("MKVL"), id="x")) == {"x": "MKVL"}


@pytest.mark.parametrize("id_", [7, np.int64(7), "7", b"7"])
def test_ids_are_texts(id_):
    assert held({id_: "MKL"}) == held([(id_, "MKL")]) == {"7": "MKL"}
    assert held(pd.Series(["MKL"], index=[id_])) == {"7": "MKL"}


def test_a_filtered_series_keeps_the_ids_of_its_index():
    assert held(pd.Series(SEQUENCES)[lambda each: each.str.len() > 5]) == {
        "0": SEQUENCES[0],
        "2": SEQUENCES[2],
    }


def test_columns_are_named_by_argument(oracle, tmp_path):
    """In tables in memory and in files."""
    table = pd.DataFrame({"id": SEQUENCES, "accession": IDS, "aa": SEQUENCES})
    path = tmp_path / "in.csv"
    table.to_csv(path, index=False)
    for given in (table, path, str(path), [path]):
        embeddings = embed(given, **SMALL, id_column="accession", sequence_column="aa")
        assert embeddings.ids == IDS
        np.testing.assert_allclose(
            embeddings.embeddings, [oracle[each] for each in SEQUENCES], atol=1e-5
        )


def test_a_table_and_a_file_make_the_same_run(tmp_path, fasta):
    """The same call with the file's path reads it."""
    embed(parsed(fasta), **SMALL, output_dir=tmp_path / "run")
    (batch,) = open_dataset(tmp_path / "run").record_batches(9, ["id", "description"])
    assert batch.column("id").to_pylist() == IDS
    assert batch.column("description").to_pylist() == ["of a kind"] * 4
    embed(fasta, **SMALL, output_dir=tmp_path / "run")


def test_objects_are_not_changed(fasta):
    table = pd.DataFrame(TABLE)
    before = table.copy()
    given = list(parsed(fasta))
    held(table)
    held(given)
    pd.testing.assert_frame_equal(table, before)
    assert [(each.id, each.description, str(each.seq)) for each in given] == [
        (name, f"{name} of a kind", text) for name, text in NAMED.items()
    ]


@pytest.mark.parametrize("as_text", [True, False])
def test_paths_are_recognised_by_type_or_by_existence(fasta, as_text):
    name = str if as_text else Path
    assert files_or_records(name(fasta)) == [fasta]
    assert files_or_records([name(fasta), fasta]) == [fasta, fasta]
    assert files_or_records(name(fasta.parent)) == [fasta.parent]
    assert files_or_records(np.array([name(fasta)], dtype=object)) == [fasta]
    assert files_or_records(pd.Series([name(fasta)])) == [fasta]
    assert files_or_records(name(fasta.parent / "*.fasta")) == [fasta.parent / "*.fasta"]


@pytest.mark.parametrize("written", ["~/in.fasta", "$HOME/in.fasta", "~/*.fasta"])
def test_home_is_expanded_in_every_path(tmp_path, monkeypatch, written):
    (tmp_path / "in.fasta").write_text(">a\nMKL\n")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir("/")
    for given in (written, Path(written), [written], [Path(written)]):
        assert embed(given, **SMALL, output_dir="~/run").ids == ["a"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.fasta", "run"]


@pytest.mark.parametrize("address", ["s3://bucket/x.fasta", "https://host/x?format=fasta"])
def test_addresses_are_refused_wherever_a_path_can_be(address):
    """The error says what to do instead, and comes before anything is written."""
    for arguments in (
        {"sequences": address},
        {"sequences": [address]},
        {"sequences": ["MKL"], "output_dir": address},
    ):
        with pytest.raises(ConfigError, match="addresses are not"):
            embed(**SMALL | arguments)
    with pytest.raises(ConfigError, match="weights are not fetched from an address"):
        embed(["MKL"], **SMALL | {"weights": address})


def test_a_sequence_with_the_name_of_a_file_is_no_file(tmp_path, monkeypatch):
    """If there are other sequences."""
    (tmp_path / "MKL").write_text(">a\nW\n")
    monkeypatch.chdir(tmp_path)
    assert held(["MKL", "MKV"]) == {"0": "MKL", "1": "MKV"}
    assert held(["MKV", "MKL"]) == {"0": "MKV", "1": "MKL"}
    with pytest.raises(
        FastaError, match=r"'MKL', could be a sequence, and there is a file of this name; give Path"
    ):
        files_or_records(["MKL"])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            pd.DataFrame({"name": IDS, "aa": SEQUENCES}),
            r"no column 'id' in this DataFrame, .* 'name', 'aa'; name them with id_col",
        ),
        (
            pl.DataFrame({"id": IDS, "aa": SEQUENCES}),
            r"no column 'sequence' in this DataFrame, which has the columns 'id', 'aa'",
        ),
        (pa.table({"M": SEQUENCES}), r"no column 'id' in this Table, which has the columns 'M'"),
        (
            pd.DataFrame(np.ones((2, 3))),
            r"no column 'id' in this DataFrame, which has the columns 0, 1, 2",
        ),
        (pd.DataFrame(), r"no column 'id' in this DataFrame, which has the columns \(none\)"),
        (pd.concat([pd.DataFrame(TABLE)] * 2, axis=1), "2 columns are called 'id'"),
        (pl.LazyFrame(TABLE), r"a LazyFrame is not computed yet; give what its collect\(\)"),
        (
            pd.DataFrame({"id": IDS, "sequence": ["MKL", None, "W", "W"]}),
            r"record 1 \('q'\) has no sequence \((None|nan)\)",
        ),
        (pd.DataFrame({"id": ["a", None], "sequence": ["MKL", "W"]}), r"record 1 has no id"),
        (
            pd.DataFrame({"id": [1, np.nan], "sequence": ["MKL", "W"]}),
            r"record 0 has the id 1.0, a float",
        ),
        (
            pl.DataFrame({"id": ["a"], "sequence": [5]}),
            r"record 0 \('a'\) is 5, a int; give sequences as texts",
        ),
        (
            pd.Series(["MKL", pd.NA], dtype="string"),
            r"record 1 \('1'\) has no sequence \(<NA>\); leave it out",
        ),
        (pd.Series(["MKL", np.nan]), r"record 1 \('1'\) has no sequence \(nan\)"),
        (
            pd.Series(["MKL"], index=pd.MultiIndex.from_tuples([("a", 1)])),
            r"record 0 has the id \('a', 1\), a tuple",
        ),
        (pa.array(["MKL", None]), r"record 1 \('1'\) has no sequence \(None\)"),
        (["MKL", None], r"record 1 \('1'\) has no sequence \(None\); leave it out"),
        ({None: "MKL"}, "record 0 has no id"),
        ({1.5: "MKL"}, r"record 0 has the id 1.5, a float; ids are texts or whole numbers"),
        ({True: "MKL"}, r"record 0 has the id True"),
        (
            {"id": IDS, "sequence": SEQUENCES},
            r"a dictionary has one sequence for each id: .* dict\(zip\(ids, sequences\)\)",
        ),
        (
            {"a": Path("x.fasta")},
            r"record 0 \('a'\) is the path .* a file has ids of its own; give a list of paths",
        ),
        ([{"name": "a", "sequence": "MKL"}], r"record 0 has no 'id', but 'name', 'sequence'"),
        (
            [("a", "MKL"), "MKV"],
            r"record 1, 'MKV', has no id, and record 0, .* has one; give all of them an id",
        ),
        (
            ["MKV", SeqRecord(Seq("MKL"), id="a")],
            r"record 1, .* has an id, and record 0, 'MKV', has none",
        ),
        ([SeqRecord(Seq("MKL"))], r"record 0 has no id \(<unknown id>\); give it one"),
        ([SeqRecord(None, id="a")], r"record 0 \('a'\) has no sequence"),
        ([Seq(None, length=5)], r"record 0 \('0'\) has no residues"),
        ([["MKL", "MKV", "W"]], r"record 0 is \['MKL', 'MKV', 'W'\], of 3"),
        ([[["MKL", "MKV"]]], r"record 0 is \[\['MKL', 'MKV'\]\], of 1"),
        ([("a", ["M", "K"])], r"record 0 \('a'\) is \['M', 'K'\], a list"),
        ([{"MKL"}], r"record 0 \('0'\) is \{'MKL'\}, a set"),
        ({"MKL", "W"}, "a set has no order"),
        (frozenset({"MKL"}), "a set has no order"),
        (np.ones((2, 3)), r"record 0 is \[1.0, 1.0, 1.0\]"),
        (np.array("MKL"), "is a single value"),
        (np.array([[["a", "MKL"]]]), "record 0 is"),
        (5, "sequences is 5, a int; give sequences as texts"),
        (None, "sequences is None"),
        ([5], r"record 0 \('0'\) is 5, a int"),
        ([b"\xff"], "which is not UTF-8 text"),
        (sys.__stdin__, "this is an open file; give its path instead"),
        (
            pd.DataFrame({"sequence": SEQUENCES}, index=IDS),
            r"no column 'id' .*, or give table\['sequence'\], whose index has",
        ),
        (
            io.StringIO(">a\nMKL\n"),
            r"this is an open file; give its path instead, or SeqIO.parse\(file, 'fasta'\)",
        ),
        (
            ">a\nMKL\n",
            r"the text of a FASTA file, and a path is wanted; write it to a file, or give "
            r"SeqIO.parse\(io.StringIO",
        ),
        (
            [">a\n", "MKL\n"],
            r"record 0 is '>a\\n', a line of a FASTA file; give the path of the file",
        ),
        (
            ["absent.fasta"],
            "record 0 is 'absent.fasta', which looks like the name of a file, and there is no such "
            "file",
        ),
        (
            ["MKL", "dir/x"],
            "record 1 is 'dir/x', which looks like the name of a file, and there is no such file",
        ),
        (["absent.csv.gz"], "looks like the name of a file, and there is no such file"),
        (
            ["MKL", Path("x.fasta")],
            r"record 1 is the path .*x.fasta.*, and record 0 is 'MKL'; give files or sequences, "
            "not both",
        ),
        (
            [Path("x.fasta"), "MKL"],
            r"record 1 is 'MKL', which is no file that exists, and record 0, .* is one",
        ),
        (b"MKL", "MKL: there is no such file; a single sequence goes into a list"),
    ],
)
def test_what_cannot_be_used_is_refused_in_one_line(given, message):
    with pytest.raises(FastaError, match=message) as refusal:
        files_or_records(given)
    assert "\n" not in str(refusal.value)
    assert len(str(refusal.value)) < 400


@pytest.mark.parametrize(
    "make",
    [
        list,
        dict,
        tuple,
        lambda: iter(()),
        lambda: pd.Series([]),
        lambda: pd.DataFrame({"id": [], "sequence": []}),
    ],
)
def test_an_object_without_records_is_refused(make):
    with pytest.raises(FastaError, match="there is no sequence to embed; give at least one"):
        embed(make(), **SMALL)


def test_an_open_file_is_named(fasta):
    with (
        fasta.open() as file,
        pytest.raises(FastaError, match=f"this is an open file; give '{fasta}' instead"),
    ):
        embed(file, **SMALL)


def test_an_alignment_is_refused_for_its_gaps():
    """Without gaps it is a list of records like any other."""
    rows = [SeqRecord(Seq("MKVL"), id="a"), SeqRecord(Seq("MK-L"), id="b")]
    assert held(MultipleSeqAlignment(rows[:1])) == {"a": "MKVL"}
    with pytest.raises(
        FastaError,
        match=r"record 1: sequence 'b' has '-' at position 3; gaps belong to an alignment",
    ):
        embed(MultipleSeqAlignment(rows), **SMALL)


@pytest.mark.parametrize(
    "given", [pd.Series(["MKL", "W"], index=["a", "a"]), [(1, "MKL"), ("1", "W")]]
)
def test_ids_that_are_the_same_as_texts_are_refused(given):
    with pytest.raises(FastaError, match=r"the id '(a|1)' occurs twice, at records 0 and 1"):
        embed(given, **SMALL)


def test_an_error_of_the_callers_generator_is_the_callers():
    def failing():
        yield "MKL"
        raise TypeError("of the caller")

    with pytest.raises(TypeError, match="of the caller"):
        embed(failing(), **SMALL)
