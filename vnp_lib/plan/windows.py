"""Long sequences by their lengths alone: into which windows they are divided. `long_sequences.py` computes with these."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from vnp_lib.inputs import VIRNUCPRO_RESIDUES

__all__ = ["VIRNUCPRO_RESIDUES", "Windows"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Windows:
    """Windows have `length` residues and begin `length - overlap` after one another, but for the last.

    That ends where the sequence does. A sequence of up to `length` residues is one window.
    """

    length: int
    overlap: int

    @classmethod
    def of_policy(cls, policy: str) -> Self | None:
        """Understand a plan's `long_policy`, `window:1022:255`; None for all others, which divide nothing."""
        kind, *numbers = policy.split(":")
        if kind != "window":
            return None
        length, overlap = map(int, numbers)
        return cls(length=length, overlap=overlap)

    def starts(self, length: int) -> list[int]:
        """The first residue, from 0, of each window of a sequence of `length` residues.

        Windows of 10 residues with an overlap of 4, over 25 residues: 0, 6, 12, 15.
        """
        if length <= self.length:
            return [0]
        return [*range(0, length - self.length, self.length - self.overlap), length - self.length]

    def counts(self, lengths: NDArray[np.integer[Any]]) -> NDArray[np.int64]:
        """How many windows sequences of `lengths` residues have, (N,)."""
        beyond_the_first = np.maximum(lengths.astype(np.int64) - self.length, 0)
        counts: NDArray[np.int64] = 1 - (-beyond_the_first // (self.length - self.overlap))
        return counts
