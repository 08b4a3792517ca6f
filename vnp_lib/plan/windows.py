"""The windows of long sequences, computed from their lengths."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from vnp_lib.inputs import VIRNUCPRO_RESIDUES

__all__ = ["VIRNUCPRO_RESIDUES", "Windows"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Windows:
    """Windows of `length` residues that start every `length - overlap` residues.

    The last window starts earlier, so that it ends with the sequence. A sequence of up to `length`
    residues is one window.
    """

    length: int
    overlap: int

    @classmethod
    def of_policy(cls, policy: str) -> Self | None:
        """Parse a `long_policy`, `window:1022:255`; return None for one without windows."""
        kind, *numbers = policy.split(":")
        if kind != "window":
            return None
        length, overlap = map(int, numbers)
        return cls(length=length, overlap=overlap)

    def starts(self, length: int) -> list[int]:
        """Return the first residue, from 0, of each window of a sequence of `length` residues.

        Windows of 10 residues with an overlap of 4, over 25 residues: 0, 6, 12, 15.
        """
        if length <= self.length:
            return [0]
        return [*range(0, length - self.length, self.length - self.overlap), length - self.length]

    def counts(self, lengths: NDArray[np.integer[Any]]) -> NDArray[np.int64]:
        """Return the number of windows of sequences of `lengths` residues, (N,)."""
        after_first = np.maximum(lengths.astype(np.int64) - self.length, 0)
        # Two negations round the division up: a part of a step needs a window of its own.
        counts: NDArray[np.int64] = 1 - (-after_first // (self.length - self.overlap))
        return counts
