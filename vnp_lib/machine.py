"""What this machine has: cores, memory that is free, and GPUs."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

Answer = TypeVar("Answer")

_CHILD_BYTES = 10**9  # of a child beside its weights: Python, torch, the states of a batch
_BYTES_PER_PARAMETER = 5  # float32, and a little for what is made on the way
_USABLE_SHARE = 0.6  # of the memory that is free now: the rest is for files and for others


def num_cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0))


def num_cpu_children(model: str) -> int:
    """How many children are best on the CPU: one a core, as far as memory allows, and at least one.

    Each has the weights to itself, so the larger models leave room for few, which then use several cores each.
    """
    child_bytes = _CHILD_BYTES + _BYTES_PER_PARAMETER * num_parameters(model)
    return max(1, min(num_cores(), int(_USABLE_SHARE * available_memory_bytes() / child_bytes)))


def num_parameters(model: str) -> int:
    """Read it off a model's name: `esm2_t36_3B_UR50D` has 3 billion."""
    match = re.search(r"_(\d+)([MB])_", model)
    assert match is not None
    return int(match[1]) * (10**6 if match[2] == "M" else 10**9)


def available_memory_bytes(
    *,
    meminfo: Path = Path("/proc/meminfo"),
    cgroup: Path = Path("/proc/self/cgroup"),
    root: Path = Path("/sys/fs/cgroup"),
) -> int:
    """How much memory can be had: of the machine, or of the control group that this process is held in."""
    lines = meminfo.read_text(encoding="utf-8").splitlines()
    of_the_machine = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    try:
        group = control_group(cgroup, root)
        limit, used = ((group / name).read_text(encoding="utf-8") for name in ("memory.max", "memory.current"))
        return min(of_the_machine, int(limit) - int(used))
    except (OSError, StopIteration, ValueError):  # no such group, or "max"
        return of_the_machine


def control_group(cgroup: Path = Path("/proc/self/cgroup"), root: Path = Path("/sys/fs/cgroup")) -> Path:
    """Find the directory of this process's control group. OSError or StopIteration where there is none."""
    own = next(line for line in cgroup.read_text(encoding="utf-8").splitlines() if line.startswith("0::")).removeprefix(
        "0::"
    )
    return root / own.lstrip("/")


def free_gpu_bytes(gpu: str) -> int | None:
    """How much memory of a GPU is free; None where that cannot be told.

    Args:
        gpu: As in CUDA_VISIBLE_DEVICES: a number, or the UUID of a GPU or of a part of one. Numbers are by PCI bus, which
            among GPUs of several kinds is CUDA's order only under CUDA_DEVICE_ORDER=PCI_BUS_ID.
    """

    def free_bytes(nvml: Any) -> int:
        handle = nvml.nvmlDeviceGetHandleByIndex(int(gpu)) if gpu.isdigit() else nvml.nvmlDeviceGetHandleByUUID(gpu)
        return int(nvml.nvmlDeviceGetMemoryInfo(handle).free)

    return ask_nvml(free_bytes)


def ask_nvml(question: Callable[[Any], Answer]) -> Answer | None:
    """Put a question to NVML, NVIDIA's driver, without CUDA in this process; None where it has no answer, or is not there."""
    with suppress(ImportError):
        import pynvml

        with suppress(pynvml.NVMLError):
            pynvml.nvmlInit()
            try:
                return question(pynvml)
            finally:
                pynvml.nvmlShutdown()
    return None
