"""The quarantine: sequences that are set aside, and why: the process dies of them, or their embedding is not finite.

`quarantine.jsonl` has a line for each, by ordinal: a JSON object that pandas, jq and DuckDB read. Its `sha256` is that of
its other fields, so that a line with a flipped bit is an error and never sets another sequence aside. Its `fingerprint` is that
of the run: ordinals are positions in that run's input, and a line of any other run sets nothing aside. Every change happens
under a lock between processes and replaces the file as a whole, so that readers need no lock.

That whole lines are gone cannot be seen, and does no harm: a sequence that has lost its line is tried again by the next
run, and no dataset is put together while an ordinal is neither computed nor in quarantine, unless a partial one is asked
for, which counts it as missing.
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
    """A sequence that is set aside."""

    ordinal: int  # position in the input, from 0
    id: str
    length: int  # residues
    kind: str  # FailureKind
    cause: str  # FailureCause
    message: str
    attempts: int  # how often it failed alone
    at: str  # ISO 8601, UTC
    fingerprint: str  # of the run; "" in lines of vnp 0.1.0, which told no run
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
    """How many sequences of a run may be set aside. More of them are not bad proteins but a broken set-up."""

    total: int
    not_finite: int  # of these, without a finite row

    @classmethod
    def of(cls, num_computed: int) -> Self:
        """Say it for a run of so many different sequences.

        One in a hundred of up to 10,000 and one in a thousand of 100,000 or more, 100 in between. Of a small input 3 in any case,
        and a quarter of it, or 10, where they end the process. A protein that has no finite row in float32 either is so rare
        that more than 3 are taken for the set-up's fault there.
        """
        share = min(num_computed // 100, max(100, num_computed // 1000))
        return cls(total=max(3, min(10, num_computed // 4), share), not_finite=max(3, share))


class Quarantine:
    """`quarantine.jsonl`, with `quarantine.lock` beside it, which is never removed.

    Whatever reads, and so whatever changes something, raises StorageError where the file is damaged; it is left as it is
    then. Whatever changes something raises LockTimeoutError when the lock cannot be had within 30 s, and OSError where the
    file cannot be written; all that it has changed is durable when it returns.
    """

    def __init__(
        self, path: Path, *, num_sequences: int, num_computed: int, fingerprint: str
    ) -> None:
        """Open the file of a run.

        Args:
            path: Of the file, which need not be there.
            num_sequences: Of the whole input: ordinals are below it.
            num_computed: Of these, the different ones, from which the limit follows.
            fingerprint: Of the run.
        """
        self.path = path
        self._num_sequences = num_sequences
        self._num_computed = num_computed
        self._fingerprint = fingerprint
        self._lock = FileLock(path.with_suffix(".lock"), purpose=f"update {path.name}")

    @classmethod
    def of(cls, plan: RunPlan, paths: RunPaths) -> Self:
        """Open that of a run."""
        return cls(
            paths.quarantine,
            num_sequences=plan.num_sequences,
            num_computed=plan.num_computed,
            fingerprint=plan.fingerprint,
        )

    def add(self, *sequences: QuarantinedSequence) -> bool:
        """Set sequences of this run aside. False where their ordinals are there already: the file is left as it is.

        Raises:
            QuarantineFullError: They would be more than may be; nothing is written.
            ValueError: The input has no such ordinal, or one is of another run.
        """
        for sequence in sequences:
            if not 0 <= sequence.ordinal < self._num_sequences:
                raise ValueError(
                    f"ordinal {sequence.ordinal} is not among {self._num_sequences:,} sequences"
                )
            if sequence.fingerprint != self._fingerprint:
                raise ValueError(
                    f"{sequence.id!r} is of the run {sequence.fingerprint!r}, not {self._fingerprint!r}"
                )
        with self._lock.held(timeout_s=LOCK_TIMEOUT_S):
            held, others = self._read()
            present = {each.ordinal for each in held}
            added = [sequence for sequence in sequences if sequence.ordinal not in present]
            if not added:
                fsync_directory(
                    self.path.parent
                )  # whoever added them may have died before doing so
                return False
            self._require_room([*held, *added])
            self._write([*held, *added], others)
            return True

    def read(self) -> list[QuarantinedSequence]:
        """All of this run that are set aside, by ordinal; none where there is no file."""
        return self._read()[0]

    def ordinals(self) -> frozenset[int]:
        """Positions in the input of all that are set aside; those of their copies are not among them."""
        return frozenset(sequence.ordinal for sequence in self.read())

    def release(self, ordinals: Iterable[int]) -> None:
        """Take out again those of `ordinals` that are there, as when they turn out to be computed."""
        released = frozenset(ordinals)
        with self._lock.held(timeout_s=LOCK_TIMEOUT_S):
            sequences, others = self._read()
            kept = [sequence for sequence in sequences if sequence.ordinal not in released]
            if len(kept) < len(sequences):
                self._write(kept, others)

    def remove_other_runs(self, target: Path) -> int:
        """Move the lines of other runs to the end of `target`, and return how many there were."""
        with self._lock.held(timeout_s=LOCK_TIMEOUT_S):
            sequences, others = self._read()
            if others:
                earlier = target.read_bytes() if target.exists() else b""
                write_file(target, earlier + b"".join(others), replace=True)
                self._write(sequences, [])
            return len(others)

    def _read(self) -> tuple[list[QuarantinedSequence], list[bytes]]:
        """The sequences of this run, and the lines of others."""
        try:
            lines = self.path.read_bytes().splitlines(keepends=True)
        except FileNotFoundError:
            return [], []
        sequences: list[QuarantinedSequence] = []
        others = []
        for number, line in enumerate(lines, start=1):
            sequence = _unsealed(line)
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
                f"{len(sequences):,} of {self._num_computed:,} sequences fail ({causes}), and at most {limit.total:,} are set "
                f"aside: so many point to a broken set-up, not to bad proteins. Look at the messages in {self.path} and at the "
                f"shards' worker.log: is it a device, the driver, or the memory? Mend that, move {self.path} away, and start "
                f"the run again: it tries these sequences again"
            )

    def _write(self, sequences: list[QuarantinedSequence], others: list[bytes]) -> None:
        ordered = sorted(sequences, key=lambda sequence: sequence.ordinal)
        write_file(self.path, b"".join([*map(_sealed, ordered), *others]), replace=True)

    def _damaged(self, number: int, fault: str) -> StorageError:
        return StorageError(
            f"{self.path} is damaged in line {number}: {fault}; move the file away and start the run again: the sequences "
            f"in it are then tried again"
        )


def too_many_non_finite(told: str, path: Path) -> QuarantineFullError:
    """Say that so many sequences (`told`) have no finite embedding that it cannot be their fault."""
    return QuarantineFullError(
        f"{told} have no finite embedding, in float32 neither: so many point to a broken set-up, not to bad proteins. Are the "
        f"weights whole (`vnp verify-model` compares them with fair-esm), and does the device compute rightly (--devices cpu "
        f"shows it)? Mend that, move {path} away if there is one, and start the run again: it tries these sequences again"
    )


def sequence_digest(plan: RunPlan, ordinal: int) -> str:
    """The sha256 of a sequence's residues."""
    (residues,) = plan.fetch(np.array([ordinal]))[1]
    return hashlib.sha256(residues.encode()).hexdigest()


def _sealed(sequence: QuarantinedSequence) -> bytes:
    return _seal(asdict(sequence))


def _seal(fields: dict[str, object]) -> bytes:
    return canonical_json(fields | {"sha256": hashlib.sha256(canonical_json(fields)).hexdigest()})


def _unsealed(line: bytes) -> QuarantinedSequence | None:
    """None unless `line` is, byte for byte, what `_sealed` writes, or what it wrote before it told the run."""
    try:
        fields = json.loads(line)
        fields.pop("sha256")
        sequence = QuarantinedSequence(**({"fingerprint": "", "sequence_sha256": ""} | fields))
        return sequence if _seal(fields) == line else None
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError):
        return None
