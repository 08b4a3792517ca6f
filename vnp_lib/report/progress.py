"""Show the progress of a run: a bar on a terminal, else a line every 30 seconds."""

from __future__ import annotations

import time
from collections.abc import Callable
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn

from vnp_lib.formatting import format_duration
from vnp_lib.terminal import error_console


class RunProgress:
    """Count embedded sequences and show them on standard error. Write errors are ignored.

    The bar and the time left are computed from tokens, because the longest sequences come first.
    The text gives sequences.
    """

    def __init__(
        self,
        *,
        total_sequences: int,
        total_tokens: int,
        log_interval_s: float = 30.0,
        console: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._total_sequences = total_sequences
        self._total_tokens = total_tokens
        self._log_interval_s = log_interval_s
        self._console = console or error_console()
        self._clock = clock
        self._done: dict[int, tuple[int, int]] = {}  # sequences and tokens, by shard
        self._measured_tokens = 0
        self._started_at: float | None = None
        self._newest_at = clock()  # end of the measured time
        self._next_line_at = clock() + log_interval_s
        self._bar: tuple[Progress, TaskID] | None = None

    def __enter__(self) -> RunProgress:
        if self._console.is_terminal or self._console.is_jupyter:
            bar = Progress(
                TextColumn("{task.description}"), BarColumn(), console=self._console, transient=True
            )
            self._bar = bar, bar.add_task(self.describe(), total=self._total_tokens)
            bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._bar:
            self._bar[0].stop()

    def begin(self, rank: int, *, sequences: int, tokens: int) -> None:
        """Set what is done of a shard as an attempt begins, without work that was lost before."""
        self._done[rank] = sequences, tokens
        self._show()

    def advance(self, rank: int, *, sequences: int, tokens: int) -> None:
        """Count a batch that was embedded here.

        Time counts from the first batch, so that loading the model does not lower the speed.
        """
        # The tokens of the first batch were computed before the measured time begins.
        if self._started_at is None:
            self._started_at = self._clock()
        else:
            self._measured_tokens += tokens
        self._newest_at = self._clock()
        done_sequences, done_tokens = self._done.get(rank, (0, 0))
        self._done[rank] = done_sequences + sequences, done_tokens + tokens
        self._show()

    def observe(self, rank: int, *, sequences: int, tokens: int) -> None:
        """Set what is in the checkpoints of a shard that is embedded on another machine.

        Time counts from the first call to the newest checkpoint: later work is not known here.
        """
        if self._started_at is None:
            self._started_at = self._clock()
        new_tokens = tokens - self._done.get(rank, (0, 0))[1]
        if new_tokens > 0:
            self._measured_tokens += new_tokens
            self._newest_at = self._clock()
        self._done[rank] = sequences, tokens
        self._show()

    def print_line(self, text: str) -> None:
        """Print a message on a line of its own."""
        self._console.print(text, highlight=False, markup=False)

    def describe(self) -> str:
        """Return one line: `600 of 1,200 sequences (50%), 5,400 tokens/s, 0:00:12 left`."""
        sequences, tokens = self._totals()
        share = tokens / self._total_tokens if self._total_tokens else 1.0
        line = f"{sequences:,} of {self._total_sequences:,} sequences ({share:.0%})"
        rate = self.tokens_per_s()
        if not rate:
            return line
        left = format_duration((self._total_tokens - tokens) / rate)
        return f"{line}, {rate:,.0f} tokens/s, {left} left"

    def tokens_per_s(self) -> float:
        """Return the mean rate since the first batch or observation; 0 if not known yet."""
        if self._started_at is None:
            return 0.0
        elapsed_s = self._newest_at - self._started_at
        return self._measured_tokens / elapsed_s if elapsed_s > 0 else 0.0

    def _totals(self) -> tuple[int, int]:
        return sum(done[0] for done in self._done.values()), sum(
            done[1] for done in self._done.values()
        )

    def _show(self) -> None:
        if self._bar:
            bar, task = self._bar
            bar.update(task, completed=self._totals()[1], description=self.describe())
        elif self._clock() >= self._next_line_at:
            self._next_line_at = self._clock() + self._log_interval_s
            self._console.print(self.describe(), highlight=False)
