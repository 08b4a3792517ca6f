"""Collect the results of the fault tests, for a table at the end of the session."""

from __future__ import annotations

from typing import NamedTuple


class Figure(NamedTuple):
    """One row of the table."""

    fault: str
    trials: int
    result: str


_figures: list[Figure] = []


def record_figure(fault: str, trials: int, result: str) -> None:
    """Add a row to the table. Call it after all trials have passed; `result` holds for all."""
    _figures.append(Figure(fault, trials, result))


def table() -> list[str]:
    """Return the rows as aligned lines, in the order of recording; no line without a row."""
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
