"""The rows of a dataset as torch sees them."""

from __future__ import annotations

from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset


class RowSource(Protocol):
    """What rows are read from; the workers of a DataLoader get it by fork or by pickle."""

    def __len__(self) -> int: ...

    def at(self, position: int) -> tuple[str, NDArray[np.float32]]: ...


class EmbeddingRows(Dataset[tuple[str, Tensor]]):
    """Ids and embeddings, float32, (dim,), by position. IndexError where there is none."""

    def __init__(self, source: RowSource) -> None:
        self._source = source

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, position: int) -> tuple[str, Tensor]:
        sequence_id, embedding = self._source.at(position)
        return sequence_id, torch.from_numpy(embedding)

    def __getitems__(self, positions: list[int]) -> list[tuple[str, Tensor]]:
        """A batch of a DataLoader, however shuffled: rows that lie together are read together."""
        items = {position: self[position] for position in sorted(positions)}
        return [items[position] for position in positions]
