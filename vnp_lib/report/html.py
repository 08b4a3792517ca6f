"""Write report.html: the history and state of a run on one page without scripts or network.

It can be written at any time, also during a run, and then shows the state of that moment.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader

from vnp_lib.errors import StorageError
from vnp_lib.formatting import format_bytes, format_duration, printable, utc_now
from vnp_lib.plan import NUM_SPECIAL_TOKENS, RunPaths, RunPlan, describe_input, packed_tokens
from vnp_lib.report.readers import read_quarantine, read_shards
from vnp_lib.report.status import RunStatus, read_status
from vnp_lib.run import Attempt, read_attempts
from vnp_lib.storage import write_file

_MOST_ROWS = 200  # per table


def write_report(
    plan: RunPlan, paths: RunPaths, *, clock: Callable[[], datetime] = utc_now
) -> Path:
    """Write the page from the run's records, durably, over an earlier page, and return its path.

    Equal records give equal pages, except for the time of writing. A record that cannot be read
    becomes a note on the page.

    Raises:
        StorageError: If the page cannot be written.
    """
    page = render_report(plan, paths, clock=clock)
    try:
        write_file(paths.report, page.encode("utf-8", "replace"), replace=True)
    except OSError as error:
        raise StorageError(
            f"{paths.report} cannot be written: {error.strerror or error}"
        ) from error
    return paths.report


@contextmanager
def _quiet_matplotlib() -> Iterator[None]:
    """Suppress Matplotlib's messages about caches, fonts and settings: they help no reader."""
    logger = logging.getLogger("matplotlib")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    finally:
        logger.setLevel(level)


@_quiet_matplotlib()
def render_report(
    plan: RunPlan, paths: RunPaths, *, clock: Callable[[], datetime] = utc_now
) -> str:
    """Return the page as HTML.

    Raises:
        StorageError: If Matplotlib cannot be used.
    """
    try:
        # Matplotlib takes a second to import. It raises OSError if its cache has no directory, and
        # ValueError if MPLBACKEND does not exist.
        from vnp_lib.report import plots
    except (ImportError, OSError, ValueError) as error:
        message = " ".join(str(error).split())
        raise StorageError(
            f"Matplotlib cannot be used, so no report can be drawn: {message}"
        ) from error

    status = read_status(plan, paths, clock=clock)
    # The status has notes on a manifest or a quarantine that cannot be read.
    recorded, _ = read_shards(paths)
    quarantined = read_quarantine(plan, paths)[0] or []
    ranks = sorted(
        {*range(plan.num_shards), *(rank for rank, shard in recorded.items() if shard.attempts)}
    )
    failures_by_rank = {
        rank: list(recorded[rank].failures) if rank in recorded else [] for rank in ranks
    }
    attempts = [
        attempt
        for rank, records in failures_by_rank.items()
        for attempt in read_attempts(paths, rank, records)
    ]
    failures = sorted(
        ((record, rank) for rank, records in failures_by_rank.items() for record in records),
        key=lambda each: str(each[0].get("at")),
    )
    sizes_bytes = []
    for marker in sorted(paths.checkpoints_dir.glob("shard_*/batch_*.pt.done")):
        # A running worker process may move a damaged checkpoint away in the meantime.
        with suppress(FileNotFoundError):
            sizes_bytes.append(marker.with_suffix("").stat().st_size)
    batch_tokens = np.concatenate(
        [
            packed_tokens(
                plan.lengths[plan.shard_ordinals(rank)] + NUM_SPECIAL_TOKENS, plan.token_budget
            )
            for rank in range(plan.num_shards)
        ]
    )
    # Ids and messages were written by others: no control characters, none that change direction.
    environment = Environment(
        loader=PackageLoader("vnp_lib.report", "."),
        autoescape=True,
        finalize=lambda value: (
            "\n".join(map(printable, value.split("\n"))) if type(value) is str else value
        ),
    )
    return environment.get_template("report.html.jinja").render(
        title=f"{plan.identity['model']}, {plan.num_sequences:,} sequences",
        written_at=f"{status.at:%Y-%m-%d %H:%M:%S} UTC",
        running="Not running." if status.running is None else f"Running: {status.running}.",
        input=describe_input(status.input, paths),
        tiles=list(_tiles(status, attempts, sizes_bytes, num_failures=len(failures))),
        notes=status.notes,
        pictures={
            "attempts": plots.attempts_over_time(attempts, ranks),
            "speed": plots.speed_over_time(attempts),
            "lengths": plots.lengths_histogram(plan.lengths),
            "fill": plots.fill_histogram(batch_tokens, plan.token_budget),
            "checkpoints": plots.checkpoint_sizes(sizes_bytes),
        },
        failures=[
            _failure(record, rank, plots.colour_of) for record, rank in failures[-_MOST_ROWS:]
        ],
        failures_shown=_shown(len(failures), "failures", "the newest", paths.manifest),
        quarantine=quarantined[:_MOST_ROWS],
        quarantine_shown="None."
        if not quarantined
        else _shown(len(quarantined), "sequences", "the first", paths.quarantine),
        shards=status.shards,
        facts=[
            *_facts(plan, paths),
            *([("computed by", status.software)] if status.software else []),
        ],
        dataset=f"The dataset is {status.dataset}.",
        snippet=_snippet(paths, has_rows=plan.num_sequences > 0),
    )


def _tiles(
    status: RunStatus, attempts: Sequence[Attempt], sizes_bytes: Sequence[int], *, num_failures: int
) -> Iterator[tuple[str, str]]:
    computing_s = sum(each.seconds for attempt in attempts for each in attempt.checkpoints)
    tokens = sum(each.tokens for attempt in attempts for each in attempt.checkpoints)
    yield (
        f"{status.num_done:,} of {status.num_computed:,} distinct sequences",
        f"{status.percent:.1f} %",
    )
    yield "shards", f"{len(status.shards):,}"
    yield "attempts", f"{len(attempts):,}"
    yield "failures", f"{num_failures:,}"
    yield "in quarantine", "?" if status.num_quarantined is None else f"{status.num_quarantined:,}"
    yield f"in checkpoints: {len(sizes_bytes):,}", format_bytes(sum(sizes_bytes))
    if computing_s:
        yield "tokens/s per device, on average", f"{tokens / computing_s:,.0f}"
        yield "device time, computing", format_duration(computing_s)


def _facts(plan: RunPlan, paths: RunPaths) -> Iterator[tuple[str, str]]:
    yield "run directory", str(paths.run_dir.resolve())
    yield "dataset", str(paths.embeddings_dir.resolve())
    yield "fingerprint", plan.fingerprint
    yield from (
        (name.replace("_", " "), str(value)) for name, value in sorted(plan.identity.items())
    )
    yield "distinct sequences", f"{plan.num_computed:,}"
    yield "residues", f"{plan.num_residues:,}"
    yield "tokens to compute", f"{plan.num_tokens(plan.order):,}"
    yield "shards", f"{plan.num_shards:,}"
    yield "token budget", f"{plan.token_budget:,}"


def _failure(record: dict[str, Any], rank: int, colour_of: Callable[[str], str]) -> dict[str, Any]:
    kind = str(record.get("kind", ""))
    texts = {name: str(record.get(name) or "") for name in ("cause", "reason", "message", "device")}
    at = str(record.get("at") or "")[:19].replace("T", " ")
    return texts | {"rank": rank, "kind": kind, "colour": colour_of(kind), "at": at}


def _shown(count: int, what: str, which: str, where: Path) -> str:
    if count > _MOST_ROWS:
        return f"{count:,} {what}: {which} {_MOST_ROWS} are shown, {where} has more."
    return f"{count:,} {what}." if count != 1 else f"1 {what.removesuffix('s')}."


def _snippet(paths: RunPaths, *, has_rows: bool) -> str:
    first_row = "dataset[dataset.ids[0]]  # float32, (dim,)\n" if has_rows else ""
    return (
        "from vnp_lib.dataset import open_dataset\n"
        f"dataset = open_dataset({str(paths.run_dir.resolve())!r})\n"
        f"{first_row}"
        "\n"
        f"# or with DuckDB, polars, pandas: {paths.embeddings_dir.resolve()}/*.parquet"
    )
