"""The precision certificate: how far a run in half precision is from float32, measured on sequences of its own.

Before a shard's child begins, it embeds the shard's part of the sample in float32. When the run's own rows of these sequences
are computed, what lies between the two goes into the checkpoint that holds them, and from all checkpoints into
`_SUCCESS.json`: the rows that were compared are those that are in the dataset.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from vnp_lib.plan import Ordinals, RunPlan

NUM_SAMPLED = 64
LONGEST_SAMPLED = 1022  # residues; in float32 a much longer one may not fit, and would take long
LEAST_COSINE = 0.999  # below it, people are warned


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """A row of the run beside the float32 row of the same sequence."""

    ordinal: int
    max_abs_difference: float
    cosine: float

    @classmethod
    def between(cls, ordinal: int, row: NDArray[np.float32], exact: NDArray[np.float32]) -> Self:
        """Compare two rows, (W,)."""
        ours, theirs = row.astype(np.float64), exact.astype(np.float64)
        norms = float(np.linalg.norm(ours) * np.linalg.norm(theirs))
        return cls(
            ordinal=ordinal,
            max_abs_difference=float(np.abs(ours - theirs).max()),
            cosine=float(ours @ theirs) / norms if norms else 0.0,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Certificate:
    """The worst of all comparisons of a run."""

    num_compared: int
    max_abs_difference: float
    lowest_cosine: float

    @classmethod
    def of(cls, comparisons: Iterable[Comparison]) -> Self | None:
        """Sum comparisons up, each sequence once; None where there is none."""
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
        """Whether a user of the embeddings should know before using them."""
        return self.lowest_cosine < LEAST_COSINE

    def describe(self) -> str:
        """Say it in a line: `64 sequences compared with float32: cosine at least 0.999981, difference at most 0.031`."""
        return (
            f"{self.num_compared} sequences compared with float32: cosine at least {self.lowest_cosine:.6f}, "
            f"difference at most {self.max_abs_difference:.2g}"
        )


def sampled_ordinals(plan: RunPlan) -> Ordinals:
    """Choose the sequences to compare, at most 64, evenly over all lengths; the same for every division into shards."""
    eligible = plan.order[plan.lengths[plan.order] <= LONGEST_SAMPLED]
    places = np.linspace(0, eligible.size - 1, min(NUM_SAMPLED, eligible.size)).round().astype(np.int64)
    return eligible[places]


def compare(
    ordinals: NDArray[np.int64],
    rows: NDArray[np.float32] | Sequence[NDArray[np.float32]],
    exact: Mapping[int, NDArray[np.float32]],
) -> list[Comparison]:
    """Compare those of the B rows, each (W,), whose exact row is known and finite."""
    known = np.flatnonzero(np.isin(ordinals, list(exact)))
    return [
        Comparison.between(ordinal, rows[place], exact[ordinal])
        for place, ordinal in zip(known.tolist(), ordinals[known].tolist(), strict=True)
        if np.isfinite(exact[ordinal]).all()
    ]


def to_metadata(comparisons: Sequence[Comparison]) -> dict[str, Any]:
    """What a checkpoint keeps of them; nothing where there are none."""
    return {"precision": [asdict(each) for each in comparisons]} if comparisons else {}


def from_metadata(metadata: Mapping[str, Any]) -> list[Comparison]:
    """What a checkpoint has kept."""
    return [Comparison(**each) for each in metadata.get("precision", ())]
