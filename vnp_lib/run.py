"""A run in its directory: opened under a lock, planned, and asked what is left of it."""

from __future__ import annotations

import errno
import logging
import os
import shutil
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from vnp_lib import __version__
from vnp_lib.assembly import DatasetSummary, require_own_parts, whole_dataset
from vnp_lib.checkpoint.quarantine import Quarantine, sequence_digest
from vnp_lib.config import EmbedConfig
from vnp_lib.dataset.reader import stored_dtype
from vnp_lib.devices import kind_of, num_cores, planned_devices, resolve_devices, resolve_dtype, torch_device_name
from vnp_lib.errors import ConfigError, InputError, LockTimeoutError, RunDirectoryBusyError
from vnp_lib.failures import Failure
from vnp_lib.inputs import standard_input
from vnp_lib.inputs.policy import InputPolicy
from vnp_lib.inputs.reader import read
from vnp_lib.inputs.sources import STDIN, describe_left_out, find_sources
from vnp_lib.metrics import RunMetrics
from vnp_lib.plan.outputs import OutputKind, RowLayout, StoreDtype, choose_outputs
from vnp_lib.plan.paths import RunPaths
from vnp_lib.plan.plan import ModelIdentity, RunPlan, load_plan
from vnp_lib.plan.planner import check_free_space, is_input_gone, kept_store_dtype, kept_token_budget, make_plan
from vnp_lib.run_directory import move_aside, require_no_others
from vnp_lib.run_record import RunRecord
from vnp_lib.software import NUMERICS_VERSION, exact_software, package_in_use
from vnp_lib.storage.durable import make_directory, remove_orphaned_temporaries
from vnp_lib.storage.file_system import try_file_system
from vnp_lib.storage.locks import FileLock
from vnp_lib.user_paths import shown
from vnp_lib.verify import read_checkpoints
from vnp_lib.worker import ShardJob, done_or_set_aside

if TYPE_CHECKING:  # torch takes seconds to import: what a command line gets wrong is said before
    from vnp_lib.checkpoint.survey import CommittedRows, Survey
    from vnp_lib.model.weights import Weights

logger = logging.getLogger(__name__)

RANDOM_WEIGHTS = "random"
CPU_TOKEN_BUDGET = 2048


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardState:
    """How much of a shard is done."""

    rank: int
    num_sequences: int
    num_done: int
    tokens_done: int

    @property
    def is_complete(self) -> bool:
        return self.num_done == self.num_sequences


class Run:
    """A run directory that is ours for as long as `open_run` says."""

    def __init__(self, *, config: EmbedConfig, devices: tuple[str, ...], weights: Weights, plan: RunPlan) -> None:
        self.config = config
        self.devices = devices
        self.plan = plan
        self.paths = RunPaths(config.output_dir)
        self.manifest = RunRecord(
            self.paths.manifest,
            world_size=plan.num_shards,
            input_fingerprint=plan.fingerprint,
            model_config_hash=weights.digest,
        )
        self.quarantine = Quarantine.of(plan, self.paths)
        self.metrics = RunMetrics()
        self._weights = weights
        self._package = package_in_use()  # now, when what is on disk is what this process has imported

    def checkpoints(self, *, rank: int | None = None) -> Survey:
        """Look into the markers of all checkpoints, or of one shard's."""
        from vnp_lib.checkpoint.survey import survey_checkpoints

        return survey_checkpoints(self.paths.checkpoints_dir, self.plan.fingerprint, verify_digests=False, rank=rank)

    def shard_states(self) -> list[ShardState]:
        """Say how much of each shard is in checkpoints, by their markers, or in quarantine."""
        is_done = done_or_set_aside(self.plan, self.paths, self._committed)
        return [self._shard_state(rank, is_done) for rank in range(self.plan.num_shards)]

    def look_again(self) -> bool:
        """Say whether all shards are complete, after having the system forget what it remembers of the directories."""
        from vnp_lib.checkpoint.survey import refresh_listings

        refresh_listings(self.paths.checkpoints_dir)
        return all(shard.is_complete for shard in self.shard_states())

    def shard_state(self, rank: int) -> ShardState:
        """The same for one shard."""
        return self._shard_state(rank, done_or_set_aside(self.plan, self.paths, self._committed))

    def num_quarantined(self, rank: int) -> int:
        """How many of a shard's sequences are in quarantine."""
        return int(np.isin(self.plan.shard_ordinals(rank), list(self.quarantine.ordinals())).sum())

    def num_tokens_left(self, shards: Iterable[ShardState]) -> int:
        """How many tokens have to go through the model yet, when its shards stand so."""
        return self.plan.num_tokens(self.plan.order) - sum(shard.tokens_done for shard in shards)

    def describe_progress(self) -> str:
        """Say how much there is: `9,000 of 10,000 sequences are embedded`."""
        num_done = sum(shard.num_done for shard in self.shard_states())
        return f"{num_done:,} of {self.plan.num_computed:,} distinct sequences are embedded"

    def kept_dataset(self) -> DatasetSummary | None:
        """The dataset of this very run, whole, where all checkpoints have been deleted since: nothing need be computed again."""
        if self.checkpoints().valid:
            return None
        return whole_dataset(self.plan, self.paths, quarantined=self.quarantine.ordinals())

    def set_damaged_aside(self) -> None:
        """Read all checkpoints whole and move aside those that assembly would not take: their rows are computed again.

        Raises:
            StorageFailingError: So many are damaged that the storage is failing. Nothing has been moved.
        """
        from vnp_lib.checkpoint.file import set_aside
        from vnp_lib.checkpoint.survey import wait_for_listed_files

        wait_for_listed_files(self.paths.checkpoints_dir)
        survey = read_checkpoints(self.plan, self.paths)
        survey.require_sound_storage()
        for damage in survey.damaged:
            logger.warning("%s is moved aside: %s", damage.path, damage.reason)
            set_aside(damage.path)

    def prepare_shard(self, rank: int) -> None:
        """See that a shard's directory can take an attempt, before a child is started for it.

        Raises:
            ConfigError: It is no directory, or cannot be written.
            OSError: The disk is full or failing, which may pass: the attempt is made again.
        """
        directory = self.paths.shard_dir(rank)
        try:
            make_directory(directory)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.ESTALE):
                raise
            raise ConfigError(f"{directory} cannot be made: {error.strerror}; move away what is there") from None
        if not os.access(directory, os.W_OK | os.X_OK):
            raise ConfigError(f"{directory} cannot be written; mend its permissions")

    def shard_job(self, rank: int, device: str) -> ShardJob:
        """Describe an attempt on a shard to its child."""
        identity, runtime = self.plan.identity, self.config.runtime
        failures = [Failure.from_json(record) for record in self.manifest.failures(rank)]
        return ShardJob(
            run_dir=self.paths.run_dir.resolve(),
            rank=rank,
            fingerprint=self.plan.fingerprint,
            model=identity["model"],
            weights=RANDOM_WEIGHTS if self._weights.path is None else str(self._weights.path),
            weights_digest=self._weights.digest,
            dtype=identity["dtype"],
            device=kind_of(device),
            num_threads=1 if self.config.deterministic else self._threads_per_child(),
            is_deterministic=self.config.deterministic,
            checkpoint_seq_threshold=runtime.checkpoint_seq_threshold,
            checkpoint_time_threshold=runtime.checkpoint_time_threshold,
            token_budget=self.manifest.token_budget(rank, device) or self.plan.token_budget,
            suspects=self._suspects(failures),
            deferred=_silent_at(failures),
            is_careful=bool(failures) and failures[-1].accuses_batch,
            quarantines=self.config.on_poison == "quarantine",
            package=self._package,
        )

    def scale_token_budget(self, rank: int, device: str, scale: float) -> None:
        """Have the next attempts on a shard on a device take smaller batches, or larger ones."""
        tokens = self.manifest.token_budget(rank, device) or self.plan.token_budget
        self.manifest.remember_token_budget(rank, device, max(1, int(tokens * scale)))

    def _suspects(self, failures: list[Failure]) -> tuple[int, ...]:
        """Who is to be computed alone: first those at which a child has died already, then the rest of their batches."""
        if self.config.on_poison != "quarantine":
            return ()
        accused = [
            failure.ordinal for failure in reversed(failures) if failure.accuses_batch and not failure.is_silence
        ]
        ordinals = [ordinal for ordinal in accused if ordinal is not None] + self.manifest.suspects()
        return tuple(dict.fromkeys(ordinals))

    @cached_property
    def _committed(self) -> CommittedRows:
        from vnp_lib.checkpoint.survey import CommittedRows

        return CommittedRows(self.paths.checkpoints_dir, self.plan.fingerprint, self.plan.num_sequences)

    def _shard_state(self, rank: int, is_done: NDArray[np.bool_]) -> ShardState:
        ordinals = self.plan.shard_ordinals(rank)
        done = ordinals[is_done[ordinals]]
        return ShardState(
            rank=rank, num_sequences=ordinals.size, num_done=done.size, tokens_done=self.plan.num_tokens(done)
        )

    def _threads_per_child(self) -> int | None:
        children = min(sum(device == "cpu" for device in self.devices), self.plan.num_shards)
        return max(1, num_cores() // children) if children > 1 else None


def _silent_at(failures: list[Failure]) -> tuple[int, ...]:
    """The sequences, each alone in the model, at which an attempt gave no sign of life."""
    ordinals = [failure.ordinal for failure in failures if failure.is_silence]
    return tuple(dict.fromkeys(ordinal for ordinal in ordinals if ordinal is not None))


def check_at_the_door(config: EmbedConfig) -> None:
    """Look at what a run is given, before anything is started or made: what can be seen quickly, that is.

    Raises:
        InputError: A file, a device or a directory that cannot be used.
    """
    _look_at_input(config)
    planned_devices(config)
    if config.metrics_port is not None and config.executor == "local":  # else a shard of the last run may have it yet
        from vnp_lib.metrics_page import require_free_port

        require_free_port(config.metrics_address, config.metrics_port)
    _look_at_output(config)
    paths = RunPaths(config.output_dir)
    require_no_others(paths)
    if not config.force_restart:
        require_own_parts(paths)
    look_at_model(config)


def look_at_model(config: EmbedConfig) -> Weights | None:
    """See that the weights are there and are the model's, and have what the outputs need; their numbers are not read.

    Returns:
        The weights, without their digest; None where a run would download them.

    Raises:
        InputError: They cannot be used, or the model has no such layer.
    """
    from vnp_lib.model.heads import check_heads
    from vnp_lib.model.weights import look_at_weights

    layout = planned_layout(config)
    weights = look_at_weights(config.model, config.weights)
    if weights is not None and config.weights != "auto":  # else what is missing of them is downloaded
        check_heads(config.model, weights, layout.heads)
    return weights


def _look_at_input(config: EmbedConfig) -> None:
    """Look at the beginning of each file, and that something is piped where that is asked for."""
    stdin = RunPaths(config.output_dir).stdin
    if STDIN in config.fasta:
        standard_input.require_piped(sys.stdin.buffer, stdin, is_kept=not config.force_restart)
    if not config.force_restart and is_input_gone(RunPaths(config.output_dir), config.fasta):
        return
    files = [given for given in config.fasta if given != STDIN]
    for source in find_sources(files, stdin=stdin):
        next(read(source, InputPolicy.of(config)), None)
    for told in describe_left_out(config.fasta):
        logger.warning(told)


def _look_at_output(config: EmbedConfig) -> None:
    """See that the run directory is there or can be made, and that it is not one of the input's."""
    output_dir = config.output_dir
    if os.path.islink(output_dir) and not os.path.exists(output_dir):
        raise ConfigError(
            f"--output-dir {output_dir}: this is a link to {shown(os.readlink(output_dir))}, and there is no such directory; "
            "make it, or give another one"
        )
    above = output_dir.absolute()
    existing = next(path for path in (output_dir, *above.parents) if os.path.exists(path))
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        raise ConfigError(f"--output-dir {output_dir}: {existing} is not a directory that can be written")
    for given in config.fasta:
        if given != STDIN and os.path.isdir(given) and os.path.exists(output_dir) and given.samefile(output_dir):
            raise ConfigError(
                f"--output-dir {output_dir}: this is the directory of the input too, and a run fills its own with many files; give "
                f"another one, for example {output_dir / 'run'}, or name the files, as in --fasta '{given / '*.fasta'}'"
            )


@contextmanager
def open_run(config: EmbedConfig) -> Iterator[Run]:
    """Take the run directory, plan the run or find the plan that is there, and give the directory back at the end.

    Raises:
        InputError: The input, a setting or the directory cannot be used. A directory that was not there is not there
            afterwards either; one that was is untouched.
    """
    from vnp_lib.model.weights import resolve_weights

    paths = RunPaths(config.output_dir)
    devices = planned_devices(config)
    weights = resolve_weights(config.model, config.weights)
    is_new = not paths.run_dir.exists()
    with _locked(paths):
        try:
            require_no_others(paths)
            if config.force_restart:
                find_sources([given for given in config.fasta if given != STDIN], stdin=paths.stdin)
                move_aside(paths)
            require_own_parts(paths)
            for directory in (paths.run_dir, *_directories(paths)):
                remove_orphaned_temporaries(directory)
            with _stdin_kept(config, paths):
                plan = _plan(config, paths, devices, weights)
        except BaseException:
            # Where there are checkpoints another run is in it: locks do not work here.
            if is_new and not paths.checkpoints_dir.exists() and not paths.stdin.exists():
                shutil.rmtree(paths.run_dir)
            raise
        run = Run(config=config, devices=devices, weights=weights, plan=plan)
        make_directory(paths.checkpoints_dir)
        survey = run.checkpoints()
        run.manifest.open_or_rebuild(
            world_size=plan.num_shards,
            input_fingerprint=plan.fingerprint,
            model_config_hash=weights.digest,
            records=survey.valid,
        )
        _release_the_innocent(run, survey)
        try:
            yield run
        finally:
            run.manifest.close()


def _release_the_innocent(run: Run, survey: Survey) -> None:
    """Take out of quarantine what is of another run, whose ordinals are other sequences, and what has been computed."""
    if num_others := run.quarantine.set_others_aside(run.paths.superseded_quarantine):
        logger.warning(
            "%d sequences were set aside by another run on this directory, or by one that did not say of which run they were: "
            "they count no more, and what was said of them is in %s",
            num_others,
            run.paths.superseded_quarantine,
        )
    if held := run.quarantine.read():
        # Where locks do not work, two runs may have come to different ends.
        is_done = survey.done_mask(run.plan.num_sequences)
        run.quarantine.release(
            each.ordinal
            for each in held
            if is_done[each.ordinal] or each.sequence_sha256 != sequence_digest(run.plan, each.ordinal)
        )


def attach_run(config: EmbedConfig, fingerprint: str) -> Run:
    """Join a run that another machine has opened, and holds, to embed a shard of it with this machine's devices.

    Raises:
        InputError: The directory holds another run by now, or this machine's weights are others.
    """
    from vnp_lib.model.weights import resolve_weights

    plan = load_plan(RunPaths(config.output_dir))
    weights = resolve_weights(config.model, config.weights)
    if plan.fingerprint != fingerprint:
        raise InputError(f"{config.output_dir} holds another run by now ({plan.fingerprint}, not {fingerprint})")
    if plan.vnp not in ("", __version__) or plan.identity.get("numerics", 1) != NUMERICS_VERSION:
        raise InputError(
            f"{config.output_dir} was opened by vnp {plan.vnp} (numbers of version {plan.identity.get('numerics', 1)}), and this "
            f"machine has vnp {__version__} (version {NUMERICS_VERSION}) in {package_in_use().directory}; install the same on both"
        )
    if plan.identity["weights_digest"] != weights.digest:
        raise InputError(f"the weights of {config.model} on this machine are not those that the run was begun with")
    _try_file_system(config.output_dir, is_new=False)  # which may be mounted otherwise here
    devices = tuple(dict.fromkeys(resolve_devices(config.devices, config.model)))  # one child has all cores of the CPU
    own = _exact_software(devices, executor="work-pool")
    if not plan.identity.get("division", own).endswith(own):
        raise InputError(
            f"{config.output_dir} is to have the same bytes whatever is killed when (--deterministic), and its rows are computed with "
            f"{plan.identity['division']}, but this machine has {own}; use machines of one kind"
        )
    return Run(config=config, devices=devices, weights=weights, plan=plan)


@contextmanager
def _stdin_kept(config: EmbedConfig, paths: RunPaths) -> Iterator[None]:
    """Keep standard input where it is asked for; what turns out to be unusable is not kept, and whatever else happens it is."""
    is_new = STDIN in config.fasta and standard_input.keep(sys.stdin.buffer, paths.stdin)
    try:
        yield
    except InputError:
        if is_new:
            paths.stdin.unlink()
        raise


def _plan(config: EmbedConfig, paths: RunPaths, devices: tuple[str, ...], weights: Weights) -> RunPlan:
    from vnp_lib.model.esm2 import architecture_of
    from vnp_lib.model.heads import check_heads

    layout = planned_layout(config)
    num_shards = config.shards or len(devices)
    token_budget = planned_token_budget(config, devices)
    plan = make_plan(
        paths,
        config.fasta,
        ModelIdentity(
            model=config.model,
            weights_digest=weights.digest,
            layer=max(layout.layers, default=architecture_of(config.model).num_layers),
            pooling=",".join(dict.fromkeys(output.kind.value for output in layout.outputs)),
            long_policy=layout.long_policy,
            **layout.identity(),
            contact_regression=check_heads(config.model, weights, layout.heads),
            dtype=resolve_dtype(config.dtype, devices[0]),
            division=f"{num_shards} shards, {token_budget} tokens a batch, {_exact_software(devices, executor=config.executor)}"
            if config.deterministic
            else None,
            numerics=None if NUMERICS_VERSION == 1 else NUMERICS_VERSION,
        ),
        num_shards=num_shards,
        token_budget=token_budget,
        policy=InputPolicy.of(config),
        store_dtype=_planned_store_dtype(config, paths),
    )
    check_free_space(paths, plan, layout)
    return plan


def _exact_software(devices: Sequence[str], *, executor: str) -> str:
    """Name what decides the last bits. A work pool's GPUs are not among it: the machine that opens the run does not see them."""
    import torch

    seen = [device for device in devices if device == "cpu" or executor == "local"]
    return exact_software(torch.device(torch_device_name(device)) for device in seen)


def planned_layout(config: EmbedConfig) -> RowLayout:
    """Say what a row of a run is.

    Raises:
        ConfigError: The model has no such layer, or what is asked for of long sequences cannot be.
    """
    from vnp_lib.model.esm2 import architecture_of  # imports torch, which takes seconds

    architecture = architecture_of(config.model)
    outputs = choose_outputs(
        set(map(OutputKind, config.include)), config.repr_layers, num_layers=architecture.num_layers
    )
    return RowLayout(outputs, architecture.embed_dim, _long_policy(config))


def _long_policy(config: EmbedConfig) -> str:
    if config.long not in ("window", "virnucpro"):
        return "whole"  # or the input's affair
    if set(config.include) != {"mean"}:
        raise ConfigError(f"--long {config.long} says how a mean is taken: it goes with --include mean alone")
    if config.long == "virnucpro":
        return config.long
    assert config.max_length is not None
    overlap = config.max_length // 4 if config.window_overlap is None else config.window_overlap
    if overlap >= config.max_length:
        raise ConfigError(
            f"--window-overlap {overlap}: windows of {config.max_length} residues overlap by less than that"
        )
    return f"window:{config.max_length}:{overlap}"


def _planned_store_dtype(config: EmbedConfig, paths: RunPaths) -> StoreDtype:
    """Say how the dataset's values are stored; if the user says nothing, as they were to be when the run was begun.

    Raises:
        ConfigError: The dataset is there in another precision, and the checkpoints to make it anew are not.
    """
    kept = kept_store_dtype(paths)
    asked = StoreDtype(config.store_dtype) if config.store_dtype is not None else kept or StoreDtype.FLOAT32
    stored = stored_dtype(paths.embeddings_dir)
    if stored not in (None, asked) and not any(paths.checkpoints_dir.glob("shard_*/batch_*.pt")):
        raise ConfigError(
            f"--store-dtype {asked}: the dataset in {paths.embeddings_dir} is in {stored}, and the checkpoints to put it together "
            f"anew are gone; start the run with --store-dtype {stored}, or compute all of it again, in another output directory or "
            f"with --force-restart"
        )
    return asked


def planned_token_budget(config: EmbedConfig, devices: tuple[str, ...]) -> int:
    """Say how many tokens a forward pass of a run has at most.

    On GPUs, and if the user says nothing, it stays what the run was begun with: memory that is free differs from one day to
    the next, and its batches, which `--deterministic` holds a run to, are not to. Else it is what suits the devices.

    Raises:
        ConfigError: The model does not fit into a GPU.
    """
    if config.token_budget is not None:
        return config.token_budget
    if kind_of(devices[0]) == "cpu":
        return CPU_TOKEN_BUDGET
    from vnp_lib.inference.gpu_memory import TOKENS_UNSEEN, choose_token_budget

    if (kept := kept_token_budget(RunPaths(config.output_dir))) is not None:
        return kept
    if config.executor != "local":
        return TOKENS_UNSEEN
    import torch

    dtype = getattr(torch, resolve_dtype(config.dtype, devices[0]))
    return choose_token_budget(config.model, dtype, devices, planned_layout(config))


def _directories(paths: RunPaths) -> list[Path]:
    """All directories that a run writes to; those of an earlier division into shards too.

    Raises:
        ConfigError: One is a link: through it we would write outside of the run directory.
    """
    shard_dirs = sorted(paths.checkpoints_dir.glob("shard_*"))
    directories = [paths.plan_dir, paths.checkpoints_dir, *shard_dirs, paths.embeddings_dir, paths.assembly_dir]
    for directory in directories:
        if directory.is_symlink():
            raise ConfigError(
                f"{directory} is a link, and a run writes to its own directory only: put what it leads to there"
            )
    return directories


@contextmanager
def _locked(paths: RunPaths) -> Iterator[None]:
    is_new = not paths.run_dir.exists()
    try:
        make_directory(paths.run_dir)
        _try_file_system(paths.run_dir, is_new=is_new)
        lock = FileLock(paths.run_lock, purpose="run on this directory")
        _take(lock)
    except LockTimeoutError as error:
        raise RunDirectoryBusyError(f"{paths.run_dir} is in use: {error}. Wait for it, or stop it first.") from None
    except OSError as error:
        raise ConfigError(f"--output-dir {paths.run_dir} cannot be written: {error.strerror}") from None
    try:
        yield
    finally:
        lock.release()


def _take(lock: FileLock) -> None:
    try:
        lock.acquire(timeout_s=0)
    except LockTimeoutError:
        if lock.presumed_holder() is not None:
            raise
        # Who only looks whether a run is going on holds the lock for a moment, and leaves no name.
        lock.acquire(timeout_s=1.0)


def _try_file_system(directory: Path, *, is_new: bool) -> None:
    abilities = try_file_system(directory)
    try:
        abilities.require_usable()
    except ConfigError:
        if is_new:
            with suppress(OSError):
                directory.rmdir()
        raise
    if abilities.warning is not None:
        logger.warning("%s", abilities.warning)
