"""Scan the input once: count, check and deduplicate its sequences."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vnp_lib.errors import FastaError
from vnp_lib.inputs import (
    DIGEST_BYTES,
    EMPTY_ADVICE,
    InputChunk,
    InputCounts,
    InputPolicy,
    SequenceChunk,
    Source,
    digest_texts,
    find_repeats,
    locate_records,
)

_NUM_SHOWN = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class ScanResult:
    """What a pass over the input finds."""

    sequences_sha256: str  # of ">header\nSEQUENCE\n" of every record, normalised, in order
    original_lengths_sha256: str  # int32, little-endian; "" where no sequence was cut
    num_residues: int
    counts: InputCounts
    representatives: NDArray[np.int64]


class InputScan:
    """Takes the measure of the input chunk by chunk, in about 40 bytes a sequence."""

    def __init__(self) -> None:
        self.counts = InputCounts()
        self._sha256 = hashlib.sha256()
        self._original_lengths_sha256 = hashlib.sha256()
        self._num_residues = 0
        self._id_digests = bytearray()
        self._sequence_digests = bytearray()

    @property
    def num_sequences(self) -> int:
        return len(self._sequence_digests) // DIGEST_BYTES

    def add(self, chunk: InputChunk) -> None:
        self.counts += chunk.counts
        self._sha256.update(_as_fasta(chunk.usable))
        self._original_lengths_sha256.update(
            np.asarray(chunk.original_lengths).astype("<i4").tobytes()
        )
        self._num_residues += int(chunk.lengths.sum(dtype=np.int64))
        self._id_digests += digest_texts(chunk.usable.ids)
        self._sequence_digests += digest_texts(chunk.usable.sequences)

    def repeated_ids(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Ordinals of records whose id occurred before, ascending, and of those where it first did."""
        return find_repeats(self._id_digests)

    def representatives(self, *, dedup: bool) -> NDArray[np.int64]:
        """The ordinal of the first identical sequence, or without `dedup` its own, (N,).

        To be asked for once, when all is added: ids are forgotten then, and the duplicates are among the counts.
        """
        self._id_digests.clear()
        representatives = np.arange(self.num_sequences)
        if dedup:
            repeats, firsts = find_repeats(self._sequence_digests)
            representatives[repeats] = firsts
            self.counts += InputCounts(num_duplicates=repeats.size)
        return representatives

    def finish(self, sources: Sequence[Source], policy: InputPolicy) -> ScanResult:
        """Raises FastaError where nothing is left, or an id may not occur twice and does; then the input is read again."""
        if not self.num_sequences and not policy.allow_empty:
            raise no_sequences_error(self.counts, policy)
        if policy.duplicate_ids != "keep":
            repeats, firsts = self.repeated_ids()
            if repeats.size and policy.duplicate_ids == "rename":
                raise FastaError(
                    "the input was changed while it was read; wait until it is complete, then start again"
                )
            if repeats.size:
                raise _duplicate_ids(sources, policy, repeats, firsts)
        representatives = self.representatives(dedup=policy.dedup)
        return ScanResult(
            sequences_sha256=self._sha256.hexdigest(),
            original_lengths_sha256=self._original_lengths_sha256.hexdigest()
            if self.counts.num_cut
            else "",
            num_residues=self._num_residues,
            counts=self.counts,
            representatives=representatives,
        )


def _as_fasta(chunk: SequenceChunk) -> bytes:
    lines = [""] * (2 * len(chunk.ids))
    described = zip(chunk.ids, chunk.descriptions, strict=True)
    lines[0::2] = [
        f">{sequence_id} {rest}" if rest else f">{sequence_id}" for sequence_id, rest in described
    ]
    lines[1::2] = chunk.sequences
    return "\n".join([*lines, ""]).encode()


def no_sequences_error(counts: InputCounts, policy: InputPolicy) -> FastaError:
    """Say why there is nothing to embed though there are records, and what to do."""
    if counts.num_skipped:
        what = f"all {counts.num_skipped:,} {'proteins' if policy.translate else 'records'} are skipped"
        return FastaError(f"{what}: there is nothing to embed; mend them first, or {EMPTY_ADVICE}")
    return FastaError(
        "no record has a frame without a stop codon: there is no protein to embed; give other records, or "
        + EMPTY_ADVICE
    )


def _duplicate_ids(
    sources: Sequence[Source],
    policy: InputPolicy,
    repeats: NDArray[np.int64],
    firsts: NDArray[np.int64],
) -> FastaError:
    pairs = list(zip(firsts[:_NUM_SHOWN].tolist(), repeats[:_NUM_SHOWN].tolist(), strict=True))
    places = locate_records(sources, policy, {ordinal for pair in pairs for ordinal in pair})
    listed = "; ".join(
        f"{places[first][0]!r}: {places[first][1]} and {places[again][1]}" for first, again in pairs
    )
    more = f"; and {repeats.size - _NUM_SHOWN:,} more" if repeats.size > _NUM_SHOWN else ""
    return FastaError(
        f"ids must be unique, but some occur twice ({listed}{more}); rename or take out these records, or have that done "
        f"with --duplicate-ids rename, or have each keep its row with --duplicate-ids keep"
    )
