"""Estimate a run: count and validate the input, compute the disk space and the time it needs.

The input is read once, in about 60 bytes of memory per sequence, and a second time if ids occur
twice. Nothing is written.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console, ConsoleOptions, RenderResult, group
from rich.table import Table

from vnp_lib.devices import resolve_devices
from vnp_lib.errors import ConfigError, FastaError
from vnp_lib.formatting import format_bytes, format_duration
from vnp_lib.inputs import (
    STDIN,
    Fault,
    IdRenamer,
    InputChunk,
    InputCounts,
    InputPolicy,
    RecordLocator,
    Source,
    find_sources,
    locate_records,
    make_id_renamer,
    read_with_faults,
    save_stdin,
)
from vnp_lib.options import EstimateConfig
from vnp_lib.plan import (
    NUM_SPECIAL_TOKENS,
    InputScan,
    RunPaths,
    model_tokens,
    no_sequences_error,
    packed_tokens,
    required_bytes,
)
from vnp_lib.report.status import load_plan_of
from vnp_lib.run import (
    check_model,
    layout_from_config,
    nearest_existing,
    planned_token_budget,
    read_attempts,
)
from vnp_lib.terminal import bar, plain

_MOST_REFUSALS_SHOWN = 5
# Each bin of the histogram is as wide as all before it.
_FIRST_BIN_END = 50  # residues
_MAX_BAR_WIDTH = 40  # columns
_NARROWEST_TABLE = 40  # columns


@dataclass(frozen=True, slots=True, kw_only=True)
class LengthBin:
    """A bin of the histogram of sequence lengths."""

    least: int  # residues
    most: int
    count: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Speed:
    """The expected speed, and where it is from."""

    tokens_per_s: float
    source: str


@dataclass(frozen=True, slots=True, kw_only=True)
class RunEstimate:
    """The estimate of a run. Counts are of the usable records."""

    fasta: tuple[str, ...]
    left_out: tuple[str, ...]  # what of each directory and pattern is not read
    model: str
    weights: str  # path, or where they would be downloaded to
    num_sequences: int
    num_computed: int  # distinct ones
    num_refused: int  # records; an unusable file counts as one
    refusals: tuple[str, ...]  # the first ones: file, line, id, reason
    input: InputCounts  # changes to the input
    num_residues: int
    # Tokens through the model: of the distinct sequences, BOS and EOS included, of every window.
    num_tokens: int
    lengths: tuple[LengthBin, ...]
    median_length: float
    longest: int  # residues
    num_shards: int
    token_budget: int
    num_batches: int
    # Tokens of the batches by their budget. A batch of one sequence over the budget counts as full.
    mean_fill: float
    # Sequences that are a batch of their own because they are longer than the budget.
    num_over_budget: int
    required_bytes: int
    free_bytes: int
    output_dir: str
    speed: Speed | None  # of all devices together

    @property
    def expected_s(self) -> float | None:
        return self.num_tokens / self.speed.tokens_per_s if self.speed else None

    @property
    def has_room(self) -> bool:
        return self.free_bytes >= self.required_bytes

    @property
    def can_begin(self) -> bool:
        """Whether a run would start: nothing is refused, and the disk has room."""
        return not self.num_refused and self.has_room

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"expected_s": self.expected_s, "can_begin": self.can_begin}


def estimate_run(config: EstimateConfig) -> RunEstimate:
    """Read the input and estimate a run with these settings.

    Raises:
        ConfigError: If a device does not exist, or `speed_of` has no speed.
        WeightsError: If a run would refuse the weights.
    """
    # It imports torch, which takes seconds.
    from vnp_lib.model import published_path

    model_weights = check_model(config)
    if model_weights is None:
        weights = f"not here yet: a run downloads them to {published_path(config.model)}"
    else:
        weights = str(model_weights.path or config.weights)
    try:
        device_speed = _mean_speed(config.speed_of or config.output_dir, config.model)
    except ConfigError:
        if config.speed_of is not None:
            raise
        device_speed = None
    found = _Input.read(config)
    devices = resolve_devices(config.devices, config.model)
    lengths = np.sort(found.lengths[found.is_computed])[::-1]
    num_shards = max(1, min(config.shards or len(devices), lengths.size))
    token_budget = planned_token_budget(config, devices)
    layout = layout_from_config(config)
    token_lengths = lengths + NUM_SPECIAL_TOKENS
    batch_tokens = np.concatenate(
        [packed_tokens(token_lengths[r::num_shards], token_budget) for r in range(num_shards)]
    )
    parent = nearest_existing(config.output_dir)
    return RunEstimate(
        fasta=tuple(map(str, config.fasta)),
        left_out=found.left_out,
        model=config.model,
        weights=weights,
        num_sequences=found.num_sequences,
        num_computed=found.num_computed,
        num_refused=found.num_refused,
        refusals=found.refusals,
        input=found.counts,
        num_residues=int(found.lengths.sum(dtype=np.int64)),
        num_tokens=model_tokens(lengths, layout.long_policy),
        lengths=tuple(_histogram(found.lengths)),
        median_length=float(np.median(found.lengths)) if found.num_sequences else 0.0,
        longest=int(found.lengths.max(initial=0)),
        num_shards=num_shards,
        token_budget=token_budget,
        num_batches=batch_tokens.size,
        mean_fill=float(np.minimum(batch_tokens / token_budget, 1.0).mean())
        if batch_tokens.size
        else 0.0,
        num_over_budget=int((batch_tokens > token_budget).sum()),
        required_bytes=required_bytes(found, layout),
        free_bytes=shutil.disk_usage(parent).free,
        output_dir=str(config.output_dir),
        speed=_total_speed(config, device_speed, len(devices)),
    )


@group()
def render_estimate(seen: RunEstimate) -> RenderResult:
    """Render an estimate for a terminal."""
    yield _Facts(tuple(_facts(seen)))
    yield ""
    yield _Bars(seen.lengths)
    yield ""
    if seen.num_refused:
        yield plain(f"{seen.num_refused:,} would be refused:", style="bold red")
        yield from (plain(f"  {refusal}") for refusal in seen.refusals)
        if seen.num_refused > len(seen.refusals):
            yield plain(f"  and {seen.num_refused - len(seen.refusals):,} more")
    if not seen.has_room:
        yield plain("the disk has no room for this run", style="bold red")
    if seen.can_begin:
        yield plain(
            "nothing would be refused, and the disk has room: the run can start", style="green"
        )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Input:
    """The result of one pass over the input."""

    lengths: NDArray[np.int32]  # residues, of the usable records, (N,)
    is_computed: NDArray[np.bool_]  # (N,)
    num_refused: int
    refusals: tuple[str, ...]
    left_out: tuple[str, ...]
    counts: InputCounts

    @classmethod
    def read(cls, config: EstimateConfig) -> _Input:
        policy = InputPolicy.of(config)
        scan, refused = InputScan(), _Refused()
        lengths = [np.empty(0, dtype=np.int32)]
        left_out: list[str] = []
        with _saved_stdin(config) as stdin:
            sources = find_sources(
                config.fasta, stdin=stdin, refuse=refused.add_file, left_out=left_out
            )
            rename = make_id_renamer(sources, policy)
            for source in sources:
                places = RecordLocator(source)
                for chunk in _usable_chunks(source, policy, refused, rename):
                    scan.add(chunk)
                    lengths.append(chunk.lengths)
                    refused.add(places, chunk.refused)
            if policy.duplicate_ids == "error":
                repeats, firsts = scan.repeated_ids()
                refused.add_repeats(sources, policy, repeats, firsts)
        if not scan.num_sequences and not refused.count and not policy.allow_empty:
            refused.add_file(no_sequences_error(scan.counts, policy))
        representatives = scan.representatives(dedup=policy.dedup)
        return cls(
            lengths=np.concatenate(lengths),
            is_computed=np.equal(representatives, np.arange(representatives.size)),
            num_refused=refused.count,
            refusals=tuple(refused.messages()),
            left_out=tuple(left_out),
            counts=scan.counts,
        )

    @property
    def num_sequences(self) -> int:
        return self.lengths.size

    @property
    def num_computed(self) -> int:
        return int(self.is_computed.sum())

    @property
    def computed_lengths(self) -> NDArray[np.int32]:
        return self.lengths[self.is_computed]


@contextmanager
def _saved_stdin(config: EstimateConfig) -> Iterator[Path]:
    """Yield the copy of standard input: that of the run if there is one, else a temporary one."""
    saved = RunPaths(config.output_dir).stdin
    if STDIN not in config.fasta:
        yield saved
        return
    with TemporaryDirectory() as directory:
        path = saved if saved.exists() else Path(directory, saved.name)
        save_stdin(sys.stdin.buffer, path)
        yield path


def _usable_chunks(
    source: Source, policy: InputPolicy, refused: _Refused, rename: IdRenamer | None
) -> Iterator[InputChunk]:
    """Yield the chunks of a source up to an error, and refuse the file then."""
    try:
        yield from read_with_faults(source, policy, rename=rename)
    except FastaError as error:
        refused.add_file(error)


class _Refused:
    """Count what a run would refuse, and keep the first messages."""

    def __init__(self) -> None:
        self.count = 0
        self._files: list[str] = []
        self._records: list[str] = []
        self._repeats: list[str] = []

    def add(self, places: RecordLocator, faults: Sequence[Fault]) -> None:
        self.count += len(faults)
        room = _MOST_REFUSALS_SHOWN - len(self._records)
        self._records += [
            f"{places.describe(fault.record)}: {fault.reason}" for fault in faults[:room]
        ]

    def add_file(self, error: FastaError) -> None:
        self.count += 1
        self._files.append(str(error))

    def add_repeats(
        self,
        sources: Sequence[Source],
        policy: InputPolicy,
        repeats: NDArray[np.int64],
        firsts: NDArray[np.int64],
    ) -> None:
        """Refuse records whose id occurred before. The input is read again to locate them."""
        self.count += repeats.size
        pairs = list(
            zip(
                repeats[:_MOST_REFUSALS_SHOWN].tolist(),
                firsts[:_MOST_REFUSALS_SHOWN].tolist(),
                strict=True,
            )
        )
        places = locate_records(sources, policy, {ordinal for pair in pairs for ordinal in pair})
        self._repeats = [
            f"{places[again][1]}: id {places[again][0]!r} is also in {places[first][1]}"
            for again, first in pairs
        ]

    def messages(self) -> list[str]:
        return self._files + self._records + self._repeats


def _histogram(lengths: NDArray[np.int32]) -> Iterator[LengthBin]:
    """Yield bins of 1 to 49, 50 to 99, 100 to 199 residues etc., those of all sequences."""
    ends = [_FIRST_BIN_END]
    while ends[-1] <= lengths.max(initial=0):
        ends.append(2 * ends[-1])
    counts, _ = np.histogram(lengths, bins=[1, *ends])
    filled = np.flatnonzero(counts)
    for index in range(filled[0], filled[-1] + 1) if filled.size else ():
        yield LengthBin(
            least=ends[index - 1] if index else 1, most=ends[index] - 1, count=int(counts[index])
        )


def _total_speed(
    config: EstimateConfig, device_speed: Speed | None, num_devices: int
) -> Speed | None:
    if config.tokens_per_second is not None:
        return Speed(tokens_per_s=config.tokens_per_second, source="as given")
    if device_speed is None:
        return None
    rate = device_speed.tokens_per_s
    source = f"{rate:,.0f} per device in {device_speed.source}, {num_devices} here"
    return Speed(tokens_per_s=rate * num_devices, source=source)


def _mean_speed(run_dir: Path, model: str) -> Speed:
    plan = load_plan_of(run_dir)
    if plan.identity["model"] != model:
        raise ConfigError(
            f"{run_dir} is a run of {plan.identity['model']}: its speed says nothing about {model}"
        )
    attempts = [
        attempt
        for rank in range(plan.num_shards)
        for attempt in read_attempts(RunPaths(run_dir), rank)
    ]
    checkpoints = [checkpoint for attempt in attempts for checkpoint in attempt.checkpoints]
    seconds = sum(checkpoint.seconds for checkpoint in checkpoints)
    if not seconds:
        raise ConfigError(f"{run_dir} has no checkpoint in its history: its speed is not known")
    return Speed(
        tokens_per_s=sum(checkpoint.tokens for checkpoint in checkpoints) / seconds,
        source=str(run_dir),
    )


def _facts(seen: RunEstimate) -> Iterator[tuple[str, str]]:
    yield "sequences", f"{seen.num_sequences:,}, {seen.num_computed:,} distinct"
    yield "residues", f"{seen.num_residues:,}; {seen.num_tokens:,} tokens to compute"
    yield "weights", seen.weights
    yield "lengths", f"median {seen.median_length:,.0f}, longest {seen.longest:,} residues"
    for description in seen.left_out:
        yield "files", description
    if changes := seen.input.describe():
        if seen.input.num_skipped:
            skipped = RunPaths(Path(seen.output_dir)).skipped
            changes += f"; a run lists skipped records in {skipped}"
        yield "input", changes
    counts = seen.input.letters
    changed_characters = [
        f"{count:,} {description}"
        for count, description in (
            (counts.unknown, "X"),
            (counts.read_as_unknown, "J read as X"),
            (counts.lower_case, "in lower case"),
            (counts.final_stops, "final * removed"),
            (counts.white_space, "white space removed"),
            (counts.invisible, "invisible removed"),
            (counts.mapped, "not an amino acid, read as X"),
        )
        if count
    ]
    if changed_characters:
        yield "characters", "; ".join(changed_characters)
    shards = "shard" if seen.num_shards == 1 else "shards"
    batches = (
        f"{seen.num_batches:,} in {seen.num_shards:,} {shards}, {seen.mean_fill:.1%} of "
        f"{seen.token_budget:,} tokens full"
    )
    if seen.num_over_budget:
        batches += f"; {seen.num_over_budget:,} sequences are longer than that"
    yield "batches", batches
    yield (
        "disk",
        f"{format_bytes(seen.required_bytes)} needed, {format_bytes(seen.free_bytes)} free at "
        f"{seen.output_dir}",
    )
    if seen.speed is not None and seen.expected_s is not None:
        rate = f"at {seen.speed.tokens_per_s:,.0f} tokens/s ({seen.speed.source})"
        yield "time", f"about {format_duration(seen.expected_s)} {rate}"
    else:
        yield "time", "not known; give --tokens-per-second, or an earlier run with --speed-of"


class _Facts:
    """Render names and texts in two columns if the terminal is wide enough."""

    def __init__(self, facts: Sequence[tuple[str, str]]) -> None:
        self._facts = facts

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        if options.max_width < _NARROWEST_TABLE:
            yield from (plain(f"{name}: {text}") for name, text in self._facts)
            return
        table = Table(box=None, pad_edge=False, show_header=False)
        table.add_column(style="dim")
        table.add_column(overflow="fold")
        for name, text in self._facts:
            table.add_row(name, plain(text))
        yield table


class _Bars:
    """Render the histogram, with bars as long as the terminal allows."""

    def __init__(self, bins: Sequence[LengthBin]) -> None:
        self._bins = bins

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        most = max((each.count for each in self._bins), default=1)
        lines = [
            (f"{each.least:>7,} to {each.most:>7,}  ", f" {each.count:,}", each.count / most)
            for each in self._bins
        ]
        text_width = max((len(span) + len(count) for span, count, _ in lines), default=0)
        width = max(1, min(_MAX_BAR_WIDTH, options.max_width - text_width))
        for span, count, share in lines:
            yield plain(f"{span}{bar(share, options, width=width)}{count}")
