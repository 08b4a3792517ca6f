"""Open, lock and check a run directory."""

from __future__ import annotations

import logging
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from vnp_lib import __version__
from vnp_lib.checkpoint import Survey, sequence_digest
from vnp_lib.config import EmbedConfig
from vnp_lib.devices import planned_devices, resolve_devices
from vnp_lib.errors import ConfigError, InputError, LockTimeoutError, RunDirectoryBusyError
from vnp_lib.inputs import (
    STDIN,
    InputPolicy,
    find_sources,
    read_records,
    require_piped_stdin,
    save_stdin,
)
from vnp_lib.plan import RunPaths, is_input_gone, load_plan
from vnp_lib.run.assembly import require_own_parts
from vnp_lib.run.ownership import require_no_others, supersede_run
from vnp_lib.run.resolve import exact_software_of, layout_from_config, plan_run
from vnp_lib.run.run import Run
from vnp_lib.software import NUMERICS_VERSION, package_in_use
from vnp_lib.storage import FileLock, make_directory, remove_orphaned_temporaries, try_file_system
from vnp_lib.user_paths import shown

if TYPE_CHECKING:
    from vnp_lib.model import Weights

logger = logging.getLogger(__name__)


def validate_config(config: EmbedConfig) -> None:
    """Validate the settings of a run up front, as far as that is quick; create nothing.

    Raises:
        InputError: A file, a device or a directory cannot be used.
    """
    paths = RunPaths(config.output_dir)
    if STDIN in config.fasta:
        require_piped_stdin(sys.stdin.buffer, paths.stdin, is_kept=not config.force_restart)
    if config.force_restart or not is_input_gone(paths, config.fasta):
        files = [given for given in config.fasta if given != STDIN]
        left_out: list[str] = []
        for source in find_sources(files, stdin=paths.stdin, left_out=left_out):
            # The beginning of each file shows whether it is usable.
            next(read_records(source, InputPolicy.of(config)), None)
        for description in left_out:
            logger.warning(description)
    planned_devices(config)
    _validate_output(config)
    require_no_others(paths)
    if not config.force_restart:
        require_own_parts(paths)
    check_model(config)


def check_model(config: EmbedConfig) -> Weights | None:
    """Check that the weights exist, fit the model and have what the outputs need.

    Their values are not read.

    Returns:
        The weights, without their digest; None if a run would download them.

    Raises:
        InputError: They cannot be used, or the model has no such layer.
    """
    from vnp_lib.model import check_heads, inspect_weights

    layout = layout_from_config(config)
    weights = inspect_weights(config.model, config.weights)
    # What is missing of "auto" weights is downloaded.
    if weights is not None and config.weights != "auto":
        check_heads(weights, layout.heads)
    return weights


def _validate_output(config: EmbedConfig) -> None:
    """Check that the run directory exists or can be created, and is not an input directory."""
    output_dir = config.output_dir
    if os.path.islink(output_dir) and not os.path.exists(output_dir):
        raise ConfigError(
            f"--output-dir {output_dir}: this is a link to {shown(os.readlink(output_dir))}, and "
            "there is no such directory; make it, or give another one"
        )
    existing = nearest_existing(output_dir)
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        raise ConfigError(
            f"--output-dir {output_dir}: {existing} is not a directory that can be written"
        )
    for given in config.fasta:
        if (
            given != STDIN
            and os.path.isdir(given)
            and os.path.exists(output_dir)
            and given.samefile(output_dir)
        ):
            raise ConfigError(
                f"--output-dir {output_dir}: this is the directory of the input too, and a run "
                f"fills its own with many files; give another one, for example "
                f"{output_dir / 'run'}, or name the files, as in --fasta '{given / '*.fasta'}'"
            )


def nearest_existing(path: Path) -> Path:
    """Return a path, or the nearest of its parents that exists."""
    return next(each for each in (path, *path.absolute().parents) if os.path.exists(each))


@contextmanager
def open_run(config: EmbedConfig) -> Iterator[Run]:
    """Lock the run directory, and plan the run or load the plan that exists.

    Raises:
        InputError: The input, a setting or the directory cannot be used. A directory that did not
            exist is removed again; one that did is left as it was.
    """
    from vnp_lib.model import resolve_weights

    paths = RunPaths(config.output_dir)
    devices = planned_devices(config)
    weights = resolve_weights(config.model, config.weights)
    is_new = not paths.run_dir.exists()
    with _locked(paths):
        try:
            require_no_others(paths)
            if config.force_restart:
                find_sources([given for given in config.fasta if given != STDIN], stdin=paths.stdin)
                supersede_run(paths)
            require_own_parts(paths)
            for directory in (paths.run_dir, *_directories(paths)):
                remove_orphaned_temporaries(directory)
            with _saved_stdin(config, paths):
                plan = plan_run(config, paths, devices, weights)
        except BaseException:
            # If there are checkpoints, another run is in it: locks do not work here.
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
        _clean_quarantine(run, survey)
        try:
            yield run
        finally:
            run.manifest.close()


def _clean_quarantine(run: Run, survey: Survey) -> None:
    """Remove from the quarantine sequences of another run, and those that have been computed."""
    if num_others := run.quarantine.remove_other_runs(run.paths.superseded_quarantine):
        logger.warning(
            "%d sequences were quarantined by another run on this directory, or by one that did "
            "not record its fingerprint: they no longer count, and their lines are in %s",
            num_others,
            run.paths.superseded_quarantine,
        )
    if held := run.quarantine.read():
        # If locks do not work, two runs may have come to different results.
        is_done = survey.done_mask(run.plan.num_sequences)
        run.quarantine.release(
            each.ordinal
            for each in held
            if is_done[each.ordinal]
            or each.sequence_sha256 != sequence_digest(run.plan, each.ordinal)
        )


def attach_run(config: EmbedConfig, fingerprint: str) -> Run:
    """Join a run that another machine holds open, to embed a shard of it on this machine.

    Raises:
        InputError: The directory now holds another run, or this machine's weights differ.
    """
    from vnp_lib.model import resolve_weights

    plan = load_plan(RunPaths(config.output_dir))
    weights = resolve_weights(config.model, config.weights)
    if plan.fingerprint != fingerprint:
        raise InputError(
            f"{config.output_dir} now holds another run ({plan.fingerprint}, not {fingerprint})"
        )
    if plan.vnp not in ("", __version__) or plan.identity.get("numerics", 1) != NUMERICS_VERSION:
        raise InputError(
            f"{config.output_dir} was opened by vnp {plan.vnp} (numbers of version "
            f"{plan.identity.get('numerics', 1)}), and this machine has vnp {__version__} (version "
            f"{NUMERICS_VERSION}) in {package_in_use().directory}; install the same on both"
        )
    if plan.identity["weights_digest"] != weights.digest:
        raise InputError(
            f"the weights of {config.model} on this machine are not those that the run was begun "
            f"with"
        )
    # It may be mounted with other options on this machine.
    _try_file_system(config.output_dir, is_new=False)
    # One worker process has all cores of the CPU.
    devices = tuple(dict.fromkeys(resolve_devices(config.devices, config.model)))
    own = exact_software_of(devices, executor="work-pool")
    if not plan.identity.get("division", own).endswith(own):
        raise InputError(
            f"{config.output_dir} is to have the same bytes whatever is killed when "
            f"(--deterministic), and its rows are computed with {plan.identity['division']}, but "
            f"this machine has {own}; use machines of one kind"
        )
    return Run(config=config, devices=devices, weights=weights, plan=plan)


@contextmanager
def _saved_stdin(config: EmbedConfig, paths: RunPaths) -> Iterator[None]:
    """Save standard input if it is an input; delete it again if it turns out unusable."""
    is_new = STDIN in config.fasta and save_stdin(sys.stdin.buffer, paths.stdin)
    try:
        yield
    except InputError:
        if is_new:
            paths.stdin.unlink()
        raise


def _directories(paths: RunPaths) -> list[Path]:
    """Return all directories that a run writes to, including shards of an earlier division.

    Raises:
        ConfigError: One is a link, through which the run would write outside of its directory.
    """
    shard_dirs = sorted(paths.checkpoints_dir.glob("shard_*"))
    directories = [
        paths.plan_dir,
        paths.checkpoints_dir,
        *shard_dirs,
        paths.embeddings_dir,
        paths.assembly_dir,
    ]
    for directory in directories:
        if directory.is_symlink():
            raise ConfigError(
                f"{directory} is a link, and a run writes to its own directory only: "
                f"replace it by the directory that it points to"
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
        raise RunDirectoryBusyError(
            f"{paths.run_dir} is in use: {error}. Wait for it, or stop it first."
        ) from None
    except OSError as error:
        raise ConfigError(
            f"--output-dir {paths.run_dir} cannot be written: {error.strerror}"
        ) from None
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
        # A process that only checks for a run holds the lock for a moment, and leaves no name.
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
