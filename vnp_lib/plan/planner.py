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
    find_damage,
    is_representative,
    load_plan,
    required_bytes,
    store_dtype_of,
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
# The fields of an identity that depend on the input; the others depend on the settings.
_INPUT_FIELDS = ("schema", "sequences_sha256", "num_sequences")


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
    """Read and check the input, and write its plan, or keep the plan in the run directory.

    A plan of the same identity is kept; only `plan.json` is rewritten if `num_shards`,
    `token_budget` or `store_dtype` differs. The plan is rebuilt if its files fail validation, or if
    the same sequences were obtained with different input settings. It is kept without its input
    files, if these are gone (a preempted machine's own disk), because it holds every sequence.
    There is at least one shard, and there are at most as many as sequences to compute. On return,
    `paths.plan_dir` is complete on disk.

    Raises:
        FastaError: The input is invalid, or has duplicate ids that the policy forbids.
        FingerprintMismatchError: The directory belongs to another run. It is not changed.
        ConfigError: The directory cannot be created or written.
    """
    try:
        content = _reuse_without_input(paths, fasta, policy, model)
        if content is None:
            request = _PlanRequest(
                sources=find_sources(fasta, stdin=paths.stdin), policy=policy, model=model
            )
            content = _reuse_for_input(paths, request) or _write_plan_files(paths, request)
        chosen = {
            "given": _given_paths(fasta),
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
            f"the run directory {paths.run_dir} cannot be created or written ({reason})"
        ) from error
    # The files have just been written or verified.
    return load_plan(paths, verify_digests=False)


def is_input_gone(paths: RunPaths, fasta: Sequence[Path]) -> bool:
    """Return whether the plan on disk was made from these files, and some no longer exist."""
    with suppress(StorageError, OSError):
        is_same = read_sealed_json(paths.plan_json).get("given") == _given_paths(fasta)
        return is_same and any(given != STDIN and not input_exists(given) for given in fasta)
    return False


def kept_token_budget(paths: RunPaths) -> int | None:
    """Return the token budget of the plan on disk; None if there is no readable plan."""
    with suppress(StorageError, OSError):
        tokens = read_sealed_json(paths.plan_json).get("token_budget")
        return tokens if isinstance(tokens, int) and tokens >= 1 else None
    return None


def kept_store_dtype(paths: RunPaths) -> StoreDtype | None:
    """Return the store dtype of the plan on disk; None if there is no readable plan."""
    with suppress(StorageError, OSError, ValueError):
        return store_dtype_of(read_sealed_json(paths.plan_json))
    return None


def check_free_space(paths: RunPaths, plan: RunPlan, layout: RowLayout) -> None:
    """Raise ConfigError, with both figures, if the disk has no space for the rest of the run."""
    # A complete dataset of this run needs none. One that differs stays until it is replaced.
    wanted = {"fingerprint": plan.fingerprint, "store_dtype": plan.store_dtype, "num_missing": 0}
    with suppress(StorageError, OSError):
        if wanted.items() <= read_sealed_json(paths.success).items():
            return
    saved_bytes = 0
    for parent, _, names in os.walk(paths.checkpoints_dir):
        for name in names:
            # Worker processes of an earlier run may still rename or remove files.
            with suppress(FileNotFoundError):
                saved_bytes += os.lstat(os.path.join(parent, name)).st_size
    try:
        require_free_space(paths.run_dir, required_bytes(plan, layout) - saved_bytes)
    except StorageError as error:
        raise ConfigError(str(error)) from error


@dataclass(frozen=True, slots=True, kw_only=True)
class _PlanRequest:
    """The input and the settings that determine the identity of a plan."""

    sources: list[Source]
    policy: InputPolicy
    model: ModelIdentity


def _given_paths(fasta: Sequence[Path]) -> list[str]:
    """Return the input paths as `plan.json` records them."""
    return [str(given) if given == STDIN else os.path.abspath(given) for given in fasta]


def _reuse_without_input(
    paths: RunPaths, fasta: Sequence[Path], policy: InputPolicy, model: ModelIdentity
) -> dict[str, Any] | None:
    """Return the content of `plan.json` if its input is gone and nothing else differs.

    None means that the input has to be read.
    """
    if not is_input_gone(paths, fasta):
        return None
    fields = read_sealed_json(paths.plan_json)
    stored: dict[str, Any] = fields["identity"]
    input_fields = {name: stored.get(name) for name in _INPUT_FIELDS}
    _require_same_identity(paths, stored, _settings_identity(model, policy) | input_fields)
    if find_damage(paths, fields):
        return None
    gone = next(given for given in fasta if given != STDIN and not input_exists(given))
    _log.warning(
        "%s no longer exists: the run continues with the %s sequences that were read before, "
        "which are in %s",
        gone,
        f"{fields['num_sequences']:,}",
        paths.plan_dir,
    )
    return fields


def _reuse_for_input(paths: RunPaths, request: _PlanRequest) -> dict[str, Any] | None:
    """Return the content of `plan.json` if it is of the same run, and its files are intact."""
    if not paths.plan_json.exists():
        return None
    try:
        fields = read_sealed_json(paths.plan_json)
    except StorageError as error:
        _log.warning("The plan is rebuilt: %s", error)
        return None
    scan = InputScan()
    rename = make_id_renamer(request.sources, request.policy)
    for source in request.sources:
        for chunk in read_records(source, request.policy, rename=rename):
            scan.add(chunk)
    scanned = scan.finish(request.sources, request.policy)
    _require_same_identity(paths, fields["identity"], _identity(scanned, request))
    # Equal sequences may be truncated from different ones, and the lengths before are stored too.
    is_cut_alike = fields.get("original_lengths_sha256", "") == scanned.original_lengths_sha256
    if fields["input"] != scanned.counts.to_json() or not is_cut_alike:
        _log.info(
            "The plan is rebuilt: the same sequences were obtained with different input settings"
        )
        return None
    if damage := find_damage(paths, fields):
        _log.warning("The plan is rebuilt: %s", damage)
        return None
    return fields


def _write_plan_files(paths: RunPaths, request: _PlanRequest) -> dict[str, Any]:
    """Write the files of a plan, and return the content of `plan.json`, which is written last."""
    make_directory(paths.plan_dir)
    remove_orphaned_temporaries(paths.plan_dir)
    paths.skipped.unlink(missing_ok=True)
    scan = InputScan()
    rename = make_id_renamer(request.sources, request.policy)
    with ExitStack() as stack:
        file = stack.enter_context(durable_file(paths.sequences, replace=True))
        skipped = _SkippedRecords(paths.skipped, stack)
        with pa.ipc.new_file(file, SEQUENCES_SCHEMA) as writer:
            for source in request.sources:
                places = RecordLocator(source)
                for chunk in read_records(source, request.policy, rename=rename):
                    scan.add(chunk)
                    skipped.add(source, places, chunk.skipped)
                    if chunk.records:
                        texts = chunk.usable
                        lengths = (chunk.lengths, chunk.original_lengths)
                        columns = [texts.ids, texts.descriptions, texts.sequences, *lengths]
                        writer.write_batch(pa.record_batch(columns, schema=SEQUENCES_SCHEMA))
        scanned = scan.finish(request.sources, request.policy)
    with durable_file(paths.representatives, replace=True) as representatives_file:
        np.lib.format.write_array(representatives_file, scanned.representatives, allow_pickle=False)
    identity = _identity(scanned, request)
    written = {paths.sequences: file, paths.representatives: representatives_file}
    if skipped.file is not None:
        written[paths.skipped] = skipped.file
    return {
        "schema": PLAN_SCHEMA,
        "identity": identity,
        "fingerprint": hashlib.sha256(canonical_json(identity)).hexdigest(),
        "num_sequences": scanned.representatives.size,
        "num_computed": is_representative(scanned.representatives).sum().item(),
        "num_residues": scanned.num_residues,
        "original_lengths_sha256": scanned.original_lengths_sha256,
        "input": scanned.counts.to_json(),
        "files": {path.name: asdict(each.digest) for path, each in written.items()},
    }


class _SkippedRecords:
    """Writer of `skipped.jsonl`, which exists only if records were skipped."""

    def __init__(self, path: Path, stack: ExitStack) -> None:
        self.file: DurableFile | None = None
        self._path = path
        # Publishes the file on exit.
        self._stack = stack

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


def _identity(scanned: ScanResult, request: _PlanRequest) -> dict[str, Any]:
    values = (PLAN_SCHEMA, scanned.sequences_sha256, scanned.representatives.size)
    input_fields = dict(zip(_INPUT_FIELDS, values, strict=True))
    return _settings_identity(request.model, request.policy) | input_fields


def _settings_identity(model: ModelIdentity, policy: InputPolicy) -> dict[str, Any]:
    # A field without a value is left out, so that new fields do not change old fingerprints.
    model_fields = {name: value for name, value in asdict(model).items() if value is not None}
    return model_fields | policy.identity()


def _require_same_identity(paths: RunPaths, stored: dict[str, Any], wanted: dict[str, Any]) -> None:
    if stored.get("numerics", 1) != wanted.get("numerics", 1):
        raise FingerprintMismatchError(
            f"{paths.run_dir} was started by a vnp with numerics version "
            f"{stored.get('numerics', 1)}, and this one ({__version__}) has version "
            f"{wanted.get('numerics', 1)}: a dataset cannot mix them; resume with that vnp, or "
            f"choose another output directory, or --force-restart, which moves its content away"
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
            f"{paths.run_dir} belongs to another run ({listed}); choose another output directory, "
            f"or --force-restart, which moves its content away"
        )
