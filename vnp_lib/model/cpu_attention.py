"""Attention on a CPU as two matrix products with powers of two between them, for sequences of up to some hundred tokens.

There torch's own kernel takes longer for what lies between its small products than for them.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

_SHORTEST = 48  # tokens; below, the many small products are no faster
_LONGEST = {
    torch.float32: 256,
    torch.bfloat16: 1024,
}  # tokens; the scores of one head, L * L, are all in memory at a time
_SCORES_AT_ONCE = (
    1 << 18
)  # 1 MiB in float32: what lies between the products stays in a core's cache
_SAFE_SUM = 2.0**90  # float32 ends at 2**128


def products_are_faster(states: Tensor) -> bool:
    """Whether `attend_by_products` is faster than torch's kernel for sequences like these, (B, H, L, D).

    As measured in benchmarks/README.md. With more than one thread it is not: its products are too small to be shared.
    """
    if states.device.type != "cpu" or torch.get_num_threads() > 1:
        return False
    return _SHORTEST <= states.shape[2] <= _LONGEST.get(states.dtype, 0)


def attend_by_products(q: Tensor, k: Tensor, v: Tensor) -> Tensor | None:
    """Compute softmax(q k^T / sqrt(D)) v for sequences of equal length, scores and their softmax in float32.

    The softmax is 2**x over its sum, with log2(e) in the scores, and without the row's maximum subtracted first: a power of
    two costs a fifth of torch's softmax. Nothing is lost by it as long as the sums are far from where float32 ends.

    Args:
        q, k, v: Queries, keys and values, (B, H, L, D), in any order in memory, each head contiguous.

    Returns:
        The attended values, (B, H, L, D), in memory (B, L, H, D); None where a sum is not far enough, or not finite.
    """
    count, heads, seqlen, head_dim = q.shape
    attended = v.new_empty(count, seqlen, heads, head_dim).transpose(1, 2)
    sums = torch.empty(count, heads, seqlen, 1)
    heads_at_once = min(heads, max(1, _SCORES_AT_ONCE // seqlen**2))
    scores = torch.empty(heads_at_once, seqlen, seqlen)
    for sequence in zip(q, k, v, attended, sums, strict=True):
        for some_heads in zip(*(states.split(heads_at_once) for states in sequence), strict=True):
            _attend(*some_heads, scores=scores[: len(some_heads[0])])
    least, most = sums.aminmax()
    return (
        attended if least > 1 / _SAFE_SUM and most < _SAFE_SUM else None
    )  # not so where one is NaN


def _attend(
    q: Tensor, k: Tensor, v: Tensor, attended: Tensor, sums: Tensor, *, scores: Tensor
) -> None:
    """Fill `attended`, (H, L, D), and `sums`, (H, L, 1), of some heads of one sequence; `scores`, (H, L, L), is room."""
    scores.baddbmm_(
        q.float(), k.float().mT, beta=0, alpha=math.log2(math.e) / math.sqrt(q.shape[-1])
    )
    weights = scores.exp2_()
    torch.sum(weights, dim=-1, keepdim=True, out=sums)
    torch.div(torch.bmm(weights.to(v.dtype), v), sums, out=attended)
