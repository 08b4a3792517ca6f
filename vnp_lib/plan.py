"""The plan of a run: its sequences, its order, shards and batches, and the fingerprint of its content.

A plan is made once, before anything is computed, and is three files under `plan/`: `sequences.arrow` (what was read),
`representatives.npy` (which sequences are identical) and, written last, `plan.json`, which holds the digests of the other
two. Where records were skipped, `skipped.jsonl` names them, and has its digest there too. Everything else follows by
arithmetic: any process that loads a plan finds the same shards and batches.
"""

from __future__ import annotations

import hashlib
import logging
import mmap
import os
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol, TypeAlias

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from vnp_lib import __version__
from vnp_lib.errors import ConfigError, FastaError, FingerprintMismatchError, StorageError
from vnp_lib.inputs.duplicates import DIGEST_BYTES, digests_of, find_repeats
from vnp_lib.inputs.policy import InputCounts, InputPolicy
from vnp_lib.inputs.reader import EMPTY_ADVICE, InputChunk, Places, places_of, read, renaming_of
from vnp_lib.inputs.records import Fault, SequenceChunk
from vnp_lib.inputs.sources import STDIN, Source, find_sources, is_there
from vnp_lib.outputs import RowLayout, StoreDtype
from vnp_lib.packing import pack
from vnp_lib.storage.durable import (
    DurableFile,
    FileDigest,
    canonical_json,
    digest_file,
    durable_file,
    make_directory,
    read_sealed_json,
    remove_orphaned_temporaries,
    require_free_space,
    write_sealed_json,
)
from vnp_lib.windows import Windows

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

NUM_SPECIAL_TOKENS = 2  # BOS and EOS
_NUM_SHOWN = 10
ROW_OVERHEAD_BYTES = 256  # id, description, ordinal and length of a row, with room to spare
_WORKSPACE_BYTES = 256 * 1024**2
_DEFAULT_POLICY = InputPolicy()
_OF_THE_SEQUENCES = ("schema", "sequences_sha256", "num_sequences")  # what of the identity only the input tells

_log = logging.getLogger(__name__)

Ordinals: TypeAlias = NDArray[np.int32] | NDArray[np.int64]  # the smaller, where many are kept


@dataclass(frozen=True, slots=True)
class RunPaths:
    """Every path of a run."""

    run_dir: Path

    @property
    def plan_dir(self) -> Path:
        return self.run_dir / "plan"

    @property
    def plan_json(self) -> Path:
        return self.plan_dir / "plan.json"

    @property
    def sequences(self) -> Path:
        return self.plan_dir / "sequences.arrow"

    @property
    def representatives(self) -> Path:
        return self.plan_dir / "representatives.npy"

    @property
    def skipped(self) -> Path:
        return self.plan_dir / "skipped.jsonl"

    @property
    def stdin(self) -> Path:
        return self.plan_dir / "stdin"

    @property
    def run_lock(self) -> Path:
        return self.run_dir / "run.lock"

    @property
    def checkpoints_dir(self) -> Path:
        return self.run_dir / "checkpoints"

    @property
    def manifest(self) -> Path:
        return self.checkpoints_dir / "manifest.json"

    def shard_dir(self, rank: int) -> Path:
        return shard_dir(self.checkpoints_dir, rank)

    def shard_lock(self, rank: int) -> Path:
        return self.shard_dir(rank) / "shard.lock"

    def job(self, rank: int) -> Path:
        return self.shard_dir(rank) / "job.json"

    def worker_log(self, rank: int) -> Path:
        return self.shard_dir(rank) / "worker.log"

    def heartbeat(self, rank: int) -> Path:
        return self.shard_dir(rank) / "heartbeat"

    def history(self, rank: int) -> Path:
        return self.shard_dir(rank) / "history.jsonl"

    def checkpoint(self, rank: int, batch_idx: int) -> Path:
        return checkpoint_path(self.checkpoints_dir, rank, batch_idx)

    @property
    def results_dir(self) -> Path:
        return self.run_dir / "results"

    @property
    def quarantine(self) -> Path:
        return self.run_dir / "quarantine.jsonl"

    @property
    def superseded_quarantine(self) -> Path:
        """Lines of it that are of an earlier run on this directory."""
        return self.run_dir / "quarantine.superseded.jsonl"

    @property
    def embeddings_dir(self) -> Path:
        return self.run_dir / "embeddings"

    @property
    def success(self) -> Path:
        return self.embeddings_dir / "_SUCCESS.json"

    @property
    def assembly_dir(self) -> Path:
        return self.run_dir / ".assembly"

    @property
    def new_dataset(self) -> Path:
        """What is to take the place of `embeddings_dir`, while it is written."""
        return self.assembly_dir / "new"

    @property
    def replaced_dataset(self) -> Path:
        """What `embeddings_dir` was before, for a moment; or what it is to be at the next."""
        return self.assembly_dir / "replaced"

    @property
    def report(self) -> Path:
        return self.run_dir / "report.html"


def shard_dir(checkpoints_dir: Path, rank: int) -> Path:
    return checkpoints_dir / f"shard_{rank}"


def checkpoint_path(checkpoints_dir: Path, rank: int, batch_idx: int) -> Path:
    return shard_dir(checkpoints_dir, rank) / f"batch_{batch_idx:05d}.pt"


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

    def forget_pages(self) -> None:
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
        return [self._chunks[chunk][row].as_py() for chunk, row in zip(of_chunk.tolist(), rows, strict=True)]


def make_plan(
    paths: RunPaths,
    fasta: Sequence[Path],
    model: ModelIdentity,
    *,
    num_shards: int,
    token_budget: int,
    policy: InputPolicy = _DEFAULT_POLICY,
    store_dtype: StoreDtype = StoreDtype.FLOAT32,
) -> RunPlan:
    """Read the input, check it, and write its plan; or find that the run directory holds this very plan.

    Afterwards `paths.plan_dir` is complete on disk. Where a plan of the same identity is there it is kept, but for
    `plan.json` if `num_shards`, `token_budget` or `store_dtype` is another. It is written anew where files do not fit their digests, or
    where the same sequences were come by in another way. There are never more shards than sequences to compute, but at least
    one. Where the files that the plan was made from are gone (a spot machine's own disk), it is kept too: it holds every
    sequence.

    Raises:
        FastaError: Input that cannot be used, or an id that occurs twice, unless the policy allows for it.
        FingerprintMismatchError: The directory belongs to another run. It is left as it was.
        ConfigError: The directory cannot be made or written.
    """
    try:
        content = _content_without_input(paths, fasta, policy, model)
        if content is None:
            asked = _Asked(sources=find_sources(fasta, stdin=paths.stdin), policy=policy, model=model)
            content = _kept_content(paths, asked) or _write_content(paths, asked)
        chosen = {
            "given": _as_given(fasta),
            "num_shards": max(1, min(num_shards, content["num_computed"])),
            "token_budget": token_budget,
            "store_dtype": store_dtype,
            "vnp": __version__,
        }
        if content != content | chosen:
            write_sealed_json(paths.plan_json, content | chosen, replace=True)
    except OSError as error:
        reason = f"{error.filename or paths.plan_dir}: {error.strerror or error}"
        raise ConfigError(f"the run directory {paths.run_dir} cannot be made or written ({reason})") from error
    return load_plan(paths, verify_digests=False)  # they have just been written, or read


def is_input_gone(paths: RunPaths, fasta: Sequence[Path]) -> bool:
    """Whether the plan that is there was made from these very files, and some of them are there no more."""
    with suppress(StorageError, OSError):
        is_same = read_sealed_json(paths.plan_json).get("given") == _as_given(fasta)
        return is_same and any(given != STDIN and not is_there(given) for given in fasta)
    return False


def kept_token_budget(paths: RunPaths) -> int | None:
    """Say what token budget the plan has that is there; None where there is none, or none that can be read."""
    with suppress(StorageError, OSError):
        tokens = read_sealed_json(paths.plan_json).get("token_budget")
        return tokens if isinstance(tokens, int) and tokens >= 1 else None
    return None


def kept_store_dtype(paths: RunPaths) -> StoreDtype | None:
    """Say in which precision the plan that is there has values stored; None where there is none, or none that can be read."""
    with suppress(StorageError, OSError, ValueError):
        return _store_dtype(read_sealed_json(paths.plan_json))
    return None


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
        raise StorageError(f"{paths.plan_json} has schema {fields['schema']}; this version reads {PLAN_SCHEMA}")
    if damage := _damage(paths, fields, verify_digests=verify_digests):
        raise StorageError(f"{damage}; start the run again with its input: the plan is then written anew")
    with paths.sequences.open("rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    table = pa.ipc.open_file(pa.py_buffer(mapped)).read_all()
    column = np.from_dlpack(table.column("length").combine_chunks())  # `to_numpy` would import pandas
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


def longest_first(lengths: NDArray[np.integer[Any]], representatives: Ordinals) -> NDArray[np.int64]:
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
        num_values = int(layout.widths(plan.lengths).sum() + layout.widths(plan.computed_lengths).sum())
    return num_values * np.dtype(np.float32).itemsize + num_rows * ROW_OVERHEAD_BYTES + _WORKSPACE_BYTES


def check_free_space(paths: RunPaths, plan: RunPlan, layout: RowLayout) -> None:
    """Raise ConfigError, with both figures, where the run directory's disk has no room for the rest of the run.

    A dataset of another kind is of no use to it, and stays until the new one is written.
    """
    if _has_dataset(paths, plan):
        return
    try:
        require_free_space(paths.run_dir, required_bytes(plan, layout) - _tree_bytes(paths.checkpoints_dir))
    except StorageError as error:
        raise ConfigError(str(error)) from error


def _has_dataset(paths: RunPaths, plan: RunPlan) -> bool:
    """Whether the dataset says that it is the one that the run would end with."""
    with suppress(StorageError, OSError):
        success = read_sealed_json(paths.success)
        asked = {"fingerprint": plan.fingerprint, "store_dtype": plan.store_dtype, "num_missing": 0}
        return asked.items() <= success.items()
    return False


@dataclass(frozen=True, slots=True, kw_only=True)
class _Asked:
    """What a plan is asked for."""

    sources: list[Source]
    policy: InputPolicy
    model: ModelIdentity


@dataclass(frozen=True, slots=True, kw_only=True)
class _Survey:
    """What a pass over the input finds."""

    sequences_sha256: str  # of ">header\nSEQUENCE\n" of every record, normalised, in order
    original_lengths_sha256: str  # int32, little-endian; "" where no sequence was cut
    num_residues: int
    counts: InputCounts
    representatives: NDArray[np.int64]


class Surveyor:
    """Takes the measure of the input chunk by chunk, in about 40 bytes a sequence."""

    def __init__(self) -> None:
        self.counts = InputCounts()
        self._sha256 = hashlib.sha256()
        self._original_lengths_sha256 = hashlib.sha256()
        self._num_residues = 0
        self._id_digests = bytearray()
        self._sequence_digests = bytearray()

    @property
    def num_sequences(self) -> int:
        return len(self._sequence_digests) // DIGEST_BYTES

    def add(self, chunk: InputChunk) -> None:
        self.counts += chunk.counts
        self._sha256.update(_as_fasta(chunk.usable))
        self._original_lengths_sha256.update(np.asarray(chunk.original_lengths).astype("<i4").tobytes())
        self._num_residues += int(chunk.lengths.sum(dtype=np.int64))
        self._id_digests += digests_of(chunk.usable.ids)
        self._sequence_digests += digests_of(chunk.usable.sequences)

    def repeated_ids(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Ordinals of records whose id occurred before, ascending, and of those where it first did."""
        return find_repeats(self._id_digests)

    def representatives(self, *, dedup: bool) -> NDArray[np.int64]:
        """The ordinal of the first identical sequence, or without `dedup` its own, (N,).

        To be asked for once, when all is added: ids are forgotten then, and the duplicates are among the counts.
        """
        self._id_digests.clear()
        representatives = np.arange(self.num_sequences)
        if dedup:
            repeats, firsts = find_repeats(self._sequence_digests)
            representatives[repeats] = firsts
            self.counts += InputCounts(num_duplicates=repeats.size)
        return representatives

    def finish(self, sources: Sequence[Source], policy: InputPolicy) -> _Survey:
        """Raises FastaError where nothing is left, or an id may not occur twice and does; then the input is read again."""
        if not self.num_sequences and not policy.allow_empty:
            raise nothing_left(self.counts, policy)
        if policy.duplicate_ids != "keep":
            repeats, firsts = self.repeated_ids()
            if repeats.size and policy.duplicate_ids == "rename":
                raise FastaError("the input was changed while it was read; wait until it is complete, then start again")
            if repeats.size:
                raise _duplicate_ids(sources, policy, repeats, firsts)
        representatives = self.representatives(dedup=policy.dedup)
        return _Survey(
            sequences_sha256=self._sha256.hexdigest(),
            original_lengths_sha256=self._original_lengths_sha256.hexdigest() if self.counts.num_cut else "",
            num_residues=self._num_residues,
            counts=self.counts,
            representatives=representatives,
        )


def _as_fasta(chunk: SequenceChunk) -> bytes:
    lines = [""] * (2 * len(chunk.ids))
    described = zip(chunk.ids, chunk.descriptions, strict=True)
    lines[0::2] = [f">{sequence_id} {rest}" if rest else f">{sequence_id}" for sequence_id, rest in described]
    lines[1::2] = chunk.sequences
    return "\n".join([*lines, ""]).encode()


def _store_dtype(fields: dict[str, Any]) -> StoreDtype:
    """What `plan.json` says; where it says nothing, it is of a time when there was no choice."""
    return StoreDtype(fields.get("store_dtype", StoreDtype.FLOAT32))


def nothing_left(counts: InputCounts, policy: InputPolicy) -> FastaError:
    """Say why there is nothing to embed though there are records, and what to do."""
    if counts.num_skipped:
        what = f"all {counts.num_skipped:,} {'proteins' if policy.translate else 'records'} are skipped"
        return FastaError(f"{what}: there is nothing to embed; mend them first, or {EMPTY_ADVICE}")
    return FastaError(
        "no record has a frame without a stop codon: there is no protein to embed; give other records, or "
        + EMPTY_ADVICE
    )


def _duplicate_ids(
    sources: Sequence[Source], policy: InputPolicy, repeats: NDArray[np.int64], firsts: NDArray[np.int64]
) -> FastaError:
    pairs = list(zip(firsts[:_NUM_SHOWN].tolist(), repeats[:_NUM_SHOWN].tolist(), strict=True))
    places = places_of(sources, policy, {ordinal for pair in pairs for ordinal in pair})
    listed = "; ".join(f"{places[first][0]!r}: {places[first][1]} and {places[again][1]}" for first, again in pairs)
    more = f"; and {repeats.size - _NUM_SHOWN:,} more" if repeats.size > _NUM_SHOWN else ""
    return FastaError(
        f"ids must be unique, but some occur twice ({listed}{more}); rename or take out these records, or have that done "
        f"with --duplicate-ids rename, or have each keep its row with --duplicate-ids keep"
    )


def _as_given(fasta: Sequence[Path]) -> list[str]:
    """How a plan remembers what it was made from."""
    return [str(given) if given == STDIN else os.path.abspath(given) for given in fasta]


def _content_without_input(
    paths: RunPaths, fasta: Sequence[Path], policy: InputPolicy, model: ModelIdentity
) -> dict[str, Any] | None:
    """What `plan.json` says, if its input is gone and all else is as it was; None where the input has to be read."""
    if not is_input_gone(paths, fasta):
        return None
    fields = read_sealed_json(paths.plan_json)
    stored: dict[str, Any] = fields["identity"]
    of_the_sequences = {name: stored.get(name) for name in _OF_THE_SEQUENCES}
    _require_same_identity(paths, stored, _identity_of(model, policy) | of_the_sequences)
    if _damage(paths, fields):
        return None
    gone = next(given for given in fasta if given != STDIN and not is_there(given))
    _log.warning(
        "%s is not there any more: the run goes on with the %s sequences that were read before, which are in %s",
        gone,
        f"{fields['num_sequences']:,}",
        paths.plan_dir,
    )
    return fields


def _kept_content(paths: RunPaths, asked: _Asked) -> dict[str, Any] | None:
    """What `plan.json` says, if it is there, is of the same run, and its files are whole."""
    if not paths.plan_json.exists():
        return None
    try:
        fields = read_sealed_json(paths.plan_json)
    except StorageError as error:
        _log.warning("The plan is written anew: %s", error)
        return None
    surveyor = Surveyor()
    rename = renaming_of(asked.sources, asked.policy)
    for source in asked.sources:
        for chunk in read(source, asked.policy, rename=rename):
            surveyor.add(chunk)
    survey = surveyor.finish(asked.sources, asked.policy)
    _require_same_identity(paths, fields["identity"], _identity(survey, asked))
    is_cut_alike = fields.get("original_lengths_sha256", "") == survey.original_lengths_sha256
    if fields["input"] != survey.counts.to_json() or not is_cut_alike:
        _log.info("The plan is written anew: the same sequences are come by in another way")
        return None
    if damage := _damage(paths, fields):
        _log.warning("The plan is written anew: %s", damage)
        return None
    return fields


def _write_content(paths: RunPaths, asked: _Asked) -> dict[str, Any]:
    """Write what `plan.json` will vouch for, and return what it says of it."""
    make_directory(paths.plan_dir)
    remove_orphaned_temporaries(paths.plan_dir)
    paths.skipped.unlink(missing_ok=True)
    surveyor = Surveyor()
    rename = renaming_of(asked.sources, asked.policy)
    with ExitStack() as stack:
        file = stack.enter_context(durable_file(paths.sequences, replace=True))
        skipped = _SkippedRecords(paths.skipped, stack)
        with pa.ipc.new_file(file, SEQUENCES_SCHEMA) as writer:
            for source in asked.sources:
                places = Places(source)
                for chunk in read(source, asked.policy, rename=rename):
                    surveyor.add(chunk)
                    skipped.add(source, places, chunk.skipped)
                    if chunk.records:
                        writer.write_batch(_record_batch(chunk))
        survey = surveyor.finish(asked.sources, asked.policy)
    with durable_file(paths.representatives, replace=True) as representatives_file:
        np.lib.format.write_array(representatives_file, survey.representatives, allow_pickle=False)
    identity = _identity(survey, asked)
    written = {paths.sequences: file, paths.representatives: representatives_file}
    if skipped.file is not None:
        written[paths.skipped] = skipped.file
    return {
        "schema": PLAN_SCHEMA,
        "identity": identity,
        "fingerprint": hashlib.sha256(canonical_json(identity)).hexdigest(),
        "num_sequences": survey.representatives.size,
        "num_computed": _is_computed(survey.representatives).sum().item(),
        "num_residues": survey.num_residues,
        "original_lengths_sha256": survey.original_lengths_sha256,
        "input": survey.counts.to_json(),
        "files": {path.name: asdict(each.digest) for path, each in written.items()},
    }


class _SkippedRecords:
    """`skipped.jsonl`: there only where records were skipped."""

    def __init__(self, path: Path, stack: ExitStack) -> None:
        self.file: DurableFile | None = None
        self._path = path
        self._stack = stack  # publishes it at its end

    def add(self, source: Source, places: Places, faults: Sequence[Fault]) -> None:
        for fault in faults:
            if self.file is None:
                self.file = self._stack.enter_context(durable_file(self._path, replace=True))
            place = places.find(fault.record)
            self.file.write(
                canonical_json({"file": source.name, "id": fault.sequence_id, "reason": fault.reason} | place)
            )


def _record_batch(chunk: InputChunk) -> pa.RecordBatch:
    texts = chunk.usable
    columns = [texts.ids, texts.descriptions, texts.sequences, chunk.lengths, chunk.original_lengths]
    return pa.record_batch(columns, schema=SEQUENCES_SCHEMA)


def _identity(survey: _Survey, asked: _Asked) -> dict[str, Any]:
    of_the_sequences = (PLAN_SCHEMA, survey.sequences_sha256, survey.representatives.size)
    return _identity_of(asked.model, asked.policy) | dict(zip(_OF_THE_SEQUENCES, of_the_sequences, strict=True))


def _identity_of(model: ModelIdentity, policy: InputPolicy) -> dict[str, Any]:
    of_the_model = {name: value for name, value in asdict(model).items() if value is not None}
    return of_the_model | policy.identity()


def _require_same_identity(paths: RunPaths, stored: dict[str, Any], wanted: dict[str, Any]) -> None:
    if stored.get("numerics", 1) != wanted.get("numerics", 1):
        raise FingerprintMismatchError(
            f"{paths.run_dir} was begun by a vnp whose numbers are of version {stored.get('numerics', 1)}, and those of this one "
            f"({__version__}) are of version {wanted.get('numerics', 1)}: one dataset does not mix them; go on with that vnp, or "
            f"choose another output directory, or --force-restart, which moves what is there aside"
        )
    differing = [name for name in sorted(stored.keys() | wanted.keys()) if stored.get(name) != wanted.get(name)]
    if differing:
        listed = "; ".join(f"{name} is {stored.get(name)!r} there and {wanted.get(name)!r} here" for name in differing)
        raise FingerprintMismatchError(
            f"{paths.run_dir} belongs to another run ({listed}); choose another output directory, or --force-restart, "
            f"which moves what is there aside"
        )


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


def _tree_bytes(directory: Path) -> int:
    """Sum the sizes of all files; workers of an earlier run, which still save, may rename or remove some meanwhile."""
    size_bytes = 0
    for parent, _, names in os.walk(directory):
        for name in names:
            with suppress(FileNotFoundError):
                size_bytes += os.lstat(os.path.join(parent, name)).st_size
    return size_bytes
