"""The dataset: every sequence's embedding, in input order, in Parquet parts that `_SUCCESS.json` vouches for.

`assemble` makes it from checkpoints, in two passes over the rows and with memory for one checkpoint and one part:
rows are first distributed over one temporary bucket for each part, copies of identical sequences included; then each bucket
is put in order, checked against the plan, and written. `open_dataset` reads it, a few rows or all, without the rest.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import uuid
import zlib
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import cached_property, lru_cache
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from vnp_lib import files
from vnp_lib.failures import CheckpointError, IncompleteDatasetError, NumericalInstabilityError, StorageError
from vnp_lib.plan import ROW_OVERHEAD_BYTES, RunPaths, RunPlan
from vnp_lib.precision import Certificate, Comparison, from_metadata
from vnp_lib.read_ahead import ReadAhead

if TYPE_CHECKING:  # torch takes seconds to import, and readers of a dataset do without
    from vnp_lib.checkpoint import Checkpoint, CheckpointRecord

DATASET_SCHEMA = 1

_PART_BYTES = 128 * 1024**2  # of embeddings
_ROW_GROUP_BYTES = 4 * 1024**2  # what is read to get at one row
_NUM_SHOWN = 10
_SUCCESS_NAME = "_SUCCESS.json"
_NONE_SHA256 = hashlib.sha256().hexdigest()  # of no ordinals
_FOOTER_TAIL_BYTES = 8  # its length and "PAR1" end a Parquet file


@dataclass(frozen=True, slots=True, kw_only=True)
class DatasetSummary:
    """What an assembly left on disk."""

    path: Path
    num_rows: int
    num_quarantined: int
    num_missing: int  # 0 unless the dataset is partial
    num_parts: int
    dim: int
    size_bytes: int
    precision: Certificate | None  # of what went through the model in half precision

    def describe(self) -> str:
        """Say what the dataset holds, and what it lacks: `997 sequences embedded, 3 in quarantine`."""
        return describe_rows(self.num_rows, num_quarantined=self.num_quarantined, num_missing=self.num_missing)


def describe_rows(num_rows: int, *, num_quarantined: int, num_missing: int) -> str:
    """Say how many rows a dataset has, and what it lacks: `997 sequences embedded, 3 in quarantine`."""
    lacking = ((num_quarantined, "in quarantine"), (num_missing, "missing"))
    return ", ".join([f"{num_rows:,} sequences embedded", *(f"{count:,} {what}" for count, what in lacking if count)])


def _utc_now() -> datetime:
    return datetime.now(UTC)


def assemble(
    plan: RunPlan,
    paths: RunPaths,
    records: Sequence[CheckpointRecord],
    *,
    quarantined: frozenset[int] = frozenset(),
    allow_missing: bool = False,
    clock: Callable[[], datetime] = _utc_now,
    part_bytes: int = _PART_BYTES,
) -> DatasetSummary:
    """Put the dataset together from checkpoints; each is read once, and its digest checked.

    Afterwards `paths.embeddings_dir` holds `part-*.parquet` and, written last, `_SUCCESS.json`; all is durable. An assembly
    that is interrupted leaves no `_SUCCESS.json`, and the next one starts over. A whole dataset of the same content is
    left as it is; so is one from which nothing is missing, though by now a checkpoint is gone.

    Args:
        plan: The plan that the checkpoints follow.
        paths: Of the run.
        records: Checkpoints. Where two hold the same ordinal, the first by rank and batch_idx counts.
        quarantined: Ordinals that have no embedding; a sequence's copies share its fate.
        allow_missing: Leave out the rows of ordinals that are in no checkpoint and not in quarantine; they are counted in
            `_SUCCESS.json`. A later assembly that finds other ordinals missing, or none, starts over.
        clock: Gives the time that goes into `_SUCCESS.json`.
        part_bytes: Bytes of rows in a part, their ids and descriptions included.

    Raises:
        IncompleteDatasetError: An ordinal is in no checkpoint and not in quarantine, and may not be missing; or it is in
            both; or nothing at all is computed.
        NumericalInstabilityError: A row is not finite.
        CheckpointError: A checkpoint does not prove itself or does not fit the plan.
        StorageError: The dataset cannot be written.
    """
    is_quarantined = with_copies(plan, quarantined)
    try:
        if not _is_whole(paths, _content(plan, is_quarantined, np.zeros_like(is_quarantined))):
            records = sorted(records, key=lambda record: (record.rank, record.batch_idx))
            is_missing = _find_missing(plan, records, is_quarantined, allow_missing=allow_missing)
            content = _content(plan, is_quarantined, is_missing)
            if not (is_missing.any() and _is_whole(paths, content)):
                _start_over(paths)
                has_row = ~is_quarantined & ~is_missing
                _write_dataset(plan, paths, records, has_row, content, clock().isoformat(), part_bytes)
        _sync_names(paths)  # whoever put it together may have died before doing so
        shutil.rmtree(paths.assembly_dir, ignore_errors=True)
    except OSError as error:
        raise StorageError(
            f"{paths.embeddings_dir}: the dataset cannot be written ({error}); mend that and start the run again: "
            f"nothing is computed twice"
        ) from error
    return _summary(paths)


def open_dataset(path: Path | str) -> EmbeddingDataset:
    """Open the dataset of a run, by its run directory or the `embeddings` directory in it.

    Of a partial dataset, which only a run that was asked for one makes, `metadata["num_missing"]` is not 0.

    Raises:
        StorageError: There is no dataset, or a part of it is missing or has another size.
    """
    directory = _find_dataset(Path(path))
    return EmbeddingDataset(directory, _read_success(directory))


def verify_dataset(path: Path | str) -> list[str]:
    """Read every byte of a dataset and say what is wrong with it: nothing, if it is whole."""
    try:
        directory = _find_dataset(Path(path))
        success = _read_success(directory)
    except StorageError as error:
        return [str(error)]
    return [damage for part in success["parts"] if (damage := _damage(directory, part))]


def load_planned(plan: RunPlan, record: CheckpointRecord, *, dim: int) -> Checkpoint:
    """Read a checkpoint whole, and check that it holds what its marker and the plan say.

    Raises:
        CheckpointError: It does not prove itself, or does not fit; says what to do.
    """
    from vnp_lib.checkpoint import load_checkpoint

    _require_planned(plan, record)
    checkpoint = load_checkpoint(record.path, fingerprint=plan.fingerprint)
    _require_as_recorded(plan, record, checkpoint, dim)
    return checkpoint


def with_copies(plan: RunPlan, ordinals: Collection[int]) -> NDArray[np.bool_]:
    """Which sequences are among `ordinals` or a copy of one that is, (N,)."""
    is_meant = np.zeros(plan.num_sequences, dtype=bool)
    is_meant[list(ordinals)] = True
    return is_meant | is_meant[plan.representatives]


class EmbeddingDataset:
    """Read access to a dataset. Rows are in input order; a sequence in quarantine has none.

    Nor has one that had not been computed when a partial dataset was put together: `metadata["num_missing"]` counts these,
    and is 0 in a dataset that is complete; `metadata["num_quarantined"]` counts the others. Both include copies.

    Nothing is read before it is asked for. Looking up by id makes a dictionary of all ids first, about 150 bytes each.
    Whatever reads raises StorageError where a part is damaged.
    """

    def __init__(self, directory: Path, metadata: dict[str, Any]) -> None:
        self.metadata = metadata  # what `_SUCCESS.json` says: counts, identity, fingerprint, parts
        self._directory = directory
        self._part_starts = [0, *accumulate(part["rows"] for part in metadata["parts"])]
        self._file = lru_cache(maxsize=16)(self._open_part)
        self._part_ordinals = lru_cache(maxsize=16)(self._read_ordinals)
        self._row_group = lru_cache(maxsize=8)(self._read_row_group)

    def __len__(self) -> int:
        return int(self._part_starts[-1])

    def __contains__(self, sequence_id: object) -> bool:
        return sequence_id in self._row_of_id

    def __getitem__(self, sequence_id: str) -> NDArray[np.float32]:
        """The embedding of a sequence, (dim,). KeyError if the dataset has no such id."""
        if sequence_id not in self._row_of_id:
            raise KeyError(f"{sequence_id!r} is not in {self._directory}")
        row = self._row_of_id[sequence_id]
        part = bisect_right(self._part_starts, row) - 1
        return self._vector(part, row - self._part_starts[part])

    @property
    def dim(self) -> int:
        """Width of an embedding."""
        return int(self.metadata["dim"])

    @cached_property
    def ids(self) -> list[str]:
        """The ids of all rows, in input order."""
        return [sequence_id for part in range(self._num_parts) for sequence_id in self._column(part, "id").to_pylist()]

    def row(self, ordinal: int) -> NDArray[np.float32]:
        """The embedding of the sequence at a position in the input, from 0, (dim,). KeyError if it has none."""
        part = ordinal // int(self.metadata["ordinals_per_part"])
        if 0 <= part < self._num_parts:
            ordinals = self._part_ordinals(part)
            row = int(np.searchsorted(ordinals, ordinal))
            if row < ordinals.size and ordinals[row] == ordinal:
                return self._vector(part, row)
        raise KeyError(
            f"ordinal {ordinal} is not in {self._directory}: it is not in the input, or in quarantine"
            + (", or not computed yet: the dataset is partial" if self.metadata["num_missing"] else "")
        )

    def batches(self, batch_size: int) -> Iterator[tuple[list[str], NDArray[np.float32]]]:
        """Ids and embeddings, (n, dim), of all rows in input order, at most `batch_size` at a time."""
        for part in range(self._num_parts):
            with _damage_is_storage_error(self._path(part)):
                for batch in self._file(part).iter_batches(batch_size, columns=["id", "embedding"]):
                    yield batch.column("id").to_pylist(), _as_rows(batch.column("embedding"), self.dim)

    @property
    def _num_parts(self) -> int:
        return len(self.metadata["parts"])

    @cached_property
    def _row_of_id(self) -> dict[str, int]:
        return {sequence_id: row for row, sequence_id in enumerate(self.ids)}

    def _path(self, part: int) -> Path:
        return self._directory / str(self.metadata["parts"][part]["name"])

    def _vector(self, part: int, row: int) -> NDArray[np.float32]:
        metadata = self._file(part).metadata
        starts = [0, *accumulate(metadata.row_group(group).num_rows for group in range(metadata.num_row_groups))]
        group = bisect_right(starts, row) - 1
        vector: NDArray[np.float32] = self._row_group(part, group)[row - starts[group]]
        return vector.copy()

    def _open_part(self, part: int) -> pq.ParquetFile:
        with _damage_is_storage_error(self._path(part)):
            _require_footer(self._path(part), self.metadata["parts"][part])
            return pq.ParquetFile(self._path(part), memory_map=True, page_checksum_verification=True)

    def _column(self, part: int, name: str) -> pa.ChunkedArray:
        with _damage_is_storage_error(self._path(part)):
            return self._file(part).read(columns=[name]).column(name)

    def _read_ordinals(self, part: int) -> NDArray[np.int64]:
        ordinals: NDArray[np.int64] = self._column(part, "ordinal").to_numpy()
        return ordinals

    def _read_row_group(self, part: int, group: int) -> NDArray[np.float32]:
        with _damage_is_storage_error(self._path(part)):
            column = self._file(part).read_row_group(group, columns=["embedding"]).column("embedding")
        return _as_rows(column.combine_chunks(), self.dim)


def _content(plan: RunPlan, is_quarantined: NDArray[np.bool_], is_missing: NDArray[np.bool_]) -> dict[str, Any]:
    """What tells one run's datasets apart, as it stands in `_SUCCESS.json`."""
    return {
        "fingerprint": plan.fingerprint,
        "num_quarantined": int(is_quarantined.sum()),
        "quarantined_sha256": _ordinals_sha256(is_quarantined),
        "num_missing": int(is_missing.sum()),
        "missing_sha256": _ordinals_sha256(is_missing),
    }


def _ordinals_sha256(mask: NDArray[np.bool_]) -> str:
    return hashlib.sha256(np.flatnonzero(mask).astype("<i8").tobytes()).hexdigest()


def _is_whole(paths: RunPaths, content: dict[str, Any]) -> bool:
    """Whether there is a dataset of this content. Every byte of it is read, but not of one of another content."""
    try:
        is_same = content.items() <= _read_success(paths.embeddings_dir).items()
    except StorageError:
        return False
    return is_same and not verify_dataset(paths.embeddings_dir)


def _sync_names(paths: RunPaths) -> None:
    files.make_directory(paths.embeddings_dir)
    files.fsync_directory(paths.embeddings_dir)


def _find_missing(
    plan: RunPlan, records: Sequence[CheckpointRecord], is_quarantined: NDArray[np.bool_], *, allow_missing: bool
) -> NDArray[np.bool_]:
    """Which ordinals are in no checkpoint and not in quarantine, (N,). Raises as `assemble`."""
    is_computed = np.zeros(plan.num_sequences, dtype=bool)
    for record in records:
        _require_planned(plan, record)
        is_computed[record.ordinals] = True
    is_covered = is_computed[plan.representatives]
    is_missing: NDArray[np.bool_] = ~is_covered & ~is_quarantined
    if not (allow_missing and is_computed.any()):
        _refuse_ordinals(plan, is_missing, "are in no checkpoint; start the run again: it computes them")
    _refuse_ordinals(plan, is_covered & is_quarantined, "are in quarantine and yet in a checkpoint")
    if not is_computed.any():
        raise IncompleteDatasetError("every sequence is in quarantine: there is no dataset to put together")
    return is_missing


def _require_planned(plan: RunPlan, record: CheckpointRecord) -> None:
    ordinals = record.ordinals
    is_known = (ordinals >= 0) & (ordinals < plan.num_sequences)
    if not is_known.all() or (plan.representatives[ordinals] != ordinals).any():
        raise CheckpointError(
            f"{record.path} holds ordinals that the plan does not compute; move it and its marker away"
        )
    if np.unique(ordinals).size != ordinals.size:
        raise CheckpointError(f"{record.path} holds an ordinal twice; move it and its marker away")


def _refuse_ordinals(plan: RunPlan, mask: NDArray[np.bool_], what: str) -> None:
    ordinals = np.flatnonzero(mask)
    if ordinals.size:
        shown = ordinals[:_NUM_SHOWN]
        listed = ", ".join(f"{ordinal} ({id_!r})" for ordinal, id_ in zip(shown, plan.ids(shown), strict=True))
        more = ", ..." if ordinals.size > _NUM_SHOWN else ""
        raise IncompleteDatasetError(f"{ordinals.size:,} of {mask.size:,} sequences {what}: ordinals {listed}{more}")


def _start_over(paths: RunPaths) -> None:
    """Remove what an earlier assembly left, `_SUCCESS.json` first."""
    files.make_directory(paths.embeddings_dir)
    if paths.success.exists():
        files.ops.unlink(paths.success)
        files.fsync_directory(paths.embeddings_dir)
    for part in sorted(paths.embeddings_dir.glob("part-*.parquet")):
        files.ops.unlink(part)
    files.remove_orphaned_temporaries(paths.embeddings_dir)
    shutil.rmtree(paths.assembly_dir, ignore_errors=True)
    paths.assembly_dir.mkdir()


def _write_dataset(
    plan: RunPlan,
    paths: RunPaths,
    records: Sequence[CheckpointRecord],
    has_row: NDArray[np.bool_],
    content: dict[str, Any],
    created_at: str,
    part_bytes: int,
) -> None:
    dim = records[0].width
    rows_per_part = max(1, part_bytes // (dim * np.dtype(np.float32).itemsize + ROW_OVERHEAD_BYTES))
    buckets = _Buckets(paths.assembly_dir, dim, rows_per_part)
    comparisons = _distribute(plan, records, buckets)
    precision = Certificate.of(comparisons)
    starts = range(0, plan.num_sequences, rows_per_part)
    taken = ReadAhead(map(buckets.take, range(len(starts))), 1)
    success = content | {
        "schema": DATASET_SCHEMA,
        "identity": plan.identity,
        "num_sequences": plan.num_sequences,
        "num_computed": plan.num_computed,
        "dim": dim,
        "ordinals_per_part": rows_per_part,
        "precision": asdict(precision) if precision else None,
        "parts": [
            _write_part(plan, paths, range(start, start + rows_per_part), rows, has_row)
            for start, rows in zip(starts, taken, strict=True)
        ],
        "created_at": created_at,
    }
    files.write_sealed_json(paths.success, success, replace=True)


def _distribute(plan: RunPlan, records: Sequence[CheckpointRecord], buckets: _Buckets) -> list[Comparison]:
    """Give every row to its bucket, and return what the checkpoints say of how exact their rows are."""
    comparisons: list[Comparison] = []
    copies = _Copies(plan.representatives)
    is_placed = np.zeros(plan.num_sequences, dtype=bool)
    checkpoints = ReadAhead((load_planned(plan, record, dim=buckets.dim) for record in records), 1)
    for record, checkpoint in zip(records, checkpoints, strict=True):
        rows = np.flatnonzero(~is_placed[record.ordinals])
        is_placed[record.ordinals] = True
        used = set(record.ordinals[rows].tolist())
        comparisons += [each for each in from_metadata(checkpoint.metadata) if each.ordinal in used]
        ordinals, sources = copies.fan_out(record.ordinals[rows])
        buckets.append(ordinals, checkpoint.embeddings, rows[sources])
        plan.forget_pages()
    return comparisons


def _require_as_recorded(plan: RunPlan, record: CheckpointRecord, checkpoint: Checkpoint, dim: int) -> None:
    if checkpoint.embeddings.shape != (record.ordinals.size, dim):
        raise CheckpointError(
            f"{record.path} has rows of shape {checkpoint.embeddings.shape}; ({record.ordinals.size}, {dim}) is wanted"
        )
    if checkpoint.metadata.get("ordinals") != record.ordinals.tolist():
        raise CheckpointError(f"{record.path} and its marker differ in their ordinals; move both away")
    if checkpoint.sequence_ids != plan.ids(record.ordinals):
        raise CheckpointError(f"{record.path} gives its rows other ids than the plan; move it and its marker away")


class _Copies:
    """Which sequences repeat a computed one."""

    def __init__(self, representatives: NDArray[np.int64]) -> None:
        copies = np.flatnonzero(representatives != np.arange(representatives.size))
        self._copies = copies[np.argsort(representatives[copies], kind="stable")]
        self._originals = representatives[self._copies]

    def fan_out(self, ordinals: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """All sequences that share an embedding with one of `ordinals`, ascending, and the position in it of that one."""
        starts = np.searchsorted(self._originals, ordinals, side="left")
        counts = np.searchsorted(self._originals, ordinals, side="right") - starts
        sources = np.repeat(np.arange(ordinals.size), counts)
        nth_copy = np.arange(sources.size) - np.repeat(np.cumsum(counts) - counts, counts)
        targets = np.concatenate([ordinals, self._copies[starts[sources] + nth_copy]])
        sources = np.concatenate([np.arange(ordinals.size), sources])
        ascending = np.argsort(targets)
        return targets[ascending], sources[ascending]


class _Buckets:
    """Temporary files, one for each part, that take its rows in whatever order they come.

    Their names are ours alone: where locks do not work, two assemblies may be at it, and the later one removes the
    buckets of the earlier, which then fails. They never write to the same file.
    """

    def __init__(self, directory: Path, dim: int, rows_per_part: int) -> None:
        self.dim = dim
        self.rows_per_part = rows_per_part
        self._directory = directory
        self._name = uuid.uuid4().hex[:8]
        self._ordinals: defaultdict[int, list[NDArray[np.int64]]] = defaultdict(list)  # in the order of the rows
        self._crc32: defaultdict[int, int] = defaultdict(int)

    def append(self, ordinals: NDArray[np.int64], embeddings: NDArray[Any], rows: NDArray[np.int64]) -> None:
        """Give each of the ascending `ordinals` the row of `embeddings` that stands at its place in `rows`."""
        parts, starts = np.unique(ordinals // self.rows_per_part, return_index=True)
        stops = np.append(starts, ordinals.size)[1:]
        for part, start, stop in zip(parts.tolist(), starts, stops, strict=True):
            data = embeddings[rows[start:stop]].astype("<f4", copy=False).data
            with self._path(part).open("ab") as file:
                file.write(data)
            self._ordinals[part].append(ordinals[start:stop])
            self._crc32[part] = zlib.crc32(data, self._crc32[part])

    def take(self, part: int) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """Ordinals, ascending, and rows of a part. Its bucket is gone then."""
        if part not in self._ordinals:
            return np.empty(0, dtype=np.int64), np.empty((0, self.dim), dtype=np.float32)
        path = self._path(part)
        values = np.fromfile(path, dtype="<f4")
        if zlib.crc32(values.data) != self._crc32[part]:
            raise StorageError(f"{path} does not give back what was written to it; check the disk")
        path.unlink()
        ordinals = np.concatenate(self._ordinals.pop(part))
        ascending = np.argsort(ordinals)
        return ordinals[ascending], values.reshape(-1, self.dim)[ascending]

    def _path(self, part: int) -> Path:
        return self._directory / f"bucket-{part:05d}-{self._name}"


def _write_part(
    plan: RunPlan,
    paths: RunPaths,
    span: range,
    taken: tuple[NDArray[np.int64], NDArray[np.float32]],
    has_row: NDArray[np.bool_],
) -> dict[str, Any]:
    """Check and write the part of the ordinals in `span`, and return what `_SUCCESS.json` says of it."""
    start, stop = span.start, min(span.stop, plan.num_sequences)
    part = start // len(span)
    expected = start + np.flatnonzero(has_row[start:stop])
    ordinals, rows = taken
    if not np.array_equal(ordinals, expected):
        raise StorageError(f"ordinals {start} to {stop} came back from disk incomplete; start the run again")
    _require_finite(plan, ordinals, rows)
    table = plan.records(start, stop).take(pa.array(expected - start)).drop_columns(["sequence"])
    table = pa.table([pa.array(ordinals), *table.columns, _as_arrow(rows)], schema=_schema(plan, rows.shape[1]))
    path = paths.embeddings_dir / f"part-{part:05d}.parquet"
    with files.durable_file(path, replace=True) as file:
        pq.write_table(
            table,
            file,
            row_group_size=max(1, _ROW_GROUP_BYTES // (rows.shape[1] * rows.itemsize)),
            compression="none",
            use_dictionary=False,
            write_statistics=["ordinal", "id"],
            write_page_checksum=True,
        )
    plan.forget_pages()
    return {"name": path.name, "rows": ordinals.size} | asdict(file.digest) | _footer(path)


def _footer(path: Path) -> dict[str, Any]:
    """Size and sha256 of a part's end, which says what is where in it: pages have checksums of their own, this has none."""
    with path.open("rb") as file:
        file.seek(-_FOOTER_TAIL_BYTES, os.SEEK_END)
        length = int.from_bytes(file.read(4), "little")
    size_bytes = length + _FOOTER_TAIL_BYTES
    return {"footer_bytes": size_bytes, "footer_sha256": _sha256_of_end(path, size_bytes)}


def _require_footer(path: Path, part: dict[str, Any]) -> None:
    if _sha256_of_end(path, part["footer_bytes"]) != part["footer_sha256"]:
        raise StorageError(f"{path} is damaged: its footer is not the one that was written")


def _sha256_of_end(path: Path, size_bytes: int) -> str:
    with path.open("rb") as file:
        file.seek(-size_bytes, os.SEEK_END)
        return files.digest_stream(file).sha256


def _require_finite(plan: RunPlan, ordinals: NDArray[np.int64], rows: NDArray[np.float32]) -> None:
    is_finite = np.isfinite(rows).all(axis=1)
    if not is_finite.all():
        bad = ordinals[~is_finite]
        raise NumericalInstabilityError(
            f"{bad.size:,} embeddings are not finite, the first of {plan.ids(bad[:1])[0]!r} (ordinal {bad[0]})"
        )


def _schema(plan: RunPlan, dim: int) -> pa.Schema:
    about = {name: str(plan.identity[name]) for name in ("model", "layer", "pooling", "dtype")}
    return pa.schema(
        [
            pa.field("ordinal", pa.int64(), nullable=False),
            pa.field("id", pa.string(), nullable=False),
            pa.field("description", pa.string(), nullable=False),
            pa.field("length", pa.int32(), nullable=False),
            pa.field("embedding", _embedding_type(dim), nullable=False),
        ],
        metadata=about | {"fingerprint": plan.fingerprint},
    )


def _embedding_type(dim: int) -> pa.DataType:
    return pa.list_(pa.field("element", pa.float32(), nullable=False), dim)  # nulls would make reading half as fast


def _as_arrow(rows: NDArray[np.float32]) -> pa.Array:
    return pa.FixedSizeListArray.from_arrays(pa.array(rows.ravel()), type=_embedding_type(rows.shape[1]))


def _as_rows(column: pa.FixedSizeListArray, dim: int) -> NDArray[np.float32]:
    rows: NDArray[np.float32] = column.flatten().to_numpy().reshape(-1, dim).copy()  # Arrow's own memory is read-only
    return rows


def _find_dataset(path: Path) -> Path:
    for directory in (path, path / "embeddings"):
        if (directory / _SUCCESS_NAME).exists():
            return directory
    if not path.is_dir():
        raise StorageError(f"{path}: there is no such directory")
    raise StorageError(
        f"{path}: there is no complete dataset here (no {_SUCCESS_NAME}); start the run again with the same output "
        f"directory, and it goes on where it ended"
    )


def _read_success(directory: Path) -> dict[str, Any]:
    """Raises StorageError where it is damaged, or a part is missing or of another size.

    One that says nothing of missing rows was written when there could be none; one that says nothing of precision, when it
    was not measured.
    """
    success = files.read_sealed_json(directory / _SUCCESS_NAME)
    if success["schema"] != DATASET_SCHEMA:
        raise StorageError(f"{directory} has schema {success['schema']}; this version reads {DATASET_SCHEMA}")
    for part in success["parts"]:
        path = directory / part["name"]
        size_bytes = path.stat().st_size if path.exists() else 0
        if size_bytes != part["size_bytes"]:
            raise StorageError(
                f"{path} has {size_bytes:,} bytes, and {part['size_bytes']:,} were written; start the run again: the "
                f"dataset is then put together anew"
            )
    return {"num_missing": 0, "missing_sha256": _NONE_SHA256, "precision": None} | success


def _damage(directory: Path, part: dict[str, Any]) -> str | None:
    path = directory / str(part["name"])
    try:
        digest = files.digest_file(path)
    except OSError as error:
        return f"{path} cannot be read ({error})"
    return (
        None if digest.sha256 == part["sha256"] else f"{path} is damaged: its sha256 is not the one of {_SUCCESS_NAME}"
    )


def _summary(paths: RunPaths) -> DatasetSummary:
    success = _read_success(paths.embeddings_dir)
    return DatasetSummary(
        path=paths.embeddings_dir,
        num_rows=sum(part["rows"] for part in success["parts"]),
        num_quarantined=success["num_quarantined"],
        num_missing=success["num_missing"],
        num_parts=len(success["parts"]),
        dim=success["dim"],
        size_bytes=sum(part["size_bytes"] for part in success["parts"]),
        precision=Certificate(**success["precision"]) if success["precision"] else None,
    )


@contextmanager
def _damage_is_storage_error(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, pa.ArrowException) as error:
        raise StorageError(f"{path} is damaged: {error}") from error
