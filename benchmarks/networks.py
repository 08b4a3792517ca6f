"""The same parameters in each package's own network, and in the files that fair-esm reads."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from vnp_lib.model import reference
from vnp_lib.model.esm2 import ESM2, Architecture, architecture_of
from vnp_lib.model.weight_files import name_in_transformers
from vnp_lib.model.weights import random_tensors, save_weights

# fair-esm's loader unpickles a Namespace, which torch refuses without this variable.
FAIR_ESM_ENVIRONMENT = {"TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD": "1"}

CPU = torch.device("cpu")


def write_weights(directory: Path, model: str) -> Path:
    """Write random parameters as the two files of fair-esm: model and contact regression."""
    torch.manual_seed(0)
    state = fair_esm_network(
        architecture_of(model), dict(random_tensors(architecture_of(model)))
    ).state_dict()
    regression = {name: state.pop(name) for name in list(state) if name.startswith("contact_head.")}
    path = directory / f"{model}.pt"
    save_weights(path, model, state)
    torch.save({"model": regression}, directory / f"{model}-contact-regression.pt")
    return path


def load_fair_esm(path: Path) -> nn.Module:
    """Read a model with fair-esm's own loader."""
    from esm.pretrained import load_model_and_alphabet_local

    os.environ.update(FAIR_ESM_ENVIRONMENT)
    with warnings.catch_warnings(action="ignore"):  # torch says that it has seen the variable
        network: nn.Module = load_model_and_alphabet_local(path)[0]
    return network.eval()


def our_network(
    architecture: Architecture,
    state: Mapping[str, Tensor],
    *,
    dtype: torch.dtype,
    device: torch.device,
) -> ESM2:
    return ESM2.from_fair_esm(architecture, state.items(), dtype=dtype, device=device)


def fair_esm_network(
    architecture: Architecture, state: Mapping[str, Tensor], *, device: torch.device = CPU
) -> nn.Module:
    with torch.device(device):
        return reference.fair_esm_network(architecture, state)


def transformers_network(
    architecture: Architecture, state: Mapping[str, Tensor], *, device: torch.device = CPU
) -> nn.Module:
    """Hugging Face's EsmModel as ESM-2's configurations have it, with SDPA attention."""
    from transformers import EsmConfig, EsmModel

    config = EsmConfig(
        vocab_size=33,
        mask_token_id=32,
        pad_token_id=1,
        hidden_size=architecture.embed_dim,
        num_hidden_layers=architecture.num_layers,
        num_attention_heads=architecture.attention_heads,
        intermediate_size=4 * architecture.embed_dim,
        max_position_embeddings=1026,
        position_embedding_type="rotary",
        emb_layer_norm_before=False,
        token_dropout=True,
        attn_implementation="sdpa",
    )
    with torch.device(device):
        network = EsmModel(config, add_pooling_layer=False)
    return reference.filled(
        network, {name_in_transformers(name): tensor for name, tensor in state.items()}
    )
