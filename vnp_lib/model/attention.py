"""Attention within each sequence of a packed batch, and the rotary positions it works with."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import cache, lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from vnp_lib.model.cpu_attention import attend_by_products, products_are_faster

Run = tuple[int, int]  # neighbours of equal length: how many sequences, and how many tokens each


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedLayout:
    """Where the sequences of a packed batch lie. Made once per forward pass, used by every layer."""

    cu_seqlens: Tensor  # int32 (B + 1,), on the states' device
    max_seqlen: int  # tokens
    runs: tuple[Run, ...]  # empty for a kernel that takes cu_seqlens itself

    @classmethod
    def of(cls, cu_seqlens: Tensor, max_seqlen: int, dtype: torch.dtype) -> PackedLayout:
        """Choose the backend for states of `dtype` on the device of `cu_seqlens`."""
        runs = (
            () if _has_varlen_kernel(cu_seqlens.device, dtype) else runs_of_equal_length(cu_seqlens)
        )
        return cls(cu_seqlens=cu_seqlens, max_seqlen=max_seqlen, runs=runs)


def runs_of_equal_length(cu_seqlens: Tensor) -> tuple[Run, ...]:
    """Find neighbours of equal length in a packed batch with these boundaries, int32 (B + 1,), on whatever device."""
    seqlens, counts = torch.unique_consecutive(cu_seqlens.cpu().diff(), return_counts=True)
    return tuple(zip(counts.tolist(), seqlens.tolist(), strict=True))


def varlen_attention(q: Tensor, k: Tensor, v: Tensor, layout: PackedLayout) -> Tensor:
    """Let each token attend to all tokens of its own sequence, softmax(q k^T / sqrt(D)) v.

    Args:
        q, k, v: Queries, keys and values, (T, H, D), each head contiguous.
        layout: Where the sequences lie.

    Returns:
        The attended values, (T, H, D).
    """
    if layout.runs:
        return _attend_by_runs(q, k, v, layout.runs)
    boundaries, longest = layout.cu_seqlens, layout.max_seqlen
    # In this form, by position, torch 2.10 to 2.13 and flash-attn 2 agree on the arguments.
    kernel = _varlen_kernel()
    assert kernel is not None  # or the layout has runs
    return kernel(q, k, v, boundaries, boundaries, longest, longest)


def pairs_adjacent(x: Tensor, head_dim: int) -> Tensor:
    """Reorder rows of a query or key projection, (H * D, ...): fair-esm turns (i, i + D/2), `rotate` turns (2i, 2i + 1).

    Scores do not notice, since queries and keys are reordered alike.
    """
    halves = x.view(-1, 2, head_dim // 2, *x.shape[1:])
    return halves.transpose(1, 2).reshape(x.shape)


def rotary_factors(layout: PackedLayout, num_tokens: int, head_dim: int) -> Tensor:
    """Look up the rotary factors of every token; positions count from 0 at each sequence's BOS.

    They are float32 whatever the model is: bfloat16 counts exactly only to 256, float16 only to 2048.

    Returns:
        What `rotate` takes: complex64 (T, 1, 1, D/2).
    """
    starts = layout.cu_seqlens[:-1]
    first_token = torch.repeat_interleave(starts, layout.cu_seqlens.diff(), output_size=num_tokens)
    positions = torch.arange(num_tokens, device=starts.device) - first_token
    table_rows = max(1024, 1 << (layout.max_seqlen - 1).bit_length())
    return _rotary_table(head_dim, table_rows, starts.device)[positions, None, None]


def rotate(x: Tensor, factors: Tensor) -> Tensor:
    """Turn the pairs (2i, 2i + 1) of queries and keys, (T, N, H, D), by their token's angles (RoFormer, arXiv:2104.09864).

    In place, and in float32 whatever `x` is: one complex multiplication.
    """
    exact = x.float()
    torch.view_as_complex(exact.view(*x.shape[:-1], -1, 2)).mul_(factors)
    return x if exact is x else x.copy_(exact)


def _has_varlen_kernel(device: torch.device, dtype: torch.dtype) -> bool:
    return (
        device.type == "cuda"
        and dtype in (torch.float16, torch.bfloat16)
        and _varlen_kernel() is not None
        and torch.cuda.get_device_capability(device) >= (8, 0)  # flash attention begins with Ampere
    )


@cache
def _varlen_kernel() -> Callable[..., Tensor] | None:
    """A kernel for packed sequences: torch's own, where this build has it, else flash-attn's, else None.

    By position, both take the same. The import takes half a second: for GPUs alone.
    """
    if torch.backends.cuda.is_flash_attention_available():
        with suppress(ImportError):
            from torch.nn.attention.varlen import varlen_attn

            return varlen_attn  # type: ignore[return-value]  # a tuple only where auxiliary outputs are asked for
    with suppress(ImportError):
        from flash_attn import flash_attn_varlen_func

        return flash_attn_varlen_func  # type: ignore[no-any-return]
    return None


def _attend_by_runs(q: Tensor, k: Tensor, v: Tensor, runs: tuple[Run, ...]) -> Tensor:
    tokens = [count * seqlen for count, seqlen in runs]
    states_of_runs = zip(*(x.split_with_sizes(tokens) for x in (q, k, v)), strict=True)
    return torch.cat(
        [_attend_one_run(states, *run) for states, run in zip(states_of_runs, runs, strict=True)]
    )


def _attend_one_run(states: tuple[Tensor, ...], count: int, seqlen: int) -> Tensor:
    q, k, v = (x.view(count, seqlen, *x.shape[1:]).transpose(1, 2) for x in states)
    attended = attend_by_products(q, k, v) if products_are_faster(v) else None
    if attended is None:
        attended = F.scaled_dot_product_attention(q, k, v)
    return attended.transpose(1, 2).flatten(0, 1)


@lru_cache(maxsize=4)
def _rotary_table(head_dim: int, rows: int, device: torch.device) -> Tensor:
    # On the CPU, as fair-esm's are: powers differ in the last bits between devices, and the angles grow with the position.
    frequencies = 1.0 / 10000 ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    angles = torch.outer(torch.arange(rows, dtype=torch.float32), frequencies)
    return torch.complex(angles.cos(), angles.sin()).to(device)
