"""Which code computes: the version of this package, and a digest of what it is made of."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Self

from vnp_lib import __version__
from vnp_lib.failures import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class Package:
    """A copy of `vnp_lib`."""

    version: str
    code_sha256: str  # of the names and bytes of its Python files
    directory: str

    @classmethod
    def in_directory(cls, directory: Path) -> Self:
        """Look at a copy of this version."""
        digest = hashlib.sha256()
        for path in sorted(directory.rglob("*.py")):
            code = path.read_bytes()
            digest.update(f"{path.relative_to(directory).as_posix()} {len(code)}\n".encode())
            digest.update(code)
        return cls(version=__version__, code_sha256=digest.hexdigest(), directory=str(directory))


@cache
def package_in_use() -> Package:
    """Return the copy that this process runs, as it is on disk when this is first asked for: at the start of a run."""
    return Package.in_directory(Path(__file__).parent)


def require_same_package(starter: object) -> None:
    """Raise ConfigError unless this process runs the code of the process that has started it.

    Args:
        starter: The fields of that one's `Package`, as JSON has them; anything else is another version's.
    """
    ours = package_in_use()
    if isinstance(starter, dict) and starter.get("code_sha256") == ours.code_sha256:
        return
    told = starter if isinstance(starter, dict) else {}
    version, directory = told.get("version", "of an unknown version"), told.get("directory", "an unknown place")
    if directory == ours.directory:
        raise ConfigError(
            f"the code of vnp in {directory} has changed since this run was started (from {version} to {ours.version}), "
            f"and a run does not mix the two; start the run again: it resumes with the code that is there now"
        )
    raise ConfigError(
        f"the worker process runs vnp {ours.version} from {ours.directory}, and the run was started by vnp {version} from "
        f"{directory}, whose code differs; remove one of the two from the Python path (PYTHONPATH, site-packages) and "
        f"start the run again"
    )
