"""`report.html`: what became of a run, on one page that needs nothing else: no script, no font, no network.

It can be written at any time, also while the run is going on, and says then how the run stands.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import datetime
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader, Template
from numpy.typing import NDArray

from vnp_lib.checkpoint import CheckpointManifest, Quarantine, QuarantinedSequence, ShardRecord
from vnp_lib.errors import StorageError
from vnp_lib.formatting import format_bytes, format_duration, printable, utc_now
from vnp_lib.plan import NUM_SPECIAL_TOKENS, RunPaths, RunPlan, describe_input, packed_tokens
from vnp_lib.report.status import RunStatus, read_status
from vnp_lib.run import Attempt, read_attempts
from vnp_lib.storage import write_file

_MOST_ROWS = 200  # of a table


def write_report(
    plan: RunPlan, paths: RunPaths, *, clock: Callable[[], datetime] = utc_now
) -> Path:
    """Write the page from what the run has recorded, in the place of an earlier one, durably; return its path.

    Equal records give equal pages, but for the time of writing. What cannot be read is a note on the page.

    Raises:
        StorageError: The page cannot be written.
    """
    page = render_report(plan, paths, clock=clock)
    try:
        write_file(paths.report, page.encode("utf-8", "replace"), replace=True)
    except OSError as error:
        raise StorageError(
            f"{paths.report} cannot be written: {error.strerror or error}"
        ) from error
    return paths.report


def render_report(
    plan: RunPlan, paths: RunPaths, *, clock: Callable[[], datetime] = utc_now
) -> str:
    """Make the page, and write nothing.

    Raises:
        StorageError: There are no pictures, since Matplotlib cannot be used here.
    """
    with _quiet_matplotlib():
        return _render(plan, paths, clock=clock)


@contextmanager
def _quiet_matplotlib() -> Iterator[None]:
    """Keep to ourselves what Matplotlib says of its caches, fonts and settings: nobody who reads a report can use it."""
    logger = logging.getLogger("matplotlib")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    finally:
        logger.setLevel(level)


def _render(plan: RunPlan, paths: RunPaths, *, clock: Callable[[], datetime]) -> str:
    try:
        from vnp_lib.report import plots  # imports matplotlib, which takes a second
    except (
        ImportError,
        OSError,
        ValueError,
    ) as error:  # no directory for its cache; an MPLBACKEND that does not exist
        told = " ".join(str(error).split())
        raise StorageError(
            f"Matplotlib cannot be used, so no report can be drawn: {told}"
        ) from error

    status = read_status(plan, paths, clock=clock)
    recorded = _recorded_shards(paths)
    ranks = sorted(
        {*range(plan.num_shards), *(rank for rank, shard in recorded.items() if shard.attempts)}
    )
    attempts = [
        each for rank in ranks for each in read_attempts(paths, rank, _failures_of(recorded, rank))
    ]
    sizes_bytes = list(_checkpoint_sizes(paths))
    failures = sorted(
        ((record, rank) for rank in ranks for record in _failures_of(recorded, rank)),
        key=lambda each: str(each[0].get("at")),
    )
    quarantined = _quarantined(plan, paths)
    return _template().render(
        title=f"{plan.identity['model']}, {plan.num_sequences:,} sequences",
        written_at=_time(status.at),
        running="No run is going on."
        if status.running is None
        else f"A run is going on: {status.running}.",
        input=describe_input(status.input, paths),
        tiles=list(_tiles(status, attempts, sizes_bytes, num_failures=len(failures))),
        notes=status.notes,
        pictures={
            "attempts": plots.attempts_over_time(attempts, ranks),
            "speed": plots.speed_over_time(attempts),
            "lengths": plots.lengths_histogram(plan.lengths),
            "fill": plots.fill_histogram(_batch_tokens(plan), plan.token_budget),
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


@cache
def _template() -> Template:
    environment = Environment(
        loader=PackageLoader("vnp_lib.report", "."), autoescape=True, finalize=_finalized
    )
    return environment.get_template("report.html.jinja")


def _finalized(value: Any) -> Any:
    """What a browser may show of text that somebody else wrote: no control letters, none that turn its direction."""
    return "\n".join(map(printable, value.split("\n"))) if type(value) is str else value


def _recorded_shards(paths: RunPaths) -> dict[int, ShardRecord]:
    try:
        return CheckpointManifest(paths.manifest).shards()
    except (StorageError, OSError):
        return {}  # the status has a note of it


def _failures_of(recorded: dict[int, ShardRecord], rank: int) -> list[dict[str, Any]]:
    return list(recorded[rank].failures) if rank in recorded else []


def _checkpoint_sizes(paths: RunPaths) -> Iterator[int]:
    for marker in sorted(paths.checkpoints_dir.glob("shard_*/batch_*.pt.done")):
        path = marker.with_name(marker.name.removesuffix(".done"))
        with suppress(FileNotFoundError):  # a run that is going on may move it aside meanwhile
            yield path.stat().st_size


def _batch_tokens(plan: RunPlan) -> NDArray[np.int64]:
    ordinals = map(plan.shard_ordinals, range(plan.num_shards))
    return np.concatenate(
        [
            packed_tokens(plan.lengths[own] + NUM_SPECIAL_TOKENS, plan.token_budget)
            for own in ordinals
        ]
    )


def _quarantined(plan: RunPlan, paths: RunPaths) -> list[QuarantinedSequence]:
    try:
        return Quarantine.of(plan, paths).read()
    except (StorageError, OSError):
        return []  # the status has a note of it


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
        yield "tokens/s a device, on average", f"{tokens / computing_s:,.0f}"
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
    told = {name: str(record.get(name) or "") for name in ("cause", "reason", "message", "device")}
    return told | {"rank": rank, "kind": kind, "colour": colour_of(kind), "at": _time_of(record)}


def _time_of(record: dict[str, Any]) -> str:
    return str(record.get("at") or "")[:19].replace("T", " ")


def _time(at: datetime) -> str:
    return at.strftime("%Y-%m-%d %H:%M:%S UTC")


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
