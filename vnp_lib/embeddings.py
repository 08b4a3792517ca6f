"""Embeddings in memory: a matrix and the ids of its rows."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:  # torch takes seconds to import, and pandas is the user's
    import pandas as pd
    from torch import Tensor


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Embeddings:
    """One vector a protein, by place and by id.

    >>> embeddings = Embeddings(ids=["a", "b"], embeddings=np.array([[1, 2, 3], [4, 5, 6]], dtype=np.float32))
    >>> embeddings
    Embeddings(2 sequences, 3 wide)
    >>> embeddings["b"]
    array([4., 5., 6.], dtype=float32)
    >>> [sequence_id for sequence_id, vector in embeddings]
    ['a', 'b']
    """

    ids: list[str]  # N, each once
    embeddings: NDArray[np.float32]  # (N, D); row i belongs to ids[i]

    def __len__(self) -> int:
        return len(self.ids)

    def __iter__(self) -> Iterator[tuple[str, NDArray[np.float32]]]:
        """Ids with their vectors, (D,), in order: `dict(embeddings)` works."""
        return zip(self.ids, self.embeddings, strict=True)

    def __contains__(self, sequence_id: object) -> bool:
        return sequence_id in self._row_of_id

    def __getitem__(self, sequence_id: str) -> NDArray[np.float32]:
        """The vector of a sequence, (D,), a view of its row. KeyError if there is no such id."""
        if sequence_id not in self._row_of_id:
            raise KeyError(f"{sequence_id!r} is not among the {len(self)} ids")
        vector: NDArray[np.float32] = self.embeddings[self._row_of_id[sequence_id]]
        return vector

    def __repr__(self) -> str:
        return f"Embeddings({len(self):,} sequences, {self.embeddings.shape[1]:,} wide)"

    def to_torch(self) -> Tensor:
        """The matrix as a tensor, float32 (N, D), on the CPU. The two share their memory."""
        import torch

        return torch.from_numpy(self.embeddings)

    def to_dataframe(self) -> pd.DataFrame:
        """The matrix as a pandas DataFrame with the ids as its index. ImportError where pandas is not installed."""
        import pandas as pd

        return pd.DataFrame(self.embeddings, index=pd.Index(self.ids, name="id"))

    @cached_property
    def _row_of_id(self) -> dict[str, int]:
        return {sequence_id: row for row, sequence_id in enumerate(self.ids)}
