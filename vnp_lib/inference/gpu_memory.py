"""Choose the largest token budget that fits in GPU memory, up to diminishing returns."""

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

# The token budget of GPUs on other machines, and of GPUs that do not report their free memory.
TOKENS_UNSEEN = 16_384

# Budgets are multiples of this, so that small changes of the free memory give the same batches.
_STEP = 1024  # tokens

_SHORT = 32  # tokens of a short sequence
_FLOAT32_BYTES = 4

# Peak memory of a layer, and of attention, in multiples of the states of one layer.
_WIDTHS_OF_A_LAYER = 10
_WIDTHS_OF_ATTENTION = 5

# The context and kernels of CUDA, and the workspace of cuBLAS.
_OTHER_BYTES = 2**30

# The rest of the free memory is left to gaps in the pool of the allocator.
_USABLE_SHARE = 0.8

_MAX_TOKENS = 65_536

# Slightly more than a pass of 16,384 tokens through the model with 3B parameters.
_MAX_MULTIPLICATIONS = 4.8e13

logger = logging.getLogger(__name__)


def choose_token_budget(
    model: str, dtype: torch.dtype, devices: Sequence[str], layout: RowLayout
) -> int:
    """Choose the largest number of tokens in a forward pass on devices of this machine.

    GPUs have one budget, which suits the one with the least free memory.

    Args:
        model: By fair-esm's name.
        dtype: Of the weights.
        devices: "cpu", or the numbers of GPUs.
        layout: The outputs in a row.

    Raises:
        ConfigError: The model does not fit into one of the GPUs.
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
            f"{model} with {_weight_bytes(architecture, dtype) / 2**30:.1f} GiB of weights does "
            f"not fit into GPU {device}, which has {free_bytes / 2**30:.1f} GiB free; choose a GPU "
            "with more free memory (--devices), stop other programs on it, or choose a smaller "
            "--model. --token-budget 1024 skips this check."
        )
    tokens = min(fit, most_useful_tokens(architecture))
    logger.info(
        "%d tokens in a forward pass: GPU %s has %.1f GiB free", tokens, device, free_bytes / 2**30
    )
    return tokens


def tokens_that_fit(
    architecture: Architecture, dtype: torch.dtype, free_bytes: int, layout: RowLayout
) -> int:
    """Return the tokens of a forward pass that fit into free GPU memory, a multiple of 1,024 or 0.

    They fit as one sequence, whose contacts need the most memory, and as many short sequences,
    which have the most rows. The weights are in the same memory.
    """
    left_bytes = free_bytes - _weight_bytes(architecture, dtype) - _OTHER_BYTES
    usable_bytes = _USABLE_SHARE * max(0, left_bytes)

    def most_bytes(steps: int) -> int:
        tokens = steps * _STEP
        extremes = np.array([tokens]), np.full(tokens // _SHORT, _SHORT)
        return max(pass_bytes(architecture, dtype, layout, seqlens) for seqlens in extremes)

    # An upper bound, since the memory grows at least linearly with the tokens.
    max_steps = int(usable_bytes / most_bytes(1))
    return _STEP * bisect_right(range(1, max_steps + 1), usable_bytes, key=most_bytes)


def pass_bytes(
    architecture: Architecture,
    dtype: torch.dtype,
    layout: RowLayout,
    seqlens: NDArray[np.integer[Any]],
) -> int:
    """Return the peak memory of a forward pass over sequences of `seqlens` tokens, (B,).

    The weights are not included. Nothing is kept for a backward pass, so the peak is in one layer,
    together with what is kept for the rows; or in the rows, after the layers. Tokens and rotary
    factors are kept throughout.
    """
    memory = _PassMemory(
        architecture=architecture, dtype=dtype, layout=layout, seqlens=seqlens.astype(np.int64)
    )
    return memory.lasting_bytes + max(
        memory.layer_bytes, memory.maps_bytes, memory.contacts_bytes, memory.rows_bytes
    )


@dataclass(frozen=True, kw_only=True)
class _PassMemory:
    """The memory of a forward pass at its stages."""

    architecture: Architecture
    dtype: torch.dtype
    layout: RowLayout
    seqlens: NDArray[np.int64]  # tokens of each sequence, (B,)

    @property
    def lasting_bytes(self) -> int:
        """Bytes of tokens and rotary factors."""
        return self._tokens * (8 + 4 * self.architecture.head_dim)

    @property
    def layer_bytes(self) -> int:
        """Peak bytes of a layer: ten times the states.

        The peak is at the GELU: 1 is the input of the layer, 1 the output of attention, 4 before
        and 4 after it. Attention needs less: 1 is the input, 1 the output of the layer norm, 3 are
        queries, keys and values, and in half precision 4 are two of these in float32 while they
        are rotated, which makes 9; later there are the attended values and their projection,
        which makes 7.
        """
        return (_WIDTHS_OF_A_LAYER + self._num_kept) * self._states_bytes + self._sums_bytes

    @property
    def maps_bytes(self) -> int:
        """Peak bytes of attention with contacts: 5 times the states, and some attention maps.

        The maps exist twice, or once together with the queries. In half precision, queries and
        keys exist in float32 too.
        """
        if not self._sums_bytes:
            return 0
        seqlens, counts = np.unique(self.seqlens, return_counts=True)
        at_once = np.minimum(counts, np.maximum(1, MAP_VALUES // seqlens**2))
        maps_bytes = (
            self.architecture.attention_heads * int((at_once * seqlens**2).max()) * _FLOAT32_BYTES
        )
        queries_bytes = (
            self.architecture.embed_dim * int((at_once * seqlens).max()) * _FLOAT32_BYTES
        )
        own_bytes = maps_bytes + max(maps_bytes, queries_bytes) + 2 * queries_bytes * self._is_half
        return (
            (_WIDTHS_OF_ATTENTION + self._num_kept) * self._states_bytes
            + self._sums_bytes
            + own_bytes
        )

    @property
    def contacts_bytes(self) -> int:
        """Peak bytes when contacts are computed from their sums."""
        return self._returned_bytes + 2 * self._sums_bytes

    @property
    def rows_bytes(self) -> int:
        """Peak bytes when rows are assembled from each output in float32."""
        outputs_bytes = sum(map(self._output_bytes, self.layout.outputs))
        end_to_end_bytes = (
            int(self.layout.widths(self.seqlens - NUM_SPECIAL_TOKENS).sum()) * _FLOAT32_BYTES
        )
        has_std = any(output.kind == OutputKind.STD for output in self.layout.outputs)
        centred_bytes = (
            (2 + self._is_half) * self._float32_states_bytes + self._reduced_bytes if has_std else 0
        )
        return self._returned_bytes + outputs_bytes + max(end_to_end_bytes, centred_bytes)

    def _output_bytes(self, output: Output) -> int:
        """Bytes of an output until it is in the rows; float32 results are not copied."""
        match output.kind:
            case OutputKind.MEAN | OutputKind.MAX:
                return self._reduced_bytes
            case OutputKind.BOS | OutputKind.STD:
                return self._reduced_bytes // 3
            case OutputKind.PER_TOK:
                return self._float32_states_bytes * self._is_half
            case OutputKind.LOGITS:
                return self._tokens * NUM_LOGITS * _FLOAT32_BYTES * self._is_half
            case _:
                return 0

    @property
    def _returned_bytes(self) -> int:
        """Bytes of what the network returns."""
        logits_bytes = (
            self._tokens * NUM_LOGITS * self.dtype.itemsize
            if OutputKind.LOGITS in self.layout.heads
            else 0
        )
        return len(self._layers) * self._states_bytes + logits_bytes + self._sums_bytes

    @property
    def _layers(self) -> set[int]:
        """The layers that the network returns. Heads need the last one."""
        return {*self.layout.layers, *([self.architecture.num_layers] if self.layout.heads else [])}

    @property
    def _num_kept(self) -> int:
        """Number of layers that are kept while the last one is computed, without its input."""
        last = max(self._layers)
        return len(self._layers - {last, last - 1})

    @property
    def _tokens(self) -> int:
        return int(self.seqlens.sum())

    @property
    def _states_bytes(self) -> int:
        """Bytes of the states of one layer."""
        return self._tokens * self.architecture.embed_dim * self.dtype.itemsize

    @property
    def _float32_states_bytes(self) -> int:
        return self._tokens * self.architecture.embed_dim * _FLOAT32_BYTES

    @property
    def _reduced_bytes(self) -> int:
        """Bytes of BOS, residues and EOS of each sequence, each reduced to one vector."""
        return 3 * self.seqlens.size * self.architecture.embed_dim * _FLOAT32_BYTES

    @property
    def _sums_bytes(self) -> int:
        """Bytes of the sums from which contacts are computed."""
        if OutputKind.CONTACTS not in self.layout.heads:
            return 0
        return int(((self.seqlens - NUM_SPECIAL_TOKENS) ** 2).sum()) * _FLOAT32_BYTES

    @property
    def _is_half(self) -> bool:
        return self.dtype.itemsize < _FLOAT32_BYTES


def most_useful_tokens(architecture: Architecture) -> int:
    """Return the number of tokens above which a larger pass is not faster per token.

    It is 65,536, and 16,384 for models of 3B parameters or more. This is calculated, not measured:
    on an H100 such a pass takes 0.2 s with 650M and with 3B, compared with milliseconds to launch
    it. A larger pass only delays the stop of a worker process, which completes two passes first.
    """
    useful = int(_MAX_MULTIPLICATIONS / architecture.num_parameters) // _STEP * _STEP
    return min(max(useful, TOKENS_UNSEEN), _MAX_TOKENS)


def _weight_bytes(architecture: Architecture, dtype: torch.dtype) -> int:
    return architecture.num_parameters * dtype.itemsize
