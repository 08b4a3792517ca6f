"""Embed proteins with ESM-2 from Python, in this process."""

from __future__ import annotations

import logging
import math
import os
import tempfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast, get_args, overload

import numpy as np
from numpy.typing import NDArray

from vnp_lib.config import DType, EmbedConfig, ModelName, OutputName, weights_path
from vnp_lib.dataset import open_dataset
from vnp_lib.devices import resolve_dtype, torch_device_name
from vnp_lib.embeddings import Embeddings, Outputs
from vnp_lib.errors import BatchFailedError, ConfigError, FastaError, NumericalInstabilityError
from vnp_lib.inference import TokenBudget, divide_into_batches, pack_batches
from vnp_lib.inputs import (
    STDIN,
    InputPolicy,
    Proteins,
    RecordsInMemory,
    chunk_from_memory,
    files_or_records,
    find_sources,
    read_records,
)
from vnp_lib.plan import (
    InputScan,
    Output,
    OutputKind,
    RowLayout,
    choose_outputs,
    model_tokens,
    offsets_of,
)
from vnp_lib.report import RunProgress
from vnp_lib.run import (
    RANDOM_WEIGHTS,
    AttemptStarted,
    BatchComputed,
    Run,
    WorkerEvent,
    assemble,
    open_run,
    validate_config,
)
from vnp_lib.storage import FileLock
from vnp_lib.terminal import error_console
from vnp_lib.user_paths import PathUse, user_path
from vnp_lib.worker import ShardAttempt, StopFlag

# torch takes seconds to import, and invalid arguments are reported before.
if TYPE_CHECKING:
    import torch

# A run of this process has a single shard.
_SHARD = 0

# A worker process that has lost its flow may still write checkpoints for this long.
_ORPHAN_LIMIT_S = 60.0

logger = logging.getLogger(__name__)


@overload
def embed(
    sequences: Proteins,
    *,
    model: ModelName = ...,
    weights: str | os.PathLike[str] = ...,
    include: None = None,
    repr_layers: Collection[int] | None = ...,
    device: str | torch.device = ...,
    dtype: DType = ...,
    token_budget: int | None = ...,
    output_dir: str | os.PathLike[str] | None = ...,
    id_column: str = ...,
    sequence_column: str = ...,
    allow_empty: bool = ...,
    progress: bool = ...,
) -> Embeddings: ...


@overload
def embed(
    sequences: Proteins,
    *,
    model: ModelName = ...,
    weights: str | os.PathLike[str] = ...,
    include: Collection[OutputName],
    repr_layers: Collection[int] | None = ...,
    device: str | torch.device = ...,
    dtype: DType = ...,
    token_budget: int | None = ...,
    output_dir: str | os.PathLike[str] | None = ...,
    id_column: str = ...,
    sequence_column: str = ...,
    allow_empty: bool = ...,
    progress: bool = ...,
) -> Outputs: ...


def embed(
    sequences: Proteins,
    *,
    model: ModelName = "esm2_t33_650M_UR50D",
    weights: str | os.PathLike[str] = "auto",
    include: Collection[OutputName] | None = None,
    repr_layers: Collection[int] | None = None,
    device: str | torch.device = "auto",
    dtype: DType = "auto",
    token_budget: int | None = None,
    output_dir: str | os.PathLike[str] | None = None,
    id_column: str = "id",
    sequence_column: str = "sequence",
    allow_empty: bool = False,
    progress: bool = True,
) -> Embeddings | Outputs:
    """Embed proteins with ESM-2: average the last layer over the residues, or compute `include`.

    It works in this process, on one device, and also in the running event loop of a notebook. A run
    (`python flows/embed.py`) uses all devices, and resumes after a preemption or a failure.

    Args:
        sequences: A list of sequences, with the ids "0", "1", ...; a dictionary of sequences by id;
            pairs of id and sequence; records of Biopython, as returned by `SeqIO.parse`; a pandas
            Series, with the ids in its index; a DataFrame of pandas or polars or a pyarrow Table,
            with columns for ids and sequences; or the path of a FASTA file, a table or a directory,
            or a list of paths. A sequence is text, bytes, or an object that is converted by `str`,
            such as Biopython's `Seq`. Integer ids are returned as text. The rules for FASTA files
            apply: lower case is converted to upper case, and ids have to be unique. Identical
            sequences are computed once.
        model: One of fair-esm's six ESM-2 models.
        weights: A fair-esm `.pt` file; "auto" for fair-esm's cache or a download; or "random" for
            seeded random weights, to try the function.
        include: The outputs to compute, as `--include` of a run: "mean", "bos", "max", "std",
            "per_tok", "contacts", "logits". If it is given, `Outputs` are returned, also for the
            mean alone.
        repr_layers: The layers of the outputs, in fair-esm's numbering: 0 is the embedding, -1, the
            default, the last layer. Without `include` it has to be one layer.
        device: "cpu", "cuda", "cuda:1", or "auto" for a GPU if there is one.
        dtype: Precision of the model; "auto" is bfloat16 on a GPU and float32 on the CPU. Rows are
            always float32.
        token_budget: Largest number of tokens in a forward pass; by default it suits the device. A
            batch that does not fit into memory is computed in smaller pieces.
        output_dir: A run directory, for checkpoints and the dataset, in which the same call
            resumes an earlier one, or a run. By default nothing is written.
        id_column: Column of the ids in a table, in memory or in a file.
        sequence_column: Column of the sequences in a table.
        allow_empty: Return no rows if there are no sequences, instead of an error.
        progress: Show a progress bar on a terminal or in a notebook.

    Returns:
        A row for each sequence, in the order of the input, all in memory. With `output_dir` the
        rows are read from the dataset there, which `open_dataset` reads in parts if it does not fit
        into memory. A sequence that an earlier run has quarantined has no row there, which is
        logged.

    Raises:
        InputError: The sequences, a setting or the directory cannot be used; nothing is computed.
        NumericalInstabilityError: A row is not finite, even if its sequence is computed alone in
            float32; the message has the id.
        SequenceTooLargeError: Sequences do not fit into memory, each alone; the message has the
            ids.

    >>> settings = {"model": "esm2_t6_8M_UR50D", "weights": "random", "progress": False}
    >>> embeddings = embed(["MKVLATTWQERS", "MKL"], **settings)
    >>> embeddings.embeddings.shape
    (2, 320)
    >>> named = embed({"short": "MKL"}, **settings)
    >>> bool(np.allclose(named["short"], embeddings["1"], atol=1e-5))
    True
    >>> more = embed(
    ...     ["MKVLATTWQERS", "MKL"], include=["mean", "per_tok"], repr_layers=[3, -1], **settings
    ... )
    >>> more
    Outputs(2 sequences: mean_3, mean_6, per_tok_3, per_tok_6)
    >>> more.arrays["mean_6"].shape, more["1"]["per_tok_6"].shape
    ((2, 320), (3, 320))
    """
    layout = _requested_layout(model, include, repr_layers)
    weights = weights_path(weights)
    _require_one_of("dtype", dtype, DType)
    if token_budget is not None and token_budget < 1:
        raise ConfigError(f"token_budget is {token_budget}; it must be at least 1")
    device_number = _device_number(str(device))
    settings = _Settings(
        model=model,
        layout=layout,
        weights=weights,
        device=device_number,
        dtype=cast(DType, resolve_dtype(dtype, device_number)),
        token_budget=token_budget,
        id_column=id_column,
        sequence_column=sequence_column,
        allow_empty=allow_empty,
        progress=progress,
    )
    if settings.weights == RANDOM_WEIGHTS:
        logger.warning("weights='random': an untrained model, the vectors mean nothing")
    proteins = files_or_records(sequences, id_column=id_column, sequence_column=sequence_column)
    run_dir = None if output_dir is None else user_path(output_dir, PathUse.OUTPUT)
    outputs = _embed(proteins, run_dir, settings)
    if include is not None:
        return outputs
    (embeddings,) = outputs.arrays.values()
    assert isinstance(embeddings, np.ndarray)
    return Embeddings(ids=outputs.ids, embeddings=embeddings)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Settings:
    model: ModelName
    layout: RowLayout
    weights: str
    device: str  # "cpu" or the number of a GPU
    dtype: DType
    token_budget: int | None
    id_column: str
    sequence_column: str
    allow_empty: bool
    progress: bool

    @property
    def outputs(self) -> dict[str, Output]:
        """The outputs by name."""
        return dict(zip(self.layout.names, self.layout.outputs, strict=True))


@dataclass(frozen=True, kw_only=True)
class _Records:
    ids: list[str]  # N, each once
    descriptions: list[str]
    sequences: list[str]
    representatives: NDArray[np.int64]  # position of the first identical sequence, (N,)

    @classmethod
    def read(cls, paths: Sequence[Path], settings: _Settings) -> _Records:
        """Read files, and validate their records."""
        policy = InputPolicy(
            id_column=settings.id_column,
            sequence_column=settings.sequence_column,
            allow_empty=settings.allow_empty,
        )
        left_out: list[str] = []
        sources = find_sources(paths, stdin=STDIN, left_out=left_out)
        for description in left_out:
            logger.warning(description)
        scan = InputScan()
        ids: list[str] = []
        descriptions: list[str] = []
        sequences: list[str] = []
        for chunk in chain.from_iterable(read_records(source, policy) for source in sources):
            scan.add(chunk)
            ids += chunk.usable.ids
            descriptions += chunk.usable.descriptions
            sequences += chunk.usable.sequences
        representatives = scan.finish(sources, policy).representatives
        return cls(
            ids=ids, descriptions=descriptions, sequences=sequences, representatives=representatives
        )

    @classmethod
    def in_memory(cls, records: RecordsInMemory, settings: _Settings) -> _Records:
        """Validate records in memory."""
        if not records.ids and settings.allow_empty:
            return cls(
                ids=[], descriptions=[], sequences=[], representatives=np.empty(0, dtype=np.int64)
            )
        chunk = chunk_from_memory(records.ids, records.sequences)
        texts = replace(chunk.usable, descriptions=records.descriptions)
        scan = InputScan()
        scan.add(chunk)
        repeats, firsts = scan.repeated_ids()
        if repeats.size:
            raise FastaError(
                f"the id {texts.ids[repeats[0]]!r} occurs twice, at records {firsts[0]} and "
                f"{repeats[0]}; give each sequence an id of its own"
            )
        return cls(
            ids=texts.ids,
            descriptions=texts.descriptions,
            sequences=texts.sequences,
            representatives=scan.representatives(dedup=True),
        )

    @cached_property
    def lengths(self) -> NDArray[np.int64]:
        """Residues of each sequence, (N,)."""
        return np.fromiter(map(len, self.sequences), dtype=np.int64, count=len(self.sequences))

    def fetch(self, ordinals: NDArray[np.int64]) -> tuple[list[str], list[str]]:
        """Return the ids and sequences of `ordinals`, in their order."""
        places = ordinals.tolist()
        return [self.ids[each] for each in places], [self.sequences[each] for each in places]


def _requested_layout(
    model: str, include: Collection[str] | None, repr_layers: Collection[int] | None
) -> RowLayout:
    """Return the layout of the requested outputs."""
    from vnp_lib.model import architecture_of

    _require_one_of("model", model, ModelName)
    kinds = ["mean"] if include is None else [*include]
    if isinstance(include, str) or not kinds:
        raise ConfigError(
            f"include is {include!r}; give a list of {', '.join(get_args(OutputName))}"
        )
    for kind in kinds:
        _require_one_of("include", kind, OutputName)
    architecture = architecture_of(model)
    outputs = choose_outputs(
        set(map(OutputKind, kinds)), repr_layers, num_layers=architecture.num_layers
    )
    if include is None and len(outputs) > 1:
        raise ConfigError(
            f"repr_layers is {repr_layers!r}; for several layers give include=['mean'] too"
        )
    return RowLayout(outputs, architecture.embed_dim)


def _require_one_of(name: str, value: str, type_: Any) -> None:
    if value not in get_args(type_):
        raise ConfigError(f"{name} is {value!r}; choose one of {', '.join(get_args(type_))}")


def _device_number(device: str) -> str:
    """Return a device as it is named in a run: "cpu", or the number of a GPU."""
    import torch

    kind, _, number = device.partition(":")
    if kind == "auto":
        kind = "cuda" if torch.cuda.is_available() else "cpu"
    if kind == "cpu":
        return "cpu"
    if kind != "cuda" or not (number.isdigit() or not number):
        raise ConfigError(f"device is {device!r}; choose 'auto', 'cpu', 'cuda' or 'cuda:1'")
    if int(number or 0) >= torch.cuda.device_count():
        raise ConfigError(
            f"device is {device!r}, and this machine shows {torch.cuda.device_count()} GPUs; "
            "choose 'auto' or 'cpu'"
        )
    return number or str(torch.cuda.current_device())


def _embed(
    proteins: list[Path] | RecordsInMemory, run_dir: Path | None, settings: _Settings
) -> Outputs:
    import torch

    with nullcontext() if settings.device == "cpu" else torch.cuda.device(int(settings.device)):
        if not isinstance(proteins, RecordsInMemory):
            if run_dir is None:
                return _embed_in_memory(_Records.read(proteins, settings), settings)
            return _embed_into(run_dir, proteins, settings)
        records = _Records.in_memory(proteins, settings)
        if run_dir is None:
            return _embed_in_memory(records, settings)
        with _written_as_fasta(records) as path:
            return _embed_into(run_dir, [path], settings)


def _embed_in_memory(records: _Records, settings: _Settings) -> Outputs:
    import torch

    from vnp_lib.inference import (
        AsyncInferenceRunner,
        ExactModel,
        InferenceOptions,
        choose_token_budget,
    )
    from vnp_lib.model import load_model, resolve_weights, with_heads

    if not records.ids:
        return Outputs(ids=[], arrays=_space_for(settings.outputs, 0, settings.layout.embed_dim))
    dtype, device = getattr(torch, settings.dtype), torch.device(torch_device_name(settings.device))
    weights = resolve_weights(settings.model, settings.weights)
    token_budget = settings.token_budget or choose_token_budget(
        settings.model, dtype, [settings.device], settings.layout
    )
    batches = divide_into_batches(records.lengths, token_budget, records.representatives)
    network = load_model(weights, dtype=dtype, device=device)
    runner = AsyncInferenceRunner(
        with_heads(network, weights, settings.layout.heads),
        device,
        options=InferenceOptions(
            budget=TokenBudget(token_budget),
            layout=settings.layout,
            recompute=None
            if dtype == torch.float32
            else ExactModel(weights, layout=settings.layout),
        ),
    )
    gathered = _OutputArrays(settings.layout, records.lengths)
    num_tokens = sum(model_tokens(records.lengths[batch], "whole") for batch in batches)
    with (
        _bar(settings, sum(map(len, batches)), num_tokens) as bar,
        unwrap_batch_error(),
        closing(runner.embed(pack_batches(enumerate(batches), records.fetch))) as results,
    ):
        for result in results:
            ordinals = batches[result.batch_idx]
            # If a sequence is too large, the loop ends with an error that names it.
            if len(result.sequence_ids) == ordinals.size:
                gathered.put(ordinals, result.embeddings.numpy())
            bar.advance(_SHARD, sequences=len(result.sequence_ids), tokens=result.num_tokens)
    gathered.fan_out(records.representatives)
    return Outputs(ids=records.ids, arrays=gathered.arrays)


class _OutputArrays:
    """The outputs of all sequences, which are added in any order."""

    def __init__(self, layout: RowLayout, lengths: NDArray[np.int64]) -> None:
        self._layout = layout
        self._lengths = lengths
        outputs = dict(zip(layout.names, layout.outputs, strict=True))
        self.arrays = _space_for(outputs, lengths.size, layout.embed_dim)

    def put(self, ordinals: NDArray[np.int64], rows: NDArray[np.float32]) -> None:
        """Store the rows of some sequences, (n, W) or end to end."""
        if self._layout.is_fixed:
            for array, part in zip(
                self.arrays.values(), np.split(rows, len(self.arrays), axis=1), strict=True
            ):
                array[ordinals] = part
            return
        widths = self._layout.widths(self._lengths[ordinals])
        for ordinal, row in zip(
            ordinals.tolist(), np.split(rows, offsets_of(widths)[1:-1]), strict=True
        ):
            for name, values in self._layout.divide(row, int(self._lengths[ordinal])).items():
                # A view would keep the rows of the entire batch in memory.
                self.arrays[name][ordinal] = values.copy()

    def fan_out(self, representatives: NDArray[np.int64]) -> None:
        """Copy the outputs of each sequence to its duplicates."""
        copies = np.flatnonzero(representatives != np.arange(representatives.size))
        originals = representatives[copies]
        for array in self.arrays.values():
            if isinstance(array, np.ndarray):
                array[copies] = array[originals]
                continue
            for copy, original in zip(copies.tolist(), originals.tolist(), strict=True):
                array[copy] = array[original].copy()


def _space_for(outputs: Mapping[str, Output], num_sequences: int, embed_dim: int) -> dict[str, Any]:
    """Return empty arrays for outputs by name: (N, D), or a list if they have different lengths."""
    return {
        name: np.empty((num_sequences, embed_dim), dtype=np.float32)
        if output.is_fixed
        else [None] * num_sequences
        for name, output in outputs.items()
    }


def _embed_into(output_dir: Path, fasta: Sequence[Path], settings: _Settings) -> Outputs:
    config = EmbedConfig(
        fasta=tuple(fasta),
        output_dir=output_dir,
        model=settings.model,
        weights=settings.weights,
        include=tuple(dict.fromkeys(output.kind.value for output in settings.layout.outputs)),
        repr_layers=settings.layout.layers or None,
        devices=settings.device,
        dtype=settings.dtype,
        shards=1,
        token_budget=settings.token_budget,
        id_column=settings.id_column,
        sequence_column=settings.sequence_column,
        allow_empty=settings.allow_empty,
        on_poison="fail",
    )
    validate_config(config)
    with open_run(config) as run:
        num_tokens = run.plan.num_tokens(run.plan.order)
        with _bar(settings, run.plan.num_computed, num_tokens) as bar, unwrap_batch_error():
            if not run.shard_progress(_SHARD).is_complete and run.complete_dataset() is None:
                _embed_shard(run, settings, bar)
        quarantined = run.quarantine.ordinals()
        if quarantined:
            logger.warning(
                "%d sequences are in quarantine and have no row: see %s",
                len(quarantined),
                run.paths.quarantine,
            )
        assemble(run.plan, run.paths, run.checkpoints().valid, quarantined=quarantined)
    return _read_dataset(output_dir)


def _embed_shard(run: Run, settings: _Settings, bar: RunProgress) -> None:
    """Embed a shard in this process as a worker process does, and record it as a run does."""
    run.prepare_shard(_SHARD)
    run.manifest.start_attempt(_SHARD, device=settings.device)
    job = run.shard_job(_SHARD, settings.device).model_copy(
        update={"device": torch_device_name(settings.device)}
    )
    lock = FileLock(run.paths.shard_lock(_SHARD), purpose=f"embed shard {_SHARD}")
    with lock.held(timeout_s=_ORPHAN_LIMIT_S):
        ShardAttempt(job, _ProgressEvents(bar), _NoSignals()).run_in_lock()
    run.manifest.reconcile(run.checkpoints(rank=_SHARD).valid, rank=_SHARD)
    run.manifest.mark_shard_complete(_SHARD)


class _ProgressEvents:
    """Shows the progress of an attempt in a bar."""

    def __init__(self, bar: RunProgress) -> None:
        self._bar = bar

    def send(self, event: WorkerEvent) -> None:
        match event:
            case AttemptStarted(done=done, tokens_done=tokens):
                self._bar.begin(_SHARD, sequences=done, tokens=tokens)
            case BatchComputed(sequences=sequences, tokens=tokens):
                self._bar.advance(_SHARD, sequences=sequences, tokens=tokens)


class _NoSignals(StopFlag):
    """Does not handle SIGTERM, which belongs to the user's program.

    Ctrl-C raises an exception, and computed rows are saved on any exception.
    """

    def install(self) -> None:
        pass


@contextmanager
def _written_as_fasta(records: _Records) -> Iterator[Path]:
    """Write records to a temporary file for the planner, which copies them."""
    with tempfile.TemporaryDirectory(prefix="vnp-") as directory:
        path = Path(directory) / "sequences.fasta"
        with path.open("w", encoding="utf-8") as file:
            for name, description, text in zip(
                records.ids, records.descriptions, records.sequences, strict=True
            ):
                file.write(f">{name} {description}".rstrip() + f"\n{text}\n")
        yield path


def _read_dataset(run_dir: Path) -> Outputs:
    dataset = open_dataset(run_dir)
    arrays = _space_for(dataset.columns, len(dataset), dataset.dim)
    start = 0
    for batch in dataset.row_groups(["length", *dataset.columns]):
        stop = start + batch.num_rows
        for column, array in arrays.items():
            array[start:stop] = dataset.arrays_in(batch, column)
        start = stop
    return Outputs(
        ids=list(dataset.ids), arrays=dict(zip(dataset.outputs, arrays.values(), strict=True))
    )


def _bar(settings: _Settings, num_sequences: int, num_tokens: int) -> RunProgress:
    """Return a bar on a terminal or in a notebook, which shows nothing elsewhere."""
    console = error_console(quiet=not settings.progress)
    return RunProgress(
        total_sequences=num_sequences,
        total_tokens=num_tokens,
        log_interval_s=math.inf,
        console=console,
    )


@contextmanager
def unwrap_batch_error() -> Iterator[None]:
    """Raise the NumericalInstabilityError that caused a BatchFailedError instead of that."""
    try:
        yield
    except BatchFailedError as error:
        if isinstance(error.__cause__, NumericalInstabilityError):
            raise NumericalInstabilityError(
                f"{error.__cause__}; take it out to embed the others"
            ) from None
        raise
