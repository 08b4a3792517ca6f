"""Attention on a CPU for short sequences: two matrix products with powers of two between them.

For sequences of up to some hundred tokens, torch's own kernel spends more time between its small
products than in them.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

# Many products that are smaller than this are not faster.
_SHORTEST = 48  # tokens

# The scores of one head, (L, L), are all in memory at once.
_LONGEST = {torch.float32: 256, torch.bfloat16: 1024}  # tokens

# 1 MiB in float32, so that the scores stay in the cache of a core between the products.
_SCORES_AT_ONCE = 1 << 18

# The largest float32 number is 2**128.
_SAFE_SUM = 2.0**90


def products_are_faster(states: Tensor) -> bool:
    """Whether `attend_by_products` is faster than torch's kernel for sequences (B, H, L, D).

    This is measured in benchmarks/README.md. With more than one thread it is never faster: its
    products are too small to be divided between threads.
    """
    if states.device.type != "cpu" or torch.get_num_threads() > 1:
        return False
    return _SHORTEST <= states.shape[2] <= _LONGEST.get(states.dtype, 0)


def attend_by_products(q: Tensor, k: Tensor, v: Tensor) -> Tensor | None:
    """Compute softmax(q k^T / sqrt(D)) v for sequences of equal length.

    Scores and softmax are float32. The softmax is 2**x divided by its sum, with log2(e) in the
    scores, and without first subtracting the maximum of the row: a power of two takes a fifth of
    the time of torch's softmax. This is as exact while the sums are far from the limits of float32.

    Args:
        q, k, v: Queries, keys and values, (B, H, L, D), of any strides, each head contiguous.

    Returns:
        The attended values, (B, H, L, D), in memory (B, L, H, D); None if a sum is too close to the
        limits, or not finite.
    """
    count, heads, seqlen, head_dim = q.shape
    attended = v.new_empty(count, seqlen, heads, head_dim).transpose(1, 2)
    sums = torch.empty(count, heads, seqlen, 1)
    heads_at_once = min(heads, max(1, _SCORES_AT_ONCE // seqlen**2))
    scores = torch.empty(heads_at_once, seqlen, seqlen)
    for sequence in zip(q, k, v, attended, sums, strict=True):
        for some_heads in zip(*(states.split(heads_at_once) for states in sequence), strict=True):
            _attend(*some_heads, scores=scores[: len(some_heads[0])])
    # Both comparisons are false if a sum is NaN.
    least, most = sums.aminmax()
    return attended if least > 1 / _SAFE_SUM and most < _SAFE_SUM else None


def _attend(
    q: Tensor, k: Tensor, v: Tensor, attended: Tensor, sums: Tensor, *, scores: Tensor
) -> None:
    """Compute some heads of one sequence: fill `attended`, (H, L, D), and `sums`, (H, L, 1).

    The contents of `scores`, (H, L, L), are overwritten.
    """
    scores.baddbmm_(
        q.float(), k.float().mT, beta=0, alpha=math.log2(math.e) / math.sqrt(q.shape[-1])
    )
    weights = scores.exp2_()
    torch.sum(weights, dim=-1, keepdim=True, out=sums)
    torch.div(torch.bmm(weights.to(v.dtype), v), sums, out=attended)
