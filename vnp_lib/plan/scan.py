"""Scan the input once: count, check and deduplicate its sequences."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vnp_lib.errors import FastaError
from vnp_lib.formatting import listed
from vnp_lib.inputs import (
    DIGEST_BYTES,
    EMPTY_ADVICE,
    InputChunk,
    InputCounts,
    InputPolicy,
    Source,
    digest_texts,
    find_repeats,
    locate_records,
)

_NUM_SHOWN = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class ScanResult:
    """The counts, digests and duplicates of an input."""

    # Of ">header\nSEQUENCE\n" of every record, normalised, in input order.
    sequences_sha256: str
    # Of int32, little-endian; "" if no sequence was truncated.
    original_lengths_sha256: str
    num_residues: int
    counts: InputCounts
    representatives: NDArray[np.int64]  # (N,)


class InputScan:
    """Accumulate counts and digests of the input chunk by chunk, 40 bytes per sequence."""

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
        """Add the next chunk of the input."""
        self.counts += chunk.counts
        texts = chunk.usable
        lines = [""] * (2 * len(texts.ids))
        lines[0::2] = [
            f">{sequence_id} {rest}" if rest else f">{sequence_id}"
            for sequence_id, rest in zip(texts.ids, texts.descriptions, strict=True)
        ]
        lines[1::2] = texts.sequences
        self._sha256.update("\n".join([*lines, ""]).encode())
        self._original_lengths_sha256.update(
            np.asarray(chunk.original_lengths).astype("<i4").tobytes()
        )
        self._num_residues += int(chunk.lengths.sum(dtype=np.int64))
        self._id_digests += digest_texts(texts.ids)
        self._sequence_digests += digest_texts(texts.sequences)

    def repeated_ids(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return ordinals of records that repeat an id, ascending, and of its first records."""
        return find_repeats(self._id_digests)

    def representatives(self, *, dedup: bool) -> NDArray[np.int64]:
        """Return the ordinal of the first identical sequence, or without `dedup` its own, (N,).

        Call it once, after the last chunk: it adds the duplicates to the counts.
        """
        # Finding repeats takes as much memory again: the ids are no longer needed.
        self._id_digests.clear()
        representatives = np.arange(self.num_sequences)
        if dedup:
            repeats, firsts = find_repeats(self._sequence_digests)
            representatives[repeats] = firsts
            self.counts += InputCounts(num_duplicates=repeats.size)
        return representatives

    def finish(self, sources: Sequence[Source], policy: InputPolicy) -> ScanResult:
        """Return the result of the scan.

        Raises:
            FastaError: No sequence remains, or ids occur twice, which the policy forbids. The input
                is then read again to name their places.
        """
        if not self.num_sequences and not policy.allow_empty:
            raise no_sequences_error(self.counts, policy)
        if policy.duplicate_ids != "keep":
            repeats, firsts = self.repeated_ids()
            if repeats.size and policy.duplicate_ids == "rename":
                raise FastaError(
                    "the input was changed while it was read; wait until it is complete, then "
                    "start again"
                )
            if repeats.size:
                pairs = np.column_stack([firsts, repeats])[:_NUM_SHOWN].tolist()
                wanted = {ordinal for pair in pairs for ordinal in pair}
                places = locate_records(sources, policy, wanted)
                repeated = [
                    f"{places[first][0]!r}: {places[first][1]} and {places[again][1]}"
                    for first, again in pairs
                ]
                shown = listed(repeated, _NUM_SHOWN, separator="; ", total=repeats.size)
                raise FastaError(
                    f"ids must be unique, but some occur twice ({shown}); rename or remove these "
                    "records, or use --duplicate-ids rename or --duplicate-ids keep"
                )
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


def no_sequences_error(counts: InputCounts, policy: InputPolicy) -> FastaError:
    """Return the error of an input with records but without a sequence to embed."""
    if counts.num_skipped:
        records = "proteins" if policy.translate else "records"
        return FastaError(
            f"all {counts.num_skipped:,} {records} are skipped: there is nothing to embed; fix "
            f"them first, or {EMPTY_ADVICE}"
        )
    return FastaError(
        "no record has a frame without a stop codon: there is no protein to embed; give other "
        f"records, or {EMPTY_ADVICE}"
    )
