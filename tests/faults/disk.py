"""A model of a disk at a power loss: only synced data is certain to survive.

The bytes of a file are safe once the file is synced, a name once its directory is synced. Of
everything else any part may have reached the disk, in any order: some writes, complete, in sectors
or as a length without content; some changes to a directory, each of them complete. A rename between
two directories is a change to each.
"""

from __future__ import annotations

import pickle
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

Event = tuple[Any, ...]

_SECTOR_BYTES = 512


class File:
    """The content of a file: the synced bytes, and the writes since."""

    def __init__(self) -> None:
        self._safe = b""
        self._unsynced: list[bytes] = []

    def append(self, data: bytes) -> None:
        self._unsynced.append(data)

    def sync(self) -> None:
        self._safe, self._unsynced = self._whole(), []

    def after_power_loss(self, draw: random.Random) -> bytes:
        """Return possible bytes of the file."""
        if not self._unsynced:
            return self._safe
        whole = self._whole()
        start = len(self._safe)
        match draw.choice(["nothing", "everything", "cut", "zeros", "holes", "writes"]):
            case "nothing":
                return self._safe
            case "cut":
                return whole[: draw.randint(start, len(whole))]
            case "zeros":
                return self._safe + bytes(draw.randint(0, len(whole) - start))
            case "holes":
                return _with_holes(whole, start, draw)
            case "writes":
                return self._safe + b"".join(
                    draw.choice([data, bytes(len(data))]) for data in self._unsynced
                )
        return whole

    def _whole(self) -> bytes:
        return self._safe + b"".join(self._unsynced)


class Directory:
    """The names in a directory: the synced ones, and the changes since."""

    def __init__(self) -> None:
        self.names: dict[str, File | Directory] = {}  # what a process sees
        self._safe: dict[str, File | Directory] = {}
        # Each change adds some names and removes those that are None.
        self._unsynced: list[dict[str, File | Directory | None]] = []

    def change(self, **names: File | Directory | None) -> None:
        """Add names, and remove those that are None, in one change."""
        self._unsynced.append(names)
        self.names = _applied(self.names, names)

    def sync(self) -> None:
        self._safe, self._unsynced = self.names, []

    def after_power_loss(self, draw: random.Random) -> dict[str, File | Directory]:
        names = self._safe
        share = draw.choice([0.0, 0.5, 0.9, 1.0])
        for change in self._unsynced:
            if draw.random() < share:
                names = _applied(names, change)
        return names


class Disk:
    """A disk below `root`, in the state after some operations of a record."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._top = Directory()
        self._open_files: dict[int, File] = {}

    def apply(self, event: Event) -> None:
        """Apply one operation of `RecordingOps`: its name, its arguments and its result."""
        name, *arguments, result = event
        getattr(self, f"_{name}", self._do_nothing)(*arguments, result)

    def write_after_power_loss(self, target: Path, draw: random.Random) -> None:
        """Write to `target` a possible state of the root after a power loss."""
        _write_directory(self._top, target, draw, contents={})

    def _open(self, path: Path, flags: int, fd: int) -> None:
        directory, name = self._place(path)
        if name not in directory.names:
            directory.change(**{name: File()})
        self._open_files[fd] = directory.names[name]

    def _write(self, fd: int, data: bytes, num_written: int) -> None:
        self._open_files[fd].append(data[:num_written])

    def _fsync(self, fd: int, _: None) -> None:
        self._open_files[fd].sync()

    def _link(self, source: Path, target: Path, _: None) -> None:
        directory, name = self._place(target)
        directory.change(**{name: self._find(source)})

    def _replace(self, source: Path, target: Path, _: None) -> None:
        moved = self._find(source)
        (from_directory, old_name), (to_directory, new_name) = (
            self._place(source),
            self._place(target),
        )
        if from_directory is to_directory:
            return from_directory.change(**{new_name: moved, old_name: None})
        to_directory.change(**{new_name: moved})
        from_directory.change(**{old_name: None})

    def _exchange(self, first: Path, second: Path, _: None) -> None:
        one, other = self._find(first), self._find(second)
        for path, entry in ((first, other), (second, one)):
            directory, name = self._place(path)
            directory.change(**{name: entry})

    def _unlink(self, path: Path, _: None) -> None:
        directory, name = self._place(path)
        directory.change(**{name: None})

    def _mkdir(self, path: Path, _: None) -> None:
        directory, name = self._place(path)
        directory.change(**{name: Directory()})

    def _fsync_directory(self, path: Path, _: None) -> None:
        self._find(path).sync()

    def _do_nothing(self, *_: Any) -> None:
        """Ignore a flock, a close, or an event that is no operation."""

    def _place(self, path: Path) -> tuple[Directory, str]:
        return self._find(path.parent), path.name

    def _find(self, path: Path) -> Any:
        found: Any = self._top
        for name in path.relative_to(self._root).parts:
            found = found.names[name]
        return found


def read_record(path: Path) -> Iterator[Event]:
    """Yield the events of a record, up to the point where its writer was killed."""
    with path.open("rb") as file:
        while True:
            try:
                yield pickle.load(file)
            except EOFError:
                return


def _applied(
    names: dict[str, File | Directory], change: dict[str, File | Directory | None]
) -> dict[str, File | Directory]:
    return {name: entry for name, entry in (names | change).items() if entry is not None}


def _with_holes(whole: bytes, start: int, draw: random.Random) -> bytes:
    data = bytearray(whole)
    for sector in range(start // _SECTOR_BYTES * _SECTOR_BYTES, len(data), _SECTOR_BYTES):
        if draw.random() < 0.3:
            hole = slice(max(sector, start), min(sector + _SECTOR_BYTES, len(data)))
            data[hole] = bytes(hole.stop - hole.start)
    return bytes(data)


def _write_directory(
    directory: Directory, target: Path, draw: random.Random, contents: dict[File, bytes]
) -> None:
    target.mkdir()
    for name, entry in directory.after_power_loss(draw).items():
        if isinstance(entry, Directory):
            _write_directory(entry, target / name, draw, contents)
        else:
            if entry not in contents:
                contents[entry] = entry.after_power_loss(draw)
            (target / name).write_bytes(contents[entry])
