"""`vnp esm-extract`: fair-esm's `esm-extract`, with its arguments and files, over packed batches.

It writes the same files as fair-esm's scripts/extract.py: `{label}.pt` for each sequence, with the
entire header line as label. Existing files are replaced, atomically.
"""

from __future__ import annotations

import io
import logging
import os
import shutil
import stat
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vnp_lib.dataset import extract_file
from vnp_lib.errors import ConfigError, FastaError, SequenceTooLargeError
from vnp_lib.failures import FailureKind, classify_exception
from vnp_lib.inference import PackedModel, divide_into_batches, embed_batch, pack_batches
from vnp_lib.inputs import (
    MAX_NUCLEOTIDE_SHARE_OF_PROTEINS,
    PROTEINS,
    STDIN,
    Source,
    check_records,
    faults_error,
    is_fastq_file,
    name_in_errors,
    nucleotide_share,
    read_fasta,
    require_unchanged,
)
from vnp_lib.model import (
    MODELS,
    PackedBatch,
    architecture_of,
    load_model,
    model_of,
    resolve_weights,
    split_rows,
    with_heads,
)
from vnp_lib.plan import Output, OutputKind, RowLayout, choose_outputs, model_tokens
from vnp_lib.report import RunProgress
from vnp_lib.storage import path_below, remove_orphaned_temporaries, replace_unsynced

Kind = Literal["mean", "per_tok", "bos", "contacts"]
KINDS: tuple[Kind, ...] = get_args(Kind)

# Sequences that are inspected for nucleotides.
_SAMPLE = 1000

# fair-esm's alphabet has tokens for gaps, which some files have for unknown residues.
_FAIR_ESM = replace(PROTEINS, characters=PROTEINS.characters + "-.")

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class ExtractSettings:
    """The arguments of `esm-extract`, under its names."""

    model_location: str  # name of a model, or path of its parameters
    fasta_file: Path
    output_dir: Path
    toks_per_batch: int = 4096

    # From 0, the embedding, to the number of layers; -1 is the last.
    repr_layers: tuple[int, ...] = (-1,)

    include: frozenset[Kind]
    truncation_seq_length: int = 1022  # residues
    nogpu: bool = False


def extract(settings: ExtractSettings) -> int:
    """Write a file for each sequence, computed in float32, and return the number of files.

    Raises:
        InputError: An argument, the FASTA file or a label is invalid. Nothing is written.
        SequenceTooLargeError: A batch does not fit into memory.
        OSError: A file cannot be written.
    """
    if settings.output_dir.exists() and not settings.output_dir.is_dir():
        raise ConfigError(f"{settings.output_dir}: this is a file; give a directory for the files")
    for option in ("toks_per_batch", "truncation_seq_length"):
        if getattr(settings, option) < 1:
            raise ConfigError(f"--{option} is {getattr(settings, option)}; it must be at least 1")
    weights_file = settings.model_location if _is_path(settings.model_location) else None
    model = model_of(Path(weights_file)) if weights_file else settings.model_location
    architecture = architecture_of(model)
    kinds = {OutputKind(kind) for kind in settings.include}
    outputs = choose_outputs(kinds, settings.repr_layers, num_layers=architecture.num_layers)
    layout = RowLayout(outputs, architecture.embed_dim)
    labels, sequences = _read(settings.fasta_file)
    paths = []
    for label in labels:
        try:
            paths.append(path_below(settings.output_dir, f"{label}.pt"))
        except ValueError as error:
            raise FastaError(f"the header {label!r} {error}: give it another one") from None
    sequences = _truncate(sequences, settings.truncation_seq_length)

    device = torch.device("cuda" if torch.cuda.is_available() and not settings.nogpu else "cpu")
    weights = resolve_weights(model, weights_file or "auto")
    network = with_heads(
        load_model(weights, dtype=torch.float32, device=device), weights, layout.heads
    )
    settings.output_dir.mkdir(parents=True, exist_ok=True)
    remove_orphaned_temporaries(settings.output_dir)
    lengths = np.fromiter(map(len, sequences), dtype=np.int64, count=len(sequences))

    def fetch(ordinals: NDArray[np.int64]) -> tuple[list[str], list[str]]:
        places = ordinals.tolist()
        return [labels[each] for each in places], [sequences[each] for each in places]

    batches = enumerate(divide_into_batches(lengths, settings.toks_per_batch))
    with RunProgress(
        total_sequences=len(labels), total_tokens=model_tokens(lengths, "whole")
    ) as progress:
        for batch in pack_batches(batches, fetch):
            results = _results(network, batch.to(device), layout)
            for ordinal, label, result in zip(
                batch.ordinals.tolist(), batch.sequence_ids, results, strict=True
            ):
                path = paths[ordinal]
                path.parent.mkdir(parents=True, exist_ok=True)
                data = io.BytesIO()
                torch.save(extract_file(label, result), data)
                replace_unsynced(path, data.getbuffer(), temporary_dir=settings.output_dir)
            progress.advance(0, sequences=batch.num_sequences, tokens=batch.num_tokens)
    return len(labels)


def _is_path(model_location: str) -> bool:
    """Whether it is a path. fair-esm requires the suffix .pt; other files work here."""
    if model_location in MODELS:
        return False
    return (
        "/" in model_location
        or model_location.endswith((".pt", ".safetensors"))
        or os.path.lexists(model_location)
    )


def _read(path: Path) -> tuple[list[str], list[str]]:
    """Return labels, which are entire header lines, and sequences."""
    labels: list[str] = []
    sequences: list[str] = []
    with _readable_twice(path) as file:
        source = Source(path=file, name="standard input" if path == STDIN else str(path))
        with name_in_errors(source), require_unchanged(file):
            if is_fastq_file(file):
                raise FastaError(
                    f"{file}: this is FASTQ, which holds nucleotides; give proteins as FASTA"
                )
            for raw in read_fasta(file):
                checked = check_records(raw, _FAIR_ESM, first_record=len(labels))
                if checked.faults:
                    raise faults_error(source, checked.faults)
                labels += [header.strip() for header in raw.headers]
                sequences += checked.usable.sequences
            _require_distinct_proteins(file, labels, sequences)
    return labels, sequences


def _require_distinct_proteins(path: Path, labels: list[str], sequences: list[str]) -> None:
    if not labels:
        raise FastaError(
            f"{path}: there is no sequence in it; give a file with at least one record"
        )
    if nucleotide_share(sequences[:_SAMPLE]) >= MAX_NUCLEOTIDE_SHARE_OF_PROTEINS:
        raise FastaError(
            f"{path}: this looks like nucleotides; ESM-2 takes proteins: translate it first, "
            "for example with `seqkit translate`"
        )
    label, count = Counter(labels).most_common(1)[0]
    if count > 1:
        raise FastaError(
            f"{path}: {count} sequences have the header {label!r}, "
            "and each would have the same file"
        )


@contextmanager
def _readable_twice(path: Path) -> Iterator[Path]:
    """Yield the file, or a temporary copy of the contents of a pipe, such as `<(zcat x.gz)`."""
    pipe = Path("/dev/stdin") if path == STDIN and not path.exists() else path
    if pipe.exists() and stat.S_ISCHR(pipe.stat().st_mode):
        raise FastaError(f"{path}: this is a device; give a file or a pipe")
    if not pipe.is_fifo():
        yield pipe
        return
    with NamedTemporaryFile(prefix="vnp-", suffix=".fasta") as copy, pipe.open("rb") as piped:
        shutil.copyfileobj(piped, copy)
        copy.flush()
        yield Path(copy.name)


def _truncate(sequences: list[str], max_residues: int) -> list[str]:
    num_longer = sum(len(sequence) > max_residues for sequence in sequences)
    if num_longer:
        logger.warning(
            "%d of %d sequences are longer than %d residues: the rest of each is omitted, "
            "as by esm-extract (--truncation_seq_length)",
            num_longer,
            len(sequences),
            max_residues,
        )
    return [sequence[:max_residues] for sequence in sequences]


@torch.inference_mode()
def _results(
    network: PackedModel, batch: PackedBatch, layout: RowLayout
) -> Iterator[dict[Output, Tensor]]:
    """Yield the outputs in the file of each sequence.

    They are copies: torch would write the entire tensor of a view.
    """
    try:
        rows = embed_batch(network, batch, layout).cpu()
    except (RuntimeError, MemoryError) as error:
        if classify_exception(error).kind != FailureKind.OOM:
            raise
        raise SequenceTooLargeError(
            f"a batch of {batch.num_tokens:,} tokens does not fit into memory: "
            "give a smaller --toks_per_batch, or, if it is one sequence, "
            "a smaller --truncation_seq_length"
        ) from error
    lengths = batch.lengths
    for row, length in zip(split_rows(rows, layout, lengths), lengths.tolist(), strict=True):
        shapes = [output.shape(length, layout.embed_dim) for output in layout.outputs]
        parts = row.split_with_sizes([prod(shape) for shape in shapes])
        yield {
            output: part.view(shape).clone()
            for output, part, shape in zip(layout.outputs, parts, shapes, strict=True)
        }
