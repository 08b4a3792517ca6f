"""Read the environment variables that are not options; no other module does."""

from __future__ import annotations

import os


def worker_environment(device: str) -> dict[str, str]:
    """Return the environment of a worker process, in which `device` is the only visible GPU.

    A mask that this process was started with (Slurm, Kubernetes, MIG) is kept: `device` counts
    within it.
    """
    inherited = {**os.environ}
    # `export PYTHONPATH=$PYTHONPATH:/some/where` makes an empty entry if the variable was unset.
    # Python takes such an entry for the current directory.
    if path := os.pathsep.join(filter(None, inherited.pop("PYTHONPATH", "").split(os.pathsep))):
        inherited["PYTHONPATH"] = path
    if device == "cpu":
        # By default, glibc returns large blocks to the kernel after each layer, and has thousands
        # of pages zeroed for the next one. Huge pages make that cheap. Tunables that this process
        # was started with win.
        huge_pages = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
        return huge_pages | inherited | {"CUDA_VISIBLE_DEVICES": ""}
    return inherited | {
        "CUDA_VISIBLE_DEVICES": visible_gpu(device),
        # Without it, cuBLAS may return other bits for the same input.
        "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
    }


def visible_gpu(device: str) -> str:
    """Return the number or UUID of a GPU within CUDA_VISIBLE_DEVICES, if set."""
    visible = [
        entry.strip()
        for entry in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
        if entry.strip()
    ]
    return visible[int(device)] if visible else device


def viral_checkpoint_mode() -> bool:
    """Return whether VirNucPro's variable requests more frequent checkpoints."""
    return os.environ.get("VIRNUCPRO_VIRAL_CHECKPOINT_MODE", "").strip().lower() in {
        "1",
        "true",
        "yes",
        "on",
    }
