"""Runs without a model: the checkpoints hold one fake row per sequence."""

from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from vnp_lib.checkpoint.markers import CheckpointRecord
from vnp_lib.checkpoint.survey import survey_checkpoints
from vnp_lib.checkpoint.writer import AsyncCheckpointWriter
from vnp_lib.plan.outputs import RowLayout, StoreDtype, offsets_of
from vnp_lib.plan.paths import RunPaths
from vnp_lib.plan.plan import ROW_OVERHEAD_BYTES, ModelIdentity, RunPlan
from vnp_lib.plan.planner import make_plan
from vnp_lib.run.assembly import DatasetSummary, assemble

MODEL = ModelIdentity(
    model="esm2_t6_8M_UR50D", weights_digest="random:seed=0", layer=6, dtype="float32"
)
DIM = 8
FORTY_ROWS = 40 * (DIM * 4 + ROW_OVERHEAD_BYTES)  # bytes
CREATED = datetime(2026, 11, 22, 12, 0, tzinfo=UTC)


class Run(NamedTuple):
    """A run with all its checkpoints."""

    plan: RunPlan
    paths: RunPaths
    ids: list[str]
    descriptions: list[str]
    sequences: list[str]

    def records(self) -> tuple[CheckpointRecord, ...]:
        return survey_checkpoints(
            self.paths.checkpoints_dir, self.plan.fingerprint, verify_digests=False
        ).valid

    def assemble(
        self,
        *,
        quarantined: Sequence[int] = (),
        allow_missing: bool = False,
        part_bytes: int = FORTY_ROWS,
    ) -> DatasetSummary:
        return assemble(
            self.plan,
            self.paths,
            self.records(),
            quarantined=frozenset(quarantined),
            allow_missing=allow_missing,
            clock=lambda: CREATED,
            part_bytes=part_bytes,
        )

    def expected_rows(self) -> NDArray[np.float32]:
        return np.stack([embed(sequence) for sequence in self.sequences])


def embed(sequence: str) -> NDArray[np.float32]:
    """Return a row that identifies a sequence."""
    return np.random.default_rng(list(sequence.encode())).standard_normal(DIM, dtype=np.float32)


def write_checkpoint(
    plan: RunPlan,
    path: Path,
    ordinals: NDArray[np.int64],
    *,
    ids: list[str] | None = None,
    rows: NDArray[np.float32] | None = None,
    offsets: NDArray[np.int64] | None = None,
    software: dict[str, str] | None = None,
) -> None:
    """Write the checkpoint of a shard, or other ids or rows instead of its own.

    With `offsets`, the rows are end to end.
    """
    planned_ids, sequences = plan.fetch(ordinals)
    if rows is None:
        rows = np.stack([embed(sequence) for sequence in sequences])
    metadata: dict[str, Any] = {"ordinals": ordinals.tolist(), "fingerprint": plan.fingerprint}
    if software is not None:
        metadata["software"] = software
    if offsets is not None:
        metadata["offsets"] = offsets.tolist()
    with AsyncCheckpointWriter() as writer:
        writer.write_checkpoint_async(path, rows, ids or planned_ids, metadata)


class Records(NamedTuple):
    """The records of a FASTA file, as parallel lists."""

    ids: list[str]
    descriptions: list[str]
    sequences: list[str]


def fake_records(num_sequences: int = 150, seed: int = 0) -> Records:
    """Draw records with copies, in no order of ids or lengths, every second with a description."""
    rng = np.random.default_rng(seed)
    pool = [
        "".join(rng.choice(list("LAGVSERTIDPKQNFYMHWC"), rng.integers(5, 60)))
        for _ in range(num_sequences)
    ]
    sequences = [pool[pick] for pick in rng.integers(0, num_sequences, size=num_sequences)]
    ids = [f"p{number}" for number in rng.permutation(num_sequences)]
    descriptions = [f"protein {sequence_id}" if i % 2 else "" for i, sequence_id in enumerate(ids)]
    return Records(ids, descriptions, sequences)


def start_run(
    tmp_path: Path,
    *,
    num_sequences: int = 150,
    seed: int = 0,
    model: ModelIdentity = MODEL,
    store_dtype: StoreDtype = StoreDtype.FLOAT32,
) -> Run:
    return start_run_of(tmp_path, fake_records(num_sequences, seed), model, store_dtype)


def start_run_of(
    tmp_path: Path,
    records: Records,
    model: ModelIdentity = MODEL,
    store_dtype: StoreDtype = StoreDtype.FLOAT32,
) -> Run:
    fasta = tmp_path / "x.fasta"
    fasta.write_text("".join(f">{i} {d}\n{s}\n" for i, d, s in zip(*records, strict=True)))
    paths = RunPaths(tmp_path / "run")
    plan = make_plan(paths, [fasta], model, num_shards=3, token_budget=200, store_dtype=store_dtype)
    return Run(plan, paths, *records)


def finish_run(run: Run, *, without: Sequence[int] = ()) -> Run:
    for rank in range(run.plan.num_shards):
        ordinals = run.plan.shard_ordinals(rank)
        ordinals = ordinals[~np.isin(ordinals, without)]
        batches = [batch for batch in np.array_split(ordinals, 4) if batch.size]
        for batch_idx, batch in enumerate(batches):
            write_checkpoint(run.plan, run.paths.checkpoint(rank, batch_idx), batch)
    return run


def identity_of(layout: RowLayout) -> ModelIdentity:
    return replace(MODEL, **layout.identity())


def outputs_of(layout: RowLayout, sequence: str) -> dict[str, NDArray[np.float32]]:
    """Return arrays that identify a sequence."""
    draw = np.random.default_rng(list(sequence.encode()))
    shapes = {output.name: output.shape(len(sequence), DIM) for output in layout.outputs}
    return {name: draw.standard_normal(shape, dtype=np.float32) for name, shape in shapes.items()}


def row_of(layout: RowLayout, sequence: str) -> NDArray[np.float32]:
    return np.concatenate([values.ravel() for values in outputs_of(layout, sequence).values()])


def write_planned(run: Run, layout: RowLayout, path: Path, ordinals: NDArray[np.int64]) -> None:
    rows = [row_of(layout, sequence) for sequence in run.plan.fetch(ordinals)[1]]
    if layout.is_fixed:
        write_checkpoint(run.plan, path, ordinals, rows=np.stack(rows))
    else:
        widths = np.array([row.size for row in rows])
        write_checkpoint(
            run.plan, path, ordinals, rows=np.concatenate(rows), offsets=offsets_of(widths)
        )


def finished_run_of(
    tmp_path: Path, layout: RowLayout, store_dtype: StoreDtype = StoreDtype.FLOAT32
) -> Run:
    run = start_run(tmp_path, model=identity_of(layout), store_dtype=store_dtype)
    for rank in range(run.plan.num_shards):
        for batch_idx, batch in enumerate(np.array_split(run.plan.shard_ordinals(rank), 4)):
            write_planned(run, layout, run.paths.checkpoint(rank, batch_idx), batch)
    return run


def files_of(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}
