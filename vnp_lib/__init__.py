"""ESM-2 embeddings of millions of proteins, computed shard by shard on machines that can vanish at any moment.

`embed` is for a notebook, `open_dataset` for what a run has written. Each is imported when it is first asked for.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vnp_lib.api import embed
    from vnp_lib.dataset.reader import EmbeddingDataset, open_dataset
    from vnp_lib.embeddings import Embeddings, Outputs

__version__ = "0.1.0"

__all__ = ["EmbeddingDataset", "Embeddings", "Outputs", "embed", "open_dataset"]

_MODULES = {
    "EmbeddingDataset": "vnp_lib.dataset.reader",
    "Embeddings": "vnp_lib.embeddings",
    "Outputs": "vnp_lib.embeddings",
    "embed": "vnp_lib.api",
    "open_dataset": "vnp_lib.dataset.reader",
}


def __getattr__(name: str) -> object:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
