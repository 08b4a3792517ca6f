"""What a run would be, before it is begun: the input counted and judged, the disk and the time that it needs.

The input is read once, in about 60 bytes a sequence, and a second time where ids occur twice. Nothing is written.
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
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.table import Table
from rich.text import Text

from vnp_lib.devices import resolve_devices
from vnp_lib.errors import ConfigError, FastaError
from vnp_lib.formatting import format_bytes, format_duration
from vnp_lib.inputs import (
    STDIN,
    CharacterCounts,
    Fault,
    IdRenamer,
    InputChunk,
    InputCounts,
    InputPolicy,
    RecordLocator,
    Source,
    describe_left_out,
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
from vnp_lib.run import check_model, layout_from_config, planned_token_budget, read_attempts
from vnp_lib.terminal import bar, plain

_MOST_REFUSALS_SHOWN = 5
_FIRST_BIN_END = 50  # residues; each bin of the histogram is as wide as all before it
_BAR_LETTERS = 40
_NARROWEST_TABLE = 40  # columns


@dataclass(frozen=True, slots=True, kw_only=True)
class LengthBin:
    """A bar of the histogram of lengths."""

    least: int  # residues
    most: int
    count: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Speed:
    """How fast the run is expected to be."""

    tokens_per_s: float
    source: str


@dataclass(frozen=True, slots=True, kw_only=True)
class RunEstimate:
    """What a run would be. Counts are of the records that can be used."""

    fasta: tuple[str, ...]
    left_out: tuple[str, ...]  # of each directory and pattern, what of it is not read
    model: str
    weights: str  # where they are, or would be downloaded to
    num_sequences: int
    num_computed: int  # distinct ones
    num_refused: int  # records; a file that cannot be used as a whole counts as one
    refusals: tuple[str, ...]  # the first ones: file, line, id, and what is wrong
    input: InputCounts  # what is done to it
    num_residues: int
    num_tokens: int  # that go through the model: of the distinct sequences, BOS and EOS included, of every window
    lengths: tuple[LengthBin, ...]
    median_length: float
    longest: int  # residues
    num_shards: int
    token_budget: int
    num_batches: int
    mean_fill: float  # tokens of the batches, of their budget; batches of one sequence over the budget count as full
    num_over_budget: (
        int  # sequences that are a batch of their own since they are longer than the budget
    )
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
        """Whether a run would begin: nothing is refused, and the disk has room."""
        return not self.num_refused and self.has_room

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"expected_s": self.expected_s, "can_begin": self.can_begin}


def estimate_run(config: EstimateConfig) -> RunEstimate:
    """Read the input, and say what a run with these settings would be.

    Raises:
        ConfigError: A device that is not there, or a `speed_of` that tells no speed.
        WeightsError: Weights that a run would refuse.
    """
    weights = _describe_weights(config)
    one_device = _speed_of_one_device(config)
    found = _read(config)
    devices = resolve_devices(config.devices, config.model)
    lengths = np.sort(found.lengths[found.is_computed])[::-1]
    num_shards = max(1, min(config.shards or len(devices), lengths.size))
    token_budget = planned_token_budget(config, devices)
    layout = layout_from_config(config)
    token_lengths = lengths + NUM_SPECIAL_TOKENS
    batch_tokens = np.concatenate(
        [packed_tokens(token_lengths[r::num_shards], token_budget) for r in range(num_shards)]
    )
    return RunEstimate(
        fasta=tuple(map(str, config.fasta)),
        left_out=tuple(describe_left_out(config.fasta)),
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
        free_bytes=shutil.disk_usage(_existing(config.output_dir)).free,
        output_dir=str(config.output_dir),
        speed=_speed(config, one_device, len(devices)),
    )


def render_estimate(seen: RunEstimate) -> RenderableType:
    """Draw it for a terminal."""
    return Group(_Facts(tuple(_facts(seen))), "", _Bars(seen.lengths), "", *_verdict(seen))


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Input:
    """What a pass over the input finds."""

    lengths: NDArray[np.int32]  # residues, of the records that can be used, (N,)
    is_computed: NDArray[np.bool_]  # (N,)
    num_refused: int
    refusals: tuple[str, ...]
    counts: InputCounts

    @property
    def num_sequences(self) -> int:
        return self.lengths.size

    @property
    def num_computed(self) -> int:
        return int(self.is_computed.sum())

    @property
    def computed_lengths(self) -> NDArray[np.int32]:
        return self.lengths[self.is_computed]


def _read(config: EstimateConfig) -> _Input:
    policy = InputPolicy.of(config)
    scan, refused = InputScan(), _Refused()
    lengths = [np.empty(0, dtype=np.int32)]
    with _stdin_kept(config) as stdin:
        sources = find_sources(config.fasta, stdin=stdin, refuse=refused.add_file)
        rename = make_id_renamer(sources, policy)
        for source in sources:
            places = RecordLocator(source)
            for chunk in _surveyed(source, policy, refused, rename):
                scan.add(chunk)
                lengths.append(chunk.lengths)
                refused.add(places, chunk.refused)
        if policy.duplicate_ids == "error":
            repeats, firsts = scan.repeated_ids()
            refused.add_repeats(sources, policy, repeats, firsts)
    if not scan.num_sequences and not refused.count and not policy.allow_empty:
        refused.add_file(no_sequences_error(scan.counts, policy))
    representatives = scan.representatives(dedup=policy.dedup)
    return _Input(
        lengths=np.concatenate(lengths),
        is_computed=np.equal(representatives, np.arange(representatives.size)),
        num_refused=refused.count,
        refusals=tuple(refused.told()),
        counts=scan.counts,
    )


@contextmanager
def _stdin_kept(config: EstimateConfig) -> Iterator[Path]:
    """Where standard input is kept: by the run, if there is one, and otherwise for a while out of its directory."""
    kept = RunPaths(config.output_dir).stdin
    if STDIN not in config.fasta:
        yield kept
        return
    with TemporaryDirectory() as directory:
        path = kept if kept.exists() else Path(directory, kept.name)
        save_stdin(sys.stdin.buffer, path)
        yield path


def _surveyed(
    source: Source, policy: InputPolicy, refused: _Refused, rename: IdRenamer | None
) -> Iterator[InputChunk]:
    """The chunks of a source, as far as it can be read."""
    try:
        yield from read_with_faults(source, policy, rename=rename)
    except FastaError as error:
        refused.add_file(error)


class _Refused:
    """Counts what a run would refuse, and keeps the first of it."""

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
        """Refuse records whose id occurred before; the input is read again to find them."""
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

    def told(self) -> list[str]:
        return self._files + self._records + self._repeats


def _describe_weights(config: EstimateConfig) -> str:
    """Say where the weights are, after a look at them as a run looks."""
    from vnp_lib.model import published_path

    found = check_model(config)
    if found is None:
        return f"not here yet: a run downloads them to {published_path(config.model)}"
    return config.weights if found.path is None else str(found.path)


def _histogram(lengths: NDArray[np.int32]) -> Iterator[LengthBin]:
    """Bins of 1 to 49, 50 to 99, 100 to 199 residues and so on, from the shortest sequence's to the longest's."""
    ends = [_FIRST_BIN_END]
    while ends[-1] <= lengths.max(initial=0):
        ends.append(2 * ends[-1])
    counts, _ = np.histogram(lengths, bins=[1, *ends])
    filled = np.flatnonzero(counts)
    for index in range(filled[0], filled[-1] + 1) if filled.size else ():
        yield LengthBin(
            least=ends[index - 1] if index else 1, most=ends[index] - 1, count=int(counts[index])
        )


def _existing(path: Path) -> Path:
    return next(each for each in (path, *path.absolute().parents) if each.exists())


def _speed(config: EstimateConfig, one_device: Speed | None, num_devices: int) -> Speed | None:
    if config.tokens_per_second is not None:
        return Speed(tokens_per_s=config.tokens_per_second, source="as given")
    if one_device is None:
        return None
    source = f"{one_device.tokens_per_s:,.0f} a device in {one_device.source}, {num_devices} here"
    return Speed(tokens_per_s=one_device.tokens_per_s * num_devices, source=source)


def _speed_of_one_device(config: EstimateConfig) -> Speed | None:
    """From an earlier run, where there is one."""
    try:
        return _mean_speed(config.speed_of or config.output_dir, config.model)
    except ConfigError:
        if config.speed_of is not None:
            raise
        return None


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
    for told in seen.left_out:
        yield "files", told
    if done := seen.input.describe():
        skipped = RunPaths(Path(seen.output_dir)).skipped
        yield (
            "input",
            done
            + (f"; a run lists skipped records in {skipped}" if seen.input.num_skipped else ""),
        )
    if mended := list(_mended(seen.input.letters)):
        yield "letters", ", ".join(mended)
    yield (
        "batches",
        (
            f"{seen.num_batches:,} in {seen.num_shards:,} {'shard' if seen.num_shards == 1 else 'shards'}, "
            f"{seen.mean_fill:.1%} of {seen.token_budget:,} tokens full"
            + (
                f"; {seen.num_over_budget:,} sequences are longer than that"
                if seen.num_over_budget
                else ""
            )
        ),
    )
    yield (
        "disk",
        f"{format_bytes(seen.required_bytes)} needed, {format_bytes(seen.free_bytes)} free at {seen.output_dir}",
    )
    if seen.speed is not None and seen.expected_s is not None:
        rate = f"at {seen.speed.tokens_per_s:,.0f} tokens/s ({seen.speed.source})"
        yield "time", f"about {format_duration(seen.expected_s)} {rate}"
    else:
        yield (
            "time",
            "not known; give --tokens-per-second, or a run to take it from with --speed-of",
        )


def _mended(letters: CharacterCounts) -> Iterator[str]:
    if letters.unknown:
        yield f"{letters.unknown:,} X"
    if letters.read_as_unknown:
        yield f"{letters.read_as_unknown:,} J, read as X"
    if letters.lower_case:
        yield f"{letters.lower_case:,} in lower case, raised"
    if letters.final_stops:
        yield f"{letters.final_stops:,} final * dropped"
    if letters.white_space:
        yield f"{letters.white_space:,} of white space removed"
    if letters.invisible:
        yield f"{letters.invisible:,} invisible removed"
    if letters.mapped:
        yield f"{letters.mapped:,} of no amino acid, read as X"


class _Facts:
    """What is told of a run, name and text side by side where there is room for both."""

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
    """The histogram, with bars as long as the terminal has room for."""

    def __init__(self, bins: Sequence[LengthBin]) -> None:
        self._bins = bins

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        most = max((each.count for each in self._bins), default=1)
        lines = [
            (f"{each.least:>7,} to {each.most:>7,}  ", f" {each.count:,}", each.count / most)
            for each in self._bins
        ]
        words = max((len(span) + len(count) for span, count, _ in lines), default=0)
        width = max(1, min(_BAR_LETTERS, options.max_width - words))
        for span, count, share in lines:
            yield plain(f"{span}{bar(share, options, width=width)}{count}")


def _verdict(seen: RunEstimate) -> Iterator[Text]:
    if seen.num_refused:
        yield plain(f"{seen.num_refused:,} would be refused:", style="bold red")
        yield from (plain(f"  {refusal}") for refusal in seen.refusals)
        if seen.num_refused > len(seen.refusals):
            yield plain(f"  and {seen.num_refused - len(seen.refusals):,} more")
    if not seen.has_room:
        yield plain("the disk has no room for this run", style="bold red")
    if seen.can_begin:
        yield plain(
            "nothing would be refused, and the disk has room: the run can begin", style="green"
        )
