"""Adaptive token limit: halved on out-of-memory, raised by 25 % after 50 clean passes."""

from __future__ import annotations

import sys
from collections.abc import Callable

# The token budget of a CPU, where larger batches are not faster.
CPU_TOKEN_BUDGET = 2048

_CLEAN_PASSES = 50


class TokenBudget:
    """Adaptive limit on the tokens of a forward pass.

    Args:
        limit: The largest value, which is never exceeded.
        tokens: The first value, by default the limit.
        on_change: Called with each new value.
        is_pinned: Whether the value stays at the limit.
    """

    def __init__(
        self,
        limit: int = sys.maxsize,
        tokens: int | None = None,
        *,
        on_change: Callable[[int], None] = lambda _: None,
        is_pinned: bool = False,
    ) -> None:
        self.tokens = limit if tokens is None or is_pinned else min(tokens, limit)
        self.is_pinned = is_pinned
        self._limit = limit
        self._on_change = on_change
        self._clean_passes = 0

    def shrink(self, num_tokens: int) -> None:
        """Note that this number of tokens did not fit into memory."""
        self._set(max(1, num_tokens // 2))

    def grow(self) -> None:
        """Note a clean pass. After 50 of them the budget grows by a quarter."""
        self._clean_passes += 1
        if self.tokens < self._limit and self._clean_passes >= _CLEAN_PASSES:
            self._set(min(self._limit, self.tokens + max(1, self.tokens // 4)))

    def _set(self, tokens: int) -> None:
        self.tokens = tokens
        self._clean_passes = 0
        self._on_change(tokens)
