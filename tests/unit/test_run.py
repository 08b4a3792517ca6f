"""A run's directory: whose it is."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from vnp_lib.config import EmbedConfig
from vnp_lib.failures import RunDirectoryBusyError
from vnp_lib.run import attach_run, open_run


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


@pytest.mark.parametrize(
    ("devices", "shards", "num_threads"),
    [("cpu", 4, None), ("cpu,cpu", 2, 4), ("cpu,cpu", 1, None), ("cpu,cpu,cpu", 2, 4), ("cpu,cpu,cpu", 7, 2)],
)
def test_children_that_run_at_once_share_the_cores(tmp_path, tiny_fasta, monkeypatch, devices, shards, num_threads):
    monkeypatch.setattr("vnp_lib.run.num_cores", lambda: 8)
    config = EmbedConfig(
        fasta=(tiny_fasta,),
        output_dir=tmp_path / "run",
        model="esm2_t6_8M_UR50D",
        weights="random",
        devices=devices,
        shards=shards,
    )
    with open_run(config) as run:
        assert run.shard_job(0, "cpu").num_threads == num_threads


def test_a_shard_on_another_machine_has_all_its_cores(tmp_path, tiny_fasta, monkeypatch):
    monkeypatch.setattr("vnp_lib.run.resolve_devices", lambda devices, model: ("cpu", "cpu"))
    config = EmbedConfig(
        fasta=(tiny_fasta,), output_dir=tmp_path / "run", model="esm2_t6_8M_UR50D", weights="random", devices="cpu"
    )
    with open_run(config) as run:
        joined = attach_run(config, run.plan.fingerprint)
    assert joined.devices == ("cpu",)
    assert joined.shard_job(0, "cpu").num_threads is None
