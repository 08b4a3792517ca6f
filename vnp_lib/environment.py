"""Read the process's environment variables: the only module that does, besides the options."""

from __future__ import annotations

import os


def worker_environment(device: str) -> dict[str, str]:
    """Give a child this process's environment and, where `device` is a GPU, sight of that GPU alone.

    A mask that this process was started with (Slurm, Kubernetes, MIG) is kept: `device` counts within it. On a CPU the child's
    large blocks are in huge pages where the kernel has them: as it comes, glibc gives such blocks back after each layer, and has
    thousands of pages zeroed for the next one. Tunables that this process was started with are kept.

    Empty entries of PYTHONPATH are left out. `export PYTHONPATH=$PYTHONPATH:/some/where` makes one where there was none before,
    and Python takes it for the current directory.
    """
    inherited = {**os.environ}
    if path := os.pathsep.join(filter(None, inherited.pop("PYTHONPATH", "").split(os.pathsep))):
        inherited["PYTHONPATH"] = path
    if device == "cpu":
        return (
            {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"} | inherited | {"CUDA_VISIBLE_DEVICES": ""}
        )
    return inherited | {
        "CUDA_VISIBLE_DEVICES": visible_gpu(device),
        "CUBLAS_WORKSPACE_CONFIG": ":4096:8",  # without it, cuBLAS need not give the same bits again
    }


def visible_gpu(device: str) -> str:
    """Name a GPU as CUDA_VISIBLE_DEVICES does, by number or UUID; `device` counts within the mask that there may be."""
    visible = [
        entry.strip()
        for entry in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
        if entry.strip()
    ]
    return visible[int(device)] if visible else device


def viral_checkpoint_mode() -> bool:
    """Whether checkpoints are to be written more often, as VirNucPro's users ask by an environment variable."""
    return os.environ.get("VIRNUCPRO_VIRAL_CHECKPOINT_MODE", "").strip().lower() in {
        "1",
        "true",
        "yes",
        "on",
    }
