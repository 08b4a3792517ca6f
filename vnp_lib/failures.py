"""What can go wrong: the error tree, and the judgement of how an attempt on a shard failed.

VnpError
├── InputError                  the user can mend it; the command line says so in one sentence, exit code 2
│   ├── FastaError              a sequence file that cannot be used as it is
│   ├── ConfigError             a setting, a path or a device that cannot be used
│   ├── WeightsError            weights that are missing, damaged or of another model
│   ├── FingerprintMismatchError  a run directory that belongs to another run
│   └── RunDirectoryBusyError   a run directory that another process is using
├── StorageError                the disk does not give back what was written to it, or takes no more
│   ├── CheckpointError         a checkpoint that does not prove itself
│   ├── CheckpointWriteError    checkpoints that could not be written; a RuntimeError too
│   ├── StorageFailingError     so many checkpoints are damaged that the disk cannot be trusted
│   ├── LockTimeoutError        a lock that its holder does not give up
│   └── IncompleteDatasetError  sequences that are in no checkpoint
├── NumericalInstabilityError   a row that is not finite
├── CircuitBreakerOpenError     a batch that has failed too often
└── ShardFailedError            an attempt on a shard ended badly; carries a `Failure`
"""

from __future__ import annotations

import re
import signal
from dataclasses import asdict, dataclass
from enum import IntEnum, StrEnum
from typing import Any


class VnpError(Exception):
    """Whatever this package raises on purpose."""


class InputError(VnpError):
    """Something that the user gave cannot be used; the message says what to do about it."""


class FastaError(InputError):
    """A sequence file that cannot be used as it is."""


class ConfigError(InputError):
    """A setting, a path or a device that cannot be used."""


class WeightsError(InputError):
    """Weights that are missing, damaged or of another model."""


class FingerprintMismatchError(InputError):
    """A run directory that belongs to a run with another input, model or precision."""


class RunDirectoryBusyError(InputError):
    """A run directory that another process is using."""


class StorageError(VnpError):
    """The disk does not give back what was written to it, or takes no more."""


class CheckpointError(StorageError):
    """A checkpoint that does not prove itself."""


class CheckpointWriteError(StorageError, RuntimeError):
    """Checkpoints that could not be written: their rows are on no disk."""


class StorageFailingError(StorageError):
    """So many checkpoints are damaged that the disk cannot be trusted: a person has to look at it first."""


class LockTimeoutError(StorageError):
    """A lock that its holder does not give up."""


class IncompleteDatasetError(StorageError):
    """Sequences that are in no checkpoint, when the dataset was to be put together."""


class NumericalInstabilityError(VnpError):
    """A row that is not finite."""


class CircuitBreakerOpenError(VnpError):
    """A batch that has failed too often to be tried again."""


class ShardFailedError(VnpError):
    """An attempt on a shard ended badly."""

    def __init__(self, failure: Failure) -> None:
        super().__init__(failure)  # all arguments, or the error does not survive pickling
        self.failure = failure

    def __str__(self) -> str:
        return str(self.failure)


class FailureKind(StrEnum):
    """How a failure is cured: each kind has its own policy."""

    SPOT_PREEMPTION = "spot_preemption"
    OOM = "oom"
    POISON_INPUT = "poison_input"
    TRANSIENT = "transient"


class ExitCode(IntEnum):
    """How our processes leave."""

    DONE = 0
    FAILED = 1
    UNUSABLE_INPUT = 2
    INTERRUPTED = 128 + signal.SIGINT
    STOPPED = 128 + signal.SIGTERM


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """One failed attempt: what the retry policy needs to know and a person wants to read."""

    kind: FailureKind
    message: str
    batch_idx: int | None = None
    sequence_ids: tuple[str, ...] = ()
    exit_code: int | None = None
    is_permanent: bool = False  # the same attempt can only fail again: wrong input, wrong set-up, a bug

    def __str__(self) -> str:
        where = "" if self.batch_idx is None else f" at batch {self.batch_idx}"
        return f"{self.kind}{where}: {self.message}"

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"kind": str(self.kind), "sequence_ids": list(self.sequence_ids)}

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> Failure:
        return cls(**fields | {"kind": FailureKind(fields["kind"]), "sequence_ids": tuple(fields["sequence_ids"])})


# In this order: what a message says of the device comes before the words that it shares with bad input.
_MESSAGE_PATTERNS: tuple[tuple[re.Pattern[str], FailureKind], ...] = tuple(
    (re.compile(pattern, re.IGNORECASE), kind)
    for pattern, kind in (
        (r"received sigterm|termination notice|preempt", FailureKind.SPOT_PREEMPTION),
        (r"out of memory|CUBLAS_STATUS_ALLOC_FAILED|CUDNN_STATUS_ALLOC_FAILED|can't allocate memory", FailureKind.OOM),
        (r"uncorrectable ecc|gpu is lost|fallen off the bus|nvlink|no cuda-capable device", FailureKind.TRANSIENT),
        (r"device-side assert|illegal memory access|illegal address|misaligned address", FailureKind.POISON_INPUT),
        (r"numerical instability|not finite|circuit breaker", FailureKind.POISON_INPUT),
    )
)
_PREEMPTION_EXITS = frozenset({ExitCode.STOPPED, -signal.SIGTERM})
_PERMANENT_ERRORS = (
    InputError,
    StorageFailingError,
    ImportError,
    TypeError,
    ValueError,
    KeyError,
    AttributeError,
    AssertionError,
)


def classify_exception(error: BaseException, *, batch_idx: int | None = None) -> Failure:
    """Judge an exception from inside an attempt, by its type and then by what it says."""
    message = f"{type(error).__name__}: {error}"
    return Failure(
        kind=_kind_of(error),
        message=message,
        batch_idx=batch_idx,
        is_permanent=isinstance(error, _PERMANENT_ERRORS),
    )


def classify_exit(exit_code: int, *, last_event: str = "", batch_idx: int | None = None) -> Failure:
    """Judge a child that left without a word, by its exit code (negative: the signal that ended it)."""
    kind = FailureKind.SPOT_PREEMPTION if exit_code in _PREEMPTION_EXITS else FailureKind.TRANSIENT
    after = f" after {last_event}" if last_event else ""
    return Failure(
        kind=kind,
        message=f"the child left with {describe_exit(exit_code)}{after}",
        batch_idx=batch_idx,
        exit_code=exit_code,
    )


def describe_exit(exit_code: int) -> str:
    """Name an exit code: `143` is "exit code 143", `-9` is "SIGKILL"."""
    if exit_code >= 0:
        return f"exit code {exit_code}"
    try:
        return signal.Signals(-exit_code).name
    except ValueError:
        return f"signal {-exit_code}"


def _kind_of(error: BaseException) -> FailureKind:
    if isinstance(error, NumericalInstabilityError | CircuitBreakerOpenError):
        return FailureKind.POISON_INPUT
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return FailureKind.OOM
    for pattern, kind in _MESSAGE_PATTERNS:
        if pattern.search(str(error)):
            return kind
    return FailureKind.TRANSIENT
