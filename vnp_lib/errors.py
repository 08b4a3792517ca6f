"""The exceptions of vnp, and the exit codes of its processes."""

from __future__ import annotations

import signal
from enum import IntEnum


class VnpError(Exception):
    """Base class of the errors that this package raises on purpose."""


class InputError(VnpError):
    """A problem that the user can fix; the message says how."""


class FastaError(InputError):
    """A sequence file that cannot be used."""


class ConfigError(InputError):
    """A setting, a path or a device that cannot be used."""


class WeightsError(InputError):
    """Weights that are missing, damaged or of another model."""


class FingerprintMismatchError(InputError):
    """A run directory of a run with another input, model or precision."""


class RunDirectoryBusyError(InputError):
    """A run directory that another process is using."""


class StorageError(VnpError):
    """A read or write that failed, or data that differs from what was written."""


class CheckpointError(StorageError):
    """A checkpoint that failed validation."""


class CheckpointWriteError(StorageError, RuntimeError):
    """Checkpoints that could not be written; their rows are not on disk."""


class StorageFailingError(StorageError):
    """Too many damaged checkpoints to trust the disk; a person has to inspect it first."""


class LockTimeoutError(StorageError):
    """A lock that another process kept until the timeout."""


class IncompleteDatasetError(StorageError):
    """Sequences without a checkpoint when the dataset is assembled."""


class NumericalInstabilityError(VnpError):
    """An embedding that is not finite."""


class CircuitBreakerOpenError(VnpError):
    """A batch that has failed too often to be retried."""


class QuarantineFullError(VnpError):
    """Too many failing sequences to blame them; a person has to inspect the set-up first."""


class SequenceTooLargeError(VnpError):
    """Sequences that do not fit into memory even alone; the message gives ids and lengths."""


class DeviceFailedError(VnpError):
    """A device that fails on a sequence known to be harmless."""


class BatchFailedError(VnpError):
    """An exception while a batch was in the model; that exception is its `__cause__`."""

    def __init__(
        self, batch_idx: int, sequence_ids: tuple[str, ...], ordinal: int | None = None
    ) -> None:
        """`ordinal` is given if the batch had a single sequence."""
        super().__init__(batch_idx, sequence_ids, ordinal)
        self.batch_idx = batch_idx
        self.sequence_ids = sequence_ids
        self.ordinal = ordinal

    def __str__(self) -> str:
        size = len(self.sequence_ids)
        return f"batch {self.batch_idx} ({size} sequences) failed: {self.__cause__!r}"


class ExitCode(IntEnum):
    """Exit codes of the command line and of worker processes."""

    DONE = 0
    FAILED = 1
    UNUSABLE_INPUT = 2
    INTERRUPTED = 128 + signal.SIGINT
    STOPPED = 128 + signal.SIGTERM
