"""HDF5 files that are written through a file of ours, so that a disk that takes no more ends in an error.

HDF5 itself cannot give up a file that it cannot write: it tries again as the process ends, and takes it down with SIGSEGV.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer, WriteableBuffer

_CHUNK_CACHE_BYTES = 4 * 1024**2


class Hdf5File(io.RawIOBase):
    """A file of which h5py believes that every write succeeds. Made by `open_hdf5`."""

    def __init__(self, path: Path) -> None:
        self.root: Any = None  # h5py's File, once it is open
        self._error: OSError | None = None
        self._file = path.open("r+b", buffering=0)

    def require_sound(self) -> None:
        """Raise what the first write that failed raised; to be called now and then, or all is written in vain."""
        if self._error is not None:
            raise self._error

    def write(self, data: ReadableBuffer, /) -> int:
        view = memoryview(data).cast("B")
        size_bytes = len(view)
        try:
            while view and self._error is None:
                view = view[self._file.write(view) :]
        except OSError as error:
            self._error = error
        return size_bytes

    def truncate(self, size: int | None = None, /) -> int:
        try:
            return self._file.truncate(size)
        except OSError as error:
            self._error = self._error or error
            return size or 0

    def readinto(self, buffer: WriteableBuffer, /) -> int:
        return self._file.readinto(buffer)

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()

    def readable(self) -> bool:
        return True

    def writable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def close(self) -> None:
        self._file.close()
        super().close()


@contextmanager
def open_hdf5(path: Path) -> Iterator[Hdf5File]:
    """Write an HDF5 file over what is at `path`, through `root` of what is yielded.

    Raises:
        OSError: What the system said of the first write that failed, whatever h5py made of it.
    """
    import h5py

    with Hdf5File(path) as file:
        try:
            # Indexed groups, of HDF5 1.8 and later: among a million names each is found at once.
            with h5py.File(file, "w", libver=("v108", "v108"), rdcc_nbytes=_CHUNK_CACHE_BYTES) as file.root:
                yield file
        finally:
            file.require_sound()
