"""The number of CPU workers, by cores and memory."""

from __future__ import annotations

from typing import get_args

import pytest

from vnp_lib import devices
from vnp_lib.config import ModelName
from vnp_lib.devices import available_memory_bytes, num_cpu_workers, num_parameters
from vnp_lib.model.esm2 import MODELS

GB = 10**9


@pytest.mark.parametrize(
    ("model", "cores", "memory", "workers"),
    [
        ("esm2_t6_8M_UR50D", 2, 24 * GB, 2),
        ("esm2_t6_8M_UR50D", 64, 24 * GB, 13),
        ("esm2_t36_3B_UR50D", 2, 24 * GB, 1),
        ("esm2_t36_3B_UR50D", 64, 512 * GB, 19),
        ("esm2_t48_15B_UR50D", 64, 24 * GB, 1),
    ],
)
def test_one_worker_per_core_memory_permitting(monkeypatch, model, cores, memory, workers):
    monkeypatch.setattr(devices, "num_cores", lambda: cores)
    monkeypatch.setattr(devices, "available_memory_bytes", lambda: memory)
    assert num_cpu_workers(model) == workers


@pytest.mark.parametrize("model", get_args(ModelName))
def test_a_name_has_the_number_of_parameters(model):
    architecture = MODELS[model]
    in_matrices = 12 * architecture.embed_dim**2 * architecture.num_layers
    assert num_parameters(model) == pytest.approx(in_matrices, rel=0.12)


def files_of(tmp_path, *, limit: str | None) -> dict:
    (tmp_path / "meminfo").write_text(
        "MemTotal: 4000 kB\nMemFree: 10 kB\nMemAvailable:    3000 kB\n"
    )
    (tmp_path / "cgroup").write_text("0::/ours\n")
    if limit is not None:
        (tmp_path / "ours").mkdir()
        (tmp_path / "ours" / "memory.max").write_text(f"{limit}\n")
        (tmp_path / "ours" / "memory.current").write_text("1000000\n")
    return {"meminfo": tmp_path / "meminfo", "cgroup": tmp_path / "cgroup", "root": tmp_path}


@pytest.mark.parametrize(
    ("limit", "available"),
    [(None, 3_072_000), ("max", 3_072_000), ("2500000", 1_500_000), ("9000000", 3_072_000)],
)
def test_a_control_groups_limit_counts(tmp_path, limit, available):
    assert available_memory_bytes(**files_of(tmp_path, limit=limit)) == available
