"""The plan of a run: its sequences, its order, shards and batches, and the fingerprint of its content.

A plan is made once, before anything is computed, and is three files under `plan/`: `sequences.arrow` (what was read),
`representatives.npy` (which sequences are identical) and, written last, `plan.json`, which holds the digests of the other
two. Where records were skipped, `skipped.jsonl` names them, and has its digest there too. Everything else follows by
arithmetic: any process that loads a plan finds the same shards and batches.
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
from vnp_lib.plan.packing import NUM_SPECIAL_TOKENS, pack
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
        pa.field("original_length", pa.int32(), nullable=False),  # before it was cut, where it was
    ]
)

ROW_OVERHEAD_BYTES = 256  # id, description, ordinal and length of a row, with room to spare
_WORKSPACE_BYTES = 256 * 1024**2

_log = logging.getLogger(__name__)

Ordinals: TypeAlias = NDArray[np.int32] | NDArray[np.int64]  # the smaller, where many are kept


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelIdentity:
    """What, besides the sequences, decides the numbers of a run."""

    model: str
    weights_digest: str
    layer: int
    pooling: str = "mean"
    dtype: str
    long_policy: str = "whole"  # long sequences are neither cut nor split
    outputs: str | None = None  # by name, in the order of a row; None: the mean of `layer` alone
    embed_dim: int | None = None  # where there are outputs
    contact_regression: str | None = None  # sha256 of its parameters, where there are contacts
    # Into shards and batches, and the software, if rows have to be the same to the last bit.
    division: str | None = None
    numerics: int | None = None  # NUMERICS_VERSION, unless it is 1


@dataclass(frozen=True, kw_only=True, eq=False)
class RunPlan:
    """A plan in memory. The texts stay on disk, memory-mapped; what is held is 12 bytes a sequence."""

    num_shards: int
    token_budget: int
    store_dtype: StoreDtype  # of the dataset: checkpoints are float32
    identity: dict[str, Any]
    fingerprint: str  # sha256 of the identity's canonical JSON
    num_residues: int
    vnp: str  # version of the run that opened it last; "" where that did not say
    original_lengths_sha256: str = ""  # of all sequences, where some were cut
    counts: InputCounts  # of the input that it was made from
    lengths: NDArray[np.int32]  # residues, (N,)
    representatives: Ordinals  # ordinal of the first identical sequence, (N,)
    order: Ordinals  # ordinals that are computed, longest first, then by ordinal, (num_computed,)
    table: pa.Table  # SEQUENCES_SCHEMA, by ordinal; it lies in `mapped`
    mapped: mmap.mmap  # `sequences.arrow`

    @property
    def num_sequences(self) -> int:
        return self.lengths.size

    @property
    def num_computed(self) -> int:
        """Sequences that differ from all before them: only these go through the model."""
        return self.order.size

    @property
    def computed_lengths(self) -> NDArray[np.int32]:
        """Residues of these, (num_computed,)."""
        return self.lengths[self.order]

    def num_tokens(self, ordinals: Ordinals) -> int:
        """Tokens of `ordinals` that go through the model."""
        return model_tokens(self.lengths[ordinals], self.identity["long_policy"])

    def shard_ordinals(self, rank: int) -> NDArray[np.int64]:
        """What shard `rank` computes, longest first: every num_shards-th of `order`, so that shards weigh the same."""
        return self.order[rank :: self.num_shards].astype(np.int64)

    def shard_batches(self, rank: int) -> list[NDArray[np.int64]]:
        """The ordinals of each batch of shard `rank`. A batch's index is its position; both last as long as the plan."""
        ordinals = self.shard_ordinals(rank)
        boundaries = pack(self.lengths[ordinals] + NUM_SPECIAL_TOKENS, self.token_budget)
        return np.split(ordinals, boundaries[1:-1]) if ordinals.size else []

    def fetch(self, ordinals: NDArray[np.int64]) -> tuple[list[str], list[str]]:
        """Ids and sequences of `ordinals`, in their order; only these rows are read."""
        return self._ids.take(ordinals), self._sequences.take(ordinals)

    def ids(self, ordinals: NDArray[np.int64]) -> list[str]:
        """Ids of `ordinals`, in their order; only these rows are read."""
        return self._ids.take(ordinals)

    def records(self, start: int, stop: int) -> pa.Table:
        """The rows of ordinals `start` to `stop`, the latter left out: the columns of SEQUENCES_SCHEMA."""
        return self.table.slice(start, stop - start)

    def release_pages(self) -> None:
        """Give the pages of the texts that have been read back to the system. They come again when they are asked for."""
        self.mapped.madvise(mmap.MADV_DONTNEED)

    @cached_property
    def _ids(self) -> _Texts:
        return _Texts(self.table.column("id"))

    @cached_property
    def _sequences(self) -> _Texts:
        return _Texts(self.table.column("sequence"))


class _Texts:
    """A column of texts, in a thousand chunks where there are many, from which single rows are taken."""

    def __init__(self, column: pa.ChunkedArray) -> None:
        self._chunks = column.chunks
        self._starts = np.cumsum([0, *map(len, self._chunks)])

    def take(self, ordinals: NDArray[np.int64]) -> list[str]:
        of_chunk = np.searchsorted(self._starts, ordinals, side="right") - 1
        rows = (ordinals - self._starts[of_chunk]).tolist()
        return [
            self._chunks[chunk][row].as_py()
            for chunk, row in zip(of_chunk.tolist(), rows, strict=True)
        ]


def load_plan(paths: RunPaths, *, verify_digests: bool = True) -> RunPlan:
    """Load the plan of a run, its files checked against their digests.

    Args:
        paths: Of the run.
        verify_digests: Read all of its files for that; otherwise look at their sizes only, which is for showing, not for
            computing.

    Raises:
        StorageError: A file of the plan is missing, damaged or of another version.
    """
    fields = read_sealed_json(paths.plan_json)
    if fields["schema"] != PLAN_SCHEMA:
        raise StorageError(
            f"{paths.plan_json} has schema {fields['schema']}; this version reads {PLAN_SCHEMA}"
        )
    if damage := _damage(paths, fields, verify_digests=verify_digests):
        raise StorageError(
            f"{damage}; start the run again with its input: the plan is then written anew"
        )
    with paths.sequences.open("rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    table = pa.ipc.open_file(pa.py_buffer(mapped)).read_all()
    column = np.from_dlpack(
        table.column("length").combine_chunks()
    )  # `to_numpy` would import pandas
    lengths = column.astype(np.int32, copy=False)
    mapped.madvise(mmap.MADV_DONTNEED)  # of which they are a small part
    representatives = _narrowed(np.load(paths.representatives))
    return RunPlan(
        num_shards=fields["num_shards"],
        token_budget=fields["token_budget"],
        store_dtype=_store_dtype(fields),
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
    """Ordinals of the first of each group of identical sequences, longest first, then by ordinal, (num_computed,)."""
    computed = np.flatnonzero(_is_computed(representatives))
    return computed[np.argsort(-lengths[computed], kind="stable")]


def describe_input(counts: InputCounts, paths: RunPaths) -> str:
    """Say what was done to a run's input, and where it is listed; "" if nothing."""
    listed = f"; skipped records are listed in {paths.skipped}" if counts.num_skipped else ""
    return counts.describe() + listed


class Counted(Protocol):
    """What a run is about; a `RunPlan` is."""

    @property
    def num_sequences(self) -> int: ...
    @property
    def num_computed(self) -> int: ...
    @property
    def lengths(self) -> NDArray[np.int32]: ...
    @property
    def computed_lengths(self) -> NDArray[np.int32]: ...


def model_tokens(lengths: NDArray[np.integer[Any]], long_policy: str) -> int:
    """Tokens that go through the model for sequences of `lengths` residues, (N,): BOS and EOS included, of every window."""
    if (windows := Windows.of_policy(long_policy)) is None:
        return int(lengths.sum(dtype=np.int64)) + NUM_SPECIAL_TOKENS * lengths.size
    of_a_window = np.minimum(lengths, windows.length) + NUM_SPECIAL_TOKENS
    return int((of_a_window * windows.counts(lengths)).sum())


def required_bytes(plan: Counted, layout: RowLayout) -> int:
    """Bytes that a whole run takes on disk at its peak: checkpoints, the dataset, and what assembly needs beside them."""
    num_rows = plan.num_computed + plan.num_sequences
    if layout.is_fixed:  # which says it without looking at each of many millions
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


def _store_dtype(fields: dict[str, Any]) -> StoreDtype:
    """What `plan.json` says; where it says nothing, it is of a time when there was no choice."""
    return StoreDtype(fields.get("store_dtype", StoreDtype.FLOAT32))


def _damage(paths: RunPaths, fields: dict[str, Any], *, verify_digests: bool = True) -> str | None:
    """What is wrong with the files that `plan.json` vouches for."""
    for name, digest in fields["files"].items():
        path = paths.plan_dir / name
        try:
            is_size_wrong = path.stat().st_size != digest["size_bytes"]
            if is_size_wrong or (verify_digests and digest_file(path) != FileDigest(**digest)):
                return f"{path} is damaged: its size and sha256 are not those in {paths.plan_json.name}"
        except OSError as error:
            return f"{path} cannot be read ({error.strerror})"
    return None


def _is_computed(representatives: Ordinals) -> NDArray[np.bool_]:
    return np.equal(representatives, np.arange(representatives.size, dtype=representatives.dtype))
