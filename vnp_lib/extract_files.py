"""What fair-esm's scripts/extract.py saves of a sequence, under its names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from vnp_lib.plan.outputs import Output, OutputKind

if TYPE_CHECKING:  # torch takes seconds to import
    from torch import Tensor


def extract_file(label: str, outputs: Mapping[Output, Tensor]) -> dict[str, Any]:
    """What the file of a sequence holds: `label`, and tensors by kind and, where they are of a layer, by layer.

    `representations`, `mean_representations`, `bos_representations` and `contacts` are fair-esm's; `max_representations`,
    `std_representations` and `logits`, which it does not save, are ours.
    """
    held: dict[str, Any] = {"label": label}
    for output, tensor in outputs.items():
        if output.layer is None:
            held[output.name] = tensor
        else:
            held.setdefault(_name_of(output.kind), {})[output.layer] = tensor
    return held


def _name_of(kind: OutputKind) -> str:
    return "representations" if kind == OutputKind.PER_TOK else f"{kind}_representations"
