"""A run's directory: whose it is."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from vnp_lib.config import EmbedConfig
from vnp_lib.failures import RunDirectoryBusyError
from vnp_lib.run import open_run


def test_a_second_run_on_the_directory_is_refused_at_once_with_the_holder(tmp_path: Path, tiny_fasta: Path) -> None:
    """And the directory is free again when the first run ends."""
    config = EmbedConfig(
        fasta=(tiny_fasta,), output_dir=tmp_path / "run", model="esm2_t6_8M_UR50D", weights="random", devices="cpu"
    )
    holder = f"process {os.getpid()} on .*, to run on this directory; waited 0 s"
    with open_run(config), pytest.raises(RunDirectoryBusyError, match=holder), open_run(config):
        pass
    with open_run(config):
        pass
