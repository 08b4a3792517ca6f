"""Embed millions of proteins with ESM-2 on preemptible GPUs."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vnp_lib.lazy import lazy_face

if TYPE_CHECKING:
    from vnp_lib.api import embed
    from vnp_lib.config import EmbedConfig
    from vnp_lib.dataset import EmbeddingDataset, open_dataset
    from vnp_lib.embeddings import Embeddings, Outputs
    from vnp_lib.errors import VnpError

__version__ = "0.1.0"

__all__ = [
    "EmbedConfig",
    "EmbeddingDataset",
    "Embeddings",
    "Outputs",
    "VnpError",
    "embed",
    "open_dataset",
]

__getattr__, __dir__ = lazy_face(
    __name__,
    {
        "EmbedConfig": "vnp_lib.config",
        "EmbeddingDataset": "vnp_lib.dataset",
        "Embeddings": "vnp_lib.embeddings",
        "Outputs": "vnp_lib.embeddings",
        "VnpError": "vnp_lib.errors",
        "embed": "vnp_lib.api",
        "open_dataset": "vnp_lib.dataset",
    },
)
