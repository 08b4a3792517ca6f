"""The machine: what it is, and how fast it multiplies matrices."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

RESULTS = Path(__file__).parent / "results"

_PACKAGES = ("torch", "numpy", "fair-esm", "transformers", "prefect")
_GEMM_TOKENS, _GEMM_DIM = 4096, 1024


def describe_machine() -> dict[str, Any]:
    """What a reader must know to compare: hardware, software, and the load."""
    return {
        "started_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "cpu": cpu_name(),
        "cores": len(os.sched_getaffinity(0)),
        "load_average": os.getloadavg(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: _version(name) for name in _PACKAGES},
        "commit": _commit(),
    }


def cpu_name() -> str:
    found = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    return found[1].strip() if found else platform.machine()


def results_path(machine_name: str) -> Path:
    """Return `results/2026-11-22-amd-epyc.json`; a second run on a day replaces the first."""
    name = re.sub(r"[^a-z0-9]+", "-", machine_name.lower()).strip("-")
    return RESULTS / f"{datetime.now(UTC).date()}-{name}.json"


def gemm_gflops() -> dict[str, float]:
    """Measure matrix products on this process's threads, GFLOP/s, the best of three.

    `fp32_mm` is what `nn.Linear` gets (MKL), `fp32_conv` the same product as a 1 x 1 convolution
    (oneDNN).
    """
    x, w = torch.randn(_GEMM_TOKENS, _GEMM_DIM), torch.randn(_GEMM_DIM, _GEMM_DIM)
    pixels = x[None, None].permute(0, 3, 1, 2)
    half_x, half_w = x.bfloat16(), w.bfloat16()
    products: dict[str, Callable[[], object]] = {
        "fp32_mm": lambda: F.linear(x, w),
        # The dilation has no effect on a 1 x 1 kernel, but without it torch does not use oneDNN on
        # a single thread.
        "fp32_conv": lambda: F.conv2d(pixels, w[..., None, None], dilation=2),
        "bf16_mm": lambda: F.linear(half_x, half_w),
    }
    flops = 2 * _GEMM_TOKENS * _GEMM_DIM**2
    with torch.inference_mode():
        return {name: flops / _best_s(product) / 1e9 for name, product in products.items()}


def _best_s(function: Callable[[], object]) -> float:
    function()
    return min(timed(function)[0] for _ in range(3))


def timed(function: Callable[..., Any], *arguments: Any) -> tuple[float, Any]:
    """Call it; seconds, and what it returned."""
    started_s = time.perf_counter()
    result = function(*arguments)
    return time.perf_counter() - started_s, result


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return sys.modules[package].__version__ if package in sys.modules else None


def _commit() -> str | None:
    with suppress(OSError, subprocess.CalledProcessError):
        command = ["git", "describe", "--always", "--dirty", "--abbrev=10"]
        run = subprocess.run(
            command, cwd=RESULTS.parent, capture_output=True, text=True, check=True
        )
        return run.stdout.strip()
    return None
