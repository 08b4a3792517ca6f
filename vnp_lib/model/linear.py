"""Linear layers over packed tokens, on a CPU by the faster of two libraries of torch."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_TRIALS = 5
_TOKENS, _WIDTH = 1024, 640


class Linear(nn.Linear):
    """Multiplies tokens, (T, in_features), directly or by a convolution."""

    def __init__(self, in_features: int, out_features: int, *, by_convolution: bool) -> None:
        super().__init__(in_features, out_features)
        self.by_convolution = by_convolution

    def forward(self, x: Tensor) -> Tensor:
        if self.by_convolution:
            return convolved(x, self.weight, self.bias)
        return super().forward(x)


def convolved(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Return `x @ weight.T + bias`, (T, out_features), as a 1 x 1 convolution over the tokens.

    No view copies. torch computes convolutions with oneDNN, which uses AVX-512 on every CPU that
    has it, and matrix products with MKL, which uses it on Intel CPUs only. The dilation has no
    effect on a kernel of one pixel, but without it torch computes a convolution with one thread
    itself, at the speed of MKL.
    """
    pixels = x[None, None].permute(0, 3, 1, 2)
    return F.conv2d(pixels, weight[..., None, None], bias, dilation=2).permute(0, 2, 3, 1)[0, 0]


@cache
def convolution_is_faster() -> bool:
    """Measure both ways on this machine, in float32, with the present number of threads.

    This takes 0.3 to 0.5 s. With smaller products the result is often wrong on a busy machine.
    """
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    x, weight, bias = (
        torch.rand(_TOKENS, _WIDTH),
        torch.rand(4 * _WIDTH, _WIDTH),
        torch.rand(4 * _WIDTH),
    )
    with torch.inference_mode():
        return _seconds(lambda: convolved(x, weight, bias)) < _seconds(
            lambda: F.linear(x, weight, bias)
        )


def _seconds(work: Callable[[], Tensor]) -> float:
    """Return the shortest of several trials: other programs can only make one longer."""
    work()
    durations = []
    for _ in range(_TRIALS):
        started_at = time.perf_counter()
        work()
        durations.append(time.perf_counter() - started_at)
    return min(durations)
