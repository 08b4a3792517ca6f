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
├── QuarantineFullError         so many sequences fail that it cannot be their fault
├── SequenceTooLargeError       sequences that do not fit into memory, even alone
├── DeviceFailedError           a device that fails at what is known to be good
├── BatchFailedError            an exception while a batch was in the model; that exception is its cause
└── ShardFailedError            an attempt on a shard ended badly; carries a `Failure`
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
    """An attempt on a shard ended badly."""

    def __init__(self, failure: Failure) -> None:
        super().__init__(failure)  # all arguments, or the error does not survive pickling
        self.failure = failure

    def __str__(self) -> str:
        return str(self.failure)

    def __repr__(self) -> str:  # Prefect logs it before each retry
        return f"{type(self).__name__}({str(self)!r})"


class FailureKind(StrEnum):
    """How a failure is cured: each kind has its own policy."""

    SPOT_PREEMPTION = "spot_preemption"
    OOM = "oom"
    POISON_INPUT = "poison_input"
    TRANSIENT = "transient"


class FailureCause(StrEnum):
    """What happened, as finely as it can be told."""

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
    GIVEN_UP = "given_up"  # by a flow run of its own, which has had its retries
    COMPUTE_ERROR = (
        "compute_error"  # an exception of no special kind while a batch was in the model
    )
    NATIVE_CRASH = "native_crash"  # SIGSEGV and its like
    SILENT_EXIT = "silent_exit"  # an exit code, and no word why
    HANG = "hang"
    KILLED = "killed"  # SIGKILL, by whomever
    HARDWARE = "hardware"
    DISK_FULL = "disk_full"
    STORAGE = "storage"
    STORAGE_FAILING = "storage_failing"
    CONFIGURATION = "configuration"
    BUG = "bug"
    UNKNOWN = "unknown"


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
}  # all others are transient
_PERMANENT = frozenset(
    {
        FailureCause.CONFIGURATION,
        FailureCause.BUG,
        FailureCause.STORAGE_FAILING,
        FailureCause.QUARANTINE_FULL,
        FailureCause.GIVEN_UP,
    }
)
_MOST_IDS = 10
_LONGEST_MESSAGE = 1000  # letters: it is written down with every attempt
_SUSPICIOUS = frozenset({FailureCause.NATIVE_CRASH, FailureCause.SILENT_EXIT, FailureCause.HANG})


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """One failed attempt: what the retry policy needs to know and a person wants to read."""

    cause: FailureCause
    message: str
    batch_idx: int | None = None  # the batch that was in the model
    ordinal: int | None = None  # the sequence that was in it alone
    sequence_ids: tuple[str, ...] = ()  # the first of that batch, ten at most
    exit_code: int | None = None  # negative: the signal that ended the child
    batch_sha256: str = (
        ""  # of the batch's ordinals, once it is judged: the plan may be divided into others later
    )

    @property
    def kind(self) -> FailureKind:
        return _KINDS.get(self.cause, FailureKind.TRANSIENT)

    @property
    def is_permanent(self) -> bool:
        """Whether the same attempt can only fail again: a wrong set-up, or a bug."""
        return self.cause in _PERMANENT

    @property
    def accuses_batch(self) -> bool:
        """Whether the batch that was in the model may be what did it. Never so for hardware, host or disk."""
        is_suspicious = self.kind == FailureKind.POISON_INPUT or self.cause in _SUSPICIOUS
        return is_suspicious and self.batch_idx is not None

    @property
    def is_silence(self) -> bool:
        """Whether all that is known is that there was no sign of life: never enough to give a protein up."""
        return self.cause == FailureCause.HANG

    def __str__(self) -> str:
        where = "" if self.batch_idx is None else f" at batch {self.batch_idx}"
        where = where if self.ordinal is None else f" at sequence {self.ordinal}"
        return f"{self.kind} ({self.cause}){where}: {self.message}"

    def to_json(self) -> dict[str, Any]:
        """Write it down, with what follows from the cause."""
        told = {"kind": str(self.kind), "accuses_batch": self.accuses_batch}
        return asdict(self) | told | {"sequence_ids": list(self.sequence_ids)}

    @classmethod
    def from_json(cls, record: dict[str, Any]) -> Failure:
        """Read what `to_json` wrote, whatever else has been added to it."""
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
    """Judge an exception from inside an attempt: by its type, its code, its errno, and only then by what it says."""
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
    """Judge a child that left without a word.

    Args:
        exit_code: Negative for a signal; a shell's 128 + signal means the same.
        batch_idx: The batch that was in the model, by what the child had said before.
        ordinal: Its sequence, where that was alone in it.
        is_probing: Whether the device was at a sequence known to be harmless: then it is the device.
        ran_out_of_host_memory: Whether the kernel's OOM killer has struck since the child was started.
        last_event: What it said last.
    """
    signum = _fatal_signal(exit_code)
    cause = (
        FailureCause.SILENT_EXIT
        if signum is None
        else _SIGNAL_CAUSES.get(signum, FailureCause.KILLED)
    )
    if cause == FailureCause.KILLED and ran_out_of_host_memory:
        cause = FailureCause.HOST_OOM
    if cause in _SUSPICIOUS and is_probing:
        cause = FailureCause.HARDWARE
    after = f" after {last_event!r}" if last_event else ""
    return Failure(
        cause=cause,
        message=f"the child left with {describe_exit(exit_code)}{after}{_SIGNAL_ADVICE.get(signum, '')}",
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
    """The signal that ended a process, also where a shell or a container says it as 128 + signal."""
    if exit_code < 0:
        return -exit_code
    signum = exit_code - 128
    return signum if signum in _NAMED_SIGNALS and signum not in _HARMLESS_SIGNALS else None


_NAMED_SIGNALS = frozenset(map(int, signal.Signals))

# A process stops or takes no notice unless it has a handler: 128 + such a number is an exit code like any other.
_HARMLESS_SIGNALS = frozenset(
    {
        *(signal.SIGCHLD, signal.SIGCONT, signal.SIGURG, signal.SIGWINCH),
        *(signal.SIGSTOP, signal.SIGTSTP, signal.SIGTTIN, signal.SIGTTOU),
    }
)

# A process sends itself four of them when it crashes, and only these may accuse a protein. All others come from outside, at
# whatever is in the model just then, which is mostly the longest: what is not listed is "killed".
_SIGNAL_CAUSES: dict[int, FailureCause] = {
    signal.SIGTERM: FailureCause.PREEMPTED,
    signal.SIGHUP: FailureCause.PREEMPTED,  # a terminal or a session that has ended
    signal.SIGINT: FailureCause.PREEMPTED,
    signal.SIGQUIT: FailureCause.PREEMPTED,
    signal.SIGUSR1: FailureCause.PREEMPTED,  # Slurm's --signal=USR1@60 announces the end of a job with it
    signal.SIGUSR2: FailureCause.PREEMPTED,
    signal.SIGXCPU: FailureCause.CONFIGURATION,
    signal.SIGXFSZ: FailureCause.CONFIGURATION,
    signal.SIGSYS: FailureCause.CONFIGURATION,
    signal.SIGBUS: FailureCause.STORAGE,  # a memory-mapped file that was cut, or /dev/shm is full
    signal.SIGSEGV: FailureCause.NATIVE_CRASH,
    signal.SIGABRT: FailureCause.NATIVE_CRASH,
    signal.SIGILL: FailureCause.NATIVE_CRASH,
    signal.SIGFPE: FailureCause.NATIVE_CRASH,
}

_SIGNAL_ADVICE: dict[int | None, str] = {
    signal.SIGXCPU: "; its processor time is limited (ulimit -t, or a batch system's): run it where there is no such limit",
    signal.SIGXFSZ: "; the size of its files is limited (ulimit -f): raise the limit",
    signal.SIGSYS: "; a security filter (seccomp, a container's profile) forbids a system call that it needs",
}

# By the numbers of cudaError_t: AcceleratorError.error_code.
_CUDA_CAUSES: dict[int, FailureCause] = {
    2: FailureCause.GPU_OOM,
    3: FailureCause.HARDWARE,  # the driver could not be initialised
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
    999: FailureCause.HARDWARE,  # unknown, as a card that is going gives it
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
    errno.EFBIG: FailureCause.CONFIGURATION,  # ulimit -f, or a file system whose files are small
    errno.EACCES: FailureCause.CONFIGURATION,
    errno.EPERM: FailureCause.CONFIGURATION,
    # What a file system cannot do at all, such as hard links on exFAT, SMB or some FUSE mounts: no new try helps.
    errno.ENOTSUP: FailureCause.CONFIGURATION,
    errno.ENOSYS: FailureCause.CONFIGURATION,
}

# Most specific first: what tells of the device or the host comes before the words that it shares with bad input.
_MESSAGE_CAUSES = tuple(
    (re.compile(pattern, re.IGNORECASE), cause)
    for pattern, cause in (
        (
            r"received sigterm|termination notice|preempted|spot interruption",
            FailureCause.PREEMPTED,
        ),
        (
            r"uncorrectable ecc|ecc error|gpu is lost|fallen off the bus|nvlink|unable to determine the device handle",
            FailureCause.HARDWARE,
        ),
        (
            r"no cuda-capable device|invalid device ordinal|all cuda-capable devices are busy|driver.*(mismatch|insufficient)",
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
            r"launch failure|illegal instruction|cublas_status_execution_failed|cublas_status_not_initialized",
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
    if type(error).__name__ == "OutOfMemoryError":  # torch's, which this module does without
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
    """An error and what it was raised from."""
    while error is not None:
        yield error
        error = error.__cause__
