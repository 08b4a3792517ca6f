"""Apply an input policy to chunks of checked records."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import compress
from operator import attrgetter, not_

import numpy as np
from numpy.typing import NDArray

from vnp_lib.inputs.policy import VIRNUCPRO_RESIDUES, InputCounts, InputPolicy
from vnp_lib.inputs.records import CharacterCounts, CheckedChunk, Fault, SequenceChunk


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class InputChunk:
    """Consecutive records of one source, under a policy."""

    usable: SequenceChunk
    # Number in the source, from 0, of each usable record, or of the one it was translated from.
    records: Sequence[int]
    lengths: NDArray[np.int32]  # residues, of each usable record
    original_lengths: NDArray[np.int32]  # the same before any was cut
    refused: list[Fault]  # by record
    skipped: list[Fault]  # by record
    num_windowed: int = 0
    num_in_part: int = 0
    num_renamed: int = 0
    letters: CharacterCounts

    @property
    def counts(self) -> InputCounts:
        """All counts but the duplicates, which only the whole input shows."""
        return InputCounts(
            num_skipped=len(self.skipped),
            num_cut=int(np.count_nonzero(self.lengths != self.original_lengths)),
            num_windowed=self.num_windowed,
            num_in_part=self.num_in_part,
            num_renamed=self.num_renamed,
            letters=self.letters,
        )


def apply_policy(checked: CheckedChunk, policy: InputPolicy) -> InputChunk:
    """Refuse, skip or cut records as a policy says."""
    sequences = checked.usable.sequences
    lengths = np.fromiter(map(len, sequences), dtype=np.int32, count=len(sequences))
    skips_empty = policy.min_length is not None
    is_skipped = [
        policy.invalid_residues == "skip" or (skips_empty and fault.is_empty)
        for fault in checked.faults
    ]
    chunk = InputChunk(
        usable=checked.usable,
        records=checked.records,
        lengths=lengths,
        original_lengths=lengths,
        refused=[*compress(checked.faults, map(not_, is_skipped))],
        skipped=[*compress(checked.faults, is_skipped)],
        letters=checked.letters,
    )
    if policy.min_length is not None:
        is_long_enough = chunk.lengths >= policy.min_length
        chunk = _without(
            chunk, ~is_long_enough, f"at least {policy.min_length:,} are wanted", skips=True
        )
    limit = VIRNUCPRO_RESIDUES if policy.long == "virnucpro" else policy.max_length
    if limit is None or policy.long == "whole":
        return chunk
    is_long = chunk.lengths > limit
    num_long = int(np.count_nonzero(is_long))
    if not num_long:
        return chunk
    match policy.long:
        case "window":
            return replace(chunk, num_windowed=num_long)
        case "virnucpro":
            return replace(chunk, num_in_part=num_long)
        case "truncate":
            cut = [sequence[:limit] for sequence in chunk.usable.sequences]
            return replace(
                chunk,
                usable=replace(chunk.usable, sequences=cut),
                lengths=np.minimum(chunk.lengths, limit),
            )
        case "skip":
            return _without(chunk, is_long, f"at most {limit:,} are allowed", skips=True)
    advice = "cut it or leave it out, or use --long truncate or --long skip"
    return _without(chunk, is_long, f"at most {limit:,} are allowed; {advice}", skips=False)


def _without(
    chunk: InputChunk, is_at_fault: NDArray[np.bool_], reason: str, *, skips: bool
) -> InputChunk:
    """Return a chunk without the usable records whose lengths are at fault.

    Args:
        chunk: Records.
        is_at_fault: True for each usable record to take out.
        reason: What is wrong with its length.
        skips: Skip these records instead of refusing them.
    """
    if not is_at_fault.any():
        return chunk
    texts = chunk.usable
    faults = []
    for place in np.flatnonzero(is_at_fault).tolist():
        length = int(chunk.lengths[place])
        residues = "1 residue" if length == 1 else f"{length:,} residues"
        faults.append(
            Fault(
                record=chunk.records[place],
                sequence_id=texts.ids[place],
                reason=f"sequence {texts.ids[place]!r} has {residues}, and {reason}",
            )
        )
    kept = np.flatnonzero(~is_at_fault).tolist()
    by_record = attrgetter("record")
    return replace(
        chunk,
        usable=SequenceChunk(
            ids=[texts.ids[place] for place in kept],
            descriptions=[texts.descriptions[place] for place in kept],
            sequences=[texts.sequences[place] for place in kept],
        ),
        records=[chunk.records[place] for place in kept],
        lengths=chunk.lengths[~is_at_fault],
        original_lengths=chunk.original_lengths[~is_at_fault],
        refused=chunk.refused if skips else sorted(chunk.refused + faults, key=by_record),
        skipped=sorted(chunk.skipped + faults, key=by_record) if skips else chunk.skipped,
    )
