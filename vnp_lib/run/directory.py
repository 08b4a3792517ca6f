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
from vnp_lib.checkpoint import sequence_digest
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

if TYPE_CHECKING:  # torch takes seconds to import: what a command line gets wrong is said before
    from vnp_lib.checkpoint import Survey
    from vnp_lib.model import Weights

logger = logging.getLogger(__name__)


def validate_config(config: EmbedConfig) -> None:
    """Look at what a run is given, before anything is started or made: what can be seen quickly, that is.

    Raises:
        InputError: A file, a device or a directory that cannot be used.
    """
    _look_at_input(config)
    planned_devices(config)
    _look_at_output(config)
    paths = RunPaths(config.output_dir)
    require_no_others(paths)
    if not config.force_restart:
        require_own_parts(paths)
    check_model(config)


def check_model(config: EmbedConfig) -> Weights | None:
    """See that the weights are there and are the model's, and have what the outputs need; their numbers are not read.

    Returns:
        The weights, without their digest; None where a run would download them.

    Raises:
        InputError: They cannot be used, or the model has no such layer.
    """
    from vnp_lib.model import check_heads, look_at_weights

    layout = layout_from_config(config)
    weights = look_at_weights(config.model, config.weights)
    if (
        weights is not None and config.weights != "auto"
    ):  # else what is missing of them is downloaded
        check_heads(weights, layout.heads)
    return weights


def _look_at_input(config: EmbedConfig) -> None:
    """Look at the beginning of each file, and that something is piped where that is asked for."""
    stdin = RunPaths(config.output_dir).stdin
    if STDIN in config.fasta:
        require_piped_stdin(sys.stdin.buffer, stdin, is_kept=not config.force_restart)
    if not config.force_restart and is_input_gone(RunPaths(config.output_dir), config.fasta):
        return
    files = [given for given in config.fasta if given != STDIN]
    left_out: list[str] = []
    for source in find_sources(files, stdin=stdin, left_out=left_out):
        next(read_records(source, InputPolicy.of(config)), None)
    for description in left_out:
        logger.warning(description)


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
            with _stdin_kept(config, paths):
                plan = plan_run(config, paths, devices, weights)
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
        _clean_quarantine(run, survey)
        try:
            yield run
        finally:
            run.manifest.close()


def _clean_quarantine(run: Run, survey: Survey) -> None:
    """Take out of quarantine what is of another run, whose ordinals are other sequences, and what has been computed."""
    if num_others := run.quarantine.remove_other_runs(run.paths.superseded_quarantine):
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
            if is_done[each.ordinal]
            or each.sequence_sha256 != sequence_digest(run.plan, each.ordinal)
        )


def attach_run(config: EmbedConfig, fingerprint: str) -> Run:
    """Join a run that another machine has opened, and holds, to embed a shard of it with this machine's devices.

    Raises:
        InputError: The directory holds another run by now, or this machine's weights are others.
    """
    from vnp_lib.model import resolve_weights

    plan = load_plan(RunPaths(config.output_dir))
    weights = resolve_weights(config.model, config.weights)
    if plan.fingerprint != fingerprint:
        raise InputError(
            f"{config.output_dir} holds another run by now ({plan.fingerprint}, not {fingerprint})"
        )
    if plan.vnp not in ("", __version__) or plan.identity.get("numerics", 1) != NUMERICS_VERSION:
        raise InputError(
            f"{config.output_dir} was opened by vnp {plan.vnp} (numbers of version {plan.identity.get('numerics', 1)}), and this "
            f"machine has vnp {__version__} (version {NUMERICS_VERSION}) in {package_in_use().directory}; install the same on both"
        )
    if plan.identity["weights_digest"] != weights.digest:
        raise InputError(
            f"the weights of {config.model} on this machine are not those that the run was begun with"
        )
    _try_file_system(config.output_dir, is_new=False)  # which may be mounted otherwise here
    devices = tuple(
        dict.fromkeys(resolve_devices(config.devices, config.model))
    )  # one child has all cores of the CPU
    own = exact_software_of(devices, executor="work-pool")
    if not plan.identity.get("division", own).endswith(own):
        raise InputError(
            f"{config.output_dir} is to have the same bytes whatever is killed when (--deterministic), and its rows are computed with "
            f"{plan.identity['division']}, but this machine has {own}; use machines of one kind"
        )
    return Run(config=config, devices=devices, weights=weights, plan=plan)


@contextmanager
def _stdin_kept(config: EmbedConfig, paths: RunPaths) -> Iterator[None]:
    """Keep standard input where it is asked for; what turns out to be unusable is not kept, and whatever else happens it is."""
    is_new = STDIN in config.fasta and save_stdin(sys.stdin.buffer, paths.stdin)
    try:
        yield
    except InputError:
        if is_new:
            paths.stdin.unlink()
        raise


def _directories(paths: RunPaths) -> list[Path]:
    """All directories that a run writes to; those of an earlier division into shards too.

    Raises:
        ConfigError: One is a link: through it we would write outside of the run directory.
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
