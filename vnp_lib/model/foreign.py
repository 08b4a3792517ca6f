"""Call a model of another project as VirNucPro does: packed or padded, with the layers."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from vnp_lib.model.tokens import PAD, PackedBatch

# VirNucPro requests this layer of every model.
_LAYERS_OF_ESM2_3B = 36


def representations_of(model: Any, batch: PackedBatch) -> Mapping[int, Tensor]:
    """Compute the states of every token in a batch, (T, D), by layer. The last layer is requested.

    A batch that was padded is passed to `forward(input_ids, repr_layers)`, if the model has such a
    method, and any other to `forward_packed(input_ids, cu_seqlens, max_seqlen, repr_layers)`.
    """
    owners = (getattr(model, "architecture", None), model)
    counts = (getattr(owner, "num_layers", None) for owner in owners)
    layers = [next((each for each in counts if isinstance(each, int)), _LAYERS_OF_ESM2_3B)]
    has_packed = callable(getattr(model, "forward_packed", None))
    if not has_packed or (batch.is_padded and _has_forward(model)):
        places = torch.arange(batch.max_seqlen, device=batch.input_ids.device)
        is_token = places < batch.cu_seqlens.diff()[:, None]  # (B, L)
        input_ids = batch.input_ids.new_full(is_token.shape, PAD)
        input_ids[is_token] = batch.input_ids
        padded: Mapping[int, Tensor] = _call_with_layers(model.forward, (input_ids,), layers)[
            "representations"
        ]
        return {layer: states[is_token] for layer, states in padded.items()}
    arguments = (batch.input_ids, batch.cu_seqlens, batch.max_seqlen)
    packed: Mapping[int, Tensor] = _call_with_layers(model.forward_packed, arguments, layers)[
        "representations"
    ]
    return packed


def _has_forward(model: Any) -> bool:
    """Whether the model has a padded pass that takes the layers."""
    # The method of `nn.Module` only raises an error.
    is_inherited = getattr(type(model), "forward", None) is nn.Module.forward
    if is_inherited or not callable(getattr(model, "forward", None)):
        return False
    signature = inspect.signature(model.forward)
    return _binds(signature, None, repr_layers=[]) or _binds(signature, None, [])


def _call_with_layers(
    method: Callable[..., Any], arguments: tuple[Any, ...], layers: list[int]
) -> Any:
    """Call a method with the layers as `repr_layers`, or else by position, or else without them."""
    try:
        signature = inspect.signature(method)
    except (TypeError, ValueError):
        return method(*arguments, repr_layers=layers)
    if _binds(signature, *arguments, repr_layers=layers):
        return method(*arguments, repr_layers=layers)
    takes_any = any(
        each.kind is inspect.Parameter.VAR_POSITIONAL for each in signature.parameters.values()
    )
    if takes_any or not _binds(signature, *arguments):
        return method(*arguments, layers)
    return method(*arguments)


def _binds(signature: inspect.Signature, *arguments: Any, **named: Any) -> bool:
    try:
        signature.bind(*arguments, **named)
    except TypeError:
        return False
    return True
