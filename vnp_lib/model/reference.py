"""fair-esm's own network, the reference for ours."""

from __future__ import annotations

from collections.abc import Mapping

from esm import ESM2, Alphabet
from torch import Tensor, nn

from vnp_lib.model.esm2 import Architecture

# Parameters that do not belong to the layers of ESM-2: heads, and constants.
_NOT_OF_THE_LAYERS = ("lm_head.", "contact_head.", "inv_freq", "position_ids")


def fair_esm_network(architecture: Architecture, tensors: Mapping[str, Tensor]) -> nn.Module:
    """Build fair-esm's own network with these parameters, float32 on the CPU.

    Heads that are not among the parameters are arbitrary.
    """
    network = ESM2(
        architecture.num_layers,
        architecture.embed_dim,
        architecture.attention_heads,
        alphabet=Alphabet.from_architecture("ESM-1b"),
        token_dropout=True,
    )
    return filled(network, tensors)


def filled(network: nn.Module, state: Mapping[str, Tensor]) -> nn.Module:
    """Load parameters into a network of another project.

    Raises:
        ValueError: A parameter is unknown, or one is missing that is neither a head nor a constant.
    """
    missing, unexpected = network.load_state_dict(state, strict=False)
    forgotten = [name for name in missing if not any(part in name for part in _NOT_OF_THE_LAYERS)]
    if forgotten or unexpected:
        raise ValueError(
            f"{type(network).__name__} lacks {forgotten} and does not know {unexpected}"
        )
    return network.eval()
