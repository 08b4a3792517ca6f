"""How many tokens a forward pass has on a GPU: as many as its memory holds, and no more than do good."""

from __future__ import annotations

import logging
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from vnp_lib.devices import device_type, free_gpu_bytes
from vnp_lib.environment import visible_gpu
from vnp_lib.errors import ConfigError
from vnp_lib.inference.token_budget import CPU_TOKEN_BUDGET
from vnp_lib.model import MAP_VALUES, Architecture, architecture_of
from vnp_lib.plan import NUM_LOGITS, NUM_SPECIAL_TOKENS, Output, OutputKind, RowLayout

TOKENS_UNSEEN = 16_384  # where the GPUs are on other machines, or do not tell what memory they have

_STEP = 1024  # tokens; so that a little more or less free memory makes no other batches
_SHORT = 32  # tokens of a short sequence
_EXACT_BYTES = 4  # of a number in float32
_WIDTHS_OF_A_LAYER = 10
_WIDTHS_OF_ATTENTION = 5
_OTHER_BYTES = 2**30  # CUDA's context and kernels, cuBLAS's workspace
_USABLE_SHARE = 0.8  # of what is left: the rest is for gaps in the allocator's pool
_MOST_TOKENS = 65_536
_MOST_MULTIPLICATIONS = (
    4.8e13  # a pass of 16,384 tokens through the model with 3B parameters, and a little
)

logger = logging.getLogger(__name__)


def choose_token_budget(
    model: str, dtype: torch.dtype, devices: Sequence[str], layout: RowLayout
) -> int:
    """Choose the most tokens of a forward pass on this machine's GPUs, by the one that has the least memory free.

    Args:
        model: By fair-esm's name.
        dtype: Of its weights.
        devices: GPUs, by number.
        layout: What a row is.

    Raises:
        ConfigError: The model does not fit into one of them.
    """
    if device_type(devices[0]) == "cpu":
        return CPU_TOKEN_BUDGET
    architecture = architecture_of(model)
    free = {device: free_gpu_bytes(visible_gpu(device)) for device in devices}
    known = [(free_bytes, device) for device, free_bytes in free.items() if free_bytes is not None]
    if not known:
        return TOKENS_UNSEEN
    free_bytes, device = min(known)
    fit = tokens_that_fit(architecture, dtype, free_bytes, layout)
    if not fit:
        raise ConfigError(
            f"{model} with {_weight_bytes(architecture, dtype) / 2**30:.1f} GiB of weights does not fit into GPU {device}, "
            f"which has {free_bytes / 2**30:.1f} GiB free; take a GPU that has more (--devices), end what else is on it, "
            "or take a smaller --model. --token-budget 1024 tries it all the same."
        )
    tokens = min(fit, most_useful_tokens(architecture))
    logger.info(
        "%d tokens in a forward pass: GPU %s has %.1f GiB free", tokens, device, free_bytes / 2**30
    )
    return tokens


def tokens_that_fit(
    architecture: Architecture, dtype: torch.dtype, free_bytes: int, layout: RowLayout
) -> int:
    """Say how many tokens of a forward pass fit into a GPU's free memory beside the weights, in steps of 1,024; maybe 0.

    Whether they are those of one sequence, whose contacts take the most, or of many short ones, which have the most rows.
    """
    left_bytes = free_bytes - _weight_bytes(architecture, dtype) - _OTHER_BYTES
    usable_bytes = _USABLE_SHARE * max(0, left_bytes)

    def most_bytes(steps: int) -> int:
        tokens = steps * _STEP
        extremes = np.array([tokens]), np.full(tokens // _SHORT, _SHORT)
        return max(pass_bytes(architecture, dtype, layout, seqlens) for seqlens in extremes)

    no_more_than = int(usable_bytes / most_bytes(1))  # for it grows with the tokens, or faster
    return _STEP * bisect_right(range(1, no_more_than + 1), usable_bytes, key=most_bytes)


def pass_bytes(
    architecture: Architecture,
    dtype: torch.dtype,
    layout: RowLayout,
    seqlens: NDArray[np.integer[Any]],
) -> int:
    """Say what a forward pass over sequences of so many tokens, (B,), takes at its peak, weights left out.

    Nothing is kept for a backward pass, so the peak is that of one layer, beside what is kept for the rows; or it is that of
    the rows, when the layers are done. Tokens and their rotary factors last through it all.
    """
    made = _Pass(
        architecture=architecture, dtype=dtype, layout=layout, seqlens=seqlens.astype(np.int64)
    )
    return made.lasting_bytes + max(
        made.layer_bytes, made.maps_bytes, made.contacts_bytes, made.rows_bytes
    )


@dataclass(frozen=True, kw_only=True)
class _Pass:
    """A forward pass, and what there is in memory at its stages."""

    architecture: Architecture
    dtype: torch.dtype
    layout: RowLayout
    seqlens: NDArray[np.int64]  # tokens of each sequence, (B,)

    @property
    def lasting_bytes(self) -> int:
        """Of tokens and rotary factors."""
        return self._tokens * (8 + 4 * self.architecture.head_dim)

    @property
    def layer_bytes(self) -> int:
        """Of a layer at its peak: ten times the states.

        It is at the GELU: 1 that the layer was given, 1 that attention has made of it, 4 before and 4 after. Attention stays
        below. Beside what the layer was given there are 1 after the layer norm and 3 of queries, keys and values; then, in
        half precision, 4 for two of them in float32 while they are turned: 9. Later there are the attended values and their
        projection: 7.
        """
        return (_WIDTHS_OF_A_LAYER + self._num_kept) * self._states_bytes + self._sums_bytes

    @property
    def maps_bytes(self) -> int:
        """Of attention while contacts are looked for: what a layer has by then, 5, and the maps of as many sequences as are at once.

        The maps are there twice, or once beside the queries that they are made of. In half precision, queries and keys are
        there in float32 too.
        """
        if not self._sums_bytes:
            return 0
        seqlens, counts = np.unique(self.seqlens, return_counts=True)
        at_once = np.minimum(counts, np.maximum(1, MAP_VALUES // seqlens**2))
        maps_bytes = (
            self.architecture.attention_heads * int((at_once * seqlens**2).max()) * _EXACT_BYTES
        )
        queries_bytes = self.architecture.embed_dim * int((at_once * seqlens).max()) * _EXACT_BYTES
        own_bytes = maps_bytes + max(maps_bytes, queries_bytes) + 2 * queries_bytes * self._is_half
        return (
            (_WIDTHS_OF_ATTENTION + self._num_kept) * self._states_bytes
            + self._sums_bytes
            + own_bytes
        )

    @property
    def contacts_bytes(self) -> int:
        """Of the contacts when they are made of their sums."""
        return self._given_bytes + 2 * self._sums_bytes

    @property
    def rows_bytes(self) -> int:
        """Of what the network has given, of each output in float32, and of the rows that are made of them, end to end."""
        outputs_bytes = sum(map(self._output_bytes, self.layout.outputs))
        end_to_end_bytes = (
            int(self.layout.widths(self.seqlens - NUM_SPECIAL_TOKENS).sum()) * _EXACT_BYTES
        )
        has_std = any(output.kind == OutputKind.STD for output in self.layout.outputs)
        centred_bytes = (
            (2 + self._is_half) * self._exact_states_bytes + self._reduced_bytes if has_std else 0
        )
        return self._given_bytes + outputs_bytes + max(end_to_end_bytes, centred_bytes)

    def _output_bytes(self, output: Output) -> int:
        """Of an output until it is in the rows. What the network has given in float32 is not copied."""
        match output.kind:
            case OutputKind.MEAN | OutputKind.MAX:
                return self._reduced_bytes
            case OutputKind.BOS | OutputKind.STD:
                return self._reduced_bytes // 3
            case OutputKind.PER_TOK:
                return self._exact_states_bytes * self._is_half
            case OutputKind.LOGITS:
                return self._tokens * NUM_LOGITS * _EXACT_BYTES * self._is_half
            case _:
                return 0

    @property
    def _given_bytes(self) -> int:
        """Of what the network gives."""
        logits_bytes = (
            self._tokens * NUM_LOGITS * self.dtype.itemsize
            if OutputKind.LOGITS in self.layout.heads
            else 0
        )
        return len(self._layers) * self._states_bytes + logits_bytes + self._sums_bytes

    @property
    def _layers(self) -> set[int]:
        """Those that the network gives: heads take the last one."""
        return {*self.layout.layers, *([self.architecture.num_layers] if self.layout.heads else [])}

    @property
    def _num_kept(self) -> int:
        """Layers that are kept while the last of them is computed, but for the one that it is given."""
        last = max(self._layers)
        return len(self._layers - {last, last - 1})

    @property
    def _tokens(self) -> int:
        return int(self.seqlens.sum())

    @property
    def _states_bytes(self) -> int:
        """Of the states of one layer."""
        return self._tokens * self.architecture.embed_dim * self.dtype.itemsize

    @property
    def _exact_states_bytes(self) -> int:
        return self._tokens * self.architecture.embed_dim * _EXACT_BYTES

    @property
    def _reduced_bytes(self) -> int:
        """Of BOS, residues and EOS of each sequence, reduced by themselves."""
        return 3 * self.seqlens.size * self.architecture.embed_dim * _EXACT_BYTES

    @property
    def _sums_bytes(self) -> int:
        """Of what is known of contacts."""
        if OutputKind.CONTACTS not in self.layout.heads:
            return 0
        return int(((self.seqlens - NUM_SPECIAL_TOKENS) ** 2).sum()) * _EXACT_BYTES

    @property
    def _is_half(self) -> bool:
        return self.dtype.itemsize < _EXACT_BYTES


def most_useful_tokens(architecture: Architecture) -> int:
    """Say from where on more tokens only make a forward pass longer: 65,536, and 16,384 for models of 3B parameters and more.

    Reckoned, not measured: on an H100 such a pass lasts 0.2 s with 650M and with 3B, beside which the milliseconds of
    launching it are little. A larger one only makes a child slower to stop, for it ends the two that are under way.
    """
    useful = int(_MOST_MULTIPLICATIONS / architecture.num_parameters) // _STEP * _STEP
    return min(max(useful, TOKENS_UNSEEN), _MOST_TOKENS)


def _weight_bytes(architecture: Architecture, dtype: torch.dtype) -> int:
    return architecture.num_parameters * dtype.itemsize
