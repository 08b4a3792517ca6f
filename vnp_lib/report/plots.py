"""The pictures of a report: numbers in, a self-contained `data:` address of an SVG out.

Equal numbers give equal bytes. The colours are Okabe's and Ito's, and Tol's, which colour-blind people tell apart too.
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
# Tol's muted ones: a shard's colour is not to be taken for that of an outcome.
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
_MOST_POINTS = 300  # of a line
_MOST_DOTS = 600  # on all lines: they are what makes a file large
_MOST_LABELS = 20  # of shards
_TICKED_SHARDS = 60  # in more rows a tick for each checkpoint is noise
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
    """A bar for each attempt in the row of its shard, coloured by how it ended, with a tick for each checkpoint."""
    if not attempts:
        return None
    rows = {rank: row for row, rank in enumerate(ranks)}
    height = min(9.0, 1.3 + max(0.11, 0.34 - 0.002 * len(ranks)) * len(ranks))
    with _drawn(_WIDTH, height) as (axes, drawn):
        start, end = _span(attempts)
        for colour, own in _by_colour(attempts).items():
            starts = _days([attempt.started_at for attempt in own])
            days = np.array([attempt.duration.total_seconds() / 86_400 for attempt in own])
            places = [rows[attempt.rank] for attempt in own]
            axes.barh(
                places,
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
        if points and len(ranks) <= _TICKED_SHARDS:
            axes.vlines(*_ticks(points), color="white", linewidth=0.7, alpha=0.8)
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
    """Tokens per second of each checkpoint, a line for each shard, interrupted between attempts."""
    with_checkpoints = [attempt for attempt in attempts if attempt.checkpoints]
    if not with_checkpoints:
        return None
    ranks = sorted({attempt.rank for attempt in with_checkpoints})
    is_few = len(ranks) <= len(_SHARD_COLOURS)
    has_dots = sum(len(attempt.checkpoints) for attempt in with_checkpoints) <= _MOST_DOTS
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
                marker="o" if has_dots else "",
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
    """How many sequences have which length, in residues."""
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
    """How full batches are of their budget; a sequence that is longer than it fills more than all of it."""
    if not batch_tokens.size:
        return None
    percent = 100.0 * np.minimum(batch_tokens / token_budget, 1.0)
    return _histogram(percent, np.linspace(0, 100, 41), f"% of {token_budget:,} tokens", "batches")


def checkpoint_sizes(sizes_bytes: Sequence[int]) -> str | None:
    """How large checkpoints are."""
    if not sizes_bytes:
        return None
    unit, unit_bytes = ("MB", 1e6) if max(sizes_bytes) >= 1e6 else ("kB", 1e3)
    values = np.array(sizes_bytes) / unit_bytes
    bins = np.linspace(0, values.max() * 1.02, 51)
    return _histogram(values, bins, unit, "checkpoints", width=_WIDTH, height=2.3)


def colour_of(kind: str) -> str:
    """Of a failure's kind, as in `attempts_over_time`."""
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
    """Axes to draw on, and a function that gives the picture then."""
    with matplotlib.rc_context():
        matplotlib.rcdefaults()  # a matplotlibrc of the user's is for the user's pictures
        matplotlib.rcParams.update(_STYLE)  # type: ignore[arg-type]
        figure = Figure(figsize=(width, height), layout="constrained")

        def drawn() -> str:
            out = io.BytesIO()
            figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None})
            return "data:image/svg+xml;base64," + base64.b64encode(out.getvalue()).decode("ascii")

        yield figure.subplots(), drawn


def _outcome(attempt: Attempt) -> str:
    """What its colour says: what went wrong, or else how it ended."""
    return attempt.kind if attempt.kind in COLOURS else attempt.ending


def _by_colour(attempts: Sequence[Attempt]) -> dict[str, list[Attempt]]:
    groups: dict[str, list[Attempt]] = {}
    for attempt in attempts:
        groups.setdefault(COLOURS[_outcome(attempt)], []).append(attempt)  # type: ignore[index]
    return groups


def _days(times: Iterable[datetime]) -> NDArray[np.float64]:
    """Matplotlib's measure of time."""
    return np.array([time.timestamp() / 86_400 for time in times])


def _span(attempts: Sequence[Attempt]) -> tuple[float, float]:
    """The first start and the last end, in Matplotlib's days."""
    start, end = _days(
        [min(each.started_at for each in attempts), max(each.ended_at for each in attempts)]
    )
    return start, max(end, start + 1 / 86_400)


def _ticks(
    points: Sequence[tuple[datetime, int]],
) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
    rows = np.array([row for _, row in points])
    return _days([at for at, _ in points]), rows - 0.22, rows + 0.22


def _thinned(checkpoints: Sequence[CheckpointEntry]) -> Sequence[CheckpointEntry]:
    return checkpoints[:: -(-len(checkpoints) // _MOST_POINTS) or 1]


def _dates(axes: Axes, attempts: Sequence[Attempt]) -> None:
    """Time from the first start to the last end, the same in all pictures of a run."""
    start, end = _span(attempts)
    margin = (end - start) / 60
    axes.set_xlim(start - margin, end + margin)
    # With at least 5 ticks, as it comes, it has no fitting step for spans just below 5 minutes, hours or days, and warns.
    locator = AutoDateLocator(tz=UTC, minticks=3, maxticks=9)  # type: ignore[no-untyped-call]
    axes.xaxis_date(tz=UTC)
    axes.xaxis.set_major_locator(locator)
    axes.xaxis.set_major_formatter(ConciseDateFormatter(locator, tz=UTC))  # type: ignore[no-untyped-call]
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
