"""What a person sees while it runs."""

from __future__ import annotations

import io

from rich.console import Console

from vnp_lib.progress import RunProgress, format_duration


class Clock:
    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def lines_of(clock: Clock, *, steps: int, step_s: float) -> list[str]:
    out = io.StringIO()
    console = Console(file=out, force_terminal=False, width=120)
    with RunProgress(
        total_sequences=100, total_tokens=10_000, log_interval_s=30.0, console=console, clock=clock
    ) as progress:
        for _ in range(steps):
            clock.now_s += step_s
            progress.advance(0, sequences=1, tokens=100)
    return out.getvalue().splitlines()


def test_without_a_terminal_a_line_comes_every_interval():
    lines = lines_of(Clock(), steps=60, step_s=1.0)
    assert lines == [
        "30 of 100 sequences (30%), 100 tokens/s, 0:01:10 left",
        "60 of 100 sequences (60%), 100 tokens/s, 0:00:40 left",
    ]


def test_resumed_work_shortens_the_way_but_is_no_speed():
    clock = Clock()
    progress = RunProgress(total_sequences=100, total_tokens=10_000, console=Console(file=io.StringIO()), clock=clock)
    progress.begin(0, sequences=50, tokens=5_000)
    assert progress.describe() == "50 of 100 sequences (50%)"
    for _ in range(11):
        clock.now_s += 1.0
        progress.advance(0, sequences=1, tokens=100)
    assert progress.tokens_per_s() == 100.0
    assert progress.describe() == "61 of 100 sequences (61%), 100 tokens/s, 0:00:39 left"


def test_what_an_attempt_lost_is_not_counted_twice():
    """A child computed 30 sequences and was killed with 20 of them in checkpoints; the next one begins at 20."""
    progress = RunProgress(total_sequences=100, total_tokens=10_000, console=Console(file=io.StringIO()))
    progress.begin(0, sequences=0, tokens=0)
    progress.begin(1, sequences=10, tokens=1_000)
    progress.advance(0, sequences=30, tokens=3_000)
    progress.begin(0, sequences=20, tokens=2_000)
    assert progress.describe().startswith("30 of 100 sequences (30%)")


def test_a_terminal_gets_a_bar():
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=100)
    with RunProgress(total_sequences=2, total_tokens=20, console=console) as progress:
        progress.advance(0, sequences=1, tokens=10)
    assert "of 2 sequences" in out.getvalue()


def test_nothing_to_do_is_all_done():
    progress = RunProgress(total_sequences=0, total_tokens=0, console=Console(file=io.StringIO()))
    assert progress.describe() == "0 of 0 sequences (100%)"


def test_durations_are_hours_minutes_seconds():
    assert [format_duration(s) for s in (0.4, 59.6, 3725)] == ["0:00:00", "0:01:00", "1:02:05"]
