"""What this machine has: cores, memory that is free, and GPUs."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

from vnp_lib.config import EmbedConfig, ModelName
from vnp_lib.errors import ConfigError

Answer = TypeVar("Answer")

_CHILD_BYTES = 10**9  # of a child beside its weights: Python, torch, the states of a batch
_BYTES_PER_PARAMETER = 5  # float32, and a little for what is made on the way
_USABLE_SHARE = 0.6  # of the memory that is free now: the rest is for files and for others


def num_cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0))


def num_cpu_workers(model: str) -> int:
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
    of_the_machine = next(
        int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")
    )
    try:
        group = control_group(cgroup, root)
        limit, used = (
            (group / name).read_text(encoding="utf-8") for name in ("memory.max", "memory.current")
        )
        return min(of_the_machine, int(limit) - int(used))
    except (OSError, StopIteration, ValueError):  # no such group, or "max"
        return of_the_machine


def control_group(
    cgroup: Path = Path("/proc/self/cgroup"), root: Path = Path("/sys/fs/cgroup")
) -> Path:
    """Find the directory of this process's control group. OSError or StopIteration where there is none."""
    own = next(
        line for line in cgroup.read_text(encoding="utf-8").splitlines() if line.startswith("0::")
    ).removeprefix("0::")
    return root / own.lstrip("/")


def free_gpu_bytes(gpu: str) -> int | None:
    """How much memory of a GPU is free; None where that cannot be told.

    Args:
        gpu: As in CUDA_VISIBLE_DEVICES: a number, or the UUID of a GPU or of a part of one. Numbers are by PCI bus, which
            among GPUs of several kinds is CUDA's order only under CUDA_DEVICE_ORDER=PCI_BUS_ID.
    """

    def free_bytes(nvml: Any) -> int:
        handle = (
            nvml.nvmlDeviceGetHandleByIndex(int(gpu))
            if gpu.isdigit()
            else nvml.nvmlDeviceGetHandleByUUID(gpu)
        )
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


def resolve_devices(devices: str, model: ModelName) -> tuple[str, ...]:
    """Name the devices of a run: `("0", "1")` for GPUs, `("cpu", "cpu")` for two children on the CPU.

    Raises:
        ConfigError: A GPU that is not there.
    """
    if devices.startswith("cpu"):
        return tuple(devices.split(","))
    import torch  # here, not above: the command line answers --help without it

    count = torch.cuda.device_count()
    if devices == "auto":
        return tuple(str(index) for index in range(count)) or ("cpu",) * num_cpu_workers(model)
    wanted = tuple(devices.split(","))
    absent = [index for index in wanted if int(index) >= count]
    if absent:
        raise ConfigError(
            f"--devices {devices}: there is no GPU {', '.join(absent)}; this machine shows {count}. "
            "Use --devices auto, or cpu."
        )
    return wanted


def planned_devices(config: EmbedConfig) -> tuple[str, ...]:
    """Name the devices that a run is planned for: this machine's, or what the machines of a work pool are taken to have.

    Raises:
        ConfigError: A GPU that is not there, or a work pool without a number of shards.
    """
    if config.executor == "local":
        return resolve_devices(config.devices, config.model)
    if config.shards is None:
        raise ConfigError(
            "--executor work-pool needs --shards: into how many flow runs is the input to be divided?"
        )
    return ("cpu",) if config.devices.startswith("cpu") else ("0",)


_DTYPE = {"cpu": "float32", "cuda": "bfloat16"}


def kind_of(device: str) -> str:
    """`"cuda"` for a GPU's number, `"cpu"` for the CPU."""
    return "cpu" if device == "cpu" else "cuda"


def torch_device_name(device: str) -> str:
    """Give torch's name of a run's device: `cuda:1` of "1"."""
    return device if device == "cpu" else f"cuda:{device}"


def resolve_dtype(dtype: str, device: str) -> str:
    """Name the precision of a model on a device: "auto" is bfloat16 on a GPU and float32 on the CPU."""
    return _DTYPE[kind_of(device)] if dtype == "auto" else dtype
