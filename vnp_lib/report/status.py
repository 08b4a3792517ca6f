"""Read the status of a run from its records, without validating them; `verify` reads everything.

Counts are those of the manifest, as of the newest checkpoints.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console, ConsoleOptions, RenderResult, group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from vnp_lib.checkpoint import ShardRecord, ShardStatus
from vnp_lib.dataset import describe_rows, open_dataset, read_success
from vnp_lib.errors import ConfigError, StorageError
from vnp_lib.formatting import format_age, format_duration, utc_now
from vnp_lib.inference import Certificate
from vnp_lib.inputs import InputCounts
from vnp_lib.plan import RunPaths, RunPlan, describe_input, load_plan
from vnp_lib.report.readers import read_quarantine, read_shards
from vnp_lib.run import Attempt, Ending, read_attempts
from vnp_lib.software import SoftwareShare, describe_software
from vnp_lib.storage import FileLock, LockHolder
from vnp_lib.terminal import natural_width, plain

_MOST_SHARDS_SHOWN = 40


class ShardPhase(StrEnum):
    """What a shard is doing, in the order of interest."""

    RUNNING = "running"
    FAILED = "failed"
    STOPPED = "stopped"  # not complete, and the run is not running
    WAITING = "waiting"  # for a device, or for its next attempt
    COMPLETE = "complete"


@dataclass(frozen=True, slots=True, kw_only=True)
class LastFailure:
    """The newest failure of a shard."""

    kind: str  # FailureKind
    cause: str  # FailureCause
    message: str
    reason: str  # the decision, and why
    at: datetime

    @property
    def explanation(self) -> str:
        """The decision, else the message, without the kind of failure that it may begin with."""
        return (self.reason or self.message).removeprefix(f"{self.kind}: ")


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardRow:
    """The progress of a shard."""

    rank: int
    state: ShardPhase
    attempts: int
    num_sequences: int
    num_done: int  # in checkpoints
    tokens_left: int
    tokens_per_s: float | None  # of the newest checkpoint
    checkpoint_at: datetime | None  # time of the newest checkpoint
    device: str | None
    failure: LastFailure | None

    @property
    def percent(self) -> float:
        return 100.0 * self.num_done / self.num_sequences if self.num_sequences else 100.0


@dataclass(frozen=True, slots=True, kw_only=True)
class RunStatus:
    """The status of a run."""

    run_dir: Path
    running: LockHolder | None  # the process that runs on it now
    model: str
    dtype: str
    num_sequences: int  # in the input
    num_computed: int  # distinct ones
    input: InputCounts  # changes to the input
    num_done: int
    num_quarantined: int | None  # None: the quarantine cannot be read
    shards: tuple[ShardRow, ...]
    dataset: str
    software: str  # that computed the dataset; "" if not known
    notes: tuple[str, ...]  # why figures are uncertain
    at: datetime

    @property
    def percent(self) -> float:
        return 100.0 * self.num_done / self.num_computed if self.num_computed else 100.0

    @property
    def tokens_left(self) -> int:
        return sum(shard.tokens_left for shard in self.shards)

    @property
    def tokens_per_s(self) -> float:
        """The rate of all running shards together, by their newest checkpoints; 0 if none runs."""
        return sum(
            shard.tokens_per_s or 0.0 for shard in self.shards if shard.state == ShardPhase.RUNNING
        )

    @property
    def eta_s(self) -> float | None:
        """Seconds that the rest takes at the present speed; None if no speed is known."""
        rates = [
            (s.tokens_left, s.tokens_per_s)
            for s in self.shards
            if s.state == ShardPhase.RUNNING and s.tokens_per_s
        ]
        if self.running is None or not rates:
            return None
        longest_s = max(tokens / rate for tokens, rate in rates)
        return max(longest_s, self.tokens_left / sum(rate for _, rate in rates))

    def to_json(self) -> dict[str, Any]:
        """Return everything as JSON values; times are ISO 8601 in UTC."""
        derived = {
            "percent": self.percent,
            "tokens_left": self.tokens_left,
            "tokens_per_s": self.tokens_per_s,
            "eta_s": self.eta_s,
        }
        fields: dict[str, Any] = _jsonable(asdict(self) | derived)
        for shard_fields, shard in zip(fields["shards"], self.shards, strict=True):
            shard_fields["percent"] = shard.percent
        return fields


def open_status(run_dir: Path) -> Callable[[], RunStatus]:
    """Load the plan of a run, and return a function that reads its present status.

    Raises:
        ConfigError: If `run_dir` is not a run directory, or its plan cannot be read.
    """
    paths = RunPaths(run_dir)
    plan = load_plan_of(run_dir)
    return lambda: read_status(plan, paths)


def load_plan_of(run_dir: Path) -> RunPlan:
    """Load the plan of a run for display, without verifying its digests.

    Raises:
        ConfigError: If `run_dir` is not a run directory, or its plan cannot be read.
    """
    paths = RunPaths(run_dir)
    if not paths.plan_dir.is_dir():
        raise ConfigError(f"{run_dir} is not a run directory: it has no plan/")
    try:
        return load_plan(paths, verify_digests=False)
    except (StorageError, OSError, ValueError) as error:
        # PyArrow's errors are ValueErrors.
        raise ConfigError(f"the plan in {run_dir} cannot be read ({error})") from None


def read_status(
    plan: RunPlan, paths: RunPaths, *, clock: Callable[[], datetime] = utc_now
) -> RunStatus:
    """Collect what the run has recorded. A record that cannot be read is a note, not an error."""
    recorded, manifest_error = read_shards(paths)
    running = FileLock(paths.run_lock, purpose="status").presumed_holder()
    sequences, quarantine_error = read_quarantine(plan, paths)
    quarantined = frozenset(sequence.ordinal for sequence in sequences or ())
    notes = []
    if not paths.manifest.exists():
        notes.append("there is no manifest yet: no checkpoints are known")
    elif manifest_error:
        notes.append(f"{manifest_error}: no checkpoints are known until the next run rebuilds it")
    notes += _redivision(plan, recorded, len(quarantined))
    if quarantine_error:
        notes.append(quarantine_error)
    shards = tuple(
        _shard(plan, paths, rank, recorded.get(rank), running, quarantined)
        for rank in range(plan.num_shards)
    )
    num_recorded = sum(shard.total_sequences for shard in recorded.values())
    is_complete = all(shard.state == ShardPhase.COMPLETE for shard in shards)
    software = ""
    with suppress(StorageError, OSError):
        shares = read_success(paths.embeddings_dir)["software"]
        software = describe_software([SoftwareShare.from_json(share) for share in shares])
    return RunStatus(
        run_dir=paths.run_dir,
        running=running,
        model=plan.identity["model"],
        dtype=plan.identity["dtype"],
        num_sequences=plan.num_sequences,
        num_computed=plan.num_computed,
        input=plan.counts,
        num_done=sum(shard.num_done for shard in shards)
        if is_complete
        else min(num_recorded, plan.num_computed),
        num_quarantined=None if sequences is None else len(quarantined),
        shards=shards,
        dataset=_dataset(plan, paths),
        software=software,
        notes=tuple(notes),
        at=clock(),
    )


@group()
def render_status(status: RunStatus) -> RenderResult:
    """Render a status for a terminal."""
    yield plain(
        f"{status.run_dir}: {status.model}, {status.dtype}, {status.num_sequences:,} sequences",
        style="bold",
    )
    if status.running is None:
        yield plain("not running")
    else:
        yield plain(f"running: {status.running}", style="green")
    if changes := describe_input(status.input, RunPaths(status.run_dir)):
        yield plain(f"input: {changes}", style="yellow" if status.input.is_altered else "")
    yield _Shards(status)
    line = (
        f"{status.num_done:,} of {status.num_computed:,} distinct sequences "
        f"({status.percent:.1f} %)"
    )
    if status.tokens_per_s:
        line += f", {status.tokens_per_s:,.0f} tokens/s"
    if status.eta_s is not None:
        line += f", about {format_duration(status.eta_s)} left"
    yield plain(line, style="bold")
    if status.num_quarantined:
        yield plain(f"in quarantine: {status.num_quarantined:,}", style="yellow")
    yield plain(f"dataset: {status.dataset}")
    if status.software:
        yield plain(f"computed by: {status.software}")
    for note in status.notes:
        yield plain(f"note: {note}", style="yellow")
    yield plain(
        "counts are as of the newest checkpoints; `vnp verify` validates everything",
        style="dim",
    )


def watch(read: Callable[[], RunStatus], *, interval_s: float, console: Console) -> None:
    """Redraw the status every `interval_s` seconds, until Ctrl-C."""
    with Live(render_status(read()), console=console, auto_refresh=False) as live:
        while True:
            time.sleep(interval_s)
            live.update(render_status(read()), refresh=True)


def _shard(
    plan: RunPlan,
    paths: RunPaths,
    rank: int,
    found: ShardRecord | None,
    running: LockHolder | None,
    quarantined: frozenset[int],
) -> ShardRow:
    ordinals = plan.shard_ordinals(rank)
    recorded = found or ShardRecord.new(rank)
    is_complete = recorded.status == ShardStatus.COMPLETE
    num_quarantined = int(np.isin(ordinals, list(quarantined)).sum())
    num_done = (
        ordinals.size - num_quarantined
        if is_complete
        else min(recorded.total_sequences, ordinals.size)
    )
    attempts = read_attempts(paths, rank)
    newest = next(
        (attempt.checkpoints[-1] for attempt in reversed(attempts) if attempt.checkpoints), None
    )
    failures = recorded.failures
    return ShardRow(
        rank=rank,
        state=_state(paths, rank, recorded.status, attempts, running),
        attempts=recorded.attempts if found else len(attempts),
        num_sequences=ordinals.size,
        num_done=num_done,
        # The longest sequences are computed first.
        tokens_left=0 if is_complete else plan.num_tokens(ordinals[num_done:]),
        tokens_per_s=newest.tokens_per_s if newest else None,
        checkpoint_at=newest.at if newest else None,
        device=recorded.device,
        failure=LastFailure(
            kind=failures[-1]["kind"],
            cause=failures[-1]["cause"],
            message=failures[-1]["message"],
            reason=failures[-1].get("reason", ""),
            at=datetime.fromisoformat(failures[-1]["at"]),
        )
        if failures
        else None,
    )


def _state(
    paths: RunPaths,
    rank: int,
    recorded: ShardStatus,
    attempts: list[Attempt],
    running: LockHolder | None,
) -> ShardPhase:
    if recorded == ShardStatus.COMPLETE:
        return ShardPhase.COMPLETE
    is_held = FileLock(paths.shard_lock(rank), purpose="status").presumed_holder() is not None
    if is_held or (attempts and attempts[-1].ending == Ending.RUNNING):
        return ShardPhase.RUNNING
    if recorded == ShardStatus.FAILED:
        return ShardPhase.FAILED
    return ShardPhase.STOPPED if running is None else ShardPhase.WAITING


def _redivision(
    plan: RunPlan, recorded: dict[int, ShardRecord], num_quarantined: int
) -> Iterator[str]:
    """Yield a note if the run had other shards before.

    The manifest counts a checkpoint for the shard that wrote it, whichever has its sequences now.
    """
    foreign = any(
        rank >= plan.num_shards and shard.total_sequences for rank, shard in recorded.items()
    )
    sizes = {rank: plan.shard_ordinals(rank).size for rank in range(plan.num_shards)}
    misfits = any(
        not (size - num_quarantined if shard.status == ShardStatus.COMPLETE else 0)
        <= shard.total_sequences
        <= size
        for rank, shard in recorded.items()
        if (size := sizes.get(rank)) is not None
    )
    if foreign or misfits:
        yield (
            "the run was divided into other shards before: counts of single shards, and the time "
            "left, are approximate"
        )


def _dataset(plan: RunPlan, paths: RunPaths) -> str:
    if not paths.success.exists():
        return "not assembled yet"
    try:
        metadata = open_dataset(paths.run_dir).metadata
    except StorageError as error:
        return f"damaged ({error})"
    if metadata["fingerprint"] != plan.fingerprint:
        return "from another run; the next run assembles it again"
    rows = describe_rows(
        sum(part["rows"] for part in metadata["parts"]),
        num_quarantined=metadata["num_quarantined"],
        num_missing=metadata["num_missing"],
    )
    precision = (
        f"; {Certificate(**metadata['precision']).describe()}" if metadata["precision"] else ""
    )
    return f"{'partial' if metadata['num_missing'] else 'complete'}: {rows}{precision}"


_STYLES = {ShardPhase.RUNNING: "green", ShardPhase.FAILED: "bold red", ShardPhase.STOPPED: "yellow"}


_COLUMNS = ("shard", "state", "attempt", "done", "of", "%", "tokens/s", "device", "last failure")
_NARROWEST_FAILURE = 30  # columns, within which the last failure is wrapped


class _Shards:
    """Render a table if its numbers fit the terminal, else a paragraph per shard.

    No number is ever cut.
    """

    def __init__(self, status: RunStatus) -> None:
        self._at = status.at
        # If there are too many shards, the most interesting ones are shown.
        states = list(ShardPhase)
        by_interest = sorted(
            status.shards, key=lambda shard: (states.index(shard.state), shard.rank)
        )
        self._shown = sorted(by_interest[:_MOST_SHARDS_SHOWN], key=lambda shard: shard.rank)
        hidden = Counter(shard.state for shard in status.shards if shard not in self._shown)
        self._hidden = ", ".join(f"{count} {state}" for state, count in sorted(hidden.items()))

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        rows = [tuple(_row(shard, self._at)) for shard in self._shown]
        width_needed = natural_width(
            _table(_COLUMNS[:-1], [row[:-1] for row in rows], self._hidden), console, options
        )
        if any(row[-1] for row in rows):
            width_needed += 1 + min(_NARROWEST_FAILURE, max(row[-1].cell_len for row in rows))
        if width_needed <= options.max_width:
            yield _table(_COLUMNS, rows, self._hidden)
            return
        for row in rows:
            yield _paragraph(row)
        if self._hidden:
            yield plain(f"... {self._hidden}")


def _table(columns: Sequence[str], rows: Iterable[Sequence[Text]], hidden: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim")
    for name in columns:
        is_text = name in ("state", "device", "last failure")
        table.add_column(
            name,
            justify="left" if is_text else "right",
            no_wrap=name != "last failure",
            overflow="fold",
        )
    for row in rows:
        table.add_row(*row)
    if hidden:
        table.add_row("...", hidden)
    return table


def _paragraph(row: Sequence[Text]) -> Text:
    """Write a row of the table as text.

    `shard 3 running, attempt 2, 600 of 1,200 (50.0 %), 5,400 tokens/s on cpu`
    """
    shard, state, attempt, done, total, percent, rate, device, failure = row
    counts = (", ", done, " of ", total, " (", percent, " %)")
    text = Text.assemble("shard ", shard, " ", state, ", attempt ", attempt, *counts)
    if rate:
        text.append_text(Text.assemble(", ", rate, " tokens/s"))
    if device:
        text.append_text(Text.assemble(" on ", device))
    if failure:
        text.append_text(Text.assemble("; ", failure))
    return text


def _row(shard: ShardRow, now: datetime) -> Iterator[Text]:
    failure = shard.failure
    yield plain(str(shard.rank))
    yield plain(shard.state, style=_STYLES.get(shard.state, ""))
    yield plain(str(shard.attempts))
    yield plain(f"{shard.num_done:,}")
    yield plain(f"{shard.num_sequences:,}")
    yield plain(f"{shard.percent:.1f}")
    yield plain("" if shard.tokens_per_s is None else f"{shard.tokens_per_s:,.0f}")
    yield plain(shard.device or "")
    yield plain(
        f"{failure.kind}, {format_age(failure.at, now)}: {failure.explanation}" if failure else ""
    )


def _jsonable(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _jsonable(each) for name, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_jsonable(each) for each in value]
    if isinstance(value, datetime):
        return value.astimezone(UTC).isoformat(timespec="seconds")
    return str(value) if isinstance(value, Path) else value
