"""Repeated ids are made unique, and are the same at every resume."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.helpers import SMALL_MODEL
from vnp_lib import embed, open_dataset
from vnp_lib.cli import main
from vnp_lib.dataset.export import export_dataset
from vnp_lib.errors import FastaError
from vnp_lib.inputs.duplicates import UniqueIds, digest_texts
from vnp_lib.inputs.policy import InputPolicy
from vnp_lib.inputs.reader import make_id_renamer, read_records
from vnp_lib.inputs.sources import find_sources
from vnp_lib.plan.paths import RunPaths
from vnp_lib.plan.plan import ModelIdentity, RunPlan
from vnp_lib.plan.planner import make_plan

MODEL = ModelIdentity(
    model="esm2_t6_8M_UR50D", weights_digest="random:seed=0", layer=6, dtype="float32"
)


def plan_of(run_dir: Path, *fasta: Path, **policy: Any) -> RunPlan:
    options = InputPolicy(**{"duplicate_ids": "rename", **policy})
    return make_plan(
        RunPaths(run_dir), fasta, MODEL, num_shards=2, token_budget=500, policy=options
    )


def ids_of(plan: RunPlan) -> list[str]:
    return plan.ids(np.arange(plan.num_sequences))


def write(path: Path, *records: tuple[str, str]) -> Path:
    path.write_text("".join(f">{header}\n{sequence}\n" for header, sequence in records))
    return path


def made_unique(ids: list[str], chunk: int = 1000) -> list[str]:
    unique = UniqueIds(digest_texts(ids))
    return [
        name
        for start in range(0, len(ids), chunk)
        for name in unique.rename(ids[start : start + chunk])[0]
    ]


@pytest.mark.parametrize(
    ("ids", "renamed"),
    [
        ("x x x", "x x_2 x_3"),
        ("x y x y", "x y x_2 y_2"),
        ("x x x_2", "x x_3 x_2"),
        ("x_2 x x x_3 x", "x_2 x x_4 x_3 x_5"),
        ("x x x_2 x_2", "x x_3 x_2 x_2_2"),
        ("x x x_2 x_2 x_2_2", "x x_3 x_2 x_2_3 x_2_2"),
        ("x y z", "x y z"),
        ("", ""),
    ],
)
def test_the_second_of_an_id_has_the_first_number_that_is_free(ids, renamed):
    assert made_unique(ids.split()) == renamed.split()


@pytest.mark.parametrize("seed", range(50))
def test_no_two_ids_are_equal_and_those_that_occur_once_stay(seed):
    """In any order, and with chunks of any size."""
    rng = np.random.default_rng(seed)
    kinds = ["x", "y", "x_2", "x_3", "x_2_2", "y_2", "_2", "x_", "x__2"]
    ids = rng.choice(kinds, size=rng.integers(0, 30)).tolist()
    names = made_unique(ids, chunk=int(rng.integers(1, 6)))
    assert len(set(names)) == len(names) == len(ids)
    for place, (before, after) in enumerate(zip(ids, names, strict=True)):
        if before not in ids[:place]:
            assert after == before
        else:
            assert after.startswith(f"{before}_")
            assert after not in ids


def test_a_million_ids_take_little_memory():
    """About 8 bytes per id and 24 per renamed id, besides the 16 of digests; no texts are kept."""
    ids = [f"protein_number_{number % 500_000}" for number in range(1_000_000)]
    digests = digest_texts(ids)
    tracemalloc.start()
    unique = UniqueIds(digests)
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert held < 30e6
    assert unique.rename(ids[:10]) == (ids[:10], 0)


def test_ids_are_unique_over_files_and_the_same_at_every_resume(tmp_path):
    first = write(tmp_path / "1.fasta", ("a one", "MKVLA"), ("b", "MKL"), ("a two", "WWW"))
    second = write(tmp_path / "2.fasta", ("a_2", "MKV"), ("b again", "MKL"))
    plans = [plan_of(tmp_path / "plan", first, second) for _ in range(2)]
    assert ids_of(plans[0]) == ids_of(plans[1]) == ["a", "b", "a_3", "a_2", "b_2"]
    assert plans[0].fingerprint == plans[1].fingerprint
    assert plans[0].records(0, 5).column("description").to_pylist() == [
        "one",
        "",
        "two",
        "",
        "again",
    ]
    assert plans[0].counts.describe() == "2 ids renamed, 1 duplicate not computed again"


def test_a_renamed_run_is_that_of_a_file_with_these_ids(tmp_path):
    fasta = write(tmp_path / "1.fasta", ("a", "MKVLA"), ("a", "MKL"))
    same = write(tmp_path / "2.fasta", ("a", "MKVLA"), ("a_2", "MKL"))
    assert plan_of(tmp_path / "1", fasta).fingerprint == plan_of(tmp_path / "2", same).fingerprint
    assert plan_of(tmp_path / "2", same).counts.num_renamed == 0
    unasked = plan_of(tmp_path / "3", same, duplicate_ids="error")
    assert plan_of(tmp_path / "3", fasta).fingerprint == unasked.fingerprint
    embedded = embed(
        same, model="esm2_t6_8M_UR50D", weights="random", device="cpu", output_dir=tmp_path / "run"
    )
    exported = export_dataset(tmp_path / "run", "esm-extract", output=tmp_path / "out")
    assert sorted(path.name for path in exported.path.iterdir()) == ["a.pt", "a_2.pt"]
    assert open_dataset(tmp_path / "run").ids == embedded.ids == ["a", "a_2"]


def test_small_chunks_make_the_same_ids(tmp_path):
    files = [
        write(tmp_path / name, *((f"p{n % 7}", "MKV") for n in range(40)))
        for name in ("1.fasta", "2.fasta")
    ]
    sources = find_sources(files, stdin=tmp_path)
    policy = InputPolicy(duplicate_ids="rename")
    found = []
    for chunk_size in (3, 1000):
        rename = make_id_renamer(sources, policy)
        chunks = [
            c
            for source in sources
            for c in read_records(source, policy, chunk_size=chunk_size, rename=rename)
        ]
        found.append([name for chunk in chunks for name in chunk.usable.ids])
        assert sum(chunk.counts.num_renamed for chunk in chunks) == 80 - 7
    assert found[0] == found[1]
    assert len(set(found[0])) == 80


def test_records_that_are_left_out_take_no_number(tmp_path):
    fasta = write(tmp_path / "x.fasta", ("a", "MK"), ("a", "MKVLA"), ("a", "M1V"), ("a", "MKVLW"))
    plan = plan_of(tmp_path / "run", fasta, min_length=3, invalid_residues="skip")
    assert ids_of(plan) == ["a", "a_2"]
    assert plan.counts.describe() == "2 records skipped, 1 id renamed"
    listed = [
        json.loads(line)["id"]
        for line in RunPaths(tmp_path / "run").skipped.read_text().splitlines()
    ]
    assert listed == ["a", "a"]


def test_translated_proteins_are_named_after_the_renamed_record(tmp_path):
    """So the proteins that share a contig's id are those of one contig."""
    fasta = write(
        tmp_path / "x.fasta", ("c", "ATGGCAGCAGCA"), ("d", "ATGAAACGT"), ("c", "ATGTGGTGGTGG")
    )
    plan = plan_of(tmp_path / "run", fasta, translate="six-frame")
    contigs = [name.rpartition("_chunk_")[0] for name in ids_of(plan)]
    assert list(dict.fromkeys(contigs)) == ["c", "d", "c_2"]
    assert plan.counts.num_renamed == 1
    ids, proteins = plan.fetch(np.arange(plan.num_sequences))
    once = write(
        tmp_path / "y.fasta", ("c", "ATGGCAGCAGCA"), ("d", "ATGAAACGT"), ("c_2", "ATGTGGTGGTGG")
    )
    (source,) = find_sources([once], stdin=tmp_path)
    (chunk,) = [c for c in read_records(source, InputPolicy(translate="six-frame")) if c.usable.ids]
    assert dict(zip(ids, proteins, strict=True)) == dict(
        zip(chunk.usable.ids, chunk.usable.sequences, strict=True)
    )


def test_a_fault_in_a_record_is_reported_first(tmp_path):
    fasta = write(tmp_path / "x.fasta", ("a", "MKV"), ("a", "M1V"))
    with pytest.raises(FastaError, match=r"x.fasta, line 3: sequence 'a' has '1' at position 2"):
        plan_of(tmp_path / "run", fasta)


def test_the_refusal_names_the_option(tmp_path):
    fasta = write(tmp_path / "x.fasta", ("a", "MKV"), ("a", "MKL"))
    with pytest.raises(
        FastaError,
        match="use --duplicate-ids rename or --duplicate-ids keep",
    ):
        plan_of(tmp_path / "run", fasta, duplicate_ids="error")


def test_vnp_plan_counts_the_renamed(tmp_path, capsys):
    fasta = write(tmp_path / "x.fasta", ("a", "MKV"), ("a", "MKL"), ("a", "MKW"))
    arguments = [
        "plan",
        "--fasta",
        str(fasta),
        *SMALL_MODEL,
        "--output-dir",
        str(tmp_path / "run"),
        "--json",
    ]
    assert main([*arguments, "--duplicate-ids", "rename"]) == 0
    estimate = json.loads(capsys.readouterr().out)
    assert (
        estimate["num_sequences"],
        estimate["input"]["num_renamed"],
        estimate["num_refused"],
    ) == (3, 2, 0)
