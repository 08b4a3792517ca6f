"""What is computed of a sequence, and how that lies in its row: one flat run of float32 numbers, output after output."""

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

NUM_LOGITS = 33  # one for each letter of fair-esm's alphabet, special tokens included

Values: TypeAlias = NDArray[np.float32] | NDArray[np.float16]


class StoreDtype(StrEnum):
    """The precision in which values are stored. They are computed, and lie in checkpoints, in float32."""

    FLOAT32 = "float32"
    FLOAT16 = (
        "float16"  # rounded to the nearest: 11 significant bits, 0 below 3e-8, nothing above 65,504
    )


class OutputKind(StrEnum):
    """What can be asked for. Where fair-esm's scripts/extract.py gives it too, it is the same; BOS and EOS are never residues."""

    MEAN = "mean"  # over the residues, (D,)
    BOS = "bos"  # the state of token 0, (D,)
    MAX = "max"  # over the residues, (D,)
    STD = "std"  # over the residues, of the population (divided by L, not L - 1), (D,)
    PER_TOK = "per_tok"  # the states of the residues, (L, D)
    CONTACTS = "contacts"  # how probable it is that two residues touch, (L, L)
    LOGITS = "logits"  # of the language model's head at the residues, (L, 33)


_WITHOUT_LAYER = (OutputKind.CONTACTS, OutputKind.LOGITS)  # they take the whole network
_AS_LONG_AS_THE_SEQUENCE = (OutputKind.PER_TOK, OutputKind.CONTACTS, OutputKind.LOGITS)


@dataclass(frozen=True, slots=True, kw_only=True)
class Output:
    """One thing that is computed of every sequence."""

    kind: OutputKind
    layer: int | None = (
        None  # in fair-esm's numbers: 0 is the embedding; None for what takes the whole network
    )

    @classmethod
    def parse(cls, name: str) -> Self:
        """Understand a `name`."""
        kind, _, layer = name.rpartition("_") if name[-1:].isdigit() else (name, "", "")
        return cls(kind=OutputKind(kind), layer=int(layer) if layer else None)

    @property
    def name(self) -> str:
        """What its column is called: `mean_33`, `per_tok_33`, `contacts`."""
        return self.kind.value if self.layer is None else f"{self.kind}_{self.layer}"

    @property
    def is_fixed(self) -> bool:
        """Whether it is equally wide for all sequences."""
        return self.kind not in _AS_LONG_AS_THE_SEQUENCE

    def shape(self, length: int, embed_dim: int) -> tuple[int, ...]:
        """Its shape for a sequence of `length` residues, in a network of width `embed_dim`."""
        return self._shape(length, embed_dim)

    def _shape(self, length: Any, embed_dim: int) -> tuple[Any, ...]:
        shapes = {
            OutputKind.PER_TOK: (length, embed_dim),
            OutputKind.CONTACTS: (length, length),
            OutputKind.LOGITS: (length, NUM_LOGITS),
        }
        return shapes.get(self.kind, (embed_dim,))

    def widths(self, lengths: NDArray[np.integer[Any]], embed_dim: int) -> NDArray[np.int64]:
        """How many numbers it is for sequences of `lengths` residues, (B,)."""
        if self.is_fixed:
            return np.full(lengths.shape, embed_dim, dtype=np.int64)
        first, second = self._shape(lengths.astype(np.int64), embed_dim)
        widths: NDArray[np.int64] = first * second
        return widths


@dataclass(frozen=True)
class RowLayout:
    """The outputs of a run, in the order in which they lie in a row.

    Rows of equal width are an array (B, W). Others are laid end to end, (V,), and their widths follow from the lengths of
    their sequences.
    """

    outputs: tuple[Output, ...]
    embed_dim: int
    long_policy: str = "whole"  # what the mean of a long sequence is, see `long_sequences.py`

    @classmethod
    def of_identity(cls, identity: dict[str, Any], *, embed_dim: int | None = None) -> Self:
        """The layout that a plan's identity names; `embed_dim` is wanted where the identity says nothing of it."""
        policy = identity.get("long_policy", "whole")
        if "outputs" not in identity:
            assert embed_dim is not None
            return cls((Output(kind=OutputKind.MEAN, layer=identity["layer"]),), embed_dim, policy)
        return cls(
            tuple(map(Output.parse, identity["outputs"].split(","))), identity["embed_dim"], policy
        )

    @classmethod
    def of_names(cls, names: Iterable[str], *, embed_dim: int) -> Self:
        """The layout of outputs by their names."""
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
        """Whether all rows are equally wide."""
        return all(output.is_fixed for output in self.outputs)

    @cached_property
    def fixed_width(self) -> int:
        """Numbers in a row, where all have equally many."""
        assert self.is_fixed
        return len(self.outputs) * self.embed_dim

    @property
    def layers(self) -> tuple[int, ...]:
        """The layers whose states are needed, ascending."""
        return tuple(sorted({output.layer for output in self.outputs if output.layer is not None}))

    @property
    def heads(self) -> tuple[OutputKind, ...]:
        """The kinds that need more than the network's states."""
        return tuple(output.kind for output in self.outputs if output.kind in _WITHOUT_LAYER)

    def widths(self, lengths: NDArray[np.integer[Any]]) -> NDArray[np.int64]:
        """How many numbers the rows of sequences of `lengths` residues have, (B,)."""
        widths = np.zeros(lengths.shape, dtype=np.int64)
        for output in self.outputs:
            widths += output.widths(lengths, self.embed_dim)
        return widths

    def divide(self, row: NDArray[np.float32], length: int) -> dict[str, NDArray[np.float32]]:
        """The outputs that a row, (W,), of a sequence of `length` residues consists of, by name: views of it, in their shapes."""
        shapes = [output.shape(length, self.embed_dim) for output in self.outputs]
        parts = np.split(row, np.cumsum([prod(shape) for shape in shapes])[:-1])
        return {
            name: part.reshape(shape)
            for name, part, shape in zip(self.names, parts, shapes, strict=True)
        }

    def identity(self) -> dict[str, Any]:
        """What of it is in a plan's identity beside `layer` and `pooling`, which tell one mean from another by themselves."""
        return (
            {}
            if self.is_one_mean
            else {"outputs": ",".join(self.names), "embed_dim": self.embed_dim}
        )


def choose_outputs(
    include: Collection[OutputKind], repr_layers: Collection[int] | None, *, num_layers: int
) -> tuple[Output, ...]:
    """The outputs that a user's choice comes to, in an order of our own: by kind, then by layer.

    Args:
        include: Kinds, in any order.
        repr_layers: In fair-esm's numbers, from 0, the embedding, to `num_layers`, the last; negative ones count from the
            end. None stands for the last.
        num_layers: Of the model.

    Raises:
        ConfigError: The model has no such layer.
    """
    asked = [-1] if repr_layers is None else repr_layers
    absent = [layer for layer in asked if not -num_layers - 1 <= layer <= num_layers]
    if absent or not asked:
        raise ConfigError(
            f"layers {','.join(map(str, asked))} are asked for: this model has the layers 0 (its embedding) to {num_layers}; "
            f"-1 is the last one"
        )
    layers: list[int | None] = [*sorted({layer % (num_layers + 1) for layer in asked})]
    return tuple(
        Output(kind=kind, layer=layer)
        for kind in OutputKind
        if kind in include
        for layer in (layers if kind not in _WITHOUT_LAYER else [None])
    )


def as_stored(values: NDArray[np.float32], dtype: StoreDtype) -> Values:
    """Values as they are stored. Those that float16 cannot hold are infinite: it is for the caller to find them."""
    with np.errstate(over="ignore"):
        stored: Values = values.astype(dtype, copy=False)
    return stored


def offsets_of(widths: NDArray[np.int64]) -> NDArray[np.int64]:
    """Where rows laid end to end begin and end, (B + 1,): widths 3 1 2 give 0 3 4 6."""
    return np.concatenate([[0], np.cumsum(widths)])
