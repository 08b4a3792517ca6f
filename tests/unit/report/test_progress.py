"""Tests of the progress display."""

from __future__ import annotations

import io

from rich.console import Console

from vnp_lib.formatting import format_duration
from vnp_lib.report.progress import RunProgress


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


def test_without_a_terminal_there_is_a_line_per_interval():
    lines = lines_of(Clock(), steps=60, step_s=1.0)
    assert lines == [
        "30 of 100 sequences (30%), 100 tokens/s, 0:01:10 left",
        "60 of 100 sequences (60%), 100 tokens/s, 0:00:40 left",
    ]


def test_observed_work_gives_a_line_per_interval_too():
    clock = Clock()
    out = io.StringIO()
    console = Console(file=out, force_terminal=False, width=120)
    progress = RunProgress(
        total_sequences=2, total_tokens=200, log_interval_s=30.0, console=console, clock=clock
    )
    for _ in range(35):
        clock.now_s += 1.0
        progress.observe(0, sequences=1, tokens=100)
    assert out.getvalue().splitlines() == ["1 of 2 sequences (50%)"]


def test_resumed_work_does_not_count_as_speed():
    clock = Clock()
    progress = RunProgress(
        total_sequences=100, total_tokens=10_000, console=Console(file=io.StringIO()), clock=clock
    )
    progress.begin(0, sequences=50, tokens=5_000)
    assert progress.describe() == "50 of 100 sequences (50%)"
    for _ in range(11):
        clock.now_s += 1.0
        progress.advance(0, sequences=1, tokens=100)
    assert progress.tokens_per_s() == 100.0
    assert progress.describe() == "61 of 100 sequences (61%), 100 tokens/s, 0:00:39 left"


def test_what_an_attempt_lost_is_not_counted_twice():
    """A worker is killed after 30 sequences with 20 in checkpoints; the next starts at 20."""
    progress = RunProgress(
        total_sequences=100, total_tokens=10_000, console=Console(file=io.StringIO())
    )
    progress.begin(0, sequences=0, tokens=0)
    progress.begin(1, sequences=10, tokens=1_000)
    progress.advance(0, sequences=30, tokens=3_000)
    progress.begin(0, sequences=20, tokens=2_000)
    assert progress.describe().startswith("30 of 100 sequences (30%)")


def test_observed_speed_counts_up_to_the_newest_checkpoint():
    """Two machines, read every 2 s, write 3,000 tokens at 60 and 62, and at 120 and 122 s."""
    clock = Clock()
    progress = RunProgress(
        total_sequences=400, total_tokens=40_000, console=Console(file=io.StringIO()), clock=clock
    )
    begun = {0: 5_000, 1: 1_000}
    for rank, tokens in begun.items():
        progress.begin(rank, sequences=tokens // 100, tokens=tokens)
    lines = {}
    while clock.now_s < 170.0:
        for rank, tokens in begun.items():
            num_checkpoints = int((clock.now_s - 2.0 * rank) // 60.0)
            tokens += 3_000 * max(0, num_checkpoints)
            progress.observe(rank, sequences=tokens // 100, tokens=tokens)
        lines[clock.now_s] = progress.describe()
        clock.now_s += 2.0
    assert lines[58.0] == "60 of 400 sequences (15%)"
    assert lines[60.0] == "90 of 400 sequences (22%), 50 tokens/s, 0:10:20 left"
    assert lines[62.0] == lines[118.0] == "120 of 400 sequences (30%), 97 tokens/s, 0:04:49 left"
    assert lines[122.0] == lines[168.0] == "180 of 400 sequences (45%), 98 tokens/s, 0:03:44 left"


def test_lost_rows_are_no_negative_speed():
    """A checkpoint was damaged: computing its rows again takes time, and counts."""
    clock = Clock()
    progress = RunProgress(
        total_sequences=100, total_tokens=10_000, console=Console(file=io.StringIO()), clock=clock
    )
    for now_s, tokens in ((0.0, 0), (10.0, 1_000), (20.0, 500), (30.0, 1_000)):
        clock.now_s = now_s
        progress.observe(0, sequences=tokens // 100, tokens=tokens)
    assert progress.tokens_per_s() == 50.0


def test_a_terminal_gets_a_bar():
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=100)
    with RunProgress(total_sequences=2, total_tokens=20, console=console) as progress:
        progress.advance(0, sequences=1, tokens=10)
    assert "of 2 sequences" in out.getvalue()


def test_a_message_has_its_own_line():
    """Brackets in it are not markup."""
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=100)
    with RunProgress(total_sequences=2, total_tokens=20, console=console) as progress:
        progress.print_line("shard 0 waits [/tmp/a]")
    assert "shard 0 waits [/tmp/a]\n" in out.getvalue()


def test_nothing_to_do_is_all_done():
    progress = RunProgress(total_sequences=0, total_tokens=0, console=Console(file=io.StringIO()))
    assert progress.describe() == "0 of 0 sequences (100%)"


def test_durations_are_hours_minutes_seconds():
    assert [format_duration(s) for s in (0.4, 59.6, 3725)] == ["0:00:00", "0:01:00", "1:02:05"]
