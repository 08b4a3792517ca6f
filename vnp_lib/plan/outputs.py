"""The outputs computed per sequence, and their layout in a flat float32 row."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property
from math import prod
from typing import Any, Self, TypeAlias

import numpy as np
from numpy.typing import NDArray

from vnp_lib.errors import ConfigError

# One per token of fair-esm's alphabet, special tokens included.
NUM_LOGITS = 33

Values: TypeAlias = NDArray[np.float32] | NDArray[np.float16]


class StoreDtype(StrEnum):
    """The precision of stored values. They are computed, and saved in checkpoints, in float32."""

    FLOAT32 = "float32"
    # Rounded to nearest: 11 significant bits, 0 below 3e-8, nothing above 65,504.
    FLOAT16 = "float16"


class OutputKind(StrEnum):
    """The kinds of output. BOS and EOS never count as residues.

    Kinds that fair-esm's scripts/extract.py saves too have the same values there.
    """

    MEAN = "mean"  # over the residues, (D,)
    BOS = "bos"  # state of token 0, (D,)
    MAX = "max"  # over the residues, (D,)
    STD = "std"  # over the residues, of the population (divisor L, not L - 1), (D,)
    PER_TOK = "per_tok"  # states of the residues, (L, D)
    CONTACTS = "contacts"  # probability that two residues touch, (L, L)
    LOGITS = "logits"  # of the language model head at the residues, (L, 33)


# These need the whole network, so that they belong to no layer.
_WITHOUT_LAYER = (OutputKind.CONTACTS, OutputKind.LOGITS)
_PER_RESIDUE = (OutputKind.PER_TOK, OutputKind.CONTACTS, OutputKind.LOGITS)


@dataclass(frozen=True, slots=True, kw_only=True)
class Output:
    """One value, vector or matrix computed per sequence."""

    kind: OutputKind
    # In fair-esm's numbering, 0 for the embedding; None for kinds that need the whole network.
    layer: int | None = None

    @classmethod
    def parse(cls, name: str) -> Self:
        """Parse a `name`."""
        kind, _, layer = name.rpartition("_") if name[-1:].isdigit() else (name, "", "")
        return cls(kind=OutputKind(kind), layer=int(layer) if layer else None)

    @property
    def name(self) -> str:
        """The name of its column: `mean_33`, `per_tok_33`, `contacts`."""
        return self.kind.value if self.layer is None else f"{self.kind}_{self.layer}"

    @property
    def is_fixed(self) -> bool:
        """Whether it has the same width for all sequences."""
        return self.kind not in _PER_RESIDUE

    def shape(self, length: int, embed_dim: int) -> tuple[int, ...]:
        """Return its shape for `length` residues in a network of width `embed_dim`."""
        shapes = {
            OutputKind.PER_TOK: (length, embed_dim),
            OutputKind.CONTACTS: (length, length),
            OutputKind.LOGITS: (length, NUM_LOGITS),
        }
        return shapes.get(self.kind, (embed_dim,))

    def widths(self, lengths: NDArray[np.integer[Any]], embed_dim: int) -> NDArray[np.int64]:
        """Return the number of values for sequences of `lengths` residues, (B,)."""
        if self.is_fixed:
            return np.full(lengths.shape, embed_dim, dtype=np.int64)
        widths = lengths.astype(np.int64)
        widths *= widths if self.kind is OutputKind.CONTACTS else self.shape(1, embed_dim)[1]
        return widths


@dataclass(frozen=True)
class RowLayout:
    """The outputs of a run, in the order of their values in a row.

    Rows of equal width form an array, (B, W). Others are concatenated, (V,), and their widths
    follow from the lengths of their sequences.
    """

    outputs: tuple[Output, ...]
    embed_dim: int
    # How the mean of a long sequence is computed, see `vnp_lib/model/windows.py`.
    long_policy: str = "whole"

    @classmethod
    def of_identity(cls, identity: dict[str, Any], *, embed_dim: int | None = None) -> Self:
        """Return the layout of a plan's identity; `embed_dim` is required if that has none."""
        policy = identity.get("long_policy", "whole")
        if "outputs" not in identity:
            assert embed_dim is not None
            return cls((Output(kind=OutputKind.MEAN, layer=identity["layer"]),), embed_dim, policy)
        return cls(
            tuple(map(Output.parse, identity["outputs"].split(","))), identity["embed_dim"], policy
        )

    @classmethod
    def of_names(cls, names: Iterable[str], *, embed_dim: int) -> Self:
        """Return the layout of the outputs of these names."""
        return cls(tuple(map(Output.parse, names)), embed_dim)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(output.name for output in self.outputs)

    @property
    def is_one_mean(self) -> bool:
        """Whether a row is the mean of one layer and nothing else."""
        return [output.kind for output in self.outputs] == [OutputKind.MEAN]

    @cached_property
    def is_fixed(self) -> bool:
        """Whether all rows have the same width."""
        return all(output.is_fixed for output in self.outputs)

    @cached_property
    def fixed_width(self) -> int:
        """Values per row, if all rows have the same width."""
        assert self.is_fixed
        return len(self.outputs) * self.embed_dim

    @property
    def layers(self) -> tuple[int, ...]:
        """The layers whose states are required, ascending."""
        return tuple(sorted({output.layer for output in self.outputs if output.layer is not None}))

    @property
    def heads(self) -> tuple[OutputKind, ...]:
        """The kinds that need more than the states of the network."""
        return tuple(output.kind for output in self.outputs if output.kind in _WITHOUT_LAYER)

    def widths(self, lengths: NDArray[np.integer[Any]]) -> NDArray[np.int64]:
        """Return the number of values in the rows of sequences of `lengths` residues, (B,)."""
        widths = np.zeros(lengths.shape, dtype=np.int64)
        for output in self.outputs:
            widths += output.widths(lengths, self.embed_dim)
        return widths

    def divide(self, row: NDArray[np.float32], length: int) -> dict[str, NDArray[np.float32]]:
        """Split a row, (W,), of a sequence of `length` residues into its outputs by name.

        The outputs are views of the row, in their own shapes.
        """
        shapes = [output.shape(length, self.embed_dim) for output in self.outputs]
        parts = np.split(row, np.cumsum([prod(shape) for shape in shapes])[:-1])
        return {
            name: part.reshape(shape)
            for name, part, shape in zip(self.names, parts, shapes, strict=True)
        }

    def identity(self) -> dict[str, Any]:
        """Return what it adds to a plan's identity."""
        # One mean is identified by `layer` and `pooling`, which every identity has.
        if self.is_one_mean:
            return {}
        return {"outputs": ",".join(self.names), "embed_dim": self.embed_dim}


# The mean of the highest layer that a model returns, of whatever width. It also fits the models of
# other projects, whose layers and width are unknown before they have computed a batch.
MEAN_OF_LAST_LAYER = RowLayout((Output(kind=OutputKind.MEAN),), embed_dim=0)


def choose_outputs(
    include: Collection[OutputKind], repr_layers: Collection[int] | None, *, num_layers: int
) -> tuple[Output, ...]:
    """Return the requested outputs, ordered by kind and then by layer.

    Args:
        include: Kinds, in any order.
        repr_layers: In fair-esm's numbering, from 0, the embedding, to `num_layers`, the last;
            negative numbers count from the end. None requests the last.
        num_layers: Layers of the model.

    Raises:
        ConfigError: The model has no such layer.
    """
    requested = [-1] if repr_layers is None else repr_layers
    absent = [layer for layer in requested if not -num_layers - 1 <= layer <= num_layers]
    if absent or not requested:
        raise ConfigError(
            f"layers {','.join(map(str, requested))} are requested: this model has the layers 0 "
            f"(its embedding) to {num_layers}; -1 is the last"
        )
    layers: list[int | None] = [*sorted({layer % (num_layers + 1) for layer in requested})]
    return tuple(
        Output(kind=kind, layer=layer)
        for kind in OutputKind
        if kind in include
        for layer in (layers if kind not in _WITHOUT_LAYER else [None])
    )


def as_stored(values: NDArray[np.float32], dtype: StoreDtype) -> Values:
    """Return values in the stored precision. Overflow becomes infinite: the caller checks it."""
    with np.errstate(over="ignore"):
        stored: Values = values.astype(dtype, copy=False)
    return stored


def offsets_of(widths: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the boundaries of concatenated rows, (B + 1,): widths 3 1 2 give 0 3 4 6."""
    return np.concatenate([[0], np.cumsum(widths)])
