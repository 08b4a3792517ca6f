"""Plots of a report: each function takes numbers and returns an SVG as a `data:` URL.

Equal numbers give equal bytes. The colours are from the palettes of Okabe and Ito, and of Tol,
which colour-blind readers can distinguish.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.dates import AutoDateLocator, ConciseDateFormatter
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator
from numpy.typing import NDArray

from vnp_lib.failures import FailureKind
from vnp_lib.run import Attempt, CheckpointEntry, Ending

COLOURS = {
    Ending.DONE: "#009e73",
    Ending.RUNNING: "#0072b2",
    Ending.STOPPED: "#b0b7bf",
    FailureKind.SPOT_PREEMPTION: "#56b4e9",
    FailureKind.OOM: "#e69f00",
    FailureKind.POISON_INPUT: "#cc79a7",
    FailureKind.TRANSIENT: "#d55e00",
    Ending.FAILED: "#d55e00",
    Ending.LOST: "#3e4c59",
}

_BAR = "#0072b2"
_INK = "#1f2933"
_DIM = "#616e7c"
# Tol's muted palette: the colour of a shard must not be mistaken for that of an outcome.
_SHARD_COLOURS = (
    "#332288",
    "#44aa99",
    "#cc6677",
    "#ddcc77",
    "#88ccee",
    "#882255",
    "#117733",
    "#999933",
)
_MOST_POINTS = 300  # per line
# Markers dominate the size of an SVG, so that many of them are left out.
_MOST_MARKERS = 600  # on all lines
_MOST_LABELS = 20  # shards
# With more rows, one tick per checkpoint is noise.
_MOST_TICKED_SHARDS = 60
_WIDTH, _HALF_WIDTH = 10.0, 5.0  # inches
_STYLE = {
    "svg.hashsalt": "vnp",
    "svg.fonttype": "none",
    "font.size": 9.5,
    "axes.edgecolor": "#cbd2d9",
    "axes.labelcolor": _DIM,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": "#e4e7eb",
    "xtick.color": _DIM,
    "ytick.color": _DIM,
    "text.color": _INK,
    "legend.frameon": False,
}


def attempts_over_time(attempts: Sequence[Attempt], ranks: Sequence[int]) -> str | None:
    """Draw one bar per attempt in the row of its shard, coloured by outcome.

    A tick marks each checkpoint. Returns None if there is no attempt.
    """
    if not attempts:
        return None
    rows = {rank: row for row, rank in enumerate(ranks)}
    height = min(9.0, 1.3 + max(0.11, 0.34 - 0.002 * len(ranks)) * len(ranks))
    with _drawn(_WIDTH, height) as (axes, drawn):
        start, end = _span(attempts)
        by_colour: dict[str, list[Attempt]] = {}
        for attempt in attempts:
            colour = COLOURS[_outcome(attempt)]  # type: ignore[index]
            by_colour.setdefault(colour, []).append(attempt)
        for colour, own in by_colour.items():
            starts = _days([attempt.started_at for attempt in own])
            days = np.array([attempt.duration.total_seconds() / 86_400 for attempt in own])
            axes.barh(
                [rows[attempt.rank] for attempt in own],
                np.maximum(days, (end - start) / 300),
                left=starts,
                height=0.72,
                color=colour,
                linewidth=0,
            )
        points = [
            (each.at, rows[attempt.rank])
            for attempt in attempts
            for each in _thinned(attempt.checkpoints)
        ]
        if points and len(ranks) <= _MOST_TICKED_SHARDS:
            places = np.array([row for _, row in points])
            axes.vlines(
                _days([at for at, _ in points]),
                places - 0.22,
                places + 0.22,
                color="white",
                linewidth=0.7,
                alpha=0.8,
            )
        axes.set_ylim(len(ranks) - 0.4, -0.6)
        labelled = range(0, len(ranks), -(-len(ranks) // _MOST_LABELS))
        axes.set_yticks(labelled, [str(ranks[row]) for row in labelled])
        axes.set_ylabel("shard")
        axes.grid(axis="x")
        _dates(axes, attempts)
        used = [
            (name, colour)
            for name, colour in COLOURS.items()
            if name in {_outcome(each) for each in attempts}
        ]
        _legend(axes, [Patch(color=colour, label=name.replace("_", " ")) for name, colour in used])
        return drawn()


def speed_over_time(attempts: Sequence[Attempt]) -> str | None:
    """Draw the tokens per second of each checkpoint; None without checkpoints.

    There is one line per attempt.
    """
    with_checkpoints = [attempt for attempt in attempts if attempt.checkpoints]
    if not with_checkpoints:
        return None
    ranks = sorted({attempt.rank for attempt in with_checkpoints})
    is_few = len(ranks) <= len(_SHARD_COLOURS)
    has_markers = sum(len(attempt.checkpoints) for attempt in with_checkpoints) <= _MOST_MARKERS
    with _drawn(_WIDTH, 2.9) as (axes, drawn):
        for attempt in with_checkpoints:
            points = _thinned(attempt.checkpoints)
            colour = _SHARD_COLOURS[ranks.index(attempt.rank)] if is_few else _BAR
            axes.plot(
                _days([point.at for point in points]),
                [point.tokens_per_s for point in points],
                color=colour,
                linewidth=1.5 if is_few else 0.7,
                alpha=1.0 if is_few else 0.35,
                marker="o" if has_markers else "",
                markersize=3,
            )
        axes.set_ylim(bottom=0)
        axes.set_ylabel("tokens/s")
        axes.yaxis.set_major_formatter(_THOUSANDS)
        axes.grid(axis="y")
        _dates(axes, attempts)
        if is_few:
            _legend(
                axes,
                [
                    Patch(color=_SHARD_COLOURS[i], label=f"shard {rank}")
                    for i, rank in enumerate(ranks)
                ],
            )
        else:
            axes.set_title(
                f"each line is one of {len(ranks)} shards", loc="right", fontsize=9, color=_DIM
            )
        return drawn()


def lengths_histogram(lengths: NDArray[np.int32]) -> str | None:
    """Draw the distribution of sequence lengths, in residues; None without sequences."""
    if not lengths.size:
        return None
    bins = np.unique(np.geomspace(max(1, lengths.min()), lengths.max() + 1, 41).astype(int))
    return _histogram(
        lengths,
        bins if bins.size > 1 else np.array([bins[0], bins[0] + 1]),
        "residues",
        "sequences",
        is_log=True,
    )


def fill_histogram(batch_tokens: NDArray[np.int64], token_budget: int) -> str | None:
    """Draw how full batches are; None without batches.

    A batch over the budget, of one long sequence, counts as full.
    """
    if not batch_tokens.size:
        return None
    percent = 100.0 * np.minimum(batch_tokens / token_budget, 1.0)
    return _histogram(percent, np.linspace(0, 100, 41), f"% of {token_budget:,} tokens", "batches")


def checkpoint_sizes(sizes_bytes: Sequence[int]) -> str | None:
    """Draw the distribution of checkpoint sizes; None without checkpoints."""
    if not sizes_bytes:
        return None
    unit, unit_bytes = ("MB", 1e6) if max(sizes_bytes) >= 1e6 else ("kB", 1e3)
    values = np.array(sizes_bytes) / unit_bytes
    bins = np.linspace(0, values.max() * 1.02, 51)
    return _histogram(values, bins, unit, "checkpoints", width=_WIDTH, height=2.3)


def colour_of(kind: str) -> str:
    """Return the colour of a failure kind, as in `attempts_over_time`."""
    return COLOURS.get(kind, COLOURS[Ending.LOST])  # type: ignore[call-overload, no-any-return]


_THOUSANDS = FuncFormatter(lambda value, _: f"{value:,.0f}")


def _histogram(
    values: NDArray[Any],
    bins: NDArray[Any],
    xlabel: str,
    ylabel: str,
    *,
    is_log: bool = False,
    width: float = _HALF_WIDTH,
    height: float = 2.7,
) -> str:
    counts, edges = np.histogram(values, bins=bins)
    with _drawn(width, height) as (axes, drawn):
        axes.bar(
            edges[:-1],
            counts,
            width=np.diff(edges),
            align="edge",
            color=_BAR,
            edgecolor="white",
            linewidth=0.5,
        )
        if is_log:
            axes.set_xscale("log")
            axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
            axes.xaxis.set_major_formatter(_THOUSANDS)
            axes.xaxis.set_minor_locator(NullLocator())
        axes.set_xlabel(xlabel)
        axes.set_ylabel(ylabel)
        axes.yaxis.set_major_locator(MaxNLocator(nbins=5, integer=True))
        axes.yaxis.set_major_formatter(_THOUSANDS)
        axes.grid(axis="y")
        return drawn()


@contextmanager
def _drawn(width: float, height: float) -> Iterator[tuple[Axes, Callable[[], str]]]:
    """Yield axes to draw on, and a function that returns the drawing as a `data:` URL."""
    with matplotlib.rc_context():
        # The user's matplotlibrc is for the user's own plots.
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_STYLE)  # type: ignore[arg-type]
        figure = Figure(figsize=(width, height), layout="constrained")

        def drawn() -> str:
            out = io.BytesIO()
            figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None})
            return "data:image/svg+xml;base64," + base64.b64encode(out.getvalue()).decode("ascii")

        yield figure.subplots(), drawn


def _outcome(attempt: Attempt) -> str:
    """Return the key of an attempt's colour: the failure kind if known, else how it ended."""
    return attempt.kind if attempt.kind in COLOURS else attempt.ending


def _days(times: Iterable[datetime]) -> NDArray[np.float64]:
    """Convert times to days since 1970, Matplotlib's unit."""
    return np.array([time.timestamp() / 86_400 for time in times])


def _span(attempts: Sequence[Attempt]) -> tuple[float, float]:
    """Return the first start and the last end, in days."""
    start, end = _days(
        [min(each.started_at for each in attempts), max(each.ended_at for each in attempts)]
    )
    return start, max(end, start + 1 / 86_400)


def _thinned(checkpoints: Sequence[CheckpointEntry]) -> Sequence[CheckpointEntry]:
    return checkpoints[:: -(-len(checkpoints) // _MOST_POINTS) or 1]


def _dates(axes: Axes, attempts: Sequence[Attempt]) -> None:
    """Set a time axis from the first start to the last end, the same in all plots of a run."""
    start, end = _span(attempts)
    margin = (end - start) / 60
    axes.set_xlim(start - margin, end + margin)
    # With the default of at least 5 ticks, the locator finds no step for spans just below
    # 5 minutes, hours or days, and warns.
    locator = AutoDateLocator(tz=UTC, minticks=3, maxticks=9)  # type: ignore[no-untyped-call]
    axes.xaxis_date(tz=UTC)
    axes.xaxis.set_major_locator(locator)
    formatter = ConciseDateFormatter(locator, tz=UTC)  # type: ignore[no-untyped-call]
    axes.xaxis.set_major_formatter(formatter)
    axes.set_xlabel("UTC", loc="left")


def _legend(axes: Axes, handles: list[Patch]) -> None:
    axes.legend(
        handles=handles,
        loc="lower left",
        bbox_to_anchor=(0.0, 1.0),
        ncols=min(len(handles), 8),
        handlelength=1.0,
        handleheight=0.9,
        columnspacing=1.4,
        borderaxespad=0.2,
    )
