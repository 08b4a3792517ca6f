"""The plan: its files, its dependence on content alone, and the detection of damage."""

import gzip
import hashlib
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from esm.data import Alphabet

from tests.helpers import flip_bit
from vnp_lib.errors import ConfigError, FastaError, FingerprintMismatchError, StorageError
from vnp_lib.inputs.policy import InputPolicy
from vnp_lib.model.tokens import pack_batch
from vnp_lib.plan.outputs import Output, RowLayout
from vnp_lib.plan.packing import pack
from vnp_lib.plan.paths import RunPaths
from vnp_lib.plan.plan import ModelIdentity, RunPlan, load_plan, required_bytes
from vnp_lib.plan.planner import check_free_space, make_plan
from vnp_lib.storage.durable import read_sealed_json, write_sealed_json

MEAN = (Output.parse("mean_6"),)
MODEL = ModelIdentity(
    model="esm2_t6_8M_UR50D", weights_digest="random:seed=0", layer=6, dtype="float32"
)

Record = tuple[str, str]  # header, sequence


def random_records(seed: int, num_records: int) -> list[Record]:
    """Return records with distinct ids; about a third of the sequences repeat another."""
    rng = np.random.default_rng(seed)
    pool = [
        "".join(rng.choice(list("LAGVSERTIDPKQNFYMHWC"), rng.integers(1, 300)))
        for _ in range(num_records)
    ]
    picks = rng.integers(0, num_records, size=num_records)
    return [
        (f"p{i}" + (f" protein {i}" if i % 2 else ""), pool[pick]) for i, pick in enumerate(picks)
    ]


def write_fasta(path: Path, records: list[Record]) -> Path:
    path.write_text("".join(f">{header}\n{sequence}\n" for header, sequence in records))
    return path


def plan_of(
    run_dir: Path, *fasta: Path, model: ModelIdentity = MODEL, num_shards: int = 3, **policy: Any
) -> RunPlan:
    return make_plan(
        RunPaths(run_dir),
        fasta,
        model,
        num_shards=num_shards,
        token_budget=500,
        policy=InputPolicy(**policy),
    )


def snapshot(directory: Path) -> dict[Path, tuple[int, int, bytes]]:
    return {
        path: (path.stat().st_ino, path.stat().st_mtime_ns, path.read_bytes())
        for path in directory.rglob("*")
        if path.is_file()
    }


def first_occurrences(records: list[Record]) -> list[int]:
    sequences = [sequence for _, sequence in records]
    return [sequences.index(sequence) for sequence in sequences]


@pytest.mark.parametrize("seed", range(5))
def test_a_plan_holds_every_sequence_once_in_input_order(tmp_path: Path, seed: int) -> None:
    records = random_records(seed, num_records=200)
    plan = plan_of(tmp_path / "run", write_fasta(tmp_path / "x.fasta", records))

    rows = pa.ipc.open_file(tmp_path / "run/plan/sequences.arrow").read_all().to_pylist()
    assert rows == [
        {
            "id": header.partition(" ")[0],
            "description": header.partition(" ")[2],
            "sequence": sequence,
            "length": len(sequence),
            "original_length": len(sequence),
        }
        for header, sequence in records
    ]
    assert plan.records(3, 9).to_pylist() == rows[3:9]
    assert (
        plan.representatives.tolist() == np.load(tmp_path / "run/plan/representatives.npy").tolist()
    )
    assert plan.representatives.tolist() == first_occurrences(records)
    assert plan.lengths.tolist() == [len(sequence) for _, sequence in records]
    assert plan.num_sequences == 200
    assert plan.num_computed == len({sequence for _, sequence in records})
    assert plan.num_residues == sum(len(sequence) for _, sequence in records)


@pytest.mark.parametrize("num_shards", [1, 3, 7])
def test_each_distinct_sequence_is_in_one_batch_of_one_shard(
    tmp_path: Path, num_shards: int
) -> None:
    records = random_records(seed=1, num_records=200)
    plan = plan_of(
        tmp_path / "run", write_fasta(tmp_path / "x.fasta", records), num_shards=num_shards
    )
    distinct = sorted(
        set(first_occurrences(records)), key=lambda ordinal: (-len(records[ordinal][1]), ordinal)
    )
    assert plan.order.tolist() == distinct

    for rank in range(num_shards):
        ordinals = distinct[rank::num_shards]
        boundaries = pack(np.array([len(records[ordinal][1]) + 2 for ordinal in ordinals]), 500)
        batches = plan.shard_batches(rank)
        assert plan.shard_ordinals(rank).tolist() == ordinals
        assert [batch.tolist() for batch in batches] == [
            ordinals[start:stop] for start, stop in pairwise(boundaries)
        ]


def test_fetch_returns_rows_in_the_requested_order(tmp_path: Path) -> None:
    """Rows are read from several record batches.

    A chunk of the input has 8,192 records, and ends with its file.
    """
    parts = [
        random_records(seed=seed, num_records=num_records)
        for seed, num_records in ((1, 9000), (2, 10))
    ]
    parts[1] = [(f"second-{header}", sequence) for header, sequence in parts[1]]
    files = [write_fasta(tmp_path / f"{number}.fasta", part) for number, part in enumerate(parts)]
    plan = plan_of(tmp_path / "run", *files)
    records = [*parts[0], *parts[1]]
    ordinals = np.random.default_rng(0).permutation(len(records))[:3000]

    ids, sequences = plan.fetch(ordinals)
    assert (
        ids == plan.ids(ordinals) == [records[ordinal][0].partition(" ")[0] for ordinal in ordinals]
    )
    assert sequences == [records[ordinal][1] for ordinal in ordinals]
    assert plan.fetch(np.empty(0, dtype=np.int64)) == ([], [])


def test_a_plan_is_loaded_without_pandas(tmp_path: Path) -> None:
    """Every worker process loads a plan, and Arrow's `to_numpy` would import pandas."""
    plan_of(
        tmp_path / "run", write_fasta(tmp_path / "x.fasta", random_records(seed=3, num_records=100))
    )
    code = f"""
import sys
from vnp_lib.plan.paths import RunPaths
from vnp_lib.plan.plan import load_plan
from pathlib import Path
load_plan(RunPaths(Path({str(tmp_path / "run")!r})))
print("pandas" in sys.modules)
"""
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ended.stdout == "False\n"


def test_a_loaded_plan_is_the_one_that_was_made(tmp_path: Path) -> None:
    made = plan_of(
        tmp_path / "run", write_fasta(tmp_path / "x.fasta", random_records(seed=3, num_records=100))
    )
    loaded = load_plan(RunPaths(tmp_path / "run"))
    assert loaded.fingerprint == made.fingerprint
    assert loaded.identity == made.identity
    assert loaded.table.equals(made.table)
    assert (loaded.num_shards, loaded.token_budget, loaded.num_residues) == (
        3,
        500,
        made.num_residues,
    )
    assert loaded.order.tolist() == made.order.tolist()


def test_the_fingerprint_is_the_sha256_of_the_identity(tmp_path: Path) -> None:
    """The identity contains the sha256 of the sequences."""
    plan = plan_of(
        tmp_path / "run", write_fasta(tmp_path / "x.fasta", [("a one", "mkv"), ("b", "MJ*")])
    )
    assert plan.identity == {
        "schema": 2,
        "model": "esm2_t6_8M_UR50D",
        "weights_digest": "random:seed=0",
        "layer": 6,
        "pooling": "mean",
        "dtype": "float32",
        "long_policy": "whole",
        "num_sequences": 2,
        "sequences_sha256": hashlib.sha256(b">a one\nMKV\n>b\nMX\n").hexdigest(),
    }
    canonical = json.dumps(plan.identity, sort_keys=True, separators=(",", ":")) + "\n"
    assert plan.fingerprint == hashlib.sha256(canonical.encode()).hexdigest()


def test_the_fingerprint_depends_on_content_and_not_on_files(tmp_path: Path) -> None:
    records = random_records(seed=4, num_records=50)
    whole = write_fasta(tmp_path / "whole.fasta", records)
    halves = [
        write_fasta(tmp_path / f"{half}.fasta", part)
        for half, part in enumerate((records[:20], records[20:]))
    ]
    packed = tmp_path / "whole.fasta.gz"
    packed.write_bytes(gzip.compress(whole.read_bytes().replace(b"\n", b"\r\n")))
    swapped = write_fasta(tmp_path / "swapped.fasta", [records[1], records[0], *records[2:]])

    fingerprint = plan_of(tmp_path / "1", whole).fingerprint
    assert plan_of(tmp_path / "2", *halves).fingerprint == fingerprint
    assert plan_of(tmp_path / "3", packed).fingerprint == fingerprint
    assert plan_of(tmp_path / "4", whole, num_shards=5).fingerprint == fingerprint
    assert plan_of(tmp_path / "5", swapped).fingerprint != fingerprint


def test_the_same_run_again_leaves_the_plan_untouched(tmp_path: Path) -> None:
    fasta = write_fasta(tmp_path / "x.fasta", random_records(seed=5, num_records=50))
    plan_of(tmp_path / "run", fasta)
    before = snapshot(tmp_path / "run")
    plan_of(tmp_path / "run", fasta)
    assert snapshot(tmp_path / "run") == before


def test_another_division_into_shards_replaces_only_plan_json(tmp_path: Path) -> None:
    fasta = write_fasta(tmp_path / "x.fasta", random_records(seed=5, num_records=50))
    first = plan_of(tmp_path / "run", fasta)
    before = snapshot(tmp_path / "run")
    second = make_plan(RunPaths(tmp_path / "run"), [fasta], MODEL, num_shards=2, token_budget=800)
    after = snapshot(tmp_path / "run")
    assert {path.name for path in before if after[path] != before[path]} == {"plan.json"}
    assert (second.num_shards, second.token_budget, second.fingerprint) == (
        2,
        800,
        first.fingerprint,
    )


def test_there_are_never_more_shards_than_sequences_to_compute(tmp_path: Path) -> None:
    fasta = write_fasta(tmp_path / "x.fasta", [("a", "MKV"), ("b", "MKV"), ("c", "MKL")])
    assert plan_of(tmp_path / "run", fasta, num_shards=8).num_shards == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"model": "esm2_t12_35M_UR50D"},
            "model is 'esm2_t6_8M_UR50D' there and 'esm2_t12_35M_UR50D' here",
        ),
        ({"weights_digest": "abc"}, "weights_digest is 'random:seed=0' there and 'abc' here"),
        ({"layer": 5}, "layer is 6 there and 5 here"),
        ({"pooling": "cls"}, "pooling is 'mean' there and 'cls' here"),
        ({"dtype": "bfloat16"}, "dtype is 'float32' there and 'bfloat16' here"),
        ({"long_policy": "cut"}, "long_policy is 'whole' there and 'cut' here"),
    ],
)
def test_a_directory_of_another_model_is_refused_and_untouched(
    tmp_path: Path, change: dict[str, str | int], message: str
) -> None:
    fasta = write_fasta(tmp_path / "x.fasta", random_records(seed=6, num_records=20))
    plan_of(tmp_path / "run", fasta)
    before = snapshot(tmp_path / "run")
    with pytest.raises(FingerprintMismatchError) as caught:
        plan_of(tmp_path / "run", fasta, model=replace(MODEL, **change))  # type: ignore[arg-type]
    assert message in str(caught.value)
    assert "--force-restart" in str(caught.value)
    assert snapshot(tmp_path / "run") == before


def test_a_directory_of_other_sequences_is_refused_and_untouched(tmp_path: Path) -> None:
    """The file name is the same."""
    records = random_records(seed=7, num_records=20)
    fasta = write_fasta(tmp_path / "x.fasta", records)
    plan_of(tmp_path / "run", fasta)
    before = snapshot(tmp_path / "run")
    write_fasta(fasta, [*records[:-1], (records[-1][0], records[-1][1] + "W")])
    with pytest.raises(FingerprintMismatchError, match="sequences_sha256 is"):
        plan_of(tmp_path / "run", fasta)
    assert snapshot(tmp_path / "run") == before


def test_an_id_that_occurs_twice_is_refused_with_both_places(tmp_path: Path) -> None:
    first = write_fasta(tmp_path / "1.fasta", [("a", "MKV"), ("b", "MKL"), ("a again", "MKW")])
    second = write_fasta(tmp_path / "2.fasta", [("c", "MKV"), ("b", "MKL")])
    with pytest.raises(FastaError) as caught:
        plan_of(tmp_path / "run", first, second)
    assert f"'a': {first}, line 1 and {first}, line 5" in str(caught.value)
    assert f"'b': {first}, line 3 and {second}, line 3" in str(caught.value)
    assert not snapshot(tmp_path / "run")


def test_ten_ids_that_occur_twice_are_shown_and_the_rest_counted(tmp_path: Path) -> None:
    fasta = write_fasta(tmp_path / "x.fasta", [(f"p{i % 25}", "MKV") for i in range(50)])
    with pytest.raises(FastaError, match=r"'p9': .*; and 15 more\); rename") as caught:
        plan_of(tmp_path / "run", fasta)
    assert str(caught.value).count(", line ") == 2 * 10


def test_duplicate_ids_are_kept_on_request(tmp_path: Path) -> None:
    """The policy is not part of the fingerprint."""
    fasta = write_fasta(
        tmp_path / "x.fasta", [("a", "MKV"), ("b", "MKL"), ("a again", "MKW"), ("a", "MKV")]
    )
    plan = plan_of(tmp_path / "run", fasta, duplicate_ids="keep")
    assert plan.ids(np.arange(4)) == ["a", "b", "a", "a"]
    assert plan.representatives.tolist() == [0, 1, 2, 0]
    assert plan.counts.describe() == "1 duplicate not computed again"
    once = write_fasta(tmp_path / "y.fasta", [("a", "MKV"), ("b", "MKL")])
    assert (
        plan_of(tmp_path / "1", once, duplicate_ids="keep").fingerprint
        == plan_of(tmp_path / "2", once).fingerprint
    )


def test_without_dedup_every_sequence_is_computed(tmp_path: Path) -> None:
    """With and without dedup are different runs."""
    fasta = write_fasta(tmp_path / "x.fasta", [("a", "MKV"), ("b", "MKVL"), ("c", "MKV")])
    plan = plan_of(tmp_path / "run", fasta, dedup=False)
    assert (plan.num_computed, plan.representatives.tolist(), plan.order.tolist()) == (
        3,
        [0, 1, 2],
        [1, 0, 2],
    )
    assert plan.counts.num_duplicates == 0
    with pytest.raises(FingerprintMismatchError, match="dedup is False there and None here"):
        plan_of(tmp_path / "run", fasta)


FAULTY = [("a", "MKV"), ("gap one", "M-V"), ("b", "MKVLA"), ("empty", ""), ("c", "MKVLAW")]


def test_records_that_are_skipped_are_listed_with_their_places(tmp_path: Path) -> None:
    """The list covers several files, with the messages of the errors as reasons."""
    fasta = write_fasta(tmp_path / "x.fasta", FAULTY)
    table = tmp_path / "x.csv"
    table.write_text("id,sequence\nd,MK\ne,M1\n")
    plan = plan_of(
        tmp_path / "run", fasta, table, invalid_residues="skip", long="skip", max_length=5
    )
    assert plan.ids(np.arange(plan.num_sequences)) == ["a", "b", "d"]
    assert (plan.counts.num_skipped, plan.counts.describe()) == (4, "4 records skipped")
    listed = [
        json.loads(line) for line in RunPaths(tmp_path / "run").skipped.read_text().splitlines()
    ]
    assert [(line["file"], line.get("line"), line.get("row"), line["id"]) for line in listed] == [
        (str(fasta), 3, None, "gap"),
        (str(fasta), 7, None, "empty"),
        (str(fasta), 9, None, "c"),
        (str(table), None, 3, "e"),
    ]
    assert [line["reason"].split(";")[0] for line in listed] == [
        "sequence 'gap' has '-' at position 2",
        "sequence 'empty' has no residues",
        "sequence 'c' has 6 residues, and at most 5 are allowed",
        "sequence 'e' has '1' at position 2",
    ]


def test_short_sequences_are_skipped_and_listed(tmp_path: Path) -> None:
    """The option is not part of the fingerprint: a file without the short ones is the same run."""
    records = [("a", "MKV"), ("b", "MK"), ("empty", ""), ("c", "mk*"), ("d", "MKVL")]
    fasta = write_fasta(tmp_path / "x.fasta", records)
    plan = plan_of(tmp_path / "run", fasta, min_length=3)
    assert plan.ids(np.arange(plan.num_sequences)) == ["a", "d"]
    assert plan.counts.describe() == "3 records skipped"
    listed = [
        json.loads(line) for line in RunPaths(tmp_path / "run").skipped.read_text().splitlines()
    ]
    assert [(line["id"], line["line"], line["reason"]) for line in listed] == [
        ("b", 3, "sequence 'b' has 2 residues, and at least 3 are wanted"),
        ("empty", 5, "sequence 'empty' has no residues; remove the record"),
        ("c", 7, "sequence 'c' has 2 residues, and at least 3 are wanted"),
    ]
    only = write_fasta(tmp_path / "y.fasta", [records[0], records[-1]])
    assert plan_of(tmp_path / "run", only).fingerprint == plan.fingerprint


@pytest.mark.parametrize(
    ("policy", "lengths", "message"),
    [
        ({"long": "skip", "max_length": 4}, [3, 4], "3 records skipped"),
        (
            {"long": "truncate", "max_length": 4},
            [3, 4, 4],
            "2 records skipped, 1 sequence cut short",
        ),
        (
            {"long": "window", "max_length": 2},
            [3, 4, 5],
            "2 records skipped, 3 sequences averaged over windows",
        ),
        ({"invalid_residues": "skip"}, [3, 4, 5], "3 records skipped"),
        ({"dedup": False}, [3, 4, 5], "2 records skipped"),
    ],
)
def test_short_sequences_are_skipped_under_every_policy(
    tmp_path: Path, policy: dict[str, Any], lengths: list[int], message: str
) -> None:
    """The length counts before truncation."""
    odd = [("odd", "M1")] if "invalid_residues" in policy else []
    records = [("a", "MK"), ("b", "MKV"), *odd, ("c", "MKVL"), ("d", "M"), ("e", "MKWLA")]
    plan = plan_of(
        tmp_path / "run", write_fasta(tmp_path / "x.fasta", records), min_length=3, **policy
    )
    assert plan.lengths.tolist() == lengths
    assert plan.counts.describe() == message


def test_short_proteins_of_a_translation_are_skipped(tmp_path: Path) -> None:
    fasta = write_fasta(tmp_path / "x.fasta", [("a", "ATGGCAGCAGCAGCAGCA")])
    lengths = plan_of(tmp_path / "1", fasta, translate="six-frame").lengths
    plan = plan_of(tmp_path / "2", fasta, translate="six-frame", min_length=6)
    assert plan.lengths.tolist() == lengths[lengths >= 6].tolist()
    assert plan.counts.num_skipped == (lengths < 6).sum() > 0


def test_a_damaged_list_of_skipped_records_is_rebuilt(tmp_path: Path) -> None:
    """`load_plan` refuses it, and the next run with the input writes it again."""
    fasta = write_fasta(tmp_path / "x.fasta", FAULTY)
    plan_of(tmp_path / "run", fasta, invalid_residues="skip")
    skipped = RunPaths(tmp_path / "run").skipped
    whole = skipped.read_bytes()
    skipped.write_bytes(whole.replace(b"gap", b"gag"))
    with pytest.raises(StorageError, match=r"skipped\.jsonl is damaged"):
        load_plan(RunPaths(tmp_path / "run"))
    plan_of(tmp_path / "run", fasta, invalid_residues="skip")
    assert skipped.read_bytes() == whole


def test_same_sequences_from_other_records_are_the_same_run(tmp_path: Path) -> None:
    """The plan counts the input of the last run, in which nothing is skipped."""
    faulty = write_fasta(tmp_path / "x.fasta", FAULTY)
    fixed = write_fasta(tmp_path / "y.fasta", [FAULTY[0], FAULTY[2], FAULTY[4]])
    first = plan_of(tmp_path / "run", faulty, invalid_residues="skip")
    second = plan_of(tmp_path / "run", fixed)
    assert first.fingerprint == second.fingerprint
    assert (first.counts.num_skipped, second.counts.num_skipped) == (2, 0)
    assert not RunPaths(tmp_path / "run").skipped.exists()


def test_a_plan_with_fewer_counts_is_the_same_run(tmp_path: Path) -> None:
    """Plans of earlier versions lack the newer counts."""
    fasta = write_fasta(tmp_path / "x.fasta", [("a", "MKV"), ("b", "MKV")])
    first, paths = plan_of(tmp_path / "run", fasta), RunPaths(tmp_path / "run")
    content = read_sealed_json(paths.plan_json)
    kept_counts = {"num_skipped": 0, "num_cut": 0, "letters": content["input"]["letters"]}
    write_sealed_json(paths.plan_json, content | {"input": kept_counts}, replace=True)
    assert load_plan(paths).counts.num_duplicates == 0
    second = plan_of(tmp_path / "run", fasta)
    assert (second.counts.num_duplicates, second.fingerprint) == (1, first.fingerprint)


def test_a_policy_that_leads_to_other_sequences_is_refused(tmp_path: Path) -> None:
    fasta = write_fasta(tmp_path / "x.fasta", [("a", "MKV"), ("b", "MéV")])
    plan_of(tmp_path / "run", fasta, invalid_residues="skip")
    with pytest.raises(FingerprintMismatchError, match="num_sequences is 1 there and 2 here"):
        plan_of(tmp_path / "run", fasta, invalid_residues="map")


def test_input_without_a_remaining_sequence_is_refused(tmp_path: Path) -> None:
    fasta = write_fasta(tmp_path / "x.fasta", [("a", "M1V"), ("b", "M-V")])
    with pytest.raises(FastaError, match="all 2 records are skipped: there is nothing to embed"):
        plan_of(tmp_path / "run", fasta, invalid_residues="skip")
    assert not snapshot(tmp_path / "run")


def test_truncated_sequences_keep_their_original_length(tmp_path: Path) -> None:
    """Sequences that are equal after truncation are computed once."""
    fasta = write_fasta(tmp_path / "x.fasta", [("a", "MKVLAW"), ("b", "MKVL"), ("c", "MKVLWWW")])
    plan = plan_of(tmp_path / "run", fasta, long="truncate", max_length=4)
    assert plan.fetch(np.arange(3))[1] == ["MKVL"] * 3
    assert plan.records(0, 3).select(["length", "original_length"]).to_pydict() == {
        "length": [4, 4, 4],
        "original_length": [6, 4, 7],
    }
    assert (plan.num_computed, plan.counts.num_cut, plan.identity["long_policy"]) == (
        1,
        2,
        "truncate:4",
    )
    with pytest.raises(
        FingerprintMismatchError, match="long_policy is 'truncate:4' there and 'truncate:5' here"
    ):
        plan_of(tmp_path / "run", fasta, long="truncate", max_length=5)


def test_truncation_gives_the_tokens_of_fair_esm(tmp_path: Path) -> None:
    """The oracle is fair-esm's batch converter with a truncation length of 1,022 residues."""
    rng = np.random.default_rng(0)
    records = [
        (f"p{n}", "".join(rng.choice(list("LAGVSERTIDPKQNFYMHWC"), n)))
        for n in (1021, 1022, 1023, 3000)
    ]
    plan = plan_of(
        tmp_path / "run",
        write_fasta(tmp_path / "x.fasta", records),
        long="truncate",
        max_length=1022,
    )
    ids, sequences = plan.fetch(np.arange(4))
    batch = pack_batch(sequences, sequence_ids=ids, ordinals=range(4), batch_idx=0)
    alphabet = Alphabet.from_architecture("ESM-1b")
    _, _, theirs = alphabet.get_batch_converter(truncation_seq_length=1022)(records)
    for number, start in enumerate(batch.cu_seqlens[:-1].tolist()):
        stop = int(batch.cu_seqlens[number + 1])
        assert (
            batch.input_ids[start:stop].tolist()
            == theirs[number][theirs[number] != alphabet.padding_idx].tolist()
        )


def test_bad_input_leaves_nothing_behind(tmp_path: Path) -> None:
    fasta = write_fasta(tmp_path / "x.fasta", [("a", "MKV"), ("b", "M-V")])
    with pytest.raises(FastaError, match="'b' has '-'"):
        plan_of(tmp_path / "run", fasta)
    assert not snapshot(tmp_path / "run")


@pytest.mark.parametrize("name", ["plan.json", "sequences.arrow", "representatives.npy"])
@pytest.mark.parametrize("seed", range(10))
def test_a_flipped_bit_in_the_plan_is_found_and_repaired(
    tmp_path: Path, name: str, seed: int
) -> None:
    fasta = write_fasta(tmp_path / "x.fasta", random_records(seed=8, num_records=30))
    plan_of(tmp_path / "run", fasta)
    whole = {path: content for path, (_, _, content) in snapshot(tmp_path / "run").items()}
    path = tmp_path / "run" / "plan" / name
    flip_bit(path, int(np.random.default_rng(seed).integers(8 * path.stat().st_size)))

    with pytest.raises(StorageError, match=name):
        load_plan(RunPaths(tmp_path / "run"))
    plan_of(tmp_path / "run", fasta)
    assert {path: content for path, (_, _, content) in snapshot(tmp_path / "run").items()} == whole


@pytest.mark.parametrize("name", ["plan.json", "sequences.arrow", "representatives.npy"])
def test_a_missing_file_of_the_plan_is_named(tmp_path: Path, name: str) -> None:
    plan_of(tmp_path / "run", write_fasta(tmp_path / "x.fasta", [("a", "MKV")]))
    (tmp_path / "run" / "plan" / name).unlink()
    with pytest.raises(StorageError, match=name):
        load_plan(RunPaths(tmp_path / "run"))


def test_a_damaged_plan_of_another_run_is_not_rebuilt(tmp_path: Path) -> None:
    plan_of(tmp_path / "run", write_fasta(tmp_path / "x.fasta", [("a", "MKV")]))
    (tmp_path / "run/plan/sequences.arrow").write_bytes(b"")
    before = snapshot(tmp_path / "run")
    with pytest.raises(FingerprintMismatchError):
        plan_of(tmp_path / "run", write_fasta(tmp_path / "y.fasta", [("a", "MKL")]))
    assert snapshot(tmp_path / "run") == before


def test_a_run_directory_that_cannot_be_created_is_refused(tmp_path: Path) -> None:
    fasta = write_fasta(tmp_path / "x.fasta", [("a", "MKV")])
    with pytest.raises(
        ConfigError, match=r"x\.fasta/run cannot be created or written \(.*x\.fasta: "
    ):
        plan_of(fasta / "run", fasta)


def test_required_space_is_checkpoints_and_dataset(tmp_path: Path) -> None:
    plan = plan_of(
        tmp_path / "run", write_fasta(tmp_path / "x.fasta", random_records(seed=9, num_records=100))
    )
    rows = plan.num_computed + plan.num_sequences
    assert (
        required_bytes(plan, RowLayout(MEAN, 2560)) - required_bytes(plan, RowLayout(MEAN, 0))
        == rows * 2560 * 4
    )


def test_a_disk_without_room_is_refused_with_both_figures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Existing checkpoints count: a resumed run needs space only for the rest."""
    paths = RunPaths(tmp_path / "run")
    plan = plan_of(paths.run_dir, write_fasta(tmp_path / "x.fasta", [("a", "MKV")]))
    needed = required_bytes(plan, RowLayout(MEAN, 320))
    usage = shutil.disk_usage(tmp_path)._replace(free=needed - 1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)

    with pytest.raises(
        ConfigError, match=f"{needed - 1000:,} bytes free and {needed:,} are needed"
    ):
        check_free_space(paths, plan, RowLayout(MEAN, 320))
    paths.shard_dir(0).mkdir(parents=True)
    paths.checkpoint(0, 0).write_bytes(bytes(1000))
    check_free_space(paths, plan, RowLayout(MEAN, 320))


def test_a_file_removed_during_the_space_check_is_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Worker processes of an earlier run may still rename their temporary files."""
    paths = RunPaths(tmp_path / "run")
    plan = plan_of(paths.run_dir, write_fasta(tmp_path / "x.fasta", [("a", "MKV")]))
    paths.shard_dir(0).mkdir(parents=True)
    (paths.shard_dir(0) / ".tmp-x").touch()
    stat = os.lstat

    def lstat_late(path: Any, **options: Any) -> os.stat_result:
        if str(path).endswith(".tmp-x"):
            Path(path).unlink(missing_ok=True)
        return stat(path, **options)

    monkeypatch.setattr(os, "lstat", lstat_late)
    check_free_space(paths, plan, RowLayout(MEAN, 320))
    assert not (paths.shard_dir(0) / ".tmp-x").exists()


def test_paths_are_those_of_the_documentation() -> None:
    paths = RunPaths(Path("run"))
    assert [
        str(path.relative_to("run"))
        for path in (
            paths.plan_json,
            paths.sequences,
            paths.manifest,
            paths.job(3),
            paths.worker_log(3),
        )
    ] == [
        "plan/plan.json",
        "plan/sequences.arrow",
        "checkpoints/manifest.json",
        "checkpoints/shard_3/job.json",
        "checkpoints/shard_3/worker.log",
    ]
    assert [
        str(path.relative_to("run"))
        for path in (
            paths.checkpoint(3, 12),
            paths.quarantine,
            paths.success,
            paths.report,
            paths.run_lock,
        )
    ] == [
        "checkpoints/shard_3/batch_00012.pt",
        "quarantine.jsonl",
        "embeddings/_SUCCESS.json",
        "report.html",
        "run.lock",
    ]
