"""Tests of datasets with several outputs: every array under its id and name."""

from __future__ import annotations

import json
import tracemalloc
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from numpy.typing import NDArray

import vnp_lib.run.assembly
from tests.fake_runs import (
    DIM,
    MODEL,
    Run,
    finished_run_of,
    identity_of,
    outputs_of,
    row_of,
    start_run,
    write_checkpoint,
    write_planned,
)
from vnp_lib.checkpoint.survey import survey_checkpoints
from vnp_lib.dataset.reader import EmbeddingDataset, open_dataset, verify_dataset
from vnp_lib.errors import CheckpointError, FingerprintMismatchError, NumericalInstabilityError
from vnp_lib.plan.outputs import RowLayout, StoreDtype, offsets_of
from vnp_lib.plan.paths import RunPaths
from vnp_lib.plan.planner import make_plan
from vnp_lib.run.assembly import assemble
from vnp_lib.run.validation import read_checkpoints

VECTORS = RowLayout.of_names(["mean_5", "mean_6", "bos_6"], embed_dim=DIM)
RAGGED = RowLayout.of_names(["mean_6", "per_tok_6", "contacts", "logits"], embed_dim=DIM)
ONLY_PER_TOK = RowLayout.of_names(["per_tok_6"], embed_dim=DIM)
LAYOUTS = [VECTORS, RAGGED, ONLY_PER_TOK]

all_layouts = pytest.mark.parametrize("layout", LAYOUTS, ids=["vectors", "ragged", "per_tok"])


def assert_same_outputs(
    found: dict[str, NDArray[np.float32]], expected: dict[str, NDArray[np.float32]]
) -> None:
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        assert found[name].dtype == np.float32
        assert np.array_equal(found[name], values), name  # the shape too


def assert_all_rows(dataset: EmbeddingDataset, run: Run, layout: RowLayout) -> None:
    assert dataset.outputs == layout.names
    assert dataset.ids == run.ids
    for ordinal, (sequence_id, sequence) in enumerate(zip(run.ids, run.sequences, strict=True)):
        assert_same_outputs(dataset[sequence_id], outputs_of(layout, sequence))
        assert_same_outputs(dataset.row(ordinal), outputs_of(layout, sequence))


@all_layouts
@pytest.mark.parametrize("part_bytes", [1, 50_000, 10**9])
def test_every_array_is_found_under_its_id_its_place_and_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layout: RowLayout, part_bytes: int
) -> None:
    """Copies included; in parts of one row, of some and of all, with several row groups."""
    monkeypatch.setattr(vnp_lib.run.assembly, "_ROW_GROUP_BYTES", 20_000)
    run = finished_run_of(tmp_path, layout)
    summary = run.assemble(part_bytes=part_bytes)
    assert summary.num_rows == 150
    assert (summary.num_parts == 150, summary.num_parts == 1) == (
        part_bytes == 1,
        part_bytes == 10**9,
    )
    assert_all_rows(open_dataset(run.paths.run_dir), run, layout)
    assert verify_dataset(run.paths.run_dir) == []


@all_layouts
def test_batches_give_the_outputs_by_name_in_input_order(tmp_path: Path, layout: RowLayout) -> None:
    run = finished_run_of(tmp_path, layout)
    run.assemble(part_bytes=50_000)
    place = 0
    for ids, outputs in open_dataset(run.paths.run_dir).batches(7):
        for nth, sequence_id in enumerate(ids):
            assert sequence_id == run.ids[place]
            found = {name: values[nth] for name, values in outputs.items()}
            assert_same_outputs(found, outputs_of(layout, run.sequences[place]))
            place += 1
    assert place == 150


def test_a_part_has_a_column_for_each_output_that_others_can_read(tmp_path: Path) -> None:
    """By pyarrow, which knows nothing of us: `length` tells the shapes."""
    run = finished_run_of(tmp_path, RAGGED)
    run.assemble(part_bytes=10**9)
    table = pq.read_table(run.paths.embeddings_dir / "part-00000.parquet")
    assert table.schema.names == [
        "ordinal",
        "id",
        "description",
        "length",
        "original_length",
        *RAGGED.names,
    ]
    assert table.schema.field("mean_6").type == pa.list_(
        pa.field("element", pa.float32(), nullable=False), DIM
    )
    assert table.schema.field("contacts").type == pa.list_(
        pa.field("element", pa.float32(), nullable=False)
    )
    for length, contacts, sequence in zip(
        table.column("length").to_pylist(),
        table.column("contacts").to_pylist(),
        run.sequences,
        strict=True,
    ):
        found = np.array(contacts, dtype=np.float32).reshape(length, length)
        assert np.array_equal(found, outputs_of(RAGGED, sequence)["contacts"])


@all_layouts
def test_a_dataset_in_float16_holds_the_nearest_of_each_value(
    tmp_path: Path, layout: RowLayout
) -> None:
    """Two bytes per value in Parquet, whatever its shape; float32 for our readers."""
    run = finished_run_of(tmp_path, layout, StoreDtype.FLOAT16)
    run.assemble(part_bytes=50_000)
    schema = pq.read_schema(run.paths.embeddings_dir / "part-00000.parquet")
    assert {schema.field(name).type.value_type for name in layout.names} == {pa.float16()}
    assert verify_dataset(run.paths.run_dir) == []
    dataset = open_dataset(run.paths.run_dir)
    place = 0
    for ids, outputs in dataset.batches(7):
        for nth, sequence_id in enumerate(ids):
            nearest = {
                name: values.astype(np.float16).astype(np.float32)
                for name, values in outputs_of(layout, run.sequences[place]).items()
            }
            assert sequence_id == run.ids[place]
            assert_same_outputs({name: values[nth] for name, values in outputs.items()}, nearest)
            assert_same_outputs(dataset[sequence_id], nearest)
            place += 1
    assert place == 150


def test_success_json_names_outputs_and_first_ordinals(tmp_path: Path) -> None:
    """Success JSON names the outputs and the first ordinal of each part."""
    run = finished_run_of(tmp_path, RAGGED)
    run.assemble(part_bytes=50_000)
    success = json.loads(run.paths.success.read_bytes())
    assert success["outputs"] == ["mean_6", "per_tok_6", "contacts", "logits"]
    assert success["dim"] == DIM
    assert (
        success["first_ordinals"]
        == np.cumsum([0, *(part["rows"] for part in success["parts"])])[:-1].tolist()
    )


def test_the_mean_of_another_layer_is_an_embedding_like_any_other(tmp_path: Path) -> None:
    layout = RowLayout.of_names(["mean_3"], embed_dim=DIM)
    run = start_run(tmp_path, model=replace(MODEL, layer=3))
    write_planned(run, layout, run.paths.checkpoint(0, 0), run.plan.order)
    run.assemble()
    dataset = open_dataset(run.paths.run_dir)
    assert dataset.outputs == ("mean_3",)
    assert np.array_equal(dataset[run.ids[0]], row_of(layout, run.sequences[0]))


@pytest.mark.parametrize("part_bytes", [1, 50_000])
def test_quarantined_sequences_have_no_ragged_row(tmp_path: Path, part_bytes: int) -> None:
    """Sequences in quarantine have no row in a ragged dataset either."""
    run = start_run(tmp_path, model=identity_of(RAGGED))
    left_out = run.plan.order[:3].tolist()
    write_planned(run, RAGGED, run.paths.checkpoint(0, 0), run.plan.order[3:])
    run.assemble(quarantined=left_out, part_bytes=part_bytes)
    dataset = open_dataset(run.paths.run_dir)
    kept = [ordinal for ordinal in range(150) if run.plan.representatives[ordinal] not in left_out]
    assert dataset.ids == [run.ids[ordinal] for ordinal in kept]
    for ordinal in kept:
        assert_same_outputs(dataset.row(ordinal), outputs_of(RAGGED, run.sequences[ordinal]))
    with pytest.raises(KeyError):
        dataset.row(left_out[0])


@all_layouts
def test_a_run_of_other_outputs_is_refused(tmp_path: Path, layout: RowLayout) -> None:
    """A run of other outputs is refused and its checkpoints are not taken."""
    run = finished_run_of(tmp_path, layout)
    other = RowLayout.of_names(["mean_6", "bos_5"], embed_dim=DIM)
    with pytest.raises(
        FingerprintMismatchError, match=r"outputs is '.*' there and 'mean_6,bos_5' here"
    ):
        make_plan(
            run.paths, [tmp_path / "x.fasta"], identity_of(other), num_shards=3, token_budget=200
        )
    with pytest.raises(FingerprintMismatchError, match=r"outputs is '.*' there and None here"):
        make_plan(run.paths, [tmp_path / "x.fasta"], MODEL, num_shards=3, token_budget=200)
    elsewhere = make_plan(
        RunPaths(tmp_path / "other"),
        [tmp_path / "x.fasta"],
        identity_of(other),
        num_shards=3,
        token_budget=200,
    )
    survey = survey_checkpoints(
        run.paths.checkpoints_dir, elsewhere.fingerprint, verify_digests=False
    )
    assert survey.valid == ()
    assert len(survey.damaged) == 12
    assert all("is of the run" in damage.reason for damage in survey.damaged)


def moved_by_one(offsets: list[int]) -> list[int]:
    """Two rows of other widths than their sequences', as many values as before."""
    return [offsets[0], offsets[1] + 1, *offsets[2:]]


def test_rows_of_other_widths_than_the_sequences_are_damage(tmp_path: Path) -> None:
    """The checkpoint passes validation by its marker; only the plan shows the fault."""
    run = start_run(tmp_path, model=identity_of(RAGGED))
    ordinals = run.plan.order
    rows = [row_of(RAGGED, sequence) for sequence in run.plan.fetch(ordinals)[1]]
    offsets = moved_by_one(offsets_of(np.array([row.size for row in rows])).tolist())
    path = run.paths.checkpoint(0, 0)
    write_checkpoint(run.plan, path, ordinals, rows=np.concatenate(rows), offsets=np.array(offsets))
    with pytest.raises(
        CheckpointError, match="rows of other widths than its sequences' lengths come to"
    ):
        run.assemble()
    [damage] = read_checkpoints(run.plan, run.paths).damaged
    assert "other widths" in damage.reason


def test_a_non_finite_ragged_row_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No valid checkpoint holds one: it comes from the disk of the buckets."""
    run = finished_run_of(tmp_path, RAGGED)
    take = vnp_lib.run.buckets.Buckets.take

    def spoilt(buckets: Any, part: int) -> Any:
        ordinals, rows = take(buckets, part)
        rows[int(RAGGED.widths(run.plan.lengths[ordinals])[:2].sum()) - 1] = (
            np.nan
        )  # the second row's last number
        return ordinals, rows

    monkeypatch.setattr(vnp_lib.run.buckets.Buckets, "take", spoilt)
    with pytest.raises(
        NumericalInstabilityError, match=rf"the first of {run.ids[1]!r} \(ordinal 1\)"
    ):
        run.assemble(part_bytes=10**9)


def test_ragged_assembly_needs_little_memory(tmp_path: Path) -> None:
    """Peak memory stays below a third of the rows.

    That is four checkpoints, four waiting parts and two that are being written at most.

    All but a few hundred sequences are copies, about 300 MB of rows. Threads decide how many are
    held at once.
    """
    layout = RowLayout.of_names(["per_tok_6"], embed_dim=DIM)
    sequences = ["MKVLW" * 20 if i % 2 else "AGL" * (i % 800 + 1) for i in range(15_000)]
    fasta = tmp_path / "x.fasta"
    fasta.write_text("".join(f">p{i}\n{sequence}\n" for i, sequence in enumerate(sequences)))
    paths = RunPaths(tmp_path / "run")
    plan = make_plan(paths, [fasta], identity_of(layout), num_shards=1, token_budget=10**6)
    for number, ordinals in enumerate(np.array_split(plan.order, 10)):
        widths = layout.widths(plan.lengths[ordinals])
        rows = np.repeat(widths.astype(np.float32), widths)
        write_checkpoint(
            plan, paths.checkpoint(0, number), ordinals, rows=rows, offsets=offsets_of(widths)
        )
    records = survey_checkpoints(
        paths.checkpoints_dir, plan.fingerprint, verify_digests=False
    ).valid
    whole_bytes = 4 * int(layout.widths(plan.lengths).sum())

    tracemalloc.start()
    assemble(plan, paths, records, part_bytes=4 * 1024**2)
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert 4 * 1024**2 < peak_bytes < whole_bytes / 3, (peak_bytes, whole_bytes)
    ordinal = 0
    for _, outputs in open_dataset(paths.run_dir).batches(1000):
        for values in outputs["per_tok_6"]:
            assert values.shape == (len(sequences[ordinal]), DIM)
            assert (values == values.size).all()
            ordinal += 1
    assert ordinal == 15_000


def test_what_takes_vectors_says_that_there_is_more(tmp_path: Path) -> None:
    run = finished_run_of(tmp_path, RAGGED)
    run.assemble()
    dataset = open_dataset(run.paths.run_dir)
    for takes_vectors in (
        dataset.to_numpy,
        dataset.as_torch_dataset,
        lambda: next(dataset.torch_batches(2)),
    ):
        with pytest.raises(
            ValueError,
            match="has mean_6, per_tok_6, contacts, logits per sequence, not a single vector",
        ):
            takes_vectors()
    sequence_id, outputs = dataset.at(3)
    assert sequence_id == run.ids[3]
    assert_same_outputs(outputs, outputs_of(RAGGED, run.sequences[3]))
