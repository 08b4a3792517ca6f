"""Tests of assembly: each sequence's own row, once, in input order, and no partial results."""

import errno
import json
import os
import re
import shutil
import tracemalloc
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from numpy.typing import NDArray

import vnp_lib.run.assembly
import vnp_lib.storage.durable
from tests.fake_runs import (
    CREATED,
    DIM,
    FORTY_ROWS,
    MODEL,
    Run,
    embed,
    files_of,
    finish_run,
    identity_of,
    row_of,
    start_run,
    write_checkpoint,
)
from tests.helpers import flip_bit
from vnp_lib.checkpoint.markers import CheckpointRecord
from vnp_lib.checkpoint.survey import survey_checkpoints
from vnp_lib.dataset.reader import open_dataset, verify_dataset
from vnp_lib.errors import (
    CheckpointError,
    ConfigError,
    IncompleteDatasetError,
    NumericalInstabilityError,
    StorageError,
)
from vnp_lib.inputs.policy import InputPolicy
from vnp_lib.plan.outputs import Output, OutputKind, RowLayout, StoreDtype, offsets_of
from vnp_lib.plan.paths import RunPaths
from vnp_lib.plan.plan import RunPlan, required_bytes
from vnp_lib.plan.planner import check_free_space, make_plan
from vnp_lib.run.assembly import DatasetSummary, assemble
from vnp_lib.run.validation import layout_from_plan
from vnp_lib.software import Software, SoftwareShare
from vnp_lib.storage.durable import DurableOps


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return finish_run(start_run(tmp_path))


def go_on(run: Run, ordinals: Sequence[int]) -> None:
    """Compute what had been left out."""
    write_checkpoint(run.plan, run.paths.checkpoint(0, 4), np.array(ordinals))


def some_with_copies_and_without(plan: RunPlan) -> list[int]:
    """Three ordinals that are computed: that of the most copies, and two of none."""
    originals, counts = np.unique(plan.representatives, return_counts=True)
    by_count = originals[np.argsort(counts, kind="stable")]
    assert counts.max() > 1
    return [int(by_count[-1]), int(by_count[0]), int(by_count[1])]


def assert_rows(run: Run, *, without: Sequence[int]) -> None:
    """Check the row of every sequence but those of `without` and their copies."""
    dataset = open_dataset(run.paths.run_dir)
    is_left_out = np.isin(run.plan.representatives, without)
    assert dataset.ids == [run.ids[ordinal] for ordinal in np.flatnonzero(~is_left_out)]
    for ordinal, (sequence_id, sequence) in enumerate(zip(run.ids, run.sequences, strict=True)):
        if is_left_out[ordinal]:
            assert sequence_id not in dataset
            with pytest.raises(KeyError, match=f"ordinal {ordinal} is not in"):
                dataset.row(ordinal)
        else:
            assert np.array_equal(dataset[sequence_id], embed(sequence))
            assert np.array_equal(dataset.row(ordinal), embed(sequence))
    assert verify_dataset(run.paths.run_dir) == []


@pytest.mark.parametrize("part_bytes", [1, FORTY_ROWS, 10**9])
def test_every_row_is_that_of_its_own_sequence_in_input_order(run: Run, part_bytes: int) -> None:
    """Copies of identical sequences included; read back by pyarrow, which knows nothing of us."""
    run.assemble(part_bytes=part_bytes)
    parts = sorted(run.paths.embeddings_dir.glob("part-*.parquet"))
    table = pa.concat_tables([pq.read_table(part) for part in parts])

    assert len(parts) == {1: 150, FORTY_ROWS: 4, 10**9: 1}[part_bytes]
    assert table.column("ordinal").to_pylist() == list(range(150))
    assert table.column("id").to_pylist() == run.ids
    assert table.column("description").to_pylist() == run.descriptions
    assert table.column("length").to_pylist() == [len(sequence) for sequence in run.sequences]
    assert np.array_equal(
        np.array(table.column("embedding").to_pylist(), dtype=np.float32), run.expected_rows()
    )
    assert not run.paths.assembly_dir.exists()


def test_a_part_says_what_it_is_and_is_written_to_be_read(run: Run) -> None:
    run.assemble()
    part = pq.ParquetFile(run.paths.embeddings_dir / "part-00000.parquet")
    schema = part.schema_arrow
    assert schema.names == [
        "ordinal",
        "id",
        "description",
        "length",
        "original_length",
        "embedding",
    ]
    assert schema.field("embedding").type.list_size == DIM
    assert schema.field("embedding").type.value_type == pa.float32()
    assert {key.decode(): value.decode() for key, value in schema.metadata.items()} == {
        "model": "esm2_t6_8M_UR50D",
        "layer": "6",
        "pooling": "mean",
        "dtype": "float32",
        "fingerprint": run.plan.fingerprint,
        "software": "unknown",
    }
    embedding = part.metadata.row_group(0).column(5)
    assert embedding.compression == "UNCOMPRESSED"
    assert "PLAIN_DICTIONARY" not in embedding.encodings
    assert "RLE_DICTIONARY" not in embedding.encodings


def test_success_json_counts_and_vouches_for_every_part(run: Run) -> None:
    summary = run.assemble()
    success = json.loads(run.paths.success.read_bytes())
    sizes = [(run.paths.embeddings_dir / part["name"]).stat().st_size for part in success["parts"]]

    assert [part["rows"] for part in success["parts"]] == [40, 40, 40, 30]
    assert [part["size_bytes"] for part in success["parts"]] == sizes
    assert success["fingerprint"] == run.plan.fingerprint
    assert success["identity"] == run.plan.identity
    assert (success["num_sequences"], success["num_computed"]) == (150, run.plan.num_computed)
    assert success["created_at"] == CREATED.isoformat()
    assert summary == DatasetSummary(
        path=run.paths.embeddings_dir,
        num_rows=150,
        num_quarantined=0,
        num_missing=0,
        num_parts=4,
        dim=DIM,
        size_bytes=sum(sizes),
        precision=None,
        counts=run.plan.counts,
        software=(
            SoftwareShare(software=Software.of_metadata({}), sequences=run.plan.num_computed),
        ),
    )
    assert verify_dataset(run.paths.run_dir) == []


def test_a_dataset_says_what_computed_its_rows(tmp_path: Path) -> None:
    """Each sequence counts once, for the checkpoint of its row; copies are not computed."""
    run = start_run(tmp_path)
    ordinals = run.plan.order.astype(np.int64)
    ours, theirs = (
        Software(vnp=version, code_sha256=version, torch="2.10.0", device="CPU (AVX2)")
        for version in ("1.0", "0.9")
    )
    write_checkpoint(run.plan, run.paths.checkpoint(0, 0), ordinals[:10], software=asdict(ours))
    write_checkpoint(run.plan, run.paths.checkpoint(0, 1), ordinals[5:], software=asdict(theirs))
    summary = run.assemble()
    assert summary.software == (
        SoftwareShare(software=theirs, sequences=ordinals.size - 10),
        SoftwareShare(software=ours, sequences=10),
    )
    described = (
        pq.read_schema(run.paths.embeddings_dir / "part-00000.parquet")
        .metadata[b"software"]
        .decode()
    )
    assert (
        described == f"vnp 0.9, torch 2.10.0, CPU (AVX2): {ordinals.size - 10} sequences; "
        "vnp 1.0, torch 2.10.0, CPU (AVX2): 10 sequences"
    )


def test_the_same_checkpoints_give_the_same_bytes(tmp_path: Path) -> None:
    for name in ("1", "2"):
        (tmp_path / name).mkdir()
        finish_run(start_run(tmp_path / name)).assemble()
    assert files_of(tmp_path / "1/run/embeddings") == files_of(tmp_path / "2/run/embeddings")


def test_a_sequence_in_quarantine_and_its_copies_have_no_row(tmp_path: Path) -> None:
    run = start_run(tmp_path)
    originals, counts = np.unique(run.plan.representatives, return_counts=True)
    quarantined = [int(originals[counts.argmax()]), int(originals[counts.argmin()])]
    finish_run(run, without=quarantined).assemble(quarantined=quarantined)
    kept = [
        ordinal for ordinal in range(150) if run.plan.representatives[ordinal] not in quarantined
    ]
    dataset = open_dataset(run.paths.run_dir)

    assert counts.max() > 1
    assert len(dataset) == len(kept) == 150 - counts.max() - 1
    assert dataset.ids == [run.ids[ordinal] for ordinal in kept]
    for ordinal in kept:
        assert np.array_equal(dataset.row(ordinal), embed(run.sequences[ordinal]))
    for ordinal in quarantined:
        assert run.ids[ordinal] not in dataset
        with pytest.raises(KeyError, match=f"ordinal {ordinal} is not in"):
            dataset.row(ordinal)


def test_a_part_whose_sequences_are_all_in_quarantine_is_empty(tmp_path: Path) -> None:
    run = start_run(tmp_path)
    computed = run.plan.order[run.plan.order < 40]
    finish_run(run, without=computed.tolist()).assemble(quarantined=computed.tolist())
    dataset = open_dataset(run.paths.run_dir)
    assert dataset.metadata["parts"][0]["rows"] == 0
    assert next(dataset.batches(1000))[0] == dataset.ids[: dataset.metadata["parts"][1]["rows"]]


def test_the_first_checkpoint_of_an_ordinal_counts(run: Run) -> None:
    """Two writers of the same rows differ in the last bits; the order of the list is irrelevant."""
    ordinals = run.plan.shard_ordinals(0)[:5]
    write_checkpoint(
        run.plan, run.paths.checkpoint(2, 9), ordinals, rows=np.zeros((5, DIM), np.float32)
    )
    assemble(run.plan, run.paths, run.records()[::-1])
    dataset = open_dataset(run.paths.run_dir)
    assert np.array_equal(
        np.stack([dataset.row(ordinal) for ordinal in range(150)]), run.expected_rows()
    )


def test_missing_sequences_are_counted_and_ten_are_named(tmp_path: Path) -> None:
    run = start_run(tmp_path)
    missing = np.flatnonzero(np.isin(run.plan.representatives, run.plan.order[:30]))
    finish_run(run, without=run.plan.order[:30].tolist())
    named = ", ".join(f"{ordinal} ('{run.ids[ordinal]}')" for ordinal in missing[:10])
    message = re.escape(
        f"{missing.size} of 150 sequences are in no checkpoint; start the run again"
    )
    with pytest.raises(
        IncompleteDatasetError,
        match=f"{message}.*{re.escape(named)} and {missing.size - 10} more$",
    ):
        run.assemble()
    assert not run.paths.success.exists()


def test_a_sequence_both_computed_and_in_quarantine_is_refused(run: Run) -> None:
    ordinal = int(run.plan.order[0])
    with pytest.raises(
        IncompleteDatasetError,
        match=f"in quarantine and yet in a checkpoint: ordinals.* {ordinal} ",
    ):
        run.assemble(quarantined=[ordinal])


def test_a_run_with_every_sequence_in_quarantine_has_no_dataset(tmp_path: Path) -> None:
    run = start_run(tmp_path)
    with pytest.raises(IncompleteDatasetError, match="every sequence is in quarantine"):
        run.assemble(quarantined=run.plan.order.tolist())


@pytest.mark.parametrize("part_bytes", [1, FORTY_ROWS, 10**9])
def test_a_partial_dataset_lacks_missing_rows_and_copies_only(
    tmp_path: Path, part_bytes: int
) -> None:
    """A partial dataset lacks what is missing with its copies and nothing else."""
    run = start_run(tmp_path)
    missing = some_with_copies_and_without(run.plan)
    summary = finish_run(run, without=missing).assemble(allow_missing=True, part_bytes=part_bytes)
    num_missing = int(np.isin(run.plan.representatives, missing).sum())

    assert_rows(run, without=missing)
    assert num_missing > 3
    assert (summary.num_missing, summary.num_quarantined, summary.num_rows) == (
        num_missing,
        0,
        150 - num_missing,
    )
    assert json.loads(run.paths.success.read_bytes())["num_missing"] == num_missing
    with pytest.raises(KeyError, match="or not computed yet: the dataset is partial"):
        open_dataset(run.paths.run_dir).row(missing[0])


def test_missing_and_quarantined_rows_are_distinguished(tmp_path: Path) -> None:
    run = start_run(tmp_path)
    *quarantined, missing = some_with_copies_and_without(run.plan)
    finish_run(run, without=[*quarantined, missing])
    with pytest.raises(
        IncompleteDatasetError, match=f"1 of 150 sequences are in no checkpoint.* {missing} "
    ):
        run.assemble(quarantined=quarantined)
    summary = run.assemble(quarantined=quarantined, allow_missing=True)
    assert_rows(run, without=[*quarantined, missing])
    assert (summary.num_missing, summary.num_quarantined) == (1, 149 - summary.num_rows)


def test_a_part_of_which_nothing_is_computed_is_empty(tmp_path: Path) -> None:
    run = start_run(tmp_path)
    missing = np.unique(run.plan.representatives[40:80]).tolist()
    finish_run(run, without=missing).assemble(allow_missing=True)
    dataset = open_dataset(run.paths.run_dir)
    assert dataset.metadata["parts"][1]["rows"] == 0
    assert 0 < len(dataset) == sum(len(ids) for ids, _ in dataset.batches(7))
    assert_rows(run, without=missing)


def test_a_complete_run_replaces_a_partial_dataset(
    tmp_path: Path,
) -> None:
    """Row by row, and byte by byte: nothing of the partial one is left."""
    for name in ("whole", "run"):
        (tmp_path / name).mkdir()
    finish_run(start_run(tmp_path / "whole")).assemble()
    run = start_run(tmp_path / "run")
    missing = some_with_copies_and_without(run.plan)
    finish_run(run, without=missing).assemble(allow_missing=True)
    with pytest.raises(IncompleteDatasetError, match="are in no checkpoint"):
        run.assemble()
    assert open_dataset(run.paths.run_dir).metadata["num_missing"] > 0

    go_on(run, missing)
    assert run.assemble().num_missing == 0
    assert_rows(run, without=[])
    assert files_of(run.paths.embeddings_dir) == files_of(tmp_path / "whole/run/embeddings")


def test_a_dataset_without_missing_rows_is_complete(run: Run) -> None:
    """A dataset is complete where rows may be missing and none is."""
    run.assemble()
    complete = files_of(run.paths.embeddings_dir)
    shutil.rmtree(run.paths.embeddings_dir)
    assert run.assemble(allow_missing=True).num_missing == 0
    assert files_of(run.paths.embeddings_dir) == complete


def test_a_partial_dataset_stays_until_other_rows_are_missing(tmp_path: Path) -> None:
    """Also where they are as many as before."""
    run = start_run(tmp_path)
    _, missing, other = some_with_copies_and_without(run.plan)
    finish_run(run, without=[missing])
    run.assemble(allow_missing=True)
    before = {path: path.stat().st_ino for path in run.paths.embeddings_dir.iterdir()}
    assert run.assemble(allow_missing=True).num_missing == 1
    assert {path: path.stat().st_ino for path in run.paths.embeddings_dir.iterdir()} == before

    shutil.rmtree(run.paths.checkpoints_dir)
    finish_run(run, without=[other])
    assert run.assemble(allow_missing=True).num_missing == 1
    assert_rows(run, without=[other])


def test_a_damaged_partial_dataset_is_rebuilt(tmp_path: Path) -> None:
    run = start_run(tmp_path)
    missing = some_with_copies_and_without(run.plan)
    finish_run(run, without=missing).assemble(allow_missing=True)
    part = run.paths.embeddings_dir / "part-00001.parquet"
    part.write_bytes(part.read_bytes()[:-10] + bytes(10))
    run.assemble(allow_missing=True)
    assert_rows(run, without=missing)


def test_a_partial_dataset_never_takes_the_place_of_a_complete_one(run: Run) -> None:
    """Where a checkpoint is gone since, its rows are in the dataset alone."""
    complete = run.assemble()
    before = files_of(run.paths.embeddings_dir)
    shutil.rmtree(run.paths.checkpoints_dir / "shard_0")
    assert run.assemble(allow_missing=True) == complete
    assert files_of(run.paths.embeddings_dir) == before


def test_where_nothing_is_computed_there_is_no_partial_dataset(tmp_path: Path) -> None:
    run = start_run(tmp_path)
    with pytest.raises(IncompleteDatasetError, match="149 of 150 sequences are in no checkpoint"):
        run.assemble(quarantined=some_with_copies_and_without(run.plan)[1:2], allow_missing=True)
    with pytest.raises(IncompleteDatasetError, match="every sequence is in quarantine"):
        run.assemble(quarantined=run.plan.order.tolist(), allow_missing=True)
    assert not run.paths.embeddings_dir.exists()


def test_a_partial_dataset_refuses_quarantined_rows(run: Run) -> None:
    """A partial dataset too has no sequence both computed and in quarantine."""
    with pytest.raises(IncompleteDatasetError, match="in quarantine and yet in a checkpoint"):
        run.assemble(quarantined=[int(run.plan.order[0])], allow_missing=True)


def test_a_dataset_of_an_older_version_is_complete(run: Run) -> None:
    """A dataset from before there were partial ones is complete and stays."""
    run.assemble()
    success = json.loads(run.paths.success.read_bytes())
    for name in ("seal", "num_missing", "missing_sha256"):
        success.pop(name)
    vnp_lib.storage.durable.write_sealed_json(run.paths.success, success, replace=True)
    before = files_of(run.paths.embeddings_dir)

    assert open_dataset(run.paths.run_dir).metadata["num_missing"] == 0
    assert run.assemble().num_missing == 0
    assert files_of(run.paths.embeddings_dir) == before
    assert_rows(run, without=[])


def test_a_checkpoint_with_a_flipped_bit_makes_no_dataset(run: Run) -> None:
    path = run.paths.checkpoint(1, 2)
    flip_bit(path)
    with pytest.raises(CheckpointError, match=str(path)):
        run.assemble()
    assert not run.paths.success.exists()


def test_a_checkpoint_that_gives_rows_other_ids_makes_no_dataset(run: Run) -> None:
    ordinals = run.plan.shard_ordinals(0)[:5]
    write_checkpoint(
        run.plan, run.paths.checkpoint(0, 9), ordinals, ids=run.plan.ids(ordinals)[::-1]
    )
    with pytest.raises(
        StorageError, match=r"batch_00009\.pt gives its rows other ids than the plan"
    ):
        run.assemble()


def test_a_checkpoint_of_another_width_makes_no_dataset(run: Run) -> None:
    ordinals = run.plan.shard_ordinals(0)[:5]
    write_checkpoint(
        run.plan, run.paths.checkpoint(0, 9), ordinals, rows=np.zeros((5, DIM + 1), np.float32)
    )
    with pytest.raises(
        StorageError, match=r"batch_00009\.pt has rows of shape \(5, 9\); \(5, 8\) is wanted"
    ):
        run.assemble()


@pytest.mark.parametrize(
    ("pick", "what"),
    [
        pytest.param(
            lambda plan: np.array([plan.num_sequences]), "does not compute", id="beyond the input"
        ),
        pytest.param(lambda plan: np.array([-1]), "does not compute", id="negative"),
        pytest.param(
            lambda plan: np.setdiff1d(np.arange(plan.num_sequences), plan.order)[:1],
            "does not compute",
            id="a copy",
        ),
        pytest.param(lambda plan: plan.order[[0, 0]], "holds an ordinal twice", id="twice"),
    ],
)
def test_a_record_with_ordinals_that_were_not_planned_is_refused(
    run: Run, pick: Callable[[RunPlan], NDArray[np.int64]], what: str
) -> None:
    ordinals = pick(run.plan)
    record = CheckpointRecord(
        path=run.paths.checkpoint(0, 9),
        rank=0,
        batch_idx=9,
        rows=ordinals.size,
        width=DIM,
        dtype="float32",
        ordinals=ordinals,
        fingerprint=run.plan.fingerprint,
        size_bytes=0,
        sha256="",
    )
    with pytest.raises(StorageError, match=what):
        assemble(run.plan, run.paths, [*run.records(), record])


def test_a_row_that_is_not_finite_is_named(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Checkpoints refuse such rows; were one to come through, the dataset does too."""
    load = vnp_lib.checkpoint.file.load_checkpoint

    def load_with_a_bad_row(
        path: Path, *, fingerprint: str | None
    ) -> vnp_lib.checkpoint.file.Checkpoint:
        checkpoint = load(path, fingerprint=fingerprint)
        if path == run.paths.checkpoint(0, 0):
            checkpoint.embeddings[0, 3] = np.inf
        return checkpoint

    monkeypatch.setattr(vnp_lib.checkpoint, "load_checkpoint", load_with_a_bad_row)
    with pytest.raises(NumericalInstabilityError, match=r"not finite, the first of 'p\d+'"):
        run.assemble()
    assert not run.paths.success.exists()


def test_a_whole_dataset_is_left_as_it_is(run: Run) -> None:
    first = run.assemble()
    before = {path: path.stat().st_ino for path in run.paths.embeddings_dir.iterdir()}
    assert assemble(run.plan, run.paths, run.records()) == first
    assert {path: path.stat().st_ino for path in run.paths.embeddings_dir.iterdir()} == before


def test_a_float16_dataset_replaces_a_float32_one(
    run: Run,
) -> None:
    """From the same checkpoints, and never with parts of both."""
    run.assemble()
    halved = run._replace(plan=replace(run.plan, store_dtype=StoreDtype.FLOAT16))
    halved.assemble()
    parts = sorted(run.paths.embeddings_dir.glob("part-*.parquet"))
    assert {pq.read_schema(part).field("embedding").type.value_type for part in parts} == {
        pa.float16()
    }
    before = {path: path.stat().st_ino for path in run.paths.embeddings_dir.iterdir()}
    halved.assemble()
    assert {path: path.stat().st_ino for path in run.paths.embeddings_dir.iterdir()} == before
    assert np.array_equal(
        open_dataset(run.paths.run_dir).to_numpy()[1],
        run.expected_rows().astype(np.float16).astype(np.float32),
    )
    run.assemble()
    assert_rows(run, without=[])


@pytest.mark.parametrize("value", [65_520.0, -1e6])
def test_values_beyond_float16_are_named(run: Run, value: float) -> None:
    """Rounding to infinity begins at 65,520, half-way to the number after 65,504."""
    ordinals = run.plan.shard_ordinals(0)
    rows = np.stack([embed(sequence) for sequence in run.plan.fetch(ordinals)[1]])
    rows[4, 5] = value
    shutil.rmtree(run.paths.shard_dir(0))
    write_checkpoint(run.plan, run.paths.checkpoint(0, 0), ordinals, rows=rows)
    first, *others = np.flatnonzero(run.plan.representatives == ordinals[4]).tolist()
    halved = run._replace(plan=replace(run.plan, store_dtype=StoreDtype.FLOAT16))
    checkpoints = halved.records()
    message = (
        rf"{1 + len(others)} embeddings have values beyond 65,504, .* the first of "
        rf"'{run.ids[first]}' \(ordinal {first}\)"
    )
    with pytest.raises(
        ConfigError, match=message + "; start the run again with --store-dtype float32"
    ):
        halved.assemble(part_bytes=10**9)
    assert not run.paths.success.exists()
    assert [record.path for record in run.records()] == [record.path for record in checkpoints]
    run.assemble()
    assert open_dataset(run.paths.run_dir).row(first)[5] == np.float32(value)


def test_float16_rounds_to_its_largest_number(run: Run) -> None:
    """Float16 holds what is nearer to its largest number than to the next."""
    ordinals = run.plan.order
    rows = np.stack([embed(sequence) for sequence in run.plan.fetch(ordinals)[1]])
    rows[0, 0] = np.nextafter(np.float32(65_520), np.float32(0))
    shutil.rmtree(run.paths.checkpoints_dir)
    write_checkpoint(run.plan, run.paths.checkpoint(0, 0), ordinals, rows=rows)
    run._replace(plan=replace(run.plan, store_dtype=StoreDtype.FLOAT16)).assemble()
    assert open_dataset(run.paths.run_dir).row(int(ordinals[0]))[0] == 65_504


def test_a_damaged_dataset_is_rebuilt(run: Run) -> None:
    run.assemble()
    whole = files_of(run.paths.embeddings_dir)
    part = run.paths.embeddings_dir / "part-00001.parquet"
    part.write_bytes(part.read_bytes()[:-10] + bytes(10))
    assert verify_dataset(run.paths.embeddings_dir) == [
        f"{part} is damaged: its sha256 differs from _SUCCESS.json"
    ]
    run.assemble()
    assert files_of(run.paths.embeddings_dir) == whole


def test_an_interrupted_assembly_is_invisible_and_starts_over(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_part = vnp_lib.run.assembly._write_part

    def write_two_parts(*arguments: object) -> dict[str, object]:
        if (run.paths.new_dataset / "part-00001.parquet").exists():
            raise KeyboardInterrupt
        return write_part(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(vnp_lib.run.assembly, "_write_part", write_two_parts)
    with pytest.raises(KeyboardInterrupt):
        run.assemble()
    monkeypatch.undo()
    assert not run.paths.embeddings_dir.exists()
    with pytest.raises(StorageError, match="there is no complete dataset here"):
        open_dataset(run.paths.run_dir)

    run.assemble()
    assert_rows(run, without=[])
    assert not run.paths.assembly_dir.exists()


def test_parts_without_a_dataset_are_removed(run: Run) -> None:
    """It wrote them in place: they are known by what they say of themselves."""
    run.assemble(part_bytes=1)
    run.paths.success.unlink()
    run.assemble()
    assert len(list(run.paths.embeddings_dir.iterdir())) == 5
    assert_rows(run, without=[])


OLD, NEW = StoreDtype.FLOAT32, StoreDtype.FLOAT16


class Killed(BaseException):
    """The process is gone."""


class DyingOps(DurableOps):
    """Ends the process before its n-th directory operation: the disk sees no later one."""

    def __init__(self, kill_at: int, *, can_exchange: bool) -> None:
        self.kill_at = kill_at
        self.is_dead = False
        self._can_exchange = can_exchange
        for name in ("mkdir", "link", "replace", "exchange", "unlink", "fsync_directory"):
            setattr(self, name, self._mortal(name))

    def mortal_rmtree(self, rmtree: Callable[..., None]) -> Callable[..., None]:
        return lambda *arguments, **named: None if self.is_dead else rmtree(*arguments, **named)

    def _mortal(self, name: str) -> Callable[..., Any]:
        real = getattr(DurableOps, name)

        def act(*arguments: Any) -> Any:
            self.kill_at -= 1
            self.is_dead |= self.kill_at < 0
            if self.is_dead:
                raise Killed
            if name == "exchange" and not self._can_exchange:
                raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
            return None if name.startswith("fsync") else real(self, *arguments)

        return act


@pytest.mark.parametrize("can_exchange", [True, False], ids=["exchange", "two renames"])
def test_a_kill_leaves_the_old_or_the_new_dataset_intact(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, can_exchange: bool
) -> None:
    """Other files next to it are kept.

    If directories cannot be exchanged, there is no dataset for the time of two renames.
    """
    made = finish_run(start_run(tmp_path, num_sequences=12))
    made.assemble(part_bytes=10**9)
    for name in ("notes.txt", "mine/x.csv"):
        (made.paths.embeddings_dir / name).parent.mkdir(exist_ok=True)
        (made.paths.embeddings_dir / name).write_text(name)
    seen: list[StoreDtype | None] = []
    kill_at, is_over = 0, False
    while not is_over:
        run_dir = tmp_path / str(kill_at)
        shutil.copytree(made.paths.run_dir, run_dir)
        run = made._replace(paths=RunPaths(run_dir), plan=replace(made.plan, store_dtype=NEW))
        ops = DyingOps(kill_at, can_exchange=can_exchange)
        with monkeypatch.context() as patched, suppress(Killed):
            patched.setattr(vnp_lib.storage.durable, "ops", ops)
            patched.setattr(vnp_lib.run.assembly.shutil, "rmtree", ops.mortal_rmtree(shutil.rmtree))
            run.assemble(part_bytes=10**9)
        is_over = not ops.is_dead
        is_there = run.paths.embeddings_dir.exists()
        seen.append(StoreDtype(open_dataset(run_dir).metadata["store_dtype"]) if is_there else None)
        assert not is_there or verify_dataset(run_dir) == []

        run.assemble(part_bytes=10**9)
        assert open_dataset(run_dir).metadata["store_dtype"] == NEW
        assert verify_dataset(run_dir) == []
        names = {
            path.relative_to(run.paths.embeddings_dir).as_posix()
            for path in run.paths.embeddings_dir.rglob("*")
        }
        assert names == {"_SUCCESS.json", "part-00000.parquet", "notes.txt", "mine", "mine/x.csv"}
        assert not run.paths.assembly_dir.exists()
        shutil.rmtree(run_dir)
        kill_at += 1
    order = [OLD, NEW] if can_exchange else [OLD, None, NEW]
    assert list(dict.fromkeys(seen)) == order
    assert [seen.count(each) > 2 for each in (OLD, NEW)] == [True, True]


def test_what_float16_cannot_hold_leaves_the_old_dataset_as_it_was(run: Run) -> None:
    ordinals = run.plan.shard_ordinals(0)
    rows = np.stack([embed(sequence) for sequence in run.plan.fetch(ordinals)[1]])
    rows[4, 5] = 1e6
    shutil.rmtree(run.paths.shard_dir(0))
    write_checkpoint(run.plan, run.paths.checkpoint(0, 0), ordinals, rows=rows)
    run.assemble()
    before = files_of(run.paths.embeddings_dir)
    with pytest.raises(ConfigError, match="beyond 65,504"):
        run._replace(plan=replace(run.plan, store_dtype=NEW)).assemble()
    assert files_of(run.paths.embeddings_dir) == before
    assert not run.paths.assembly_dir.exists()
    run.assemble()
    assert files_of(run.paths.embeddings_dir) == before


@pytest.mark.parametrize(
    "name",
    ["part-00000-1f2e-c000.snappy.parquet", "part-00007.parquet", "table.parquet"],
    ids=["Spark's", "ours", "any"],
)
@pytest.mark.parametrize("has_dataset", [True, False])
def test_a_foreign_parquet_file_is_refused_and_kept(run: Run, name: str, has_dataset: bool) -> None:
    """A parquet file of somebody else is never removed and never mixed in."""
    if has_dataset:
        run.assemble()
        (run.paths.embeddings_dir / "part-00001.parquet").unlink()
    foreign = run.paths.embeddings_dir / name
    foreign.parent.mkdir(exist_ok=True)
    pq.write_table(pa.table({"id": ["theirs"]}), foreign)
    before = files_of(run.paths.embeddings_dir)
    with pytest.raises(
        ConfigError, match=rf"{re.escape(name)} is not of this run.* move it to another directory"
    ):
        run.assemble()
    assert files_of(run.paths.embeddings_dir) == before
    foreign.rename(run.paths.run_dir / name)
    run.assemble()
    assert_rows(run, without=[])


def test_an_existing_dataset_is_synced_before_it_is_accepted(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its writer may have been killed between naming `_SUCCESS.json` and syncing that name."""
    run.assemble()
    synced: list[Path] = []

    class Recording(DurableOps):
        def fsync_directory(self, path: Path) -> None:
            synced.append(path)
            super().fsync_directory(path)

    monkeypatch.setattr(vnp_lib.storage.durable, "ops", Recording())
    run.assemble()
    assert synced[-2:] == [run.paths.run_dir, run.paths.embeddings_dir]


@pytest.mark.parametrize(("buffer_bytes", "most"), [(10**9, 1), (3000, 12)])
def test_a_bucket_is_opened_for_many_checkpoints_at_once(
    run: Run, monkeypatch: pytest.MonkeyPatch, buffer_bytes: int, most: int
) -> None:
    """Where their rows find room in memory; else as often as it takes."""
    opened: Counter[str] = Counter()
    real = Path.open

    def counted(path: Path, mode: str = "r", *arguments: Any, **named: Any) -> Any:
        opened.update([path.name] if mode == "ab" else [])
        return real(path, mode, *arguments, **named)

    monkeypatch.setattr(vnp_lib.run.buckets, "_BUFFER_BYTES", buffer_bytes)
    monkeypatch.setattr(Path, "open", counted)
    run.assemble()
    assert len(opened) == 4
    assert (max(opened.values()) == 1) == (most == 1)
    assert max(opened.values()) <= most
    assert_rows(run, without=[])


@pytest.mark.parametrize("layout", ["mean", "per_tok"])
def test_there_are_no_more_parts_than_success_json_holds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layout: str
) -> None:
    """They are larger instead: what is written can be read, whatever size is requested."""
    monkeypatch.setattr(vnp_lib.run.buckets, "_MOST_PARTS", 7)
    outputs = (
        (Output(kind=OutputKind.MEAN, layer=6),)
        if layout == "mean"
        else (Output(kind=OutputKind.PER_TOK, layer=6),)
    )
    rows = RowLayout(outputs, DIM)
    run = start_run(tmp_path, model=identity_of(rows))
    for rank in range(run.plan.num_shards):
        ordinals = run.plan.shard_ordinals(rank)
        own = [row_of(rows, sequence) for sequence in run.plan.fetch(ordinals)[1]]
        offsets = None if layout == "mean" else offsets_of(np.array([row.size for row in own]))
        joined = np.stack(own) if layout == "mean" else np.concatenate(own)
        write_checkpoint(
            run.plan, run.paths.checkpoint(rank, 0), ordinals, rows=joined, offsets=offsets
        )
    summary = run.assemble(part_bytes=1)
    assert 4 <= summary.num_parts <= 8
    assert len(open_dataset(run.paths.run_dir)) == 150


def test_success_json_of_the_most_parts_is_readable() -> None:
    """As many parts as there may be leave success JSON well below what is read."""
    part = {"name": "part-16384.parquet", "rows": 10**9, "size_bytes": 10**12, "sha256": "f" * 64}
    part |= {"footer_bytes": 10**9, "footer_sha256": "f" * 64}
    data = vnp_lib.storage.durable.canonical_json(
        {"parts": [part] * 2 * vnp_lib.run.buckets._MOST_PARTS}
    )
    assert len(data) < vnp_lib.storage.durable.MAX_JSON_BYTES / 3


def test_the_same_cut_sequences_of_longer_ones_are_another_input(tmp_path: Path) -> None:
    """No row differs, but the original lengths do: it is rewritten from the same checkpoints."""
    paths, cut = RunPaths(tmp_path / "run"), "MKVLAGEW" * 2
    written = []
    for tail in ("AG", "AGLSDE", "AGLSDE", ""):
        fasta = tmp_path / "x.fasta"
        fasta.write_text(f">a\n{cut}{tail}\n>b\nMKV\n")
        policy = InputPolicy(max_length=16, long="truncate")
        plan = make_plan(paths, [fasta], MODEL, num_shards=1, token_budget=200, policy=policy)
        records = survey_checkpoints(
            paths.checkpoints_dir, plan.fingerprint, verify_digests=False
        ).valid
        if not records:
            write_checkpoint(plan, paths.checkpoint(0, 0), plan.order)
            records = survey_checkpoints(
                paths.checkpoints_dir, plan.fingerprint, verify_digests=False
            ).valid
        assemble(plan, paths, records)
        table = pq.read_table(paths.embeddings_dir / "part-00000.parquet")
        written.append(table.column("original_length").to_pylist()[0])
    assert written == [18, 22, 22, 16]


def test_free_space_counts_neither_old_nor_kept_datasets(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where its checkpoints were deleted to make room."""
    run.assemble()
    layout = layout_from_plan(run.plan, run.records())
    shutil.rmtree(run.paths.checkpoints_dir)
    usage = shutil.disk_usage(run.paths.run_dir)._replace(free=required_bytes(run.plan, layout) - 1)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    check_free_space(run.paths, run.plan, layout)
    with pytest.raises(ConfigError, match="are needed: make room"):
        check_free_space(run.paths, replace(run.plan, store_dtype=NEW), layout)


def test_a_bucket_that_does_not_give_back_its_bytes_is_noticed(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    distribute = vnp_lib.run.assembly._distribute

    def distribute_and_damage(*arguments: object) -> object:
        comparisons = distribute(*arguments)  # type: ignore[arg-type]
        (bucket,) = run.paths.assembly_dir.glob("bucket-00002-*")
        flip_bit(bucket, 8 * 20)
        return comparisons

    monkeypatch.setattr(vnp_lib.run.assembly, "_distribute", distribute_and_damage)
    with pytest.raises(StorageError, match=r"bucket-00002-.* does not hold what was written to it"):
        run.assemble()
    assert not run.paths.success.exists()


def test_an_ordinal_twice_instead_of_another_is_refused(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    take = vnp_lib.run.buckets.Buckets.take

    def take_twice(buckets: Any, part: int) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        ordinals, rows = take(buckets, part)
        ordinals[1] = ordinals[0]
        return ordinals, rows

    monkeypatch.setattr(vnp_lib.run.buckets.Buckets, "take", take_twice)
    with pytest.raises(StorageError, match="came back from disk incomplete"):
        run.assemble()
    assert not run.paths.success.exists()


def test_assembly_needs_memory_for_a_checkpoint_and_a_part_only(tmp_path: Path) -> None:
    """Also where one sequence has thousands of copies: they are written a part at a time."""
    dim, num_sequences = 2048, 20_000
    sequences = ["MKVLW" if i % 2 else "MKVLW" + "AGL" * (i % 1000) for i in range(num_sequences)]
    fasta = tmp_path / "x.fasta"
    fasta.write_text("".join(f">p{i}\n{sequence}\n" for i, sequence in enumerate(sequences)))
    paths = RunPaths(tmp_path / "run")
    plan = make_plan(paths, [fasta], MODEL, num_shards=1, token_budget=10**6)
    rows = np.repeat(plan.lengths[plan.order].astype(np.float32)[:, np.newaxis], dim, axis=1)
    write_checkpoint(plan, paths.checkpoint(0, 0), plan.order, rows=rows)
    records = survey_checkpoints(
        paths.checkpoints_dir, plan.fingerprint, verify_digests=False
    ).valid

    tracemalloc.start()
    assemble(plan, paths, records, part_bytes=4 * 1024**2)
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak_bytes < num_sequences * dim * 4 / 3
    first_values = np.concatenate(
        [rows[:, 0] for _, rows in open_dataset(tmp_path / "run").batches(1000)]
    )
    assert first_values.tolist() == [len(sequence) for sequence in sequences]
