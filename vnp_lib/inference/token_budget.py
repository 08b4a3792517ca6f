"""Adaptive token limit of a forward pass."""

from __future__ import annotations

import sys
from collections.abc import Callable

_CLEAN_PASSES = 50  # before more is dared again


class TokenBudget:
    """Most tokens of a forward pass, as memory has taught it: half where they did not fit, slowly more after that."""

    def __init__(
        self,
        limit: int = sys.maxsize,
        tokens: int | None = None,
        *,
        on_change: Callable[[int], None] = lambda _: None,
        is_pinned: bool = False,
    ) -> None:
        """Begin at `tokens`, by default at the limit, which is never exceeded. One that is pinned stays at the limit."""
        self.tokens = limit if tokens is None or is_pinned else min(tokens, limit)
        self.is_pinned = is_pinned
        self._limit = limit
        self._on_change = on_change
        self._clean_passes = 0

    def shrink(self, num_tokens: int) -> None:
        """Take note that so many tokens did not fit into memory."""
        self._set(max(1, num_tokens // 2))

    def grow(self) -> None:
        """Count a pass that went well. After 50 of them the budget grows by a quarter."""
        self._clean_passes += 1
        if self.tokens < self._limit and self._clean_passes >= _CLEAN_PASSES:
            self._set(min(self._limit, self.tokens + max(1, self.tokens // 4)))

    def _set(self, tokens: int) -> None:
        self.tokens = tokens
        self._clean_passes = 0
        self._on_change(tokens)
