"""The map-style torch dataset of a dataset's rows."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

if TYPE_CHECKING:
    from vnp_lib.dataset.reader import EmbeddingDataset


class EmbeddingRows(Dataset[tuple[str, Tensor]]):
    """Ids and embeddings, float32, (dim,), by position in the dataset.

    Raises IndexError for a position outside the dataset.
    """

    def __init__(self, source: EmbeddingDataset) -> None:
        # The workers of a DataLoader inherit it by fork, or receive it pickled.
        self._source = source

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, position: int) -> tuple[str, Tensor]:
        sequence_id, embedding = self._source.at(position)
        assert isinstance(embedding, np.ndarray)
        return sequence_id, torch.from_numpy(embedding)

    def __getitems__(self, positions: list[int]) -> list[tuple[str, Tensor]]:
        """Return the batch of a DataLoader, reading rows of the same row group together."""
        items = {position: self[position] for position in sorted(positions)}
        return [items[position] for position in positions]
