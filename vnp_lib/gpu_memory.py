"""How many tokens a forward pass has on a GPU: as many as its memory holds, and no more than do good."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch

from vnp_lib.config import visible_gpu
from vnp_lib.esm2 import Architecture, architecture_of
from vnp_lib.failures import ConfigError
from vnp_lib.machine import free_gpu_bytes

TOKENS_UNSEEN = 16_384  # where the GPUs are on other machines, or do not tell what memory they have

_STEP = 1024  # tokens; so that a little more or less free memory makes no other batches
_WIDTHS_OF_A_TOKEN = 10
_OTHER_BYTES = 2**30  # CUDA's context and kernels, cuBLAS's workspace
_USABLE_SHARE = 0.8  # of what is left: the rest is for gaps in the allocator's pool
_MOST_TOKENS = 65_536
_MOST_MULTIPLICATIONS = 4.8e13  # a pass of 16,384 tokens through the model with 3B parameters, and a little

logger = logging.getLogger(__name__)


def choose_token_budget(model: str, dtype: torch.dtype, devices: Sequence[str]) -> int:
    """Choose the most tokens of a forward pass on this machine's GPUs, by the one that has the least memory free.

    Raises:
        ConfigError: The model does not fit into one of them.
    """
    architecture = architecture_of(model)
    free = {device: free_gpu_bytes(visible_gpu(device)) for device in devices}
    told = [(free_bytes, device) for device, free_bytes in free.items() if free_bytes is not None]
    if not told:
        return TOKENS_UNSEEN
    free_bytes, device = min(told)
    fit = tokens_that_fit(architecture, dtype, free_bytes)
    if not fit:
        raise ConfigError(
            f"{model} with {_weight_bytes(architecture, dtype) / 2**30:.1f} GiB of weights does not fit into GPU {device}, "
            f"which has {free_bytes / 2**30:.1f} GiB free; take a GPU that has more (--devices), end what else is on it, "
            "or take a smaller --model. --token-budget 1024 tries it all the same."
        )
    tokens = min(fit, most_useful_tokens(architecture))
    logger.info("%d tokens in a forward pass: GPU %s has %.1f GiB free", tokens, device, free_bytes / 2**30)
    return tokens


def tokens_that_fit(architecture: Architecture, dtype: torch.dtype, free_bytes: int) -> int:
    """Say how many tokens of a forward pass fit into a GPU's free memory beside the weights, in steps of 1,024; maybe 0."""
    left_bytes = free_bytes - _weight_bytes(architecture, dtype) - _OTHER_BYTES
    tokens = int(_USABLE_SHARE * max(0, left_bytes) / bytes_per_token(architecture, dtype))
    return tokens // _STEP * _STEP


def bytes_per_token(architecture: Architecture, dtype: torch.dtype) -> int:
    """Say what a forward pass takes at its peak for each token, weights left out: ten times the model's width.

    Nothing is kept for a backward pass, so the peak is that of one layer. It is at the GELU, in units of the width: 1 that
    the layer was given, 1 that attention has made of it, 4 before and 4 after. Attention stays below. Beside what the layer
    was given there are 1 after the layer norm and 3 of queries, keys and values; then, in half precision, 4 for two of them
    in float32 while they are turned: 9. Later there are the attended values and their projection: 7. So does the mean,
    with 2, and in half precision 2 more for the last layer in float32. Tokens and their rotary factors last through it all.
    """
    token_bytes, factor_bytes = 8, 4 * architecture.head_dim
    return _WIDTHS_OF_A_TOKEN * architecture.embed_dim * dtype.itemsize + token_bytes + factor_bytes


def most_useful_tokens(architecture: Architecture) -> int:
    """Say from where on more tokens only make a forward pass longer: 65,536, and 16,384 for models of 3B parameters and more.

    Reckoned, not measured: on an H100 such a pass lasts 0.2 s with 650M and with 3B, beside which the milliseconds of
    launching it are little. A larger one only makes a child slower to stop, for it ends the two that are under way.
    """
    useful = int(_MOST_MULTIPLICATIONS / architecture.num_parameters) // _STEP * _STEP
    return min(max(useful, TOKENS_UNSEEN), _MOST_TOKENS)


def _weight_bytes(architecture: Architecture, dtype: torch.dtype) -> int:
    return architecture.num_parameters * dtype.itemsize
