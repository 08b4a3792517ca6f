"""Attention within each sequence of a packed batch, and rotary positions."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import cache, lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from vnp_lib.model.cpu_attention import attend_by_products, products_are_faster

# Neighbours of equal length: the number of sequences, and the tokens of each.
Run = tuple[int, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedLayout:
    """The positions of the sequences in a packed batch, made once per forward pass."""

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
    """Find neighbours of equal length in a packed batch with boundaries `cu_seqlens`."""
    seqlens, counts = torch.unique_consecutive(cu_seqlens.cpu().diff(), return_counts=True)
    return tuple(zip(counts.tolist(), seqlens.tolist(), strict=True))


def varlen_attention(q: Tensor, k: Tensor, v: Tensor, layout: PackedLayout) -> Tensor:
    """Let each token attend to all tokens of its own sequence, softmax(q k^T / sqrt(D)) v.

    Args:
        q, k, v: Queries, keys and values, (T, H, D), each head contiguous.
        layout: The positions of the sequences.

    Returns:
        The attended values, (T, H, D).
    """
    if layout.runs:
        tokens = [count * seqlen for count, seqlen in layout.runs]
        states_of_runs = zip(*(x.split_with_sizes(tokens) for x in (q, k, v)), strict=True)
        attended = map(_attend_one_run, states_of_runs, layout.runs)
        return torch.cat(list(attended))
    boundaries, longest = layout.cu_seqlens, layout.max_seqlen
    # In this form, by position, torch 2.10 to 2.13 and flash-attn 2 agree on the arguments.
    kernel = _varlen_kernel()
    # Without a kernel the layout has runs.
    assert kernel is not None
    return kernel(q, k, v, boundaries, boundaries, longest, longest)


def pairs_adjacent(x: Tensor, head_dim: int) -> Tensor:
    """Reorder the rows of a query or key projection, (H * D, ...), for `rotate`.

    fair-esm rotates the pairs (i, i + D/2), `rotate` the pairs (2i, 2i + 1). The scores stay the
    same, since queries and keys are reordered alike.
    """
    halves = x.view(-1, 2, head_dim // 2, *x.shape[1:])
    return halves.transpose(1, 2).reshape(x.shape)


def rotary_factors(layout: PackedLayout, num_tokens: int, head_dim: int) -> Tensor:
    """Look up the rotary factors of every token. Positions count from 0 at the BOS of a sequence.

    They are float32 for all models: bfloat16 is exact for integers to 256, float16 to 2048.

    Returns:
        The factors for `rotate`: complex64 (T, 1, 1, D/2).
    """
    starts = layout.cu_seqlens[:-1]
    first_token = torch.repeat_interleave(starts, layout.cu_seqlens.diff(), output_size=num_tokens)
    positions = torch.arange(num_tokens, device=starts.device) - first_token
    table_rows = max(1024, 1 << (layout.max_seqlen - 1).bit_length())
    return _rotary_table(head_dim, table_rows, starts.device)[positions, None, None]


def rotate(x: Tensor, factors: Tensor) -> Tensor:
    """Rotate the pairs (2i, 2i + 1) of queries and keys, (T, N, H, D), in place.

    One complex multiplication in float32, whatever the dtype of `x`. The angles are those of
    RoFormer (arXiv:2104.09864).
    """
    exact = x.float()
    torch.view_as_complex(exact.view(*x.shape[:-1], -1, 2)).mul_(factors)
    return x if exact is x else x.copy_(exact)


def _has_varlen_kernel(device: torch.device, dtype: torch.dtype) -> bool:
    return (
        device.type == "cuda"
        and dtype in (torch.float16, torch.bfloat16)
        and _varlen_kernel() is not None
        # Flash attention needs Ampere or later.
        and torch.cuda.get_device_capability(device) >= (8, 0)
    )


@cache
def _varlen_kernel() -> Callable[..., Tensor] | None:
    """Return the kernel for packed sequences of torch or of flash-attn, or None if both lack it.

    Both take the same arguments by position. The import takes half a second, so that it is done for
    GPUs only.
    """
    if torch.backends.cuda.is_flash_attention_available():
        with suppress(ImportError):
            from torch.nn.attention.varlen import varlen_attn

            # It returns a tuple only if auxiliary outputs are requested.
            return varlen_attn  # type: ignore[return-value]
    with suppress(ImportError):
        from flash_attn import flash_attn_varlen_func

        return flash_attn_varlen_func  # type: ignore[no-any-return]
    return None


def _attend_one_run(states: tuple[Tensor, ...], run: Run) -> Tensor:
    count, seqlen = run
    q, k, v = (x.view(count, seqlen, *x.shape[1:]).transpose(1, 2) for x in states)
    attended = attend_by_products(q, k, v) if products_are_faster(v) else None
    if attended is None:
        attended = F.scaled_dot_product_attention(q, k, v)
    return attended.transpose(1, 2).flatten(0, 1)


@lru_cache(maxsize=4)
def _rotary_table(head_dim: int, rows: int, device: torch.device) -> Tensor:
    # On the CPU, as in fair-esm: powers differ in their last bits between devices, and the
    # differences grow with the position.
    frequencies = 1.0 / 10000 ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    angles = torch.outer(torch.arange(rows, dtype=torch.float32), frequencies)
    return torch.complex(angles.cos(), angles.sin()).to(device)
