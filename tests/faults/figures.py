"""What the fault tests found, for the one table at the end of a run."""

from __future__ import annotations

from typing import NamedTuple


class Figure(NamedTuple):
    """One row of the table."""

    fault: str
    trials: int
    result: str


_figures: list[Figure] = []


def record_figure(fault: str, trials: int, result: str) -> None:
    """Put a row into the table. Called once all trials have passed: `result` says what held in all of them."""
    _figures.append(Figure(fault, trials, result))


def table() -> list[str]:
    """The rows recorded so far as aligned lines, in the order of their recording; none if there are none."""
    if not _figures:
        return []
    rows = [
        ("fault", "trials", "result"),
        *((fault, f"{trials:,}", result) for fault, trials, result in _figures),
    ]
    fault_width, trials_width, _ = (max(map(len, column)) for column in zip(*rows, strict=True))
    return [
        f"{fault:<{fault_width}} | {trials:>{trials_width}} | {result}"
        for fault, trials, result in rows
    ]
