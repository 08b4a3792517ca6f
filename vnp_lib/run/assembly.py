"""Assemble the dataset from checkpoints.

This takes two passes over the rows, two threads, and memory for three checkpoints and four parts.
Rows, including copies of identical sequences, are first distributed over one temporary bucket per
part. Then each bucket is sorted, checked against the plan, and written. All of that happens next to
an existing dataset, and the two are exchanged at the end. `vnp_lib.dataset` reads the result.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, astuple, dataclass, replace
from datetime import datetime
from fnmatch import fnmatchcase
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from vnp_lib.dataset import (
    DATASET_SCHEMA,
    SUCCESS_NAME,
    columns_of,
    describe_rows,
    fields_of,
    footer_of,
    read_success,
    verify_dataset,
)
from vnp_lib.errors import (
    ConfigError,
    IncompleteDatasetError,
    NumericalInstabilityError,
    StorageError,
)
from vnp_lib.formatting import listed, utc_now
from vnp_lib.inference import Certificate, Comparison, from_metadata
from vnp_lib.inputs import InputCounts
from vnp_lib.plan import (
    RowLayout,
    RunPaths,
    RunPlan,
    StoreDtype,
    Values,
    as_stored,
    offsets_of,
    pack,
)
from vnp_lib.prefetch import prefetch_map
from vnp_lib.run.buckets import (
    THREADS,
    VALUE_BYTES,
    Buckets,
    Copies,
    Division,
    RaggedBuckets,
    divide_rows,
)
from vnp_lib.run.resume import Coverage, with_copies
from vnp_lib.run.validation import layout_from_plan, load_planned, require_planned
from vnp_lib.software import Software, SoftwareShare, describe_software
from vnp_lib.storage import (
    durable_file,
    exchange_directories,
    fsync_directory,
    make_directory,
    move_file,
    read_sealed_json,
    remove_file,
    write_sealed_json,
)

if TYPE_CHECKING:
    from vnp_lib.checkpoint import Checkpoint, CheckpointRecord

# Embeddings per part, or more if there are very many rows. Each thread holds a part in memory.
_PART_BYTES = 64 * 1024**2
# The least that is read to get one row.
_ROW_GROUP_BYTES = 4 * 1024**2
_NUM_SHOWN = 10
# The keys of the identity that are in the metadata of every part.
_ABOUT = ("model", "layer", "pooling", "dtype")
# The columns of every part; those of the outputs follow.
_FIELDS = (
    pa.field("ordinal", pa.int64(), nullable=False),
    pa.field("id", pa.string(), nullable=False),
    pa.field("description", pa.string(), nullable=False),
    pa.field("length", pa.int32(), nullable=False),
    pa.field("original_length", pa.int32(), nullable=False),
)
_PARTS = "part-*.parquet"
_TEMPORARY_PREFIX = ".tmp-"


@dataclass(frozen=True, slots=True, kw_only=True)
class DatasetSummary:
    """The dataset that an assembly wrote or found."""

    path: Path
    num_rows: int
    num_quarantined: int
    num_missing: int  # 0 unless the dataset is partial
    num_parts: int
    dim: int
    size_bytes: int
    precision: Certificate | None  # of rows computed in half precision
    counts: InputCounts
    software: tuple[SoftwareShare, ...]

    def describe(self) -> str:
        """Describe the rows, as in `997 sequences embedded, 3 in quarantine`."""
        rows = describe_rows(
            self.num_rows, num_quarantined=self.num_quarantined, num_missing=self.num_missing
        )
        return ", ".join(filter(None, [rows, self.counts.describe()]))


def assemble(
    plan: RunPlan,
    paths: RunPaths,
    records: Sequence[CheckpointRecord],
    *,
    quarantined: frozenset[int] = frozenset(),
    allow_missing: bool = False,
    clock: Callable[[], datetime] = utc_now,
    part_bytes: int = _PART_BYTES,
) -> DatasetSummary:
    """Assemble the dataset from checkpoints; each is read once, and its digest checked.

    Afterwards `paths.embeddings_dir` holds `part-*.parquet` and `_SUCCESS.json`, all durable. An
    existing dataset stays intact until the new one is complete; then the two are exchanged
    atomically. On a file system without an atomic exchange, there is no dataset for the time of two
    renames. An interrupted assembly changes nothing, and the next one starts over.

    A valid dataset of the same content is left as it is, and so is a complete one of which a
    checkpoint has since been deleted. Other files in `paths.embeddings_dir` stay there.

    Args:
        plan: The plan that the checkpoints follow.
        paths: The paths of the run.
        records: Checkpoints. If two hold the same ordinal, the first by rank and batch_idx counts.
        quarantined: Ordinals that have no embedding; the same holds for their copies.
        allow_missing: Leave out the rows of ordinals that are in no checkpoint and not in
            quarantine; they are counted in `_SUCCESS.json`. A later assembly that finds other
            ordinals missing, or none, starts over.
        clock: Gives the time in `_SUCCESS.json`.
        part_bytes: Bytes of rows in a part, their ids and descriptions included.

    Raises:
        IncompleteDatasetError: An ordinal is in no checkpoint and not in quarantine, and may not be
            missing; or it is in both; or nothing at all is computed.
        NumericalInstabilityError: A row is not finite.
        ConfigError: The plan stores values in float16, and one is out of its range; or a Parquet
            file that is not ours lies among the parts. Checkpoints and dataset are unchanged.
        CheckpointError: A checkpoint fails validation or does not fit the plan.
        StorageError: The dataset cannot be written.
    """
    is_quarantined = with_copies(plan, quarantined)
    try:
        _finish_exchange(paths)
        if not _is_complete(plan, paths, is_quarantined):
            records = sorted(records, key=lambda record: (record.rank, record.batch_idx))
            is_missing = _find_missing(plan, records, is_quarantined, allow_missing=allow_missing)
            content = _content(plan, is_quarantined, is_missing)
            if not (is_missing.any() and _is_valid(paths, content)):
                require_own_parts(paths)
                has_row = ~is_quarantined & ~is_missing
                _write_dataset(
                    plan, paths, records, has_row, content, clock().isoformat(), part_bytes
                )
                _exchange(paths)
        # The process that wrote the dataset may have been killed before it did so.
        make_directory(paths.embeddings_dir)
        fsync_directory(paths.embeddings_dir)
    except OSError as error:
        raise StorageError(
            f"{paths.embeddings_dir}: the dataset cannot be written ({error}); fix that and start "
            f"the run again: nothing is computed twice"
        ) from error
    finally:
        # Otherwise the next assembly finishes the exchange that this one did not.
        if not paths.replaced_dataset.is_dir():
            shutil.rmtree(paths.assembly_dir, ignore_errors=True)
    return _summary(paths)


def find_complete_dataset(
    plan: RunPlan, paths: RunPaths, *, quarantined: frozenset[int] = frozenset()
) -> DatasetSummary | None:
    """Summarise the existing dataset; None unless it is what `assemble` would write.

    Every byte of it is read.
    """
    return _summary(paths) if _is_complete(plan, paths, with_copies(plan, quarantined)) else None


def require_own_parts(paths: RunPaths) -> None:
    """Raise ConfigError if a Parquet file that no run has written lies among the parts."""
    if not paths.embeddings_dir.is_dir():
        return
    own = _own_names(paths.embeddings_dir)
    foreign = sorted(
        path for path in paths.embeddings_dir.glob("*.parquet") if path.name not in own
    )
    if foreign:
        raise ConfigError(
            f"{foreign[0]} is not of this run, or damaged, and readers of "
            f"{paths.embeddings_dir}/*.parquet would take its rows for the dataset's: move it to "
            f"another directory"
        )


def is_of_a_dataset(path: Path) -> bool:
    """Return True if an assembly has written a file, by its name and its metadata."""
    return path.name == SUCCESS_NAME or (fnmatchcase(path.name, _PARTS) and _is_marked(path))


def _content(
    plan: RunPlan, is_quarantined: NDArray[np.bool_], is_missing: NDArray[np.bool_]
) -> dict[str, Any]:
    """Return the fields of `_SUCCESS.json` by which datasets of one run differ."""
    return {
        "fingerprint": plan.fingerprint,
        "store_dtype": plan.store_dtype,
        "original_lengths_sha256": plan.original_lengths_sha256,
        "num_quarantined": int(is_quarantined.sum()),
        "quarantined_sha256": _ordinals_sha256(is_quarantined),
        "num_missing": int(is_missing.sum()),
        "missing_sha256": _ordinals_sha256(is_missing),
    }


def _ordinals_sha256(mask: NDArray[np.bool_]) -> str:
    return hashlib.sha256(np.flatnonzero(mask).astype("<i8").tobytes()).hexdigest()


def _is_complete(plan: RunPlan, paths: RunPaths, is_quarantined: NDArray[np.bool_]) -> bool:
    """Return True if the dataset of a run is valid and complete. Every byte of it is read."""
    return _is_valid(paths, _content(plan, is_quarantined, np.zeros_like(is_quarantined)))


def _is_valid(paths: RunPaths, content: dict[str, Any]) -> bool:
    """Return True if a valid dataset of this content exists; if so, every byte of it is read."""
    try:
        is_same = content.items() <= read_success(paths.embeddings_dir).items()
    except StorageError:
        return False
    return is_same and not verify_dataset(paths.embeddings_dir)


def _find_missing(
    plan: RunPlan,
    records: Sequence[CheckpointRecord],
    is_quarantined: NDArray[np.bool_],
    *,
    allow_missing: bool,
) -> NDArray[np.bool_]:
    """Return which ordinals are in no checkpoint and not in quarantine, (N,).

    Raises as `assemble`.
    """
    is_computed = np.zeros(plan.num_sequences, dtype=bool)
    for record in records:
        require_planned(plan, record)
        is_computed[record.ordinals] = True
    coverage = Coverage(plan=plan, is_computed=is_computed, is_quarantined=is_quarantined)
    is_missing = coverage.is_missing
    if not (allow_missing and is_computed.any()):
        _refuse_ordinals(
            plan, is_missing, "are in no checkpoint; start the run again: it computes them"
        )
    is_in_both = coverage.has_embedding & is_quarantined
    _refuse_ordinals(plan, is_in_both, "are in quarantine and yet in a checkpoint")
    if not is_computed.any() and plan.num_sequences:
        raise IncompleteDatasetError(
            "every sequence is in quarantine: there is no dataset to assemble"
        )
    return is_missing


def _refuse_ordinals(plan: RunPlan, mask: NDArray[np.bool_], what: str) -> None:
    ordinals = np.flatnonzero(mask)
    if ordinals.size:
        shown = ordinals[:_NUM_SHOWN]
        named = [
            f"{ordinal} ({id_!r})" for ordinal, id_ in zip(shown, plan.ids(shown), strict=True)
        ]
        raise IncompleteDatasetError(
            f"{ordinals.size:,} of {mask.size:,} sequences {what}: "
            f"ordinals {listed(named, _NUM_SHOWN, total=ordinals.size)}"
        )


def _finish_exchange(paths: RunPaths) -> None:
    """Finish the exchange of an interrupted assembly, and remove its other files."""
    if paths.replaced_dataset.is_dir():
        # It was stopped between two renames.
        if not os.path.lexists(paths.embeddings_dir):
            is_written = (paths.new_dataset / paths.success.name).exists()
            move_file(
                paths.new_dataset if is_written else paths.replaced_dataset, paths.embeddings_dir
            )
        if paths.replaced_dataset.is_dir():
            _remove_replaced(paths)
    shutil.rmtree(paths.assembly_dir, ignore_errors=True)


def _exchange(paths: RunPaths) -> None:
    """Exchange the new dataset for the existing one."""
    if not os.path.lexists(paths.embeddings_dir):
        move_file(paths.new_dataset, paths.embeddings_dir)
        return
    move_file(paths.new_dataset, paths.replaced_dataset)
    if not exchange_directories(paths.embeddings_dir, paths.replaced_dataset):
        move_file(paths.replaced_dataset, paths.new_dataset)
        move_file(paths.embeddings_dir, paths.replaced_dataset)
        move_file(paths.new_dataset, paths.embeddings_dir)
    _remove_replaced(paths)


def _remove_replaced(paths: RunPaths) -> None:
    """Remove the replaced dataset, `_SUCCESS.json` last, and move other files back."""
    own = _own_names(paths.replaced_dataset)
    for path in sorted(
        paths.replaced_dataset.iterdir(), key=lambda path: path.name == paths.success.name
    ):
        if path.name in own:
            remove_file(path)
        elif not path.name.startswith(_TEMPORARY_PREFIX):
            move_file(path, paths.embeddings_dir / path.name)
    shutil.rmtree(paths.replaced_dataset)


def _own_names(directory: Path) -> set[str]:
    """Return the names of `_SUCCESS.json`, of the parts it lists, and of other marked parts."""
    listed: set[str] = set()
    success = directory / SUCCESS_NAME
    if success.exists():
        listed.add(success.name)
        with suppress(StorageError):
            listed |= {part["name"] for part in read_sealed_json(success)["parts"]}
    return listed | {
        path.name for path in directory.glob(_PARTS) if path.name not in listed and _is_marked(path)
    }


def _is_marked(path: Path) -> bool:
    """Return True if the metadata of a Parquet file says that it is a part of a dataset."""
    try:
        marks = pq.read_schema(path).metadata or {}
    except (OSError, pa.ArrowException):
        return False
    return {name.encode() for name in (*_ABOUT, "fingerprint")} <= marks.keys()


def _write_dataset(
    plan: RunPlan,
    paths: RunPaths,
    records: Sequence[CheckpointRecord],
    has_row: NDArray[np.bool_],
    content: dict[str, Any],
    created_at: str,
    part_bytes: int,
) -> None:
    for directory in (paths.assembly_dir, paths.new_dataset):
        make_directory(directory)
    division = divide_rows(plan, layout_from_plan(plan, records), part_bytes)
    buckets = (Buckets if division.layout.is_fixed else RaggedBuckets)(
        paths.assembly_dir, plan, division
    )
    comparisons, software = _distribute(plan, records, buckets)
    precision = Certificate.of(comparisons)
    division = replace(division, software=describe_software(software))

    def write(part: int) -> dict[str, Any]:
        return _write_part(plan, paths, division, part, buckets.take(part), has_row)

    success = content | {
        "schema": DATASET_SCHEMA,
        "identity": plan.identity,
        "num_sequences": plan.num_sequences,
        "num_computed": plan.num_computed,
        "input": plan.counts.to_json(),
        "dim": division.layout.embed_dim,
        **division.described,
        "precision": asdict(precision) if precision else None,
        "software": [share.to_json() for share in software],
        "parts": list(prefetch_map(write, range(division.starts.size), threads=THREADS)),
        "created_at": created_at,
    }
    write_sealed_json(paths.new_dataset / paths.success.name, success)


def _distribute(
    plan: RunPlan, records: Sequence[CheckpointRecord], buckets: Buckets
) -> tuple[list[Comparison], tuple[SoftwareShare, ...]]:
    """Put every row in its bucket; return comparisons with float32, and the software used."""
    comparisons: list[Comparison] = []
    software: Counter[Software] = Counter()
    copies = Copies(plan.representatives)
    is_placed = np.zeros(plan.num_sequences, dtype=bool)

    def load(record: CheckpointRecord) -> Checkpoint:
        return load_planned(plan, record, buckets.layout)

    for record, checkpoint in zip(
        records, prefetch_map(load, records, threads=THREADS), strict=True
    ):
        rows = np.flatnonzero(~is_placed[record.ordinals])
        is_placed[record.ordinals] = True
        used = set(record.ordinals[rows].tolist())
        comparisons += [each for each in from_metadata(checkpoint.metadata) if each.ordinal in used]
        software[Software.of_metadata(checkpoint.metadata)] += rows.size
        ordinals, sources = copies.fan_out(record.ordinals[rows])
        buckets.append(ordinals, checkpoint, rows[sources])
        plan.release_pages()
    buckets.flush()
    shares = (SoftwareShare(software=each, sequences=count) for each, count in (+software).items())
    return comparisons, tuple(sorted(shares, key=lambda share: astuple(share.software)))


def _write_part(
    plan: RunPlan,
    paths: RunPaths,
    division: Division,
    part: int,
    taken: tuple[NDArray[np.int64], NDArray[np.float32]],
    has_row: NDArray[np.bool_],
) -> dict[str, Any]:
    """Check and write a part, and return its entry of `_SUCCESS.json`."""
    start, stop = division.span(part)
    expected = start + np.flatnonzero(has_row[start:stop])
    ordinals, rows = taken
    if not np.array_equal(ordinals, expected):
        raise StorageError(
            f"ordinals {start} to {stop} came back from disk incomplete; start the run again"
        )
    _require_finite(plan, division.layout, ordinals, rows)
    table = plan.records(start, stop).drop_columns(["sequence"]).take(pa.array(expected - start))
    values = _as_stored(plan, division.layout, ordinals, rows)
    columns = columns_of(
        division.layout, values, plan.lengths[ordinals], is_large=division.is_large
    )
    about = {name: str(plan.identity[name]) for name in _ABOUT}
    schema = pa.schema(
        [*_FIELDS, *fields_of(division.layout, plan.store_dtype, is_large=division.is_large)],
        metadata=about | {"fingerprint": plan.fingerprint, "software": division.software},
    )
    table = pa.table([pa.array(ordinals), *table.columns, *columns], schema=schema)
    path = paths.new_dataset / f"part-{part:05d}.parquet"
    row_bytes = division.layout.widths(plan.lengths[ordinals]) * VALUE_BYTES
    # Row groups of 4 MB; a larger row is a group of its own.
    groups = pairwise(pack(row_bytes, _ROW_GROUP_BYTES).tolist())
    with (
        durable_file(path) as file,
        pq.ParquetWriter(
            file,
            table.schema,
            compression="none",
            use_dictionary=False,
            write_statistics=["ordinal", "id"],
            write_page_checksum=True,
        ) as writer,
    ):
        for first, end in groups:
            writer.write_table(table.slice(first, end - first), row_group_size=end - first)
    plan.release_pages()
    return {"name": path.name, "rows": ordinals.size} | asdict(file.digest) | footer_of(path)


def _require_finite(
    plan: RunPlan, layout: RowLayout, ordinals: NDArray[np.int64], rows: NDArray[np.float32]
) -> None:
    bad = _not_finite(plan, layout, ordinals, rows)
    if bad.size:
        raise NumericalInstabilityError(
            f"{bad.size:,} embeddings are not finite, the first of {_named(plan, bad[0])}"
        )


def _as_stored(
    plan: RunPlan, layout: RowLayout, ordinals: NDArray[np.int64], rows: NDArray[np.float32]
) -> Values:
    if plan.store_dtype is StoreDtype.FLOAT32:
        return rows
    values = as_stored(rows, plan.store_dtype)
    bad = _not_finite(plan, layout, ordinals, values)
    if bad.size:
        raise ConfigError(
            f"--store-dtype float16: {bad.size:,} embeddings have values beyond 65,504, where "
            f"float16 ends, the first of {_named(plan, bad[0])}; start the run again with "
            f"--store-dtype float32: nothing is computed twice"
        )
    return values


def _not_finite(
    plan: RunPlan, layout: RowLayout, ordinals: NDArray[np.int64], rows: Values
) -> NDArray[np.int64]:
    """Return those of `ordinals` whose rows have a value that is not finite."""
    is_finite = np.isfinite(rows)
    if is_finite.all():
        return ordinals[:0]
    starts = offsets_of(layout.widths(plan.lengths[ordinals]))[:-1]
    return ordinals[~np.logical_and.reduceat(is_finite.ravel(), starts)]


def _named(plan: RunPlan, ordinal: np.int64) -> str:
    return f"{plan.ids(np.array([ordinal]))[0]!r} (ordinal {ordinal})"


def _summary(paths: RunPaths) -> DatasetSummary:
    success = read_success(paths.embeddings_dir)
    return DatasetSummary(
        path=paths.embeddings_dir,
        num_rows=sum(part["rows"] for part in success["parts"]),
        num_quarantined=success["num_quarantined"],
        num_missing=success["num_missing"],
        num_parts=len(success["parts"]),
        dim=success["dim"],
        size_bytes=sum(part["size_bytes"] for part in success["parts"]),
        precision=Certificate(**success["precision"]) if success["precision"] else None,
        counts=InputCounts.from_json(success["input"]),
        software=tuple(map(SoftwareShare.from_json, success["software"])),
    )
