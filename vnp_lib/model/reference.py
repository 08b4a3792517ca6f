"""fair-esm's own network, which ours is held against."""

from __future__ import annotations

from collections.abc import Mapping

from esm import ESM2, Alphabet
from torch import Tensor, nn

from vnp_lib.model.esm2 import Architecture

# What networks have beyond the parameters of ESM-2's layers: heads, and what they work out by themselves.
_NOT_OF_THE_LAYERS = ("lm_head.", "contact_head.", "inv_freq", "position_ids")


def fair_esm_network(architecture: Architecture, tensors: Mapping[str, Tensor]) -> nn.Module:
    """Give fair-esm's own network, float32 on the CPU, with these parameters; without heads among them, those are arbitrary."""
    network = ESM2(
        architecture.num_layers,
        architecture.embed_dim,
        architecture.attention_heads,
        alphabet=Alphabet.from_architecture("ESM-1b"),
        token_dropout=True,
    )
    return filled(network, tensors)


def filled(network: nn.Module, state: Mapping[str, Tensor]) -> nn.Module:
    """Put parameters into another's network; none may be left over, and only heads and constants left as they are."""
    missing, unexpected = network.load_state_dict(state, strict=False)
    forgotten = [name for name in missing if not any(part in name for part in _NOT_OF_THE_LAYERS)]
    if forgotten or unexpected:
        raise ValueError(
            f"{type(network).__name__} lacks {forgotten} and does not know {unexpected}"
        )
    return network.eval()
