"""What is computed: proteins, real or drawn, and what they cost.

Forward FLOPs of ESM-2 with n layers of width D, a protein of L tokens: L (24 D^2 n + 4 D n L). The
first part is the six matrix products of a layer (query, key, value, output, and two of 4 D), the
second is attention within the protein.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from esm import FastaBatchedDataset

from vnp_lib.model.esm2 import Architecture
from vnp_lib.plan.packing import NUM_SPECIAL_TOKENS

MOST_RESIDUES = 1022  # extract.py cuts longer ones, and then the work is not the same
STOCK_TOKENS = 4096  # extract.py's --toks_per_batch
EXAMPLE = Path(__file__).parents[1] / "examples" / "viral_proteins.fasta"

_RESIDUES = np.frombuffer(b"ACDEFGHIKLMNPQRSTVWY", dtype=np.uint8)


def viral_proteins() -> list[str]:
    """The example's proteins, each sequence once, without those that extract.py would cut."""
    distinct = dict.fromkeys(FastaBatchedDataset.from_file(EXAMPLE).sequence_strs)
    return [sequence for sequence in distinct if len(sequence) <= MOST_RESIDUES]


def log_normal_mix(count: int, *, seed: int = 0) -> list[str]:
    """Draw proteins with lengths as in a proteome: log-normal, median 200, within 20..1,022."""
    draw = np.random.default_rng(seed)
    lengths = np.exp(draw.normal(np.log(200), 0.75, size=count)).astype(int)
    return _drawn(np.clip(lengths, 20, MOST_RESIDUES), draw)


def virnucpro_orfs(count: int, *, seed: int = 0) -> list[str]:
    """What VirNucPro makes of reads of 300 and 500 bases: 99, 100 and 166 residues."""
    draw = np.random.default_rng(seed)
    return _drawn(draw.choice([99, 100, 166], size=count), draw)


def stock_batches(sequences: Sequence[str], token_budget: int = STOCK_TOKENS) -> list[list[int]]:
    """Cut a list into extract.py's batches, shortest proteins first, as indices."""
    batches: list[list[int]] = FastaBatchedDataset(
        range(len(sequences)), sequences
    ).get_batch_indices(token_budget, extra_toks_per_seq=1)
    return batches


def chunks(
    sequences: Sequence[str], count: int, token_budget: int = STOCK_TOKENS
) -> list[list[str]]:
    """Choose `count` of extract.py's batches, evenly from the shortest proteins to the longest."""
    batches = stock_batches(sequences, token_budget)
    places = (np.arange(count) + 0.5) / count * len(batches)
    return [
        [sequences[index] for index in batches[place]]
        for place in sorted(set(places.astype(int).tolist()))
    ]


def write_fasta(path: Path, sequences: Iterable[str]) -> None:
    path.write_text("".join(f">p{index}\n{sequence}\n" for index, sequence in enumerate(sequences)))


def num_tokens(sequences: Iterable[str]) -> int:
    """Tokens of proteins, BOS and EOS included, padding not."""
    return sum(len(sequence) + NUM_SPECIAL_TOKENS for sequence in sequences)


def forward_flops(architecture: Architecture, sequences: Iterable[str]) -> float:
    """Useful FLOPs of a forward pass, heads, padding and all that is small left out."""
    lengths = np.array(
        [len(sequence) + NUM_SPECIAL_TOKENS for sequence in sequences], dtype=np.float64
    )
    dim, layers = architecture.embed_dim, architecture.num_layers
    return float(24 * dim**2 * layers * lengths.sum() + 4 * dim * layers * (lengths**2).sum())


def _drawn(lengths: np.ndarray, draw: np.random.Generator) -> list[str]:
    residues = _RESIDUES[draw.integers(0, 20, size=lengths.sum())].tobytes().decode()
    ends = np.cumsum(lengths).tolist()
    return [
        residues[end - length : end] for end, length in zip(ends, lengths.tolist(), strict=True)
    ]
