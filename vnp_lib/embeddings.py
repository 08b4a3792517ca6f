"""Embeddings in memory: a matrix and the ids of its rows, or several arrays by name."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

# torch takes seconds to import, and pandas is optional.
if TYPE_CHECKING:
    import pandas as pd
    from torch import Tensor


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class _ById:
    """Values by id."""

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
    """One vector per protein, by position and by id.

    >>> matrix = np.array([[1, 2, 3], [4, 5, 6]], dtype=np.float32)
    >>> embeddings = Embeddings(ids=["a", "b"], embeddings=matrix)
    >>> embeddings
    Embeddings(2 sequences, 3 wide)
    >>> embeddings["b"]
    array([4., 5., 6.], dtype=float32)
    >>> [sequence_id for sequence_id, vector in embeddings]
    ['a', 'b']
    """

    embeddings: NDArray[np.float32]  # (N, D); row i belongs to ids[i]

    def __iter__(self) -> Iterator[tuple[str, NDArray[np.float32]]]:
        """Yield ids and vectors, (D,), in order, so that `dict(embeddings)` works."""
        return zip(self.ids, self.embeddings, strict=True)

    def __getitem__(self, sequence_id: str) -> NDArray[np.float32]:
        """Return the vector of a sequence, (D,), a view; KeyError if there is no such id."""
        vector: NDArray[np.float32] = self.embeddings[self._place_of(sequence_id)]
        return vector

    def __repr__(self) -> str:
        return f"Embeddings({len(self):,} sequences, {self.embeddings.shape[1]:,} wide)"

    def to_torch(self) -> Tensor:
        """Return a tensor, float32 (N, D), on the CPU, that shares memory with the matrix."""
        import torch

        return torch.from_numpy(self.embeddings)

    def to_dataframe(self) -> pd.DataFrame:
        """Return a pandas DataFrame with the ids as index; ImportError without pandas."""
        import pandas as pd

        return pd.DataFrame(self.embeddings, index=pd.Index(self.ids, name="id"))


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Outputs(_ById):
    """The requested outputs of each protein, by name, by position and by id.

    Names and shapes are those of the `outputs` of a dataset: `mean_33`, `bos_33`, `max_33` and
    `std_33`, (D,), `per_tok_33`, (L, D), `contacts`, (L, L), and `logits`, (L, 33), with L the
    residues of the sequence and 33 the layer.

    >>> means = np.ones((2, 3), dtype=np.float32)
    >>> residues = [np.ones((4, 3), dtype=np.float32), np.ones((2, 3), dtype=np.float32)]
    >>> outputs = Outputs(ids=["a", "b"], arrays={"mean_6": means, "per_tok_6": residues})
    >>> outputs
    Outputs(2 sequences: mean_6, per_tok_6)
    >>> outputs.arrays["mean_6"].shape
    (2, 3)
    >>> {name: array.shape for name, array in outputs["b"].items()}
    {'mean_6': (3,), 'per_tok_6': (2, 3)}
    """

    # Vectors are one array, (N, D); per-residue outputs are N arrays.
    arrays: dict[str, NDArray[np.float32] | list[NDArray[np.float32]]]

    def __iter__(self) -> Iterator[tuple[str, dict[str, NDArray[np.float32]]]]:
        """Yield ids and their outputs by name, in order."""
        return ((sequence_id, self._at(place)) for place, sequence_id in enumerate(self.ids))

    def __getitem__(self, sequence_id: str) -> dict[str, NDArray[np.float32]]:
        """Return the outputs of a sequence by name, as views; KeyError if there is no such id."""
        return self._at(self._place_of(sequence_id))

    def __repr__(self) -> str:
        return f"Outputs({len(self):,} sequences: {', '.join(self.arrays)})"

    def _at(self, place: int) -> dict[str, NDArray[np.float32]]:
        return {name: array[place] for name, array in self.arrays.items()}
