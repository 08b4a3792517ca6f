"""The quarantine: sequences that are set aside, and why: the process dies of them, or their embedding is not finite.

`quarantine.jsonl` has a line for each, by ordinal: a JSON object that pandas, jq and DuckDB read. Its `sha256` is that of
its other fields, so that a line with a flipped bit is an error and never sets another sequence aside. Every change happens
under a lock between processes and replaces the file as a whole, so that readers need no lock.

That whole lines are gone cannot be seen, and does no harm: a sequence that has lost its line is tried again by the next
run, and no dataset is put together while an ordinal is neither computed nor in quarantine, unless a partial one is asked
for, which counts it as missing.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from vnp_lib.failures import QuarantineFullError, StorageError
from vnp_lib.files import FileLock, canonical_json, fsync_directory, write_file

LOCK_TIMEOUT_S = 30.0

_LEAST_LIMIT = 100


@dataclass(frozen=True, slots=True, kw_only=True)
class QuarantinedSequence:
    """A sequence that is set aside."""

    ordinal: int  # position in the input, from 0
    id: str
    length: int  # residues
    kind: str  # FailureKind
    cause: str  # FailureCause
    message: str
    attempts: int  # how often it failed alone
    at: str  # ISO 8601, UTC


def quarantine_limit(num_sequences: int) -> int:
    """How many of `num_sequences` may be in quarantine: one in a thousand, or 100 where that is more."""
    return max(_LEAST_LIMIT, num_sequences // 1000)


class Quarantine:
    """`quarantine.jsonl`, with `quarantine.lock` beside it, which is never removed.

    Whatever reads, and so whatever changes something, raises StorageError where the file is damaged; it is left as it is
    then. Whatever changes something raises LockTimeoutError when the lock cannot be had within 30 s, and OSError where the
    file cannot be written; all that it has changed is durable when it returns.
    """

    def __init__(self, path: Path, *, num_sequences: int) -> None:
        """`num_sequences` is that of the whole input: ordinals are below it, and the limit follows from it."""
        self.path = path
        self._num_sequences = num_sequences
        self._lock = FileLock(path.with_suffix(".lock"), purpose=f"update {path.name}")

    def add(self, sequence: QuarantinedSequence) -> bool:
        """Set a sequence aside. False where its ordinal is there already: the file is left as it is.

        Raises:
            QuarantineFullError: There are as many as may be; nothing is written.
            ValueError: The input has no such ordinal.
        """
        if not 0 <= sequence.ordinal < self._num_sequences:
            raise ValueError(f"ordinal {sequence.ordinal} is not among {self._num_sequences:,} sequences")
        with self._lock.held(timeout_s=LOCK_TIMEOUT_S):
            sequences = self.read()
            if any(each.ordinal == sequence.ordinal for each in sequences):
                fsync_directory(self.path.parent)  # whoever added it may have died before doing so
                return False
            self._require_room(len(sequences))
            self._write([*sequences, sequence])
            return True

    def read(self) -> list[QuarantinedSequence]:
        """All that are set aside, by ordinal; none where there is no file."""
        try:
            lines = self.path.read_bytes().splitlines(keepends=True)
        except FileNotFoundError:
            return []
        sequences: list[QuarantinedSequence] = []
        for number, line in enumerate(lines, start=1):
            sequence = _unsealed(line)
            if sequence is None:
                raise self._damaged(number, "its sha256 does not fit its other fields")
            least = sequences[-1].ordinal + 1 if sequences else 0
            if not least <= sequence.ordinal < self._num_sequences:
                raise self._damaged(number, f"ordinal {sequence.ordinal} is out of order, or not in the input")
            sequences.append(sequence)
        return sequences

    def ordinals(self) -> frozenset[int]:
        """Positions in the input of all that are set aside; those of their copies are not among them."""
        return frozenset(sequence.ordinal for sequence in self.read())

    def release(self, ordinals: Iterable[int]) -> None:
        """Take out again those of `ordinals` that are there, as when they turn out to be computed."""
        released = frozenset(ordinals)
        with self._lock.held(timeout_s=LOCK_TIMEOUT_S):
            sequences = self.read()
            kept = [sequence for sequence in sequences if sequence.ordinal not in released]
            if len(kept) < len(sequences):
                self._write(kept)

    def _require_room(self, num_held: int) -> None:
        if num_held >= quarantine_limit(self._num_sequences):
            raise QuarantineFullError(
                f"{num_held:,} of {self._num_sequences:,} sequences are in quarantine already, which is as many as may be: "
                f"so many failures point to a broken set-up, not to bad proteins. Look at the causes and messages in "
                f"{self.path} and at the shards' worker.log: is it a device, the driver, the weights or the precision? "
                f"Mend that, move {self.path} away, and start the run again: it tries these sequences again"
            )

    def _write(self, sequences: list[QuarantinedSequence]) -> None:
        ordered = sorted(sequences, key=lambda sequence: sequence.ordinal)
        write_file(self.path, b"".join(map(_sealed, ordered)), replace=True)

    def _damaged(self, number: int, fault: str) -> StorageError:
        return StorageError(
            f"{self.path} is damaged in line {number}: {fault}; move the file away and start the run again: the sequences "
            f"in it are then tried again"
        )


def _sealed(sequence: QuarantinedSequence) -> bytes:
    fields = asdict(sequence)
    return canonical_json(fields | {"sha256": hashlib.sha256(canonical_json(fields)).hexdigest()})


def _unsealed(line: bytes) -> QuarantinedSequence | None:
    """None unless `line` is, byte for byte, what `_sealed` writes."""
    try:
        fields = json.loads(line)
        fields.pop("sha256")
        sequence = QuarantinedSequence(**fields)
        return sequence if _sealed(sequence) == line else None
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError):
        return None
