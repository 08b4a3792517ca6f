"""The exceptions of vnp, and the exit codes of its worker processes."""

from __future__ import annotations

import signal
from enum import IntEnum


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


class QuarantineFullError(VnpError):
    """So many sequences fail that it cannot be their fault: the set-up is broken, and a person has to look at it."""


class SequenceTooLargeError(VnpError):
    """Sequences that do not fit into memory, even alone; the message names them and their lengths."""


class DeviceFailedError(VnpError):
    """A device that fails at what is known to be good."""


class BatchFailedError(VnpError):
    """An exception while a batch was in the model; that exception is its `__cause__`."""

    def __init__(
        self, batch_idx: int, sequence_ids: tuple[str, ...], ordinal: int | None = None
    ) -> None:
        super().__init__(batch_idx, sequence_ids, ordinal)
        self.batch_idx = batch_idx
        self.sequence_ids = sequence_ids
        self.ordinal = ordinal  # of its sequence, where that was alone in it

    def __str__(self) -> str:
        return f"batch {self.batch_idx} ({len(self.sequence_ids)} sequences) failed: {self.__cause__!r}"


class ExitCode(IntEnum):
    """How our processes leave."""

    DONE = 0
    FAILED = 1
    UNUSABLE_INPUT = 2
    INTERRUPTED = 128 + signal.SIGINT
    STOPPED = 128 + signal.SIGTERM
