"""`vnp esm-extract`: what fair-esm's `esm-extract` does, with its arguments and its files, over packed batches.

It writes what fair-esm's scripts/extract.py does: `{label}.pt` for each sequence, the label being the whole header line. What is
there under such a name is replaced, never trusted; each file is whole at any moment.
"""

from __future__ import annotations

import io
import logging
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from vnp_lib.esm2 import ESM2, architecture_of, mean_pool
from vnp_lib.failures import ConfigError, FailureKind, FastaError, SequenceTooLargeError, classify_exception
from vnp_lib.fasta import read_fasta
from vnp_lib.files import remove_orphaned_temporaries, replace_unsynced
from vnp_lib.inputs import InputPolicy, Source, read
from vnp_lib.packing import pack
from vnp_lib.progress import RunProgress
from vnp_lib.tokens import TOKENS_AROUND, PackedBatch, pack_batch
from vnp_lib.weights import load_model, model_of, resolve_weights

Kind = Literal["mean", "per_tok", "bos", "contacts"]
KINDS: tuple[Kind, ...] = get_args(Kind)

_MOST_NAME_BYTES = 255  # of a file, on all common file systems

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class ExtractSettings:
    """The arguments of `esm-extract`, by its names."""

    model_location: str  # the path of a model's .pt file, or its name
    fasta_file: Path
    output_dir: Path
    toks_per_batch: int = 4096
    repr_layers: tuple[int, ...] = (-1,)  # 0, the embedding, to the number of layers; -1 is the last
    include: frozenset[Kind]
    truncation_seq_length: int = 1022  # residues
    nogpu: bool = False


def extract(settings: ExtractSettings) -> int:
    """Write a file for each sequence, computed in float32, and return their number.

    Raises:
        InputError: An argument, the FASTA file or a label cannot be used. Nothing has been written.
        SequenceTooLargeError: A batch does not fit into memory.
        OSError: The disk takes no more.
    """
    _require_sensible(settings)
    weights_file = settings.model_location if settings.model_location.endswith(".pt") else None
    model = model_of(Path(weights_file)) if weights_file else settings.model_location
    layers = _layer_numbers(settings.repr_layers, architecture_of(model).num_layers)
    labels, sequences = _read(settings.fasta_file)
    paths = [_path_below(settings.output_dir, label) for label in labels]
    sequences = _truncated(sequences, settings.truncation_seq_length)

    device = torch.device("cuda" if torch.cuda.is_available() and not settings.nogpu else "cpu")
    network = load_model(model, resolve_weights(model, weights_file or "auto"), dtype=torch.float32, device=device)
    settings.output_dir.mkdir(parents=True, exist_ok=True)
    remove_orphaned_temporaries(settings.output_dir)
    num_tokens = sum(map(len, sequences)) + TOKENS_AROUND * len(sequences)
    with RunProgress(total_sequences=len(labels), total_tokens=num_tokens) as progress:
        for batch in _batches(labels, sequences, settings.toks_per_batch):
            results = _results(network, batch.to(device), layers, settings.include)
            for ordinal, label, result in zip(batch.ordinals.tolist(), batch.sequence_ids, results, strict=True):
                _save({"label": label, **result}, paths[ordinal], settings.output_dir)
            progress.advance(0, sequences=batch.num_sequences, tokens=batch.num_tokens)
    return len(labels)


def _require_sensible(settings: ExtractSettings) -> None:
    if "contacts" in settings.include:
        raise ConfigError("--include contacts: these are not computed here; take fair-esm's own script for them")
    for option in ("toks_per_batch", "truncation_seq_length"):
        if getattr(settings, option) < 1:
            raise ConfigError(f"--{option} is {getattr(settings, option)}; it must be at least 1")


def _layer_numbers(repr_layers: Sequence[int], num_layers: int) -> list[int]:
    """Count from the front: of 6 layers, -1 is 6 and -7 is 0."""
    for layer in repr_layers:
        if not -(num_layers + 1) <= layer <= num_layers:
            raise ConfigError(f"--repr_layers {layer}: this model has 0 to {num_layers}, or -{num_layers + 1} to -1")
    return [layer % (num_layers + 1) for layer in repr_layers]


def _read(path: Path) -> tuple[list[str], list[str]]:
    """Labels, which are whole header lines, and sequences."""
    chunks = read(Source(path=path, name=str(path)), InputPolicy(duplicate_ids="keep"))
    sequences = [sequence for chunk in chunks for sequence in chunk.usable.sequences]
    labels = [header.strip() for chunk in read_fasta(path) for header in chunk.headers]
    label, count = Counter(labels).most_common(1)[0]
    if count > 1:
        raise FastaError(f"{path}: {count} sequences have the header {label!r}, and each would have the same file")
    return labels, sequences


def _path_below(directory: Path, label: str) -> Path:
    """Where the file of a label is. A "/" in it makes directories, but none outside of `directory`."""
    parts = f"{label}.pt".split("/")
    if any(part in ("", ".", "..") for part in parts):
        raise FastaError(
            f"the header {label!r} leads out of {directory} as a file name, or nowhere: give it another one"
        )
    if any(len(part.encode()) > _MOST_NAME_BYTES for part in parts):
        raise FastaError(
            f"the header {label!r} is too long for a file name, which has {_MOST_NAME_BYTES} bytes at most: shorten it, "
            "for example with `seqkit seq --only-id`"
        )
    return directory.joinpath(*parts)


def _truncated(sequences: list[str], most_residues: int) -> list[str]:
    num_longer = sum(len(sequence) > most_residues for sequence in sequences)
    if num_longer:
        logger.warning(
            "%d of %d sequences are longer than %d residues: what comes after these is left out, as by esm-extract "
            "(--truncation_seq_length)",
            num_longer,
            len(sequences),
            most_residues,
        )
    return [sequence[:most_residues] for sequence in sequences]


def _batches(labels: Sequence[str], sequences: Sequence[str], token_budget: int) -> Iterator[PackedBatch]:
    """The longest first: what does not fit into memory fails at once."""
    num_tokens = np.fromiter(map(len, sequences), dtype=np.int64, count=len(sequences)) + TOKENS_AROUND
    order = np.argsort(-num_tokens, kind="stable")
    for batch_idx, ordinals in enumerate(np.split(order, pack(num_tokens[order], token_budget)[1:-1])):
        places = ordinals.tolist()
        yield pack_batch(
            [sequences[place] for place in places],
            sequence_ids=[labels[place] for place in places],
            ordinals=ordinals,
            batch_idx=batch_idx,
        )


@torch.inference_mode()
def _results(
    network: ESM2, batch: PackedBatch, layers: Sequence[int], include: frozenset[Kind]
) -> list[dict[str, dict[int, Tensor]]]:
    """What goes into the file of each sequence, by extract.py's names. No tensor is a view: a file would hold all that it is of."""
    results: list[dict[str, dict[int, Tensor]]] = [{} for _ in range(batch.num_sequences)]
    states = _states(network, batch, layers)
    for kind in include:
        name, pool = _POOLS[kind]
        for layer, hidden in states.items():
            for result, tensor in zip(results, pool(hidden, batch.cu_seqlens), strict=True):
                result.setdefault(name, {})[layer] = tensor.clone()
    return results


def _states(network: ESM2, batch: PackedBatch, layers: Sequence[int]) -> dict[int, Tensor]:
    try:
        return network.forward_packed(batch.input_ids, batch.cu_seqlens, batch.max_seqlen, layers)["representations"]
    except (RuntimeError, MemoryError) as error:
        if classify_exception(error).kind != FailureKind.OOM:
            raise
        raise SequenceTooLargeError(
            f"a batch of {batch.num_tokens:,} tokens does not fit into memory: give a smaller --toks_per_batch, or, where "
            f"that is one sequence, a smaller --truncation_seq_length"
        ) from error


def _residues(hidden: Tensor, cu_seqlens: Tensor) -> Sequence[Tensor]:
    """States of each sequence's residues, (L, D), on the CPU."""
    return [states[1:-1] for states in torch.split(hidden.cpu(), cu_seqlens.diff().tolist())]


def _means(hidden: Tensor, cu_seqlens: Tensor) -> Sequence[Tensor]:
    return mean_pool(hidden, cu_seqlens).cpu().unbind()


def _beginnings(hidden: Tensor, cu_seqlens: Tensor) -> Sequence[Tensor]:
    """States of each sequence's BOS, (D,), on the CPU."""
    return hidden[cu_seqlens[:-1]].cpu().unbind()


_POOLS: dict[Kind, tuple[str, Callable[[Tensor, Tensor], Sequence[Tensor]]]] = {
    "per_tok": ("representations", _residues),
    "mean": ("mean_representations", _means),
    "bos": ("bos_representations", _beginnings),
}


def _save(result: Mapping[str, Any], path: Path, output_dir: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    data = io.BytesIO()
    torch.save(dict(result), data)
    replace_unsynced(path, data.getbuffer(), by_way_of=output_dir)
