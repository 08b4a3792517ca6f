"""HDF5 on a full disk: an error, and the process continues."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import h5py
import numpy as np
import pytest

from vnp_lib.dataset.formats.hdf5 import open_hdf5


@contextmanager
def no_file_larger_than(size_bytes: int) -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def write_ones(path: Path) -> None:
    path.touch()
    with open_hdf5(path) as file:
        file.root.create_dataset("ones", (1000,), "f4", chunks=(1000,))[:] = np.ones(1000)


def test_a_failed_write_is_raised_on_close_at_the_latest(tmp_path: Path) -> None:
    """HDF5 buffers small data until the file is closed."""
    with no_file_larger_than(1000), pytest.raises(OSError, match="File too large"):
        write_ones(tmp_path / "x.h5")


def test_h5py_reads_a_file_written_without_failure(tmp_path: Path) -> None:
    write_ones(tmp_path / "x.h5")
    with h5py.File(tmp_path / "x.h5") as file:
        assert file["ones"][:].tolist() == [1.0] * 1000
