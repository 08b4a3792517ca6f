"""The plan of a run: its sequences, their order, shards and batches, and its fingerprint.

A plan is made once, before anything is computed. It consists of three files in `plan/`:
`sequences.arrow` (the records), `representatives.npy` (which sequences are identical) and, written
last, `plan.json`, which holds the digests of the other two. If records were skipped,
`skipped.jsonl` lists them, and `plan.json` holds its digest too. Shards and batches are computed
from these files, equally by every process that loads them.
"""

from __future__ import annotations

import logging
import mmap
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol, TypeAlias

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from vnp_lib.errors import StorageError
from vnp_lib.inputs import InputCounts
from vnp_lib.plan.outputs import RowLayout, StoreDtype
from vnp_lib.plan.packing import NUM_SPECIAL_TOKENS, split_batches
from vnp_lib.plan.paths import RunPaths
from vnp_lib.plan.windows import Windows
from vnp_lib.storage import (
    FileDigest,
    digest_file,
    read_sealed_json,
)

PLAN_SCHEMA = 2
SEQUENCES_SCHEMA = pa.schema(
    [
        pa.field("id", pa.string(), nullable=False),
        pa.field("description", pa.string(), nullable=False),
        pa.field("sequence", pa.string(), nullable=False),
        pa.field("length", pa.int32(), nullable=False),
        # Before truncation.
        pa.field("original_length", pa.int32(), nullable=False),
    ]
)

# Id, description, ordinal and length of a row, estimated generously.
ROW_OVERHEAD_BYTES = 256
_WORKSPACE_BYTES = 256 * 1024**2

_log = logging.getLogger(__name__)

# int32 halves the memory of arrays with one ordinal per sequence.
Ordinals: TypeAlias = NDArray[np.int32] | NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelIdentity:
    """The settings that, with the sequences, determine the values of a run."""

    model: str
    weights_digest: str
    layer: int
    pooling: str = "mean"
    dtype: str
    # By default, long sequences are neither truncated nor divided.
    long_policy: str = "whole"
    # Names in the order of a row, and the width; None for the mean of `layer` alone.
    outputs: str | None = None
    embed_dim: int | None = None
    # The sha256 of its parameters, if contacts are computed.
    contact_regression: str | None = None
    # Shards, batches and software, if rows have to be reproducible to the last bit.
    division: str | None = None
    # NUMERICS_VERSION, or None for version 1, which recorded none.
    numerics: int | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class RunPlan:
    """A plan in memory: 12 bytes per sequence. Its texts stay on disk, memory-mapped."""

    num_shards: int
    token_budget: int
    # Of the dataset; checkpoints are float32.
    store_dtype: StoreDtype
    identity: dict[str, Any]
    # The sha256 of the canonical JSON of the identity.
    fingerprint: str
    num_residues: int
    # The version that opened the run last; "" for versions that did not record theirs.
    vnp: str
    # Of all sequences; "" if none was truncated.
    original_lengths_sha256: str = ""
    # Of the input that the plan was made from.
    counts: InputCounts
    lengths: NDArray[np.int32]  # residues, (N,)
    representatives: Ordinals  # ordinal of the first identical sequence, (N,)
    # Ordinals to compute, longest first, then ascending.
    order: Ordinals  # (num_computed,)
    # SEQUENCES_SCHEMA, by ordinal, in the memory of `mapped`, which is `sequences.arrow`.
    table: pa.Table
    mapped: mmap.mmap

    @property
    def num_sequences(self) -> int:
        return self.lengths.size

    @property
    def num_computed(self) -> int:
        """Distinct sequences: only the first of identical ones goes through the model."""
        return self.order.size

    @property
    def computed_lengths(self) -> NDArray[np.int32]:
        """Residues of the sequences to compute, (num_computed,)."""
        return self.lengths[self.order]

    def num_tokens(self, ordinals: Ordinals) -> int:
        """Return the tokens of `ordinals` that go through the model."""
        return model_tokens(self.lengths[ordinals], self.identity["long_policy"])

    def shard_ordinals(self, rank: int) -> NDArray[np.int64]:
        """Return the ordinals of shard `rank`, longest first."""
        # Every num_shards-th of `order`, so that shards have equal work.
        return self.order[rank :: self.num_shards].astype(np.int64)

    def shard_batches(self, rank: int) -> list[NDArray[np.int64]]:
        """Return the ordinals of each batch of shard `rank`, by batch index.

        They are the same in every process for as long as the plan exists.
        """
        ordinals = self.shard_ordinals(rank)
        num_tokens = self.lengths[ordinals] + NUM_SPECIAL_TOKENS
        return split_batches(ordinals, num_tokens, self.token_budget)

    def fetch(self, ordinals: NDArray[np.int64]) -> tuple[list[str], list[str]]:
        """Return ids and sequences of `ordinals`, in their order, reading only these rows."""
        return self._ids.take(ordinals), self._sequences.take(ordinals)

    def ids(self, ordinals: NDArray[np.int64]) -> list[str]:
        """Return the ids of `ordinals`, in their order, reading only these rows."""
        return self._ids.take(ordinals)

    def records(self, start: int, stop: int) -> pa.Table:
        """Return the rows of ordinals `start` to `stop` - 1, with all columns."""
        return self.table.slice(start, stop - start)

    def release_pages(self) -> None:
        """Release the pages of the mapped texts to the system, which reads them again on access."""
        self.mapped.madvise(mmap.MADV_DONTNEED)

    @cached_property
    def _ids(self) -> _Texts:
        return _Texts(self.table.column("id"))

    @cached_property
    def _sequences(self) -> _Texts:
        return _Texts(self.table.column("sequence"))


class _Texts:
    """Random access to the rows of a text column, which may consist of thousands of chunks."""

    def __init__(self, column: pa.ChunkedArray) -> None:
        self._chunks = column.chunks
        self._starts = np.cumsum([0, *map(len, self._chunks)])

    def take(self, ordinals: NDArray[np.int64]) -> list[str]:
        """Return the texts of `ordinals`, in their order."""
        of_chunk = np.searchsorted(self._starts, ordinals, side="right") - 1
        rows = (ordinals - self._starts[of_chunk]).tolist()
        return [
            self._chunks[chunk][row].as_py()
            for chunk, row in zip(of_chunk.tolist(), rows, strict=True)
        ]


def load_plan(paths: RunPaths, *, verify_digests: bool = True) -> RunPlan:
    """Load the plan of a run, after checking its files against `plan.json`.

    Args:
        paths: Paths of the run.
        verify_digests: Check the digests, which reads every file. Otherwise only sizes are
            compared, which suffices for display but not for computing.

    Raises:
        StorageError: A file of the plan is missing, damaged or of another version.
    """
    fields = read_sealed_json(paths.plan_json)
    if fields["schema"] != PLAN_SCHEMA:
        raise StorageError(
            f"{paths.plan_json} has schema {fields['schema']}; this version reads {PLAN_SCHEMA}"
        )
    if damage := find_damage(paths, fields, verify_digests=verify_digests):
        raise StorageError(f"{damage}; start the run again with its input to rebuild the plan")
    with paths.sequences.open("rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    table = pa.ipc.open_file(pa.py_buffer(mapped)).read_all()
    # `to_numpy` would import pandas.
    column = np.from_dlpack(table.column("length").combine_chunks())
    lengths = column.astype(np.int32, copy=False)
    # Reading the lengths has read the pages of the texts around them too.
    mapped.madvise(mmap.MADV_DONTNEED)
    representatives = _narrowed(np.load(paths.representatives))
    return RunPlan(
        num_shards=fields["num_shards"],
        token_budget=fields["token_budget"],
        store_dtype=store_dtype_of(fields),
        identity=fields["identity"],
        fingerprint=fields["fingerprint"],
        num_residues=fields["num_residues"],
        original_lengths_sha256=fields.get("original_lengths_sha256", ""),
        vnp=fields.get("vnp", ""),
        counts=InputCounts.from_json(fields["input"]),
        lengths=lengths,
        representatives=representatives,
        order=_narrowed(longest_first(lengths, representatives)),
        table=table,
        mapped=mapped,
    )


def _narrowed(ordinals: NDArray[np.int64]) -> Ordinals:
    return ordinals.astype(np.int32) if ordinals.max(initial=0) < 2**31 else ordinals


def longest_first(
    lengths: NDArray[np.integer[Any]], representatives: Ordinals
) -> NDArray[np.int64]:
    """Return the first ordinal of each group of identical sequences, (num_computed,).

    They are sorted by length, longest first, then by ordinal.
    """
    computed = np.flatnonzero(is_representative(representatives))
    return computed[np.argsort(-lengths[computed], kind="stable")]


def describe_input(counts: InputCounts, paths: RunPaths) -> str:
    """Return a sentence on what was skipped, truncated or changed in the input; "" if nothing."""
    listed = f"; skipped records are listed in {paths.skipped}" if counts.num_skipped else ""
    return counts.describe() + listed


class Counted(Protocol):
    """The counts and lengths of a run's sequences; a `RunPlan` has them."""

    @property
    def num_sequences(self) -> int: ...
    @property
    def num_computed(self) -> int: ...
    @property
    def lengths(self) -> NDArray[np.int32]: ...
    @property
    def computed_lengths(self) -> NDArray[np.int32]: ...


def model_tokens(lengths: NDArray[np.integer[Any]], long_policy: str) -> int:
    """Return the tokens that go through the model for sequences of `lengths` residues, (N,).

    BOS and EOS are included, also those of every window.
    """
    if (windows := Windows.of_policy(long_policy)) is None:
        return int(lengths.sum(dtype=np.int64)) + NUM_SPECIAL_TOKENS * lengths.size
    tokens_per_window = np.minimum(lengths, windows.length) + NUM_SPECIAL_TOKENS
    return int((tokens_per_window * windows.counts(lengths)).sum())


def required_bytes(plan: Counted, layout: RowLayout) -> int:
    """Return the peak disk usage of a run: checkpoints, dataset, and the workspace of assembly."""
    num_rows = plan.num_computed + plan.num_sequences
    # Fixed widths spare a pass over the lengths of what may be millions of sequences.
    if layout.is_fixed:
        num_values = num_rows * layout.fixed_width
    else:
        num_values = int(
            layout.widths(plan.lengths).sum() + layout.widths(plan.computed_lengths).sum()
        )
    return (
        num_values * np.dtype(np.float32).itemsize
        + num_rows * ROW_OVERHEAD_BYTES
        + _WORKSPACE_BYTES
    )


def store_dtype_of(fields: dict[str, Any]) -> StoreDtype:
    """Return the store dtype in the fields of `plan.json`."""
    # Plans of versions without the option have no such field.
    return StoreDtype(fields.get("store_dtype", StoreDtype.FLOAT32))


def find_damage(
    paths: RunPaths, fields: dict[str, Any], *, verify_digests: bool = True
) -> str | None:
    """Return what is wrong with the files whose digests `plan.json` holds, or None."""
    for name, digest in fields["files"].items():
        path = paths.plan_dir / name
        try:
            is_size_wrong = path.stat().st_size != digest["size_bytes"]
            if is_size_wrong or (verify_digests and digest_file(path) != FileDigest(**digest)):
                return f"{path} is damaged: size or sha256 differ from {paths.plan_json.name}"
        except OSError as error:
            return f"{path} cannot be read ({error.strerror})"
    return None


def is_representative(representatives: Ordinals) -> NDArray[np.bool_]:
    """Return whether each sequence is the first of those identical to it, (N,)."""
    return np.equal(representatives, np.arange(representatives.size, dtype=representatives.dtype))
