"""Make the plan of a run from its input files."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from vnp_lib import __version__
from vnp_lib.errors import ConfigError, FingerprintMismatchError, StorageError
from vnp_lib.inputs import (
    STDIN,
    Fault,
    InputChunk,
    InputPolicy,
    RecordLocator,
    Source,
    find_sources,
    input_exists,
    make_id_renamer,
    read_records,
)
from vnp_lib.plan.outputs import RowLayout, StoreDtype
from vnp_lib.plan.paths import RunPaths
from vnp_lib.plan.plan import (
    PLAN_SCHEMA,
    SEQUENCES_SCHEMA,
    ModelIdentity,
    RunPlan,
    _damage,
    _is_computed,
    _store_dtype,
    load_plan,
    required_bytes,
)
from vnp_lib.plan.scan import InputScan, ScanResult
from vnp_lib.storage import (
    DurableFile,
    canonical_json,
    durable_file,
    make_directory,
    read_sealed_json,
    remove_orphaned_temporaries,
    require_free_space,
    write_sealed_json,
)

_log = logging.getLogger(__name__)
_DEFAULT_POLICY = InputPolicy()
_OF_THE_SEQUENCES = (
    "schema",
    "sequences_sha256",
    "num_sequences",
)  # what of the identity only the input tells


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
            asked = _Asked(
                sources=find_sources(fasta, stdin=paths.stdin), policy=policy, model=model
            )
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
        raise ConfigError(
            f"the run directory {paths.run_dir} cannot be made or written ({reason})"
        ) from error
    return load_plan(paths, verify_digests=False)  # they have just been written, or read


def is_input_gone(paths: RunPaths, fasta: Sequence[Path]) -> bool:
    """Whether the plan that is there was made from these very files, and some of them are there no more."""
    with suppress(StorageError, OSError):
        is_same = read_sealed_json(paths.plan_json).get("given") == _as_given(fasta)
        return is_same and any(given != STDIN and not input_exists(given) for given in fasta)
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


def check_free_space(paths: RunPaths, plan: RunPlan, layout: RowLayout) -> None:
    """Raise ConfigError, with both figures, where the run directory's disk has no room for the rest of the run.

    A dataset of another kind is of no use to it, and stays until the new one is written.
    """
    if _has_dataset(paths, plan):
        return
    try:
        require_free_space(
            paths.run_dir, required_bytes(plan, layout) - _tree_bytes(paths.checkpoints_dir)
        )
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
    gone = next(given for given in fasta if given != STDIN and not input_exists(given))
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
    scan = InputScan()
    rename = make_id_renamer(asked.sources, asked.policy)
    for source in asked.sources:
        for chunk in read_records(source, asked.policy, rename=rename):
            scan.add(chunk)
    scanned = scan.finish(asked.sources, asked.policy)
    _require_same_identity(paths, fields["identity"], _identity(scanned, asked))
    is_cut_alike = fields.get("original_lengths_sha256", "") == scanned.original_lengths_sha256
    if fields["input"] != scanned.counts.to_json() or not is_cut_alike:
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
    scan = InputScan()
    rename = make_id_renamer(asked.sources, asked.policy)
    with ExitStack() as stack:
        file = stack.enter_context(durable_file(paths.sequences, replace=True))
        skipped = _SkippedRecords(paths.skipped, stack)
        with pa.ipc.new_file(file, SEQUENCES_SCHEMA) as writer:
            for source in asked.sources:
                places = RecordLocator(source)
                for chunk in read_records(source, asked.policy, rename=rename):
                    scan.add(chunk)
                    skipped.add(source, places, chunk.skipped)
                    if chunk.records:
                        writer.write_batch(_record_batch(chunk))
        scanned = scan.finish(asked.sources, asked.policy)
    with durable_file(paths.representatives, replace=True) as representatives_file:
        np.lib.format.write_array(representatives_file, scanned.representatives, allow_pickle=False)
    identity = _identity(scanned, asked)
    written = {paths.sequences: file, paths.representatives: representatives_file}
    if skipped.file is not None:
        written[paths.skipped] = skipped.file
    return {
        "schema": PLAN_SCHEMA,
        "identity": identity,
        "fingerprint": hashlib.sha256(canonical_json(identity)).hexdigest(),
        "num_sequences": scanned.representatives.size,
        "num_computed": _is_computed(scanned.representatives).sum().item(),
        "num_residues": scanned.num_residues,
        "original_lengths_sha256": scanned.original_lengths_sha256,
        "input": scanned.counts.to_json(),
        "files": {path.name: asdict(each.digest) for path, each in written.items()},
    }


class _SkippedRecords:
    """`skipped.jsonl`: there only where records were skipped."""

    def __init__(self, path: Path, stack: ExitStack) -> None:
        self.file: DurableFile | None = None
        self._path = path
        self._stack = stack  # publishes it at its end

    def add(self, source: Source, places: RecordLocator, faults: Sequence[Fault]) -> None:
        for fault in faults:
            if self.file is None:
                self.file = self._stack.enter_context(durable_file(self._path, replace=True))
            place = places.find(fault.record)
            self.file.write(
                canonical_json(
                    {"file": source.name, "id": fault.sequence_id, "reason": fault.reason} | place
                )
            )


def _record_batch(chunk: InputChunk) -> pa.RecordBatch:
    texts = chunk.usable
    columns = [
        texts.ids,
        texts.descriptions,
        texts.sequences,
        chunk.lengths,
        chunk.original_lengths,
    ]
    return pa.record_batch(columns, schema=SEQUENCES_SCHEMA)


def _identity(scanned: ScanResult, asked: _Asked) -> dict[str, Any]:
    of_the_sequences = (PLAN_SCHEMA, scanned.sequences_sha256, scanned.representatives.size)
    return _identity_of(asked.model, asked.policy) | dict(
        zip(_OF_THE_SEQUENCES, of_the_sequences, strict=True)
    )


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
    differing = [
        name
        for name in sorted(stored.keys() | wanted.keys())
        if stored.get(name) != wanted.get(name)
    ]
    if differing:
        listed = "; ".join(
            f"{name} is {stored.get(name)!r} there and {wanted.get(name)!r} here"
            for name in differing
        )
        raise FingerprintMismatchError(
            f"{paths.run_dir} belongs to another run ({listed}); choose another output directory, or --force-restart, "
            f"which moves what is there aside"
        )


def _tree_bytes(directory: Path) -> int:
    """Sum the sizes of all files; workers of an earlier run, which still save, may rename or remove some meanwhile."""
    size_bytes = 0
    for parent, _, names in os.walk(directory):
        for name in names:
            with suppress(FileNotFoundError):
                size_bytes += os.lstat(os.path.join(parent, name)).st_size
    return size_bytes
