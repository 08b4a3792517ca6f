"""Find the file system of a path, and whether other machines see its locks."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

MOUNTINFO = Path("/proc/self/mountinfo")

# On these file systems, flock excludes only processes of the same machine, by default or because
# of a mount option.
_LOCAL_LOCKS = re.compile(r"beegfs")
_LOCAL_LOCK_OPTIONS = frozenset(
    {"localflock", "nolock", "nobrl", "local_lock=flock", "local_lock=all"}
)
# On these it depends on a server that cannot be asked.
_PERHAPS_LOCAL_LOCKS = re.compile(r"9p|fuse(\..*)?|virtiofs")


@dataclass(frozen=True, slots=True, kw_only=True)
class Mount:
    """A mounted file system."""

    point: Path
    kind: str  # "ext4", "nfs4", "fuse.gcsfuse"
    options: frozenset[str]

    def __str__(self) -> str:
        return f"a file system of type {self.kind}, mounted on {self.point}"

    @property
    def has_local_locks(self) -> bool:
        """Whether locks are known to be invisible to other machines."""
        return bool(_LOCAL_LOCKS.fullmatch(self.kind)) or bool(self.options & _LOCAL_LOCK_OPTIONS)

    @property
    def has_shared_locks(self) -> bool:
        """Whether other machines see locks, as far as is known."""
        return not self.has_local_locks and not _PERHAPS_LOCAL_LOCKS.fullmatch(self.kind)


def mount_of(path: Path) -> Mount | None:
    """Return the mount of an existing path, or None if the system has no table of mounts."""
    try:
        device = os.stat(path).st_dev
        lines = MOUNTINFO.read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    except OSError:
        return None
    number, resolved = f"{os.major(device)}:{os.minor(device)}", path.resolve()
    # If one was mounted over another, the later line counts.
    mounts = [_parse(line) for line in reversed(lines) if " - " in line]
    above = [
        (numbered, mount) for numbered, mount in mounts if resolved.is_relative_to(mount.point)
    ]
    # On some file systems, such as btrfs and overlay, the device number of a file is not that of
    # the mount.
    of_device = [mount for numbered, mount in above if numbered == number]
    return max(
        of_device or [mount for _, mount in above],
        key=lambda mount: len(mount.point.parts),
        default=None,
    )


def locks_are_shared(path: Path) -> bool:
    """Return whether other machines see locks on the file system of `path`, as far as is known."""
    mount = mount_of(path)
    return mount is None or mount.has_shared_locks


def _parse(line: str) -> tuple[str, Mount]:
    """Return the device number and the mount in a line of mountinfo."""
    of_mount, _, of_file_system = line.partition(" - ")
    fields, (kind, *others) = of_mount.split(" "), of_file_system.split(" ")
    options = frozenset([*fields[5].split(","), *others[-1].split(",")])
    # White space in a path is escaped as an octal number.
    point = re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), fields[4])
    return fields[2], Mount(point=Path(point), kind=kind, options=options)
