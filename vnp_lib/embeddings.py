"""Embeddings in memory: a matrix and the ids of its rows, or several arrays by name."""

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
class _ById:
    """Something for each of some ids."""

    ids: list[str]  # N, each once

    def __len__(self) -> int:
        return len(self.ids)

    def __contains__(self, sequence_id: object) -> bool:
        return sequence_id in self._place_of_id

    def _place_of(self, sequence_id: str) -> int:
        if sequence_id not in self._place_of_id:
            raise KeyError(f"{sequence_id!r} is not among the {len(self)} ids")
        return self._place_of_id[sequence_id]

    @cached_property
    def _place_of_id(self) -> dict[str, int]:
        return {sequence_id: place for place, sequence_id in enumerate(self.ids)}


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Embeddings(_ById):
    """One vector a protein, by place and by id.

    >>> embeddings = Embeddings(ids=["a", "b"], embeddings=np.array([[1, 2, 3], [4, 5, 6]], dtype=np.float32))
    >>> embeddings
    Embeddings(2 sequences, 3 wide)
    >>> embeddings["b"]
    array([4., 5., 6.], dtype=float32)
    >>> [sequence_id for sequence_id, vector in embeddings]
    ['a', 'b']
    """

    embeddings: NDArray[np.float32]  # (N, D); row i belongs to ids[i]

    def __iter__(self) -> Iterator[tuple[str, NDArray[np.float32]]]:
        """Ids with their vectors, (D,), in order: `dict(embeddings)` works."""
        return zip(self.ids, self.embeddings, strict=True)

    def __getitem__(self, sequence_id: str) -> NDArray[np.float32]:
        """The vector of a sequence, (D,), a view of its row. KeyError if there is no such id."""
        vector: NDArray[np.float32] = self.embeddings[self._place_of(sequence_id)]
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


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Outputs(_ById):
    """All that was asked for of each protein, by name, by place and by id.

    Names and shapes are those of a dataset's `outputs`: `mean_33`, `bos_33`, `max_33` and `std_33`, (D,), `per_tok_33`, (L, D),
    `contacts`, (L, L), and `logits`, (L, 33), with L the sequence's residues and 33 the layer.

    >>> residues = [np.ones((4, 3), dtype=np.float32), np.ones((2, 3), dtype=np.float32)]
    >>> outputs = Outputs(ids=["a", "b"], arrays={"mean_6": np.ones((2, 3), dtype=np.float32), "per_tok_6": residues})
    >>> outputs
    Outputs(2 sequences: mean_6, per_tok_6)
    >>> outputs.arrays["mean_6"].shape
    (2, 3)
    >>> {name: array.shape for name, array in outputs["b"].items()}
    {'mean_6': (3,), 'per_tok_6': (2, 3)}
    """

    arrays: dict[
        str, NDArray[np.float32] | list[NDArray[np.float32]]
    ]  # vectors (N, D); what is as long as its sequence, N arrays

    def __iter__(self) -> Iterator[tuple[str, dict[str, NDArray[np.float32]]]]:
        """Ids with what there is of them, in order."""
        return ((sequence_id, self._at(place)) for place, sequence_id in enumerate(self.ids))

    def __getitem__(self, sequence_id: str) -> dict[str, NDArray[np.float32]]:
        """What there is of a sequence, by name: views. KeyError if there is no such id."""
        return self._at(self._place_of(sequence_id))

    def __repr__(self) -> str:
        return f"Outputs({len(self):,} sequences: {', '.join(self.arrays)})"

    def _at(self, place: int) -> dict[str, NDArray[np.float32]]:
        return {name: array[place] for name, array in self.arrays.items()}
