"""Figures with goals: how a benchmark prints them, and where it keeps them."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, Self


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """A measured value, and its goal where it has one."""

    what: str
    value: float
    unit: str
    goal: float | None = None
    kind: Literal["most", "least"] = "most"

    @classmethod
    def at_most(cls, what: str, value: float, goal: float, unit: str) -> Self:
        return cls(what=what, value=value, unit=unit, goal=goal)

    @classmethod
    def at_least(cls, what: str, value: float, goal: float, unit: str) -> Self:
        return cls(what=what, value=value, unit=unit, goal=goal, kind="least")

    @property
    def is_met(self) -> bool | None:
        if self.goal is None:
            return None
        return self.value <= self.goal if self.kind == "most" else self.value >= self.goal

    def line(self) -> str:
        goal = "" if self.goal is None else f"at {self.kind} {self.goal:,g}"
        verdict = {None: "", True: "met", False: "NOT met"}[self.is_met]
        return (
            f"{self.what:62} {_short(self.value):>12} {self.unit:18} {goal:20} {verdict}".rstrip()
        )


def report(name: str, figures: Iterable[Figure]) -> None:
    """Print the figures as a table, and save them in `results/<date>-<machine>-<name>.json`."""
    from benchmarks.hardware import (
        cpu_name,
        describe_machine,
        results_path,
    )  # imports torch: see overhead.py
    from benchmarks.results import write_json

    print(f"{'figure':62} {'value':>12} {'unit':18} {'goal':20}", flush=True)
    shown = []
    for figure in figures:
        print(figure.line(), flush=True)
        shown.append(figure)
    path = results_path(f"{cpu_name()}-{name}")
    write_json(
        path,
        {
            "machine": describe_machine(),
            "figures": [asdict(f) | {"is_met": f.is_met} for f in shown],
        },
    )
    print(f"kept in {path}; load of the last minute {os.getloadavg()[0]:.1f}")


def peak_mb() -> float:
    """Return this process's peak memory; `getrusage` would include that before exec."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 / 1e6 for line in lines if line.startswith("VmHWM"))


def _short(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
