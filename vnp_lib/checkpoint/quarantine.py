"""Quarantined sequences: those that crash the worker or yield a non-finite embedding.

`quarantine.jsonl` has one line per sequence, by ordinal: a JSON object that pandas, jq and DuckDB
read. Its `sha256` is that of its other fields, so that a line with a flipped bit is an error and
never quarantines another sequence. Its `fingerprint` is that of the run: ordinals are positions in
that run's input, and a line of any other run quarantines nothing. Every change happens under a lock
between processes and replaces the file as a whole, so that readers need no lock.

The loss of complete lines cannot be detected, and does no harm: the next run tries such a sequence
again. No dataset is assembled while an ordinal is neither computed nor in quarantine, unless a
partial dataset is requested, which counts it as missing.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Self

import numpy as np

from vnp_lib.errors import QuarantineFullError, StorageError
from vnp_lib.failures import Failure, FailureCause
from vnp_lib.formatting import utc_now
from vnp_lib.plan import RunPaths, RunPlan
from vnp_lib.storage import FileLock, canonical_json, fsync_directory, write_file

LOCK_TIMEOUT_S = 30.0


@dataclass(frozen=True, slots=True, kw_only=True)
class QuarantinedSequence:
    """A quarantined sequence, and why it is quarantined."""

    ordinal: int  # position in the input, from 0
    id: str
    length: int  # residues
    kind: str  # FailureKind
    cause: str  # FailureCause
    message: str
    attempts: int  # failures while it was alone in its batch
    at: str  # ISO 8601, UTC
    fingerprint: str  # of the run; "" in lines of vnp 0.1.0, which had no such field
    sequence_sha256: str  # of its residues

    @classmethod
    def of_failure(cls, plan: RunPlan, ordinal: int, failure: Failure, *, attempts: int) -> Self:
        """Describe a sequence to quarantine for a failure that it caused `attempts` times alone."""
        return cls(
            ordinal=ordinal,
            id=plan.ids(np.array([ordinal]))[0],
            length=int(plan.lengths[ordinal]),
            kind=failure.kind,
            cause=failure.cause,
            message=failure.message,
            attempts=attempts,
            at=utc_now().isoformat(timespec="seconds"),
            fingerprint=plan.fingerprint,
            sequence_sha256=sequence_digest(plan, ordinal),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class QuarantineLimit:
    """How many sequences of a run may be quarantined; more point to a broken set-up."""

    total: int
    not_finite: int  # of these, without a finite embedding

    @classmethod
    def of(cls, num_computed: int) -> Self:
        """Return the limit of a run with `num_computed` different sequences.

        It is one in a hundred of up to 10,000 sequences, one in a thousand of 100,000 or more, and
        100 in between. A small input may always have 3, or if they end the process, a quarter of
        the input up to 10. A protein without a finite embedding in float32 is so rare that more
        than 3 of them in a small input are attributed to the set-up.
        """
        share = min(num_computed // 100, max(100, num_computed // 1000))
        return cls(total=max(3, min(10, num_computed // 4), share), not_finite=max(3, share))


class Quarantine:
    """`quarantine.jsonl`, with the lock file `quarantine.lock`, which is never removed.

    Every method that reads the file raises StorageError if it is damaged, and leaves it as it is.
    Every method that changes it raises LockTimeoutError if the lock is not free within 30 s, and
    OSError if the file cannot be written. A change is durable when the method returns.
    """

    def __init__(
        self, path: Path, *, num_sequences: int, num_computed: int, fingerprint: str
    ) -> None:
        """Open the file of a run; nothing is read yet.

        Args:
            path: The file, which need not exist.
            num_sequences: Sequences in the whole input; ordinals are below it.
            num_computed: Different sequences, from which the limit follows.
            fingerprint: The run.
        """
        self.path = path
        self._num_sequences = num_sequences
        self._num_computed = num_computed
        self._fingerprint = fingerprint
        self._lock = FileLock(path.with_suffix(".lock"), purpose=f"update {path.name}")

    @classmethod
    def of(cls, plan: RunPlan, paths: RunPaths) -> Self:
        """Open the quarantine of a run."""
        return cls(
            paths.quarantine,
            num_sequences=plan.num_sequences,
            num_computed=plan.num_computed,
            fingerprint=plan.fingerprint,
        )

    def add(self, *sequences: QuarantinedSequence) -> bool:
        """Quarantine sequences of this run.

        Returns:
            False if all of them are quarantined already; the file is left as it is.

        Raises:
            QuarantineFullError: The limit would be exceeded; nothing is written.
            ValueError: The input has no such ordinal, or a sequence belongs to another run.
        """
        for sequence in sequences:
            if not 0 <= sequence.ordinal < self._num_sequences:
                raise ValueError(
                    f"ordinal {sequence.ordinal} is not among {self._num_sequences:,} sequences"
                )
            if sequence.fingerprint != self._fingerprint:
                raise ValueError(
                    f"{sequence.id!r} is of the run {sequence.fingerprint!r}, "
                    f"not {self._fingerprint!r}"
                )
        with self._lock.held(timeout_s=LOCK_TIMEOUT_S):
            held, others = self._read()
            present = {each.ordinal for each in held}
            added = [sequence for sequence in sequences if sequence.ordinal not in present]
            if not added:
                # The process that added them may have been killed before it did so.
                fsync_directory(self.path.parent)
                return False
            self._require_room([*held, *added])
            self._write([*held, *added], others)
            return True

    def read(self) -> list[QuarantinedSequence]:
        """Return the quarantined sequences of this run by ordinal; none if there is no file."""
        return self._read()[0]

    def ordinals(self) -> frozenset[int]:
        """Return the ordinals of the quarantined sequences, without those of their copies."""
        return frozenset(sequence.ordinal for sequence in self.read())

    def release(self, ordinals: Iterable[int]) -> None:
        """Remove sequences, as when they turn out to be computed; others are ignored."""
        released = frozenset(ordinals)
        with self._lock.held(timeout_s=LOCK_TIMEOUT_S):
            sequences, others = self._read()
            kept = [sequence for sequence in sequences if sequence.ordinal not in released]
            if len(kept) < len(sequences):
                self._write(kept, others)

    def remove_other_runs(self, target: Path) -> int:
        """Move the lines of other runs to the end of `target`, and return their number."""
        with self._lock.held(timeout_s=LOCK_TIMEOUT_S):
            sequences, others = self._read()
            if others:
                earlier = target.read_bytes() if target.exists() else b""
                write_file(target, earlier + b"".join(others), replace=True)
                self._write(sequences, [])
            return len(others)

    def _read(self) -> tuple[list[QuarantinedSequence], list[bytes]]:
        """Return the sequences of this run, and the lines of other runs."""
        try:
            lines = self.path.read_bytes().splitlines(keepends=True)
        except FileNotFoundError:
            return [], []
        sequences: list[QuarantinedSequence] = []
        others = []
        for number, line in enumerate(lines, start=1):
            sequence = _parse_line(line)
            if sequence is None:
                raise self._damaged(number, "its sha256 does not fit its other fields")
            if sequence.fingerprint != self._fingerprint:
                others.append(line)
                continue
            least = sequences[-1].ordinal + 1 if sequences else 0
            if not least <= sequence.ordinal < self._num_sequences:
                raise self._damaged(
                    number, f"ordinal {sequence.ordinal} is out of order, or not in the input"
                )
            sequences.append(sequence)
        return sequences, others

    def _require_room(self, sequences: list[QuarantinedSequence]) -> None:
        limit = QuarantineLimit.of(self._num_computed)
        num_not_finite = sum(each.cause == FailureCause.NUMERICAL_INSTABILITY for each in sequences)
        if num_not_finite > limit.not_finite:
            raise too_many_non_finite(
                f"{num_not_finite:,} of {self._num_computed:,} sequences", self.path
            )
        if len(sequences) > limit.total:
            causes = ", ".join(
                f"{count:,} {cause}"
                for cause, count in Counter(each.cause for each in sequences).items()
            )
            raise QuarantineFullError(
                f"{len(sequences):,} of {self._num_computed:,} sequences fail ({causes}), and at "
                f"most {limit.total:,} are quarantined: so many point to a broken set-up, not to "
                f"bad proteins. Look at the messages in {self.path} and at the shards' worker.log: "
                f"is it a device, the driver, or the memory? Fix that, move {self.path} away, and "
                f"start the run again: it tries these sequences again"
            )

    def _write(self, sequences: list[QuarantinedSequence], others: list[bytes]) -> None:
        ordered = sorted(sequences, key=lambda sequence: sequence.ordinal)
        write_file(
            self.path, b"".join([*(_seal(asdict(each)) for each in ordered), *others]), replace=True
        )

    def _damaged(self, number: int, fault: str) -> StorageError:
        return StorageError(
            f"{self.path} is damaged in line {number}: {fault}; move the file away and start the "
            f"run again: the sequences in it are then tried again"
        )


def too_many_non_finite(sequences: str, path: Path) -> QuarantineFullError:
    """Return the error for more sequences without a finite embedding than bad proteins explain.

    Args:
        sequences: How many, as the subject of the message.
        path: The quarantine.
    """
    return QuarantineFullError(
        f"{sequences} have no finite embedding, in float32 neither: so many point to a broken "
        f"set-up, not to bad proteins. Are the weights intact (`vnp verify-model` compares them "
        f"with fair-esm), and does the device compute correctly (--devices cpu shows it)? Fix "
        f"that, move {path} away if there is one, and start the run again: it tries these "
        f"sequences again"
    )


def sequence_digest(plan: RunPlan, ordinal: int) -> str:
    """Return the sha256 of a sequence's residues."""
    (residues,) = plan.fetch(np.array([ordinal]))[1]
    return hashlib.sha256(residues.encode()).hexdigest()


def _seal(fields: dict[str, object]) -> bytes:
    return canonical_json(fields | {"sha256": hashlib.sha256(canonical_json(fields)).hexdigest()})


def _parse_line(line: bytes) -> QuarantinedSequence | None:
    """Parse a line; None unless it is byte for byte as written, with or without the run."""
    try:
        fields = json.loads(line)
        fields.pop("sha256")
        sequence = QuarantinedSequence(**({"fingerprint": "", "sequence_sha256": ""} | fields))
        return sequence if _seal(fields) == line else None
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError):
        return None
