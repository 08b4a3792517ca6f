"""Distinguish a run's own files in its directory from others, and move them away."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from pathlib import Path

from vnp_lib.errors import ConfigError
from vnp_lib.plan import RunPaths
from vnp_lib.run.assembly import is_of_a_dataset
from vnp_lib.storage import make_directory, move_file

_SUPERSEDED = re.compile(r"superseded_(\d+)")
_IN_CHECKPOINTS = re.compile(r"shard_\d+|manifest.*\.(json|lock)|.*\.jsonl")
_IN_RESULTS = re.compile(r"[0-9a-f]{64}-\d{5}-of-\d{5}")
_PAGE_START_BYTES = 4096

logger = logging.getLogger(__name__)


def require_no_others(paths: RunPaths) -> None:
    """Check that a new run would not mix its files with those of others.

    Raises:
        ConfigError: A file or directory with a name that a run uses exists, and is not of a run.
    """
    if _holds_run(paths):
        return
    for directory, is_own in _directories(paths).items():
        # A link is refused elsewhere, whatever it points to.
        if not directory.is_dir() or directory.is_symlink():
            continue
        held = sorted(directory.iterdir())
        if held and not any(map(is_own, held)):
            raise ConfigError(
                f"{directory} is not of a run (it holds {held[0].name!r}), and a run keeps files "
                f"of its own under that name: choose another output directory, or give that one "
                f"another name"
            )
    if paths.report.exists() and not _is_page(paths.report):
        raise ConfigError(
            f"{paths.report} is not of a run, and a run writes a page of that name: choose another "
            f"output directory, or give that file another name"
        )


def supersede_run(paths: RunPaths) -> None:
    """Move the files of a run to `superseded_N`.

    Locks stay, for processes that wait for them, and so do files that are not of a run.

    Raises:
        ConfigError: Something could not be moved.
    """
    own = _own_entries(paths)
    if not own:
        return
    earlier = [
        int(match[1])
        for path in paths.run_dir.iterdir()
        if (match := _SUPERSEDED.fullmatch(path.name))
    ]
    target = paths.run_dir / f"superseded_{max(earlier, default=0) + 1}"
    try:
        make_directory(target)
        for path in own:
            move_file(path, target / path.name)
    except OSError as error:
        raise ConfigError(
            f"--force-restart: {error.filename or target} cannot be moved: {error.strerror}"
        ) from error
    logger.warning("--force-restart: the files of a run in %s are now in %s", paths.run_dir, target)


def _own_entries(paths: RunPaths) -> list[Path]:
    directories = [
        directory
        for directory, is_own in _directories(paths).items()
        if directory.is_dir()
        and not directory.is_symlink()
        and any(map(is_own, directory.iterdir()))
    ]
    files = [paths.quarantine, paths.superseded_quarantine]
    if _holds_run(paths) or _is_page(paths.report):
        files.append(paths.report)
    if paths.assembly_dir.is_dir():
        directories.append(paths.assembly_dir)
    return directories + [path for path in files if path.exists()]


def _holds_run(paths: RunPaths) -> bool:
    return any(path.exists() for path in (paths.plan_json, paths.manifest, paths.success))


def _directories(paths: RunPaths) -> dict[Path, Callable[[Path], bool]]:
    """Return the directories of a run, each with a function that recognises its entries."""
    in_plan = {
        path.name
        for path in (
            paths.plan_json,
            paths.sequences,
            paths.representatives,
            paths.skipped,
            paths.stdin,
        )
    }
    return {
        paths.plan_dir: lambda path: path.name in in_plan or _is_temporary(path),
        paths.checkpoints_dir: lambda path: (
            _IN_CHECKPOINTS.fullmatch(path.name) is not None or _is_temporary(path)
        ),
        paths.results_dir: lambda path: _IN_RESULTS.fullmatch(path.name) is not None,
        paths.embeddings_dir: lambda path: is_of_a_dataset(path) or _is_temporary(path),
    }


def _is_temporary(path: Path) -> bool:
    return path.name.startswith(".tmp-")


def _is_page(path: Path) -> bool:
    """Return True if a file is a page that `report` has written."""
    try:
        with path.open("rb") as file:
            return b"vnp" in file.read(_PAGE_START_BYTES)
    except OSError:
        return False
