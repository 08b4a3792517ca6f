"""What fair-esm itself gives for a protein, as its scripts/extract.py takes it from the model's output, one protein at a time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from esm import Alphabet
from numpy.typing import NDArray
from torch import Tensor

from vnp_lib.model.esm2 import Architecture
from vnp_lib.model.reference import fair_esm_network


class FairEsm:
    """fair-esm's own network on parameters by its names; heads that are not given stay as a fixed seed makes them."""

    def __init__(self, architecture: Architecture, state: Mapping[str, Tensor]) -> None:
        torch.manual_seed(1)
        self._network = fair_esm_network(architecture, state)
        self._to_tokens = Alphabet.from_architecture("ESM-1b").get_batch_converter()

    def state(self) -> dict[str, Tensor]:
        """All parameters, those of the heads included."""
        return {
            name: tensor
            for name, tensor in self._network.state_dict().items()
            if "rot_emb" not in name
        }

    @torch.inference_mode()
    def outputs(
        self, sequence: str, layers: Sequence[int], *, with_contacts: bool = True
    ) -> dict[str, NDArray[np.float32]]:
        """All that we can be asked for, by our names; without contacts in less memory."""
        tokens = self._to_tokens([("", sequence)])[2]
        given = self._network(tokens, repr_layers=list(layers))
        found = {"logits": given["logits"][0, 1 : len(sequence) + 1]}
        if with_contacts:
            found["contacts"] = self._network.predict_contacts(tokens)[0]
        for layer, states in given["representations"].items():
            residues = states[0, 1 : len(sequence) + 1]
            found |= {
                f"mean_{layer}": residues.mean(0),
                f"bos_{layer}": states[0, 0],
                f"max_{layer}": residues.max(0).values,
                f"std_{layer}": residues.std(0, correction=0),
                f"per_tok_{layer}": residues,
            }
        return {name: value.numpy() for name, value in found.items()}


def assert_close(ours: NDArray[np.float32], theirs: NDArray[np.float32], *, what: str) -> None:
    """Equal shapes, and no further apart than float32 is among its own libraries: 2e-5 of the largest value."""
    assert ours.dtype == np.float32
    assert ours.shape == theirs.shape, what
    assert np.abs(ours - theirs).max() <= 2e-5 * max(np.abs(theirs).max(), 1.0), what
