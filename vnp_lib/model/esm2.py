"""ESM-2: the network over packed batches."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vnp_lib.errors import ConfigError
from vnp_lib.model.attention import (
    PackedLayout,
    pairs_adjacent,
    rotary_factors,
    rotate,
    varlen_attention,
)
from vnp_lib.model.linear import Linear
from vnp_lib.model.tokens import ALPHABET_SIZE, PAD

# Takes the number of a layer and its rotated queries and keys, (T, H, D).
Watch = Callable[[int, Tensor, Tensor], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    """The shape of an ESM-2 model."""

    num_layers: int
    embed_dim: int
    attention_heads: int

    @property
    def head_dim(self) -> int:
        return self.embed_dim // self.attention_heads

    @property
    def num_parameters(self) -> int:
        """Number of parameters without the heads."""
        per_layer = 12 * self.embed_dim**2 + 13 * self.embed_dim
        return self.num_layers * per_layer + (ALPHABET_SIZE + 2) * self.embed_dim


MODELS = {
    "esm2_t6_8M_UR50D": Architecture(num_layers=6, embed_dim=320, attention_heads=20),
    "esm2_t12_35M_UR50D": Architecture(num_layers=12, embed_dim=480, attention_heads=20),
    "esm2_t30_150M_UR50D": Architecture(num_layers=30, embed_dim=640, attention_heads=20),
    "esm2_t33_650M_UR50D": Architecture(num_layers=33, embed_dim=1280, attention_heads=20),
    "esm2_t36_3B_UR50D": Architecture(num_layers=36, embed_dim=2560, attention_heads=40),
    "esm2_t48_15B_UR50D": Architecture(num_layers=48, embed_dim=5120, attention_heads=40),
}


def architecture_of(model: str) -> Architecture:
    """Return the architecture of a model by name; ConfigError if it is none of ESM-2's six."""
    if model not in MODELS:
        raise ConfigError(f"there is no model {model!r}; choose one of {', '.join(MODELS)}")
    return MODELS[model]


class ESM2(nn.Module):
    """ESM-2 without its heads, for inference (Lin et al. 2023, doi:10.1126/science.ade2574).

    It equals fair-esm's network, except that one projection computes queries, keys and values, in
    the order that `rotate` expects.
    """

    def __init__(self, architecture: Architecture, *, by_convolution: bool = False) -> None:
        super().__init__()
        self.architecture = architecture
        # With a weight, the module draws none: to draw on "meta", torch imports its compiler, which
        # takes seconds.
        weight = torch.empty(ALPHABET_SIZE, architecture.embed_dim)
        self.embed_tokens = nn.Embedding(
            ALPHABET_SIZE, architecture.embed_dim, padding_idx=PAD, _weight=weight
        )
        self.layers = nn.ModuleList(
            _TransformerLayer(architecture, by_convolution=by_convolution)
            for _ in range(architecture.num_layers)
        )
        self.emb_layer_norm_after = nn.LayerNorm(architecture.embed_dim)
        self.requires_grad_(False)

    @classmethod
    def from_fair_esm(
        cls,
        architecture: Architecture,
        tensors: Iterable[tuple[str, Tensor]],
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | None = None,
        by_convolution: bool = False,
    ) -> Self:
        """Build a network from fair-esm's parameters, which are copied and cast.

        Args:
            tensors: Parameters by fair-esm's names. They are read one by one, and none is kept.
            device: The CPU by default.
            by_convolution: How to multiply, see `Linear`; for float32 on a CPU only.

        Raises:
            ValueError: A parameter is missing, unknown, or of another shape.
        """
        with torch.device("meta"):
            network = cls(architecture, by_convolution=by_convolution)
        empty = {
            name: torch.empty(parameter.shape, dtype=dtype, device=device or torch.device("cpu"))
            for name, parameter in network.named_parameters()
        }
        # Not `to_empty`, for which torch imports its compiler too.
        network.load_state_dict(empty, assign=True)
        targets = dict(network._parameters_in_fair_esm())
        for name, tensor in tensors:
            target = targets.pop(name, None)
            if target is None or target.shape != tensor.shape:
                raise ValueError(f"{name}, {tuple(tensor.shape)}, does not fit {architecture}")
            is_rotated = _IS_ROTATED.search(name)
            target.copy_(pairs_adjacent(tensor, architecture.head_dim) if is_rotated else tensor)
        if targets:
            raise ValueError(f"there are no parameters {', '.join(targets)}")
        return network.eval()

    def forward_packed(
        self,
        input_ids: Tensor,
        cu_seqlens: Tensor,
        max_seqlen: int,
        repr_layers: Sequence[int] | None = None,
        *,
        watch: Watch | None = None,
    ) -> dict[str, dict[int, Tensor]]:
        """Compute the states of every token.

        Args:
            input_ids: Tokens without PAD or MASK, int64, (T,).
            cu_seqlens: Sequence boundaries in tokens, int32, (B + 1,), first 0, last T.
            max_seqlen: The longest sequence, in tokens.
            repr_layers: The layers to return, in fair-esm's numbering: 0 is the embedding,
                `num_layers`, the default, is the last layer after the final layer norm. Layers
                above the highest one are not computed.
            watch: Called with the number of each layer, from 0, and its queries and keys.

        Returns:
            {"representations": {layer: states, (T, D), in the weights' dtype}}
        """
        last = self.architecture.num_layers
        wanted = {last} if repr_layers is None else set(repr_layers)
        if not wanted <= set(range(last + 1)):
            raise ValueError(f"repr_layers is {sorted(wanted)}; this model has layers 0 to {last}")

        x = self.embed_tokens(input_ids) * _TOKEN_DROPOUT_SCALE
        layout = PackedLayout.of(cu_seqlens, max_seqlen, x.dtype)
        factors = rotary_factors(layout, len(x), self.architecture.head_dim)
        representations = {0: x} if 0 in wanted else {}
        for number, layer in enumerate(self.layers[: max(wanted)], start=1):
            x = layer(x, layout, factors, partial(watch, number - 1) if watch is not None else None)
            if number in wanted:
                representations[number] = x if number < last else self.emb_layer_norm_after(x)
        return {"representations": representations}

    def _parameters_in_fair_esm(self) -> Iterator[tuple[str, Tensor]]:
        """Yield views of the parameters by fair-esm's names, which has three projections."""
        for name, parameter in self.named_parameters():
            if "qkv_proj" not in name:
                yield name, parameter
                continue
            for which, part in zip("qkv", parameter.chunk(3), strict=True):
                yield name.replace("qkv_proj", f"{which}_proj"), part


# In training, 12 % of the tokens were zero (15 % chosen, 80 % of those masked). Without masks, the
# embeddings are scaled likewise.
_TOKEN_DROPOUT_SCALE = 1 - 0.15 * 0.8


class _TransformerLayer(nn.Module):
    def __init__(self, architecture: Architecture, *, by_convolution: bool) -> None:
        super().__init__()
        dim = architecture.embed_dim
        self.self_attn = _SelfAttention(architecture, by_convolution=by_convolution)
        self.self_attn_layer_norm = nn.LayerNorm(dim)
        self.fc1 = Linear(dim, 4 * dim, by_convolution=by_convolution)
        self.fc2 = Linear(4 * dim, dim, by_convolution=by_convolution)
        self.final_layer_norm = nn.LayerNorm(dim)

    def forward(
        self,
        x: Tensor,
        layout: PackedLayout,
        factors: Tensor,
        watch: Callable[[Tensor, Tensor], None] | None,
    ) -> Tensor:
        # `add_` changes the new tensor: x may be among the states that are returned.
        x = self.self_attn(self.self_attn_layer_norm(x), layout, factors, watch).add_(x)
        hidden: Tensor = self.fc2(F.gelu(self.fc1(self.final_layer_norm(x)))).add_(x)
        return hidden


class _SelfAttention(nn.Module):
    def __init__(self, architecture: Architecture, *, by_convolution: bool) -> None:
        super().__init__()
        dim = architecture.embed_dim
        self.heads = (architecture.attention_heads, architecture.head_dim)
        self.qkv_proj = Linear(dim, 3 * dim, by_convolution=by_convolution)
        self.out_proj = Linear(dim, dim, by_convolution=by_convolution)

    def forward(
        self,
        x: Tensor,
        layout: PackedLayout,
        factors: Tensor,
        watch: Callable[[Tensor, Tensor], None] | None,
    ) -> Tensor:
        qkv = self.qkv_proj(x).unflatten(-1, (3, *self.heads))
        q, k = rotate(qkv[:, :2], factors).unbind(1)
        if watch is not None:
            watch(q, k)
        attended = varlen_attention(q, k, qkv[:, 2], layout)
        out: Tensor = self.out_proj(attended.flatten(-2))
        return out


# Names of the parameters whose results are rotated.
_IS_ROTATED = re.compile(r"\.[qk]_proj\.")
