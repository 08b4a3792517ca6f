"""Compute the outputs of fair-esm, one protein at a time, as its scripts/extract.py does."""

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
    """fair-esm's network with given parameters; missing heads are initialised by a fixed seed."""

    def __init__(self, architecture: Architecture, state: Mapping[str, Tensor]) -> None:
        torch.manual_seed(1)
        self._network = fair_esm_network(architecture, state)
        self._to_tokens = Alphabet.from_architecture("ESM-1b").get_batch_converter()

    def state(self) -> dict[str, Tensor]:
        """Return all parameters, those of the heads included."""
        return {
            name: tensor
            for name, tensor in self._network.state_dict().items()
            if "rot_emb" not in name
        }

    @torch.inference_mode()
    def outputs(
        self, sequence: str, layers: Sequence[int], *, with_contacts: bool = True
    ) -> dict[str, NDArray[np.float32]]:
        """Return all outputs by our names; without contacts they need less memory."""
        tokens = self._to_tokens([("", sequence)])[2]
        result = self._network(tokens, repr_layers=list(layers))
        found = {"logits": result["logits"][0, 1 : len(sequence) + 1]}
        if with_contacts:
            found["contacts"] = self._network.predict_contacts(tokens)[0]
        for layer, states in result["representations"].items():
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
    """Assert equal shapes, and differences of at most 2e-5 of the largest value."""
    assert ours.dtype == np.float32
    assert ours.shape == theirs.shape, what
    assert np.abs(ours - theirs).max() <= 2e-5 * max(np.abs(theirs).max(), 1.0), what
