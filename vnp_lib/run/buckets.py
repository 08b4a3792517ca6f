"""Temporary files that collect the rows of each part of a dataset."""

from __future__ import annotations

import os
import threading
import uuid
import zlib
from collections import defaultdict
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from vnp_lib.errors import StorageError
from vnp_lib.plan import ROW_OVERHEAD_BYTES, Ordinals, RowLayout, RunPlan, offsets_of, pack

if TYPE_CHECKING:
    from vnp_lib.checkpoint import Checkpoint

# `_SUCCESS.json` takes 250 bytes for each, and readers accept 32 MiB of it at most.
_MOST_PARTS = 16_384
# Rows that wait for their buckets; four parts if that is less.
_BUFFER_BYTES = 256 * 1024**2
_BLOCK_BYTES = 512 * 1024
THREADS = 2
VALUE_BYTES = np.dtype(np.float32).itemsize


@dataclass(frozen=True, slots=True, kw_only=True)
class Division:
    """The division of a dataset's rows into parts."""

    layout: RowLayout
    starts: NDArray[np.int64]  # the first ordinal of each part, (P,)
    num_sequences: int
    most_values: int  # of a part
    described: dict[str, Any]  # its fields in `_SUCCESS.json`
    software: str = ""  # that computed the rows, in the metadata of every part

    @property
    def is_large(self) -> bool:
        """Return True if a part has more values than 32-bit list offsets can count."""
        return self.most_values >= 2**31

    def span(self, part: int) -> tuple[int, int]:
        """Return the first ordinal of a part, and the first one after it."""
        stop = self.starts[part + 1] if part + 1 < self.starts.size else self.num_sequences
        return int(self.starts[part]), int(stop)


def divide_rows(plan: RunPlan, layout: RowLayout, part_bytes: int) -> Division:
    """Divide the rows into parts. Without rows there is one empty part, which has the columns."""
    if layout.is_fixed:
        row_bytes = layout.fixed_width * VALUE_BYTES + ROW_OVERHEAD_BYTES
        ordinals_per_part = max(1, part_bytes // row_bytes, -(-plan.num_sequences // _MOST_PARTS))
        starts = np.arange(0, max(1, plan.num_sequences), ordinals_per_part)
        most_values = ordinals_per_part * layout.fixed_width
        described: dict[str, Any] = {"ordinals_per_part": ordinals_per_part}
    else:
        widths = layout.widths(plan.lengths)
        sizes = widths * VALUE_BYTES + ROW_OVERHEAD_BYTES
        # Two neighbouring parts together exceed the limit, so that there are at most twice as many
        # as full parts.
        most_bytes = max(part_bytes, -(-2 * int(sizes.sum()) // _MOST_PARTS))
        starts = pack(sizes, most_bytes)[:-1] if widths.size else np.zeros(1, dtype=np.int64)
        most_values = int(np.add.reduceat(widths, starts).max()) if widths.size else 0
        described = {"first_ordinals": starts.tolist()}
    if not layout.is_one_mean:
        described["outputs"] = list(layout.names)
    return Division(
        layout=layout,
        starts=starts,
        num_sequences=plan.num_sequences,
        most_values=most_values,
        described=described,
    )


class Copies:
    """The sequences that are copies of a computed one."""

    def __init__(self, representatives: Ordinals) -> None:
        copies = np.flatnonzero(representatives != np.arange(representatives.size))
        self._copies = copies[np.argsort(representatives[copies], kind="stable")]
        self._originals = representatives[self._copies]

    def fan_out(self, ordinals: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return all sequences with the embedding of one of `ordinals`, and that one's position.

        The sequences ascend.
        """
        starts = np.searchsorted(self._originals, ordinals, side="left")
        counts = np.searchsorted(self._originals, ordinals, side="right") - starts
        sources = np.repeat(np.arange(ordinals.size), counts)
        nth_copy = np.arange(sources.size) - np.repeat(np.cumsum(counts) - counts, counts)
        targets = np.concatenate([ordinals, self._copies[starts[sources] + nth_copy]])
        sources = np.concatenate([np.arange(ordinals.size), sources])
        ascending = np.argsort(targets)
        return targets[ascending], sources[ascending]


class Buckets:
    """Temporary files, one per part, that take its rows in any order.

    Their names are unique: if locks do not work, two assemblies may run at once. The later one
    removes the buckets of the earlier one, which then fails; they never write to the same file.
    """

    def __init__(self, directory: Path, plan: RunPlan, division: Division) -> None:
        self.layout = division.layout
        self._starts = division.starts
        self._lengths = plan.lengths
        self._most_values = division.most_values
        self._thread_local = threading.local()
        self._directory = directory
        self._name = uuid.uuid4().hex[:8]
        # Places in the part, in the order of its rows in the bucket.
        self._places: defaultdict[int, list[NDArray[np.int32]]] = defaultdict(list)
        self._crc32: defaultdict[int, int] = defaultdict(int)
        self._waiting: defaultdict[int, list[NDArray[np.float32]]] = defaultdict(list)
        self._num_waiting_bytes = 0
        self._most_waiting_bytes = min(_BUFFER_BYTES, 4 * division.most_values * VALUE_BYTES)

    def append(
        self, ordinals: NDArray[np.int64], checkpoint: Checkpoint, rows: NDArray[np.int64]
    ) -> None:
        """Append rows of a checkpoint: for each of the ascending `ordinals`, the one in `rows`."""
        parts, starts = np.unique(
            np.searchsorted(self._starts, ordinals, side="right") - 1, return_index=True
        )
        stops = np.append(starts, ordinals.size)[1:]
        for part, start, stop in zip(parts.tolist(), starts, stops, strict=True):
            for block in self._row_blocks(checkpoint, rows[start:stop]):
                # A copy, so that the checkpoint can be freed.
                self._waiting[part].append(block.astype("<f4"))
                self._num_waiting_bytes += self._waiting[part][-1].nbytes
                if self._num_waiting_bytes > self._most_waiting_bytes:
                    self.flush()
            self._places[part].append((ordinals[start:stop] - self._starts[part]).astype(np.int32))

    def flush(self) -> None:
        """Write the waiting rows to their buckets.

        A checkpoint has rows for nearly every bucket, and on a network file system opening a file
        takes longer than writing them.
        """
        for part, blocks in self._waiting.items():
            with self._path(part).open("ab") as file:
                for block in blocks:
                    file.write(block.data)
                    self._crc32[part] = zlib.crc32(block.data, self._crc32[part])
        self._waiting.clear()
        self._num_waiting_bytes = 0

    def take(self, part: int) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """Return the ascending ordinals and the rows of a part, and delete its bucket.

        The rows are (n, W) or end to end, and valid until this thread takes another part.
        """
        if part not in self._places:
            return np.empty(0, dtype=np.int64), self._rows_of(np.empty(0, dtype=np.int64))
        path = self._path(part)
        ordinals = self._starts[part] + np.concatenate(self._places.pop(part))
        ascending = np.argsort(ordinals)
        rows = self._rows_of(ordinals)
        if (
            path.stat().st_size != rows.nbytes
            or self._read(path, rows, ordinals, ascending) != self._crc32[part]
        ):
            raise StorageError(f"{path} does not hold what was written to it; check the disk")
        path.unlink()
        later = part + THREADS
        if later in self._places:
            # Let the system read a later bucket into its cache while the parts before it are
            # written. Another thread may be taking it.
            with suppress(FileNotFoundError), self._path(later).open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_WILLNEED)
        return ordinals[ascending], rows

    def _rows_of(self, ordinals: NDArray[np.int64]) -> NDArray[np.float32]:
        """Return memory for the rows of these sequences."""
        width = self.layout.fixed_width
        return self._space()[: ordinals.size * width].reshape(-1, width)

    def _space(self) -> NDArray[np.float32]:
        """Return the memory of this thread for a part: allocating it costs more than filling it."""
        if not hasattr(self._thread_local, "space"):
            self._thread_local.space = np.empty(self._most_values, dtype="<f4")
        space: NDArray[np.float32] = self._thread_local.space
        return space

    def _row_blocks(
        self, checkpoint: Checkpoint, rows: NDArray[np.int64]
    ) -> Iterator[NDArray[Any]]:
        """Yield rows of a checkpoint in blocks."""
        return (checkpoint.embeddings[block] for block in self._blocks(rows))

    def _read(
        self,
        path: Path,
        rows: NDArray[np.float32],
        ordinals: NDArray[np.int64],
        ascending: NDArray[np.int64],
    ) -> int:
        """Read a bucket into `rows` in ascending order of the ordinals, and return its crc32."""
        crc32 = 0
        values = np.empty((self._rows_per_block, self.layout.fixed_width), dtype="<f4")
        with path.open("rb") as file:
            for block in self._blocks(np.argsort(ascending)):
                read = values[: block.size]
                file.readinto(read.data)
                crc32 = zlib.crc32(read.data, crc32)
                rows[block] = read
        return crc32

    @property
    def _rows_per_block(self) -> int:
        return max(1, _BLOCK_BYTES // (self.layout.fixed_width * VALUE_BYTES))

    def _blocks(self, rows: NDArray[np.int64]) -> Iterator[NDArray[np.int64]]:
        """Split `rows` into blocks that fit into the processor's cache."""
        starts = range(0, rows.size, self._rows_per_block)
        return (rows[start : start + self._rows_per_block] for start in starts)

    def _path(self, part: int) -> Path:
        return self._directory / f"bucket-{part:05d}-{self._name}"


class RaggedBuckets(Buckets):
    """Buckets of rows of different widths, which are moved one by one."""

    def _rows_of(self, ordinals: NDArray[np.int64]) -> NDArray[np.float32]:
        return self._space()[: self._widths(ordinals).sum()]

    def _row_blocks(
        self, checkpoint: Checkpoint, rows: NDArray[np.int64]
    ) -> Iterator[NDArray[Any]]:
        offsets = checkpoint.metadata["offsets"]
        return (checkpoint.embeddings[offsets[row] : offsets[row + 1]] for row in rows.tolist())

    def _read(
        self,
        path: Path,
        rows: NDArray[np.float32],
        ordinals: NDArray[np.int64],
        ascending: NDArray[np.int64],
    ) -> int:
        crc32 = 0
        offsets = offsets_of(self._widths(ordinals[ascending]))
        with path.open("rb") as file:
            for place in np.argsort(ascending).tolist():
                row = rows[offsets[place] : offsets[place + 1]]
                file.readinto(row.data)
                crc32 = zlib.crc32(row.data, crc32)
        return crc32

    def _widths(self, ordinals: NDArray[np.int64]) -> NDArray[np.int64]:
        return self.layout.widths(self._lengths[ordinals])
