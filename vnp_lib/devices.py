"""The CPU cores, free memory and GPUs of this machine, and the devices of a run."""

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

# Memory of a worker process without its weights: Python, torch, the hidden states of a batch.
_WORKER_BYTES = 10**9

# Weights are float32, with some temporary memory while they are loaded.
_BYTES_PER_PARAMETER = 5

# The rest of the free memory is left to the page cache and to other programs.
_USABLE_SHARE = 0.6


def num_cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0))


def num_cpu_workers(model: str) -> int:
    """Return the best number of CPU workers: one per core, memory permitting, and at least one.

    Each holds its own copy of the weights. Of the larger models only a few fit into memory, which
    then use several cores each.
    """
    worker_bytes = _WORKER_BYTES + _BYTES_PER_PARAMETER * num_parameters(model)
    return max(1, min(num_cores(), int(_USABLE_SHARE * available_memory_bytes() / worker_bytes)))


def num_parameters(model: str) -> int:
    """Return the number of parameters in a model's name: 3 billion for `esm2_t36_3B_UR50D`."""
    match = re.search(r"_(\d+)([MB])_", model)
    assert match is not None
    return int(match[1]) * (10**6 if match[2] == "M" else 10**9)


def available_memory_bytes(
    *,
    meminfo: Path = Path("/proc/meminfo"),
    cgroup: Path = Path("/proc/self/cgroup"),
    root: Path = Path("/sys/fs/cgroup"),
) -> int:
    """Return the available memory of the machine, or of this process's control group if less."""
    lines = meminfo.read_text(encoding="utf-8").splitlines()
    machine_bytes = next(
        int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")
    )
    try:
        group = control_group(cgroup, root)
        limit, used = (
            (group / name).read_text(encoding="utf-8") for name in ("memory.max", "memory.current")
        )
        return min(machine_bytes, int(limit) - int(used))
    except (OSError, StopIteration, ValueError):
        # There is no control group, or its limit is "max".
        return machine_bytes


def control_group(
    cgroup: Path = Path("/proc/self/cgroup"), root: Path = Path("/sys/fs/cgroup")
) -> Path:
    """Return the directory of this process's control group; OSError or StopIteration if none."""
    name = next(
        line for line in cgroup.read_text(encoding="utf-8").splitlines() if line.startswith("0::")
    ).removeprefix("0::")
    return root / name.lstrip("/")


def free_gpu_bytes(gpu: str) -> int | None:
    """Return the free memory of a GPU, or None if NVML cannot tell.

    Args:
        gpu: As in CUDA_VISIBLE_DEVICES: a number, or the UUID of a GPU or of a MIG instance.
            NVML numbers GPUs by PCI bus. On a machine with several kinds of GPU, CUDA does so only
            under CUDA_DEVICE_ORDER=PCI_BUS_ID.
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
    """Query NVIDIA's management library; return None if it is missing or returns an error.

    Unlike a call of torch, this does not initialise CUDA in this process.
    """
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
    """Return the devices of a run: `("0", "1")` for GPUs, `("cpu", "cpu")` for two CPU workers.

    Raises:
        ConfigError: A GPU that this machine does not have.
    """
    if devices.startswith("cpu"):
        return tuple(devices.split(","))
    # Imported here, so that the command line answers --help without torch.
    import torch

    count = torch.cuda.device_count()
    if devices == "auto":
        return tuple(str(index) for index in range(count)) or ("cpu",) * num_cpu_workers(model)
    requested = tuple(devices.split(","))
    absent = [index for index in requested if int(index) >= count]
    if absent:
        raise ConfigError(
            f"--devices {devices}: there is no GPU {', '.join(absent)}, this machine shows "
            f"{count}; use --devices auto or cpu"
        )
    return requested


def planned_devices(config: EmbedConfig) -> tuple[str, ...]:
    """Return the devices to plan for: this machine's, or one of a work pool's machines.

    Raises:
        ConfigError: A GPU that this machine does not have, or a work pool without `shards`.
    """
    if config.executor == "local":
        return resolve_devices(config.devices, config.model)
    if config.shards is None:
        raise ConfigError(
            "--executor work-pool needs --shards: the number of flow runs to divide the input into"
        )
    return ("cpu",) if config.devices.startswith("cpu") else ("0",)


_DTYPE = {"cpu": "float32", "cuda": "bfloat16"}


def device_type(device: str) -> str:
    """Return "cuda" for the number of a GPU, and "cpu" for the CPU."""
    return "cpu" if device == "cpu" else "cuda"


def torch_device_name(device: str) -> str:
    """Return torch's name of a device of a run: `cuda:1` for "1"."""
    return device if device == "cpu" else f"cuda:{device}"


def resolve_dtype(dtype: str, device: str) -> str:
    """Return the precision of a model on a device; "auto" is bfloat16 on a GPU, else float32."""
    return _DTYPE[device_type(device)] if dtype == "auto" else dtype
