"""The two heads of ESM-2: logits of the language model, and contact probabilities.

The parameters of a head are read only if it is requested.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vnp_lib.errors import WeightsError
from vnp_lib.model.attention import runs_of_equal_length
from vnp_lib.model.esm2 import ESM2
from vnp_lib.model.weight_files import read_tensors
from vnp_lib.model.weights import RANDOM_SEED, Weights, load_contact_regression, require_finite
from vnp_lib.plan import NUM_LOGITS, NUM_SPECIAL_TOKENS, OutputKind

# Values of the maps of one attention head that are in memory at once. The map of a single sequence
# may be larger.
MAP_VALUES = 2**20


@dataclass(frozen=True, slots=True, kw_only=True)
class LanguageModelHead:
    """Computes logits of the alphabet at every token. Its last matrix is the token embedding."""

    dense_weight: Tensor  # (D, D)
    dense_bias: Tensor  # (D,)
    norm_weight: Tensor  # (D,)
    norm_bias: Tensor  # (D,)
    bias: Tensor  # (33,)

    def __call__(self, hidden: Tensor, embedding: Tensor) -> Tensor:
        """Compute the logits, (T, 33).

        Args:
            hidden: States of the last layer, (T, D).
            embedding: Token embedding of the network, (33, D).
        """
        x = F.gelu(F.linear(hidden, self.dense_weight, self.dense_bias))
        x = F.layer_norm(x, self.norm_bias.shape, self.norm_weight, self.norm_bias)
        return F.linear(x, embedding, self.bias)


@dataclass(frozen=True, slots=True, kw_only=True)
class ContactRegression:
    """Weights of the attention maps in the contacts, float32 for a network of any dtype."""

    weight: Tensor  # float32 (layers, heads)
    bias: Tensor  # float32 (1,)


class ContactMaps:
    """Computes contacts from attention maps, layer by layer (Rao et al. 2020, ICLR 2021).

    fair-esm keeps the maps of all layers, removes BOS and EOS, makes each map symmetric, subtracts
    its average product, and weights it. This class adds up the weighted maps of each layer as soon
    as they are known. It keeps one matrix (L, L) per sequence, and needs the maps of a few short
    sequences, or of a long one, at a time.
    """

    def __init__(self, regression: ContactRegression, cu_seqlens: Tensor) -> None:
        self._regression = regression
        self._runs = runs_of_equal_length(cu_seqlens)
        device = cu_seqlens.device
        self._sums = [
            torch.zeros(count, *[tokens - NUM_SPECIAL_TOKENS] * 2, device=device)
            for count, tokens in self._runs
        ]

    def add(self, layer: int, q: Tensor, k: Tensor) -> None:
        """Add a layer, from 0, by its rotated queries and keys, (T, H, D)."""
        tokens_of_runs = [count * tokens for count, tokens in self._runs]
        weight = self._regression.weight[layer]
        pairs = zip(
            q.split_with_sizes(tokens_of_runs), k.split_with_sizes(tokens_of_runs), strict=True
        )
        for (count, tokens), (queries, keys), sums in zip(
            self._runs, pairs, self._sums, strict=True
        ):
            at_a_time = max(1, MAP_VALUES // tokens**2)
            queries, keys = (
                x.view(count, tokens, *x.shape[1:]).transpose(1, 2) for x in (queries, keys)
            )
            for start in range(0, count, at_a_time):
                some = slice(start, start + at_a_time)
                # The maps have no name, which would keep them alive until the next ones exist.
                sums[some] += _evidence(
                    _attention(queries[some].float(), keys[some].float()), weight
                )

    def probabilities(self) -> list[Tensor]:
        """Return the contact probabilities, float32 (L, L) for each sequence."""
        return [
            contacts
            for sums in self._sums
            for contacts in torch.sigmoid(sums + self._regression.bias)
        ]


def _attention(q: Tensor, k: Tensor) -> Tensor:
    """Compute the map of each head, (B, H, T, T), from (B, H, T, D)."""
    return torch.softmax((q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2), dim=-1)


def _evidence(maps: Tensor, weight: Tensor) -> Tensor:
    """Sum up the corrected, symmetric maps of the residues over the heads, weighted, (B, L, L).

    Maps are (B, H, T, T), BOS and EOS included. The correction of a symmetric map S is the average
    product, r r^T / sum(S), with r the sums of its rows (Dunn et al. 2008).
    """
    maps = maps[..., 1:-1, 1:-1]
    summed = torch.einsum("h,bhij->bij", weight, maps)
    # The row sums of the symmetric maps, (B, H, L).
    row_sums = maps.sum(-1) + maps.sum(-2)
    shares = (weight / row_sums.sum(-1)).unsqueeze(-1) * row_sums
    return summed + summed.transpose(-1, -2) - shares.transpose(-1, -2) @ row_sums


class HeadedModel:
    """ESM-2 with the requested heads."""

    def __init__(
        self,
        network: ESM2,
        *,
        language_model: LanguageModelHead | None = None,
        contact_regression: ContactRegression | None = None,
    ) -> None:
        self._network = network
        self._language_model = language_model
        self._contact_regression = contact_regression

    def forward_packed(
        self,
        input_ids: Tensor,
        cu_seqlens: Tensor,
        max_seqlen: int,
        repr_layers: Sequence[int] = (),
    ) -> dict[str, Any]:
        """Compute what the network does, and the heads.

        Returns:
            The result of the network, with `logits`, (T, 33), and `contacts`, float32 (L, L) per
            sequence, if they are requested.
        """
        last = self._network.architecture.num_layers
        maps = (
            ContactMaps(self._contact_regression, cu_seqlens)
            if self._contact_regression is not None
            else None
        )
        computed: dict[str, Any] = {
            **self._network.forward_packed(
                input_ids,
                cu_seqlens,
                max_seqlen,
                [*repr_layers, last],
                watch=maps.add if maps is not None else None,
            )
        }
        if self._language_model is not None:
            hidden = computed["representations"][last]
            computed["logits"] = self._language_model(hidden, self._network.embed_tokens.weight)
        if maps is not None:
            computed["contacts"] = maps.probabilities()
        return computed


def with_heads(
    network: ESM2, weights: Weights, kinds: Collection[OutputKind]
) -> ESM2 | HeadedModel:
    """Add the heads that these kinds of output need to a network, on its device.

    Returns:
        The network itself if no head is needed.

    Raises:
        WeightsError: The parameters of a head are missing, damaged, or of another model.
    """
    if not {OutputKind.LOGITS, OutputKind.CONTACTS} & set(kinds):
        return network
    embedding = network.embed_tokens.weight
    language_model, contact_regression = None, None
    if OutputKind.LOGITS in kinds:
        tensors = _language_model_tensors(weights).items()
        language_model = LanguageModelHead(
            **{
                name: each.to(embedding.device, embedding.dtype, copy=True)
                for name, each in tensors
            }
        )
    if OutputKind.CONTACTS in kinds:
        weight, bias = (each.to(embedding.device) for each in load_contact_regression(weights))
        contact_regression = ContactRegression(
            weight=weight.view(weights.architecture.num_layers, -1), bias=bias
        )
    return HeadedModel(
        network, language_model=language_model, contact_regression=contact_regression
    )


def check_heads(weights: Weights, kinds: Collection[OutputKind]) -> str | None:
    """Check that the parameters of the heads that these kinds of output need can be read.

    Returns:
        The sha256 of the contact regression; None if contacts are not requested.

    Raises:
        WeightsError: As `with_heads`.
    """
    if OutputKind.LOGITS in kinds:
        _language_model_tensors(weights)
    if OutputKind.CONTACTS not in kinds:
        return None
    digest = sha256()
    for tensor in load_contact_regression(weights):
        digest.update(tensor.numpy().astype("<f4").tobytes())
    return digest.hexdigest()


_IN_FAIR_ESM = {
    "dense_weight": "lm_head.dense.weight",
    "dense_bias": "lm_head.dense.bias",
    "norm_weight": "lm_head.layer_norm.weight",
    "norm_bias": "lm_head.layer_norm.bias",
    "bias": "lm_head.bias",
}


def _language_model_tensors(weights: Weights) -> dict[str, Tensor]:
    dim = weights.architecture.embed_dim
    shapes: dict[str, tuple[int, ...]] = {name: (dim,) for name in _IN_FAIR_ESM}
    shapes |= {"dense_weight": (dim, dim), "bias": (NUM_LOGITS,)}
    if weights.path is None:
        # From the seed of the random weights, which this does not change.
        generator = torch.Generator().manual_seed(RANDOM_SEED)
        drawn = {
            name: torch.rand(shape, generator=generator).mul_(2).sub_(1)
            for name, shape in shapes.items()
        }
        drawn["norm_weight"].mul_(0.2).add_(1)
        drawn["dense_weight"].mul_(3**0.5 * dim**-0.5)
        return drawn
    tensors = read_tensors(weights.path)
    found = {name: tensors[theirs] for name, theirs in _IN_FAIR_ESM.items() if theirs in tensors}
    if wrong := [name for name in shapes if name not in found or found[name].shape != shapes[name]]:
        raise WeightsError(
            f"logits need the head of the language model, and {weights.path} does not hold that "
            f"of {weights.model} ({_IN_FAIR_ESM[wrong[0]]} is missing or of another shape): "
            "take fair-esm's file"
        )
    require_finite({_IN_FAIR_ESM[name]: tensor for name, tensor in found.items()}, weights.path)
    return found
