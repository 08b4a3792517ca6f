"""The precision certificate: the deviation of a half-precision run from float32.

Each worker process first embeds the part of its shard in a sample of sequences in float32. Each
checkpoint records the differences of its own rows of these sequences, and `_SUCCESS.json` the worst
of all checkpoints: the compared rows are those in the dataset.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryFile
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from numpy.typing import NDArray

from vnp_lib.plan import Ordinals, RunPlan

if TYPE_CHECKING:
    from torch import Tensor

NUM_SAMPLED = 64

# A much longer sequence may not fit into memory in float32, and would take long.
LONGEST_SAMPLED = 1022  # residues

# Users are warned below this.
LEAST_COSINE = 0.999

_BLOCK = 2**20  # values of two rows that are compared at a time


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """The difference between a row of the run and the float32 row of the same sequence."""

    ordinal: int
    max_abs_difference: float
    cosine: float

    @classmethod
    def between(cls, ordinal: int, row: NDArray[np.float32], exact: NDArray[np.float32]) -> Self:
        """Compare two rows, (W,)."""
        most, product, squares = 0.0, 0.0, np.zeros(2)
        for start in range(0, row.size, _BLOCK):
            ours, theirs = (
                each[start : start + _BLOCK].astype(np.float64) for each in (row, exact)
            )
            most = float(np.maximum(most, np.abs(ours - theirs).max()))
            product += float(ours @ theirs)
            squares += ours @ ours, theirs @ theirs
        norms = float(np.sqrt(squares).prod())
        return cls(
            ordinal=ordinal, max_abs_difference=most, cosine=product / norms if norms else 0.0
        )


class ExactRows(Mapping[int, NDArray[np.float32]]):
    """Rows in float32, (W,), by ordinal, in a temporary file without a name.

    In memory, rows with per-residue states and contacts would take a gigabyte with the model of 3B
    parameters.
    """

    def __init__(self, directory: Path) -> None:
        # Open for the lifetime of this object.
        self._file = TemporaryFile(dir=directory, buffering=0)  # noqa: SIM115
        weakref.finalize(self, self._file.close)
        self._places: dict[int, tuple[int, int]] = {}  # first byte, numbers
        self._end = 0

    def keep(self, ordinal: int, row: NDArray[np.float32]) -> None:
        """Write a row, (W,). If the disk is full, raise OSError and keep no row of this ordinal."""
        self._file.seek(self._end)
        if self._file.write(row.data) != row.nbytes:
            raise OSError(f"{row.nbytes:,} bytes of a row do not fit on the disk")
        self._places[ordinal] = self._end, row.size
        self._end += row.nbytes

    def __getitem__(self, ordinal: int) -> NDArray[np.float32]:
        start, size = self._places[ordinal]
        return np.frombuffer(os.pread(self._file.fileno(), 4 * size, start), dtype=np.float32)

    def __iter__(self) -> Iterator[int]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


@dataclass(frozen=True, slots=True, kw_only=True)
class Certificate:
    """The worst comparisons of a run."""

    num_compared: int
    max_abs_difference: float
    lowest_cosine: float

    @classmethod
    def of(cls, comparisons: Iterable[Comparison]) -> Self | None:
        """Summarise comparisons, each sequence once; return None if there are none."""
        by_ordinal = {each.ordinal: each for each in comparisons}
        if not by_ordinal:
            return None
        return cls(
            num_compared=len(by_ordinal),
            max_abs_difference=max(each.max_abs_difference for each in by_ordinal.values()),
            lowest_cosine=min(each.cosine for each in by_ordinal.values()),
        )

    @property
    def is_poor(self) -> bool:
        """Whether users should be warned before they use the embeddings."""
        return self.lowest_cosine < LEAST_COSINE

    def describe(self) -> str:
        """Describe it in one line.

        `64 sequences compared with float32: cosine at least 0.999981, difference at most 0.031`
        """
        return (
            f"{self.num_compared} sequences compared with float32: "
            f"cosine at least {self.lowest_cosine:.6f}, "
            f"difference at most {self.max_abs_difference:.2g}"
        )


def sampled_ordinals(plan: RunPlan) -> Ordinals:
    """Choose at most 64 sequences to compare, evenly over all lengths, whatever the shards are."""
    eligible = plan.order[plan.lengths[plan.order] <= LONGEST_SAMPLED]
    places = (
        np.linspace(0, eligible.size - 1, min(NUM_SAMPLED, eligible.size)).round().astype(np.int64)
    )
    return eligible[places]


def compare(
    ordinals: NDArray[np.int64],
    rows: NDArray[np.float32] | Sequence[NDArray[np.float32]] | Sequence[Tensor],
    exact: Mapping[int, NDArray[np.float32]],
) -> list[Comparison]:
    """Compare those of the B rows, each (W,), whose float32 row is known and finite."""
    known = np.flatnonzero(np.isin(ordinals, list(exact)))
    return [
        Comparison.between(ordinal, np.asarray(rows[place]), own)
        for place, ordinal in zip(known.tolist(), ordinals[known].tolist(), strict=True)
        if np.isfinite(own := exact[ordinal]).all()
    ]


def to_metadata(comparisons: Sequence[Comparison]) -> dict[str, Any]:
    """Return the metadata of a checkpoint that records comparisons, if there are any."""
    return {"precision": [asdict(each) for each in comparisons]} if comparisons else {}


def from_metadata(metadata: Mapping[str, Any]) -> list[Comparison]:
    """Return the comparisons in the metadata of a checkpoint."""
    return [Comparison(**each) for each in metadata.get("precision", ())]
