"""The error tree, and the classification of failed attempts on a shard.

VnpError
├── InputError                  the user can fix it; one sentence on the command line, exit code 2
│   ├── FastaError              a sequence file that cannot be used
│   ├── ConfigError             a setting, a path or a device that cannot be used
│   ├── WeightsError            weights that are missing, damaged or of another model
│   ├── FingerprintMismatchError  a run directory that belongs to another run
│   └── RunDirectoryBusyError   a run directory that another process is using
├── StorageError                a read or write that failed, or data that was changed
│   ├── CheckpointError         a checkpoint that failed validation
│   ├── CheckpointWriteError    checkpoints that could not be written; a RuntimeError too
│   ├── StorageFailingError     too many damaged checkpoints to trust the disk
│   ├── LockTimeoutError        a lock that another process kept until the timeout
│   └── IncompleteDatasetError  sequences without a checkpoint when the dataset is assembled
├── NumericalInstabilityError   an embedding that is not finite
├── CircuitBreakerOpenError     a batch that has failed too often to be retried
├── QuarantineFullError         too many failing sequences to blame them
├── SequenceTooLargeError       sequences that do not fit into memory even alone
├── DeviceFailedError           a device that fails on a sequence known to be harmless
├── BatchFailedError            an exception while a batch was in the model; see its `__cause__`
└── ShardFailedError            a failed attempt on a shard; carries a `Failure`
"""

from __future__ import annotations

import errno
import re
import signal
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any

from vnp_lib.errors import (
    BatchFailedError,
    CircuitBreakerOpenError,
    DeviceFailedError,
    InputError,
    NumericalInstabilityError,
    QuarantineFullError,
    SequenceTooLargeError,
    StorageError,
    StorageFailingError,
    VnpError,
)


class ShardFailedError(VnpError):
    """A failed attempt on a shard."""

    def __init__(self, failure: Failure) -> None:
        # An exception survives pickling only if its base class receives all arguments.
        super().__init__(failure)
        self.failure = failure

    def __str__(self) -> str:
        return str(self.failure)

    # Prefect logs the repr of an exception before each retry.
    def __repr__(self) -> str:
        return f"{type(self).__name__}({str(self)!r})"


class FailureKind(StrEnum):
    """How a failure is handled; the retry policy has one rule per kind."""

    SPOT_PREEMPTION = "spot_preemption"
    OOM = "oom"
    POISON_INPUT = "poison_input"
    TRANSIENT = "transient"


class FailureCause(StrEnum):
    """What happened, as precisely as can be determined."""

    PREEMPTED = "preempted"
    GPU_OOM = "gpu_oom"
    HOST_OOM = "host_oom"
    SEQUENCE_TOO_LARGE = "sequence_too_large"
    DEVICE_ASSERT = "device_assert"
    ILLEGAL_ADDRESS = "illegal_address"
    LAUNCH_FAILURE = "launch_failure"
    NUMERICAL_INSTABILITY = "numerical_instability"
    CIRCUIT_OPEN = "circuit_open"
    QUARANTINE_FULL = "quarantine_full"
    # A flow run of its own, in a work pool, has used up its retries.
    GIVEN_UP = "given_up"
    # An unclassified exception while a batch was in the model.
    COMPUTE_ERROR = "compute_error"
    # SIGSEGV, SIGABRT, SIGILL or SIGFPE.
    NATIVE_CRASH = "native_crash"
    # A non-zero exit code, and no failure event that explains it.
    SILENT_EXIT = "silent_exit"
    HANG = "hang"
    # SIGKILL, whose sender is unknown.
    KILLED = "killed"
    HARDWARE = "hardware"
    DISK_FULL = "disk_full"
    STORAGE = "storage"
    STORAGE_FAILING = "storage_failing"
    CONFIGURATION = "configuration"
    BUG = "bug"
    UNKNOWN = "unknown"


# Causes that are not listed are transient.
_KINDS = {
    FailureCause.PREEMPTED: FailureKind.SPOT_PREEMPTION,
    FailureCause.GPU_OOM: FailureKind.OOM,
    FailureCause.HOST_OOM: FailureKind.OOM,
    FailureCause.SEQUENCE_TOO_LARGE: FailureKind.OOM,
    FailureCause.DEVICE_ASSERT: FailureKind.POISON_INPUT,
    FailureCause.ILLEGAL_ADDRESS: FailureKind.POISON_INPUT,
    FailureCause.LAUNCH_FAILURE: FailureKind.POISON_INPUT,
    FailureCause.NUMERICAL_INSTABILITY: FailureKind.POISON_INPUT,
    FailureCause.CIRCUIT_OPEN: FailureKind.POISON_INPUT,
    FailureCause.QUARANTINE_FULL: FailureKind.POISON_INPUT,
    FailureCause.COMPUTE_ERROR: FailureKind.POISON_INPUT,
}
_PERMANENT = frozenset(
    {
        FailureCause.CONFIGURATION,
        FailureCause.BUG,
        FailureCause.STORAGE_FAILING,
        FailureCause.QUARANTINE_FULL,
        FailureCause.GIVEN_UP,
    }
)
_SUSPICIOUS = frozenset({FailureCause.NATIVE_CRASH, FailureCause.SILENT_EXIT, FailureCause.HANG})

# Both limits bound the size of a failure, which is recorded for every attempt.
_MOST_IDS = 10
_LONGEST_MESSAGE = 1000  # characters


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """One failed attempt, with what the retry policy and the status table need to know.

    Attributes:
        cause: What happened.
        message: The same for people, up to 1,000 characters.
        batch_idx: The batch that was in the model.
        ordinal: The only sequence of that batch; None if it had several.
        sequence_ids: The first ids of that batch, up to ten.
        exit_code: Exit code of the worker process; negative for a signal.
        batch_sha256: Digest of the ordinals of the batch, set once the retry policy has seen the
            failure. It identifies the batch even if a later attempt forms other batches.
    """

    cause: FailureCause
    message: str
    batch_idx: int | None = None
    ordinal: int | None = None
    sequence_ids: tuple[str, ...] = ()
    exit_code: int | None = None
    batch_sha256: str = ""

    @property
    def kind(self) -> FailureKind:
        return _KINDS.get(self.cause, FailureKind.TRANSIENT)

    @property
    def is_permanent(self) -> bool:
        """Whether a retry can only fail again: a wrong set-up, or a bug."""
        return self.cause in _PERMANENT

    @property
    def accuses_batch(self) -> bool:
        """Whether the batch in the model may be the reason; never for hardware, host or disk."""
        is_suspicious = self.kind == FailureKind.POISON_INPUT or self.cause in _SUSPICIOUS
        return is_suspicious and self.batch_idx is not None

    @property
    def is_silence(self) -> bool:
        """Whether only a heartbeat was missing, which never suffices to quarantine a protein."""
        return self.cause == FailureCause.HANG

    def __str__(self) -> str:
        where = "" if self.batch_idx is None else f" at batch {self.batch_idx}"
        where = where if self.ordinal is None else f" at sequence {self.ordinal}"
        return f"{self.kind} ({self.cause}){where}: {self.message}"

    def to_json(self) -> dict[str, Any]:
        """Return the fields as JSON values, with the properties that other programs read."""
        return asdict(self) | {
            "kind": str(self.kind),
            "accuses_batch": self.accuses_batch,
            "sequence_ids": list(self.sequence_ids),
        }

    @classmethod
    def from_json(cls, record: dict[str, Any]) -> Failure:
        """Read the result of `to_json`, ignoring keys that were added to it."""
        return cls(
            cause=FailureCause(record["cause"]),
            message=record["message"],
            batch_idx=record["batch_idx"],
            ordinal=record.get("ordinal"),
            sequence_ids=tuple(record["sequence_ids"]),
            exit_code=record["exit_code"],
            batch_sha256=record.get("batch_sha256", ""),
        )


def classify_exception(error: BaseException) -> Failure:
    """Classify an exception raised in an attempt: by type, CUDA error code, errno, then message."""
    batch = next((e for e in _chain(error) if isinstance(e, BatchFailedError)), None)
    root = error if batch is None or batch.__cause__ is None else batch.__cause__
    return Failure(
        cause=_cause_of(root, in_batch=batch is not None),
        message=f"{type(root).__name__}: {root}"[:_LONGEST_MESSAGE],
        batch_idx=batch.batch_idx if batch else None,
        ordinal=batch.ordinal if batch else None,
        sequence_ids=batch.sequence_ids[:_MOST_IDS] if batch else (),
    )


def classify_exit(
    exit_code: int,
    *,
    batch_idx: int | None = None,
    ordinal: int | None = None,
    is_probing: bool = False,
    ran_out_of_host_memory: bool = False,
    last_event: str = "",
) -> Failure:
    """Classify a worker process that exited without reporting a failure.

    Args:
        exit_code: Negative for a signal; 128 + signal, as from a shell, means the same.
        batch_idx: The batch that was in the model, according to the events of the worker process.
        ordinal: The only sequence of that batch, if it had one.
        is_probing: Whether the device was computing a sequence known to be harmless, so that a
            crash is the fault of the device.
        ran_out_of_host_memory: Whether the kernel's OOM killer has struck since the worker process
            was started.
        last_event: Name of the last event that it sent.
    """
    signum = _fatal_signal(exit_code)
    if signum is None:
        cause = FailureCause.SILENT_EXIT
        message = f"worker process exited with {describe_exit(exit_code)}"
    else:
        cause = _SIGNAL_CAUSES.get(signum, FailureCause.KILLED)
        message = f"worker process killed by {describe_exit(exit_code)}"
    if cause == FailureCause.KILLED and ran_out_of_host_memory:
        cause = FailureCause.HOST_OOM
    if cause in _SUSPICIOUS and is_probing:
        cause = FailureCause.HARDWARE
    if last_event:
        message += f" (last event: {last_event})"
    return Failure(
        cause=cause,
        message=message + _SIGNAL_ADVICE.get(signum, ""),
        batch_idx=batch_idx,
        ordinal=ordinal,
        exit_code=exit_code,
    )


def describe_exit(exit_code: int) -> str:
    """Name an exit code: 1 is "exit code 1", -9 and 137 are "SIGKILL"."""
    signum = _fatal_signal(exit_code)
    if signum is None:
        return f"exit code {exit_code}"
    return signal.Signals(signum).name if signum in _NAMED_SIGNALS else f"signal {signum}"


def _fatal_signal(exit_code: int) -> int | None:
    """Return the signal that ended a process, also if reported as 128 + signal."""
    if exit_code < 0:
        return -exit_code
    signum = exit_code - 128
    return signum if signum in _NAMED_SIGNALS and signum not in _HARMLESS_SIGNALS else None


_NAMED_SIGNALS = frozenset(map(int, signal.Signals))

# By default these signals are ignored or stop a process, but do not end it. So 128 + such a number
# is an exit code like any other.
_HARMLESS_SIGNALS = frozenset(
    {
        *(signal.SIGCHLD, signal.SIGCONT, signal.SIGURG, signal.SIGWINCH),
        *(signal.SIGSTOP, signal.SIGTSTP, signal.SIGTTIN, signal.SIGTTOU),
    }
)

# Only the four signals of a crash may accuse a protein. All others are sent by other processes, to
# whatever is in the model at the time, which is mostly the longest protein. A signal that is not
# listed is classified as "killed".
_SIGNAL_CAUSES: dict[int, FailureCause] = {
    signal.SIGTERM: FailureCause.PREEMPTED,
    # The terminal or the session has ended.
    signal.SIGHUP: FailureCause.PREEMPTED,
    signal.SIGINT: FailureCause.PREEMPTED,
    signal.SIGQUIT: FailureCause.PREEMPTED,
    # Slurm announces the end of a job with it, if asked by --signal=USR1@60.
    signal.SIGUSR1: FailureCause.PREEMPTED,
    signal.SIGUSR2: FailureCause.PREEMPTED,
    signal.SIGXCPU: FailureCause.CONFIGURATION,
    signal.SIGXFSZ: FailureCause.CONFIGURATION,
    signal.SIGSYS: FailureCause.CONFIGURATION,
    # A memory-mapped file was truncated, or /dev/shm is full.
    signal.SIGBUS: FailureCause.STORAGE,
    signal.SIGSEGV: FailureCause.NATIVE_CRASH,
    signal.SIGABRT: FailureCause.NATIVE_CRASH,
    signal.SIGILL: FailureCause.NATIVE_CRASH,
    signal.SIGFPE: FailureCause.NATIVE_CRASH,
}

_SIGNAL_ADVICE: dict[int | None, str] = {
    signal.SIGXCPU: (
        "; its CPU time is limited (ulimit -t, or by a batch system): raise the limit, or run it "
        "without one"
    ),
    signal.SIGXFSZ: "; the size of its files is limited (ulimit -f): raise the limit",
    signal.SIGSYS: (
        "; a security filter (seccomp, a container's profile) forbids a system call that it needs"
    ),
}

# The keys are values of cudaError_t, which torch reports as AcceleratorError.error_code.
_CUDA_CAUSES: dict[int, FailureCause] = {
    2: FailureCause.GPU_OOM,
    3: FailureCause.HARDWARE,  # driver not initialised
    46: FailureCause.HARDWARE,  # devices unavailable
    100: FailureCause.HARDWARE,  # no device
    101: FailureCause.HARDWARE,  # no such device
    214: FailureCause.HARDWARE,  # uncorrectable ECC error
    220: FailureCause.HARDWARE,  # NVLink
    226: FailureCause.HARDWARE,  # contained ECC error
    700: FailureCause.ILLEGAL_ADDRESS,
    702: FailureCause.HANG,  # launch timeout
    710: FailureCause.DEVICE_ASSERT,
    714: FailureCause.LAUNCH_FAILURE,  # hardware stack error
    715: FailureCause.LAUNCH_FAILURE,  # illegal instruction
    716: FailureCause.ILLEGAL_ADDRESS,  # misaligned address
    717: FailureCause.ILLEGAL_ADDRESS,  # invalid address space
    718: FailureCause.LAUNCH_FAILURE,  # invalid program counter
    719: FailureCause.LAUNCH_FAILURE,
    802: FailureCause.HARDWARE,  # system not ready
    803: FailureCause.HARDWARE,  # driver mismatch
    999: FailureCause.HARDWARE,  # unknown, typical of a card that is failing
}

_ERRNO_CAUSES: dict[int, FailureCause] = {
    errno.ENOSPC: FailureCause.DISK_FULL,
    errno.EDQUOT: FailureCause.DISK_FULL,
    errno.ENOMEM: FailureCause.HOST_OOM,
    errno.EIO: FailureCause.STORAGE,
    errno.EROFS: FailureCause.STORAGE,
    errno.ESTALE: FailureCause.STORAGE,
    errno.ENOTCONN: FailureCause.STORAGE,
    errno.ENODEV: FailureCause.STORAGE,
    errno.EREMOTEIO: FailureCause.STORAGE,
    # The limit is that of ulimit -f, or of a file system for small files.
    errno.EFBIG: FailureCause.CONFIGURATION,
    errno.EACCES: FailureCause.CONFIGURATION,
    errno.EPERM: FailureCause.CONFIGURATION,
    # A retry does not help if the file system lacks an operation, such as hard links on exFAT, SMB
    # or some FUSE mounts.
    errno.ENOTSUP: FailureCause.CONFIGURATION,
    errno.ENOSYS: FailureCause.CONFIGURATION,
}

# Most specific first: messages about the device or the host contain words that occur in messages
# about bad input, too.
_MESSAGE_CAUSES = tuple(
    (re.compile(pattern, re.IGNORECASE), cause)
    for pattern, cause in (
        (
            r"received sigterm|termination notice|preempted|spot interruption",
            FailureCause.PREEMPTED,
        ),
        (
            r"uncorrectable ecc|ecc error|gpu is lost|fallen off the bus|nvlink"
            r"|unable to determine the device handle",
            FailureCause.HARDWARE,
        ),
        (
            r"no cuda-capable device|invalid device ordinal|all cuda-capable devices are busy"
            r"|driver.*(mismatch|insufficient)",
            FailureCause.HARDWARE,
        ),
        (r"system not yet initialized|unknown error", FailureCause.HARDWARE),
        (
            r"defaultcpuallocator|cannot allocate memory|can't allocate memory",
            FailureCause.HOST_OOM,
        ),
        (
            r"out of memory|cublas_status_alloc_failed|cudnn_status_alloc_failed",
            FailureCause.GPU_OOM,
        ),
        (r"device-side assert", FailureCause.DEVICE_ASSERT),
        (r"illegal memory access|illegal address|misaligned address", FailureCause.ILLEGAL_ADDRESS),
        (r"launch timed out", FailureCause.HANG),
        (
            r"launch failure|illegal instruction|cublas_status_execution_failed"
            r"|cublas_status_not_initialized",
            FailureCause.LAUNCH_FAILURE,
        ),
        (r"numerical instability|not finite", FailureCause.NUMERICAL_INSTABILITY),
        (r"circuit breaker", FailureCause.CIRCUIT_OPEN),
        (r"no space left on device|disk quota exceeded", FailureCause.DISK_FULL),
        (r"input/output error|stale file handle|read-only file system", FailureCause.STORAGE),
    )
)

_TYPE_CAUSES: tuple[tuple[type[BaseException], FailureCause], ...] = (
    (NumericalInstabilityError, FailureCause.NUMERICAL_INSTABILITY),
    (CircuitBreakerOpenError, FailureCause.CIRCUIT_OPEN),
    (QuarantineFullError, FailureCause.QUARANTINE_FULL),
    (SequenceTooLargeError, FailureCause.SEQUENCE_TOO_LARGE),
    (DeviceFailedError, FailureCause.HARDWARE),
    (StorageFailingError, FailureCause.STORAGE_FAILING),
    (InputError, FailureCause.CONFIGURATION),
    (ImportError, FailureCause.CONFIGURATION),
    (MemoryError, FailureCause.HOST_OOM),
)
_BUGS = (
    TypeError,
    ValueError,
    LookupError,
    AttributeError,
    NameError,
    AssertionError,
    NotImplementedError,
)


def _cause_of(error: BaseException, *, in_batch: bool) -> FailureCause:
    # By name, because importing torch.OutOfMemoryError would take seconds.
    if type(error).__name__ == "OutOfMemoryError":
        return FailureCause.GPU_OOM
    for type_, cause in _TYPE_CAUSES:
        if isinstance(error, type_):
            return cause
    code = getattr(error, "error_code", None)
    if isinstance(code, int) and code in _CUDA_CAUSES:
        return _CUDA_CAUSES[code]
    system_error = next((e for e in _chain(error) if isinstance(e, OSError)), None)
    if system_error is not None and system_error.errno in _ERRNO_CAUSES:
        return _ERRNO_CAUSES[system_error.errno]
    if isinstance(error, StorageError):
        return FailureCause.STORAGE
    for pattern, cause in _MESSAGE_CAUSES:
        if pattern.search(str(error)):
            return cause
    if in_batch:
        return FailureCause.COMPUTE_ERROR
    return FailureCause.BUG if isinstance(error, _BUGS) else FailureCause.UNKNOWN


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an error, its cause, the cause of that, and so on."""
    while error is not None:
        yield error
        error = error.__cause__
