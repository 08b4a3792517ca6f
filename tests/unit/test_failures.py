"""Classification of failures: one table of exceptions and one of exit codes."""

from __future__ import annotations

import errno
import os
import pickle
import signal
import subprocess
from functools import partial
from pathlib import Path

import pytest
import torch

from vnp_lib.errors import (
    BatchFailedError,
    CheckpointError,
    CheckpointWriteError,
    CircuitBreakerOpenError,
    ConfigError,
    FastaError,
    FingerprintMismatchError,
    LockTimeoutError,
    NumericalInstabilityError,
    StorageError,
    StorageFailingError,
    WeightsError,
)
from vnp_lib.failures import (
    Failure,
    FailureCause,
    FailureKind,
    ShardFailedError,
    classify_exception,
    classify_exit,
    describe_exit,
)

C = FailureCause


def cuda(message: str, code: int | None = None) -> Exception:
    """An AcceleratorError as torch raises it from a CUDA call."""
    error = torch.AcceleratorError(
        f"CUDA error: {message}\nCUDA kernel errors might be asynchronously reported"
    )
    if code is not None:
        error.error_code = code
    return error


def os_error(number: int) -> OSError:
    return OSError(number, os.strerror(number))


def caused_by(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


EXCEPTIONS = [
    # out of memory
    (
        torch.OutOfMemoryError(
            "CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total capacity of 79 GiB"
        ),
        C.GPU_OOM,
    ),
    (torch.cuda.OutOfMemoryError("CUDA out of memory."), C.GPU_OOM),
    (RuntimeError("CUDA out of memory. Tried to allocate 20.00 MiB"), C.GPU_OOM),
    (cuda("out of memory", 2), C.GPU_OOM),
    (cuda("out of memory"), C.GPU_OOM),
    (
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        C.GPU_OOM,
    ),
    (RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"), C.GPU_OOM),
    (RuntimeError("HIP out of memory. Tried to allocate 1.00 GiB"), C.GPU_OOM),
    (
        RuntimeError("NVML_SUCCESS == r INTERNAL ASSERT FAILED: CUDA driver error: out of memory"),
        C.GPU_OOM,
    ),
    (MemoryError(), C.HOST_OOM),
    (MemoryError("Unable to allocate 8.00 GiB for an array"), C.HOST_OOM),
    (
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:118] err == 0. DefaultCPUAllocator: can't allocate "
            "memory: you tried"
        ),
        C.HOST_OOM,
    ),
    (RuntimeError("unable to mmap 11359232 bytes: Cannot allocate memory (12)"), C.HOST_OOM),
    (os_error(errno.ENOMEM), C.HOST_OOM),
    # errors of a kernel
    (cuda("device-side assert triggered", 710), C.DEVICE_ASSERT),
    (cuda("device-side assert triggered"), C.DEVICE_ASSERT),
    (RuntimeError("CUDA error: device-side assert triggered"), C.DEVICE_ASSERT),
    (cuda("an illegal memory access was encountered", 700), C.ILLEGAL_ADDRESS),
    (RuntimeError("CUDA error: an illegal memory access was encountered"), C.ILLEGAL_ADDRESS),
    (cuda("misaligned address", 716), C.ILLEGAL_ADDRESS),
    (RuntimeError("CUDA error: misaligned address"), C.ILLEGAL_ADDRESS),
    (cuda("operation not supported on global/shared address space", 717), C.ILLEGAL_ADDRESS),
    (cuda("unspecified launch failure", 719), C.LAUNCH_FAILURE),
    (RuntimeError("CUDA error: unspecified launch failure"), C.LAUNCH_FAILURE),
    (cuda("hardware stack error", 714), C.LAUNCH_FAILURE),
    (cuda("an illegal instruction was encountered", 715), C.LAUNCH_FAILURE),
    (RuntimeError("CUDA error: an illegal instruction was encountered"), C.LAUNCH_FAILURE),
    (cuda("invalid program counter", 718), C.LAUNCH_FAILURE),
    (
        RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasGemmEx`"),
        C.LAUNCH_FAILURE,
    ),
    (
        RuntimeError(
            "CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`"
        ),
        C.LAUNCH_FAILURE,
    ),
    (cuda("the launch timed out and was terminated", 702), C.HANG),
    (RuntimeError("CUDA error: the launch timed out and was terminated"), C.HANG),
    # the device itself
    (cuda("uncorrectable ECC error encountered", 214), C.HARDWARE),
    (RuntimeError("CUDA error: uncorrectable ECC error encountered"), C.HARDWARE),
    (cuda("Invalid access of peer GPU memory over nvlink or a hardware error", 220), C.HARDWARE),
    (
        RuntimeError("CUDA error: uncorrectable NVLink error detected during the execution"),
        C.HARDWARE,
    ),
    (cuda("contained ECC error", 226), C.HARDWARE),
    (RuntimeError("GPU 0000:65:00.0 has fallen off the bus"), C.HARDWARE),
    (
        RuntimeError("Unable to determine the device handle for GPU 0000:65:00.0: GPU is lost"),
        C.HARDWARE,
    ),
    (cuda("CUDA-capable device(s) is/are busy or unavailable", 46), C.HARDWARE),
    (RuntimeError("CUDA error: all CUDA-capable devices are busy or unavailable"), C.HARDWARE),
    (cuda("no CUDA-capable device is detected", 100), C.HARDWARE),
    (RuntimeError("No CUDA GPUs are available: no CUDA-capable device is detected"), C.HARDWARE),
    (cuda("invalid device ordinal", 101), C.HARDWARE),
    (RuntimeError("CUDA error: invalid device ordinal"), C.HARDWARE),
    (cuda("initialization error", 3), C.HARDWARE),
    (cuda("system not yet initialized", 802), C.HARDWARE),
    (
        RuntimeError(
            "Unexpected error from cudaGetDeviceCount(). Error 802: system not yet initialized"
        ),
        C.HARDWARE,
    ),
    (cuda("system has unsupported display driver / cuda driver combination", 803), C.HARDWARE),
    (
        RuntimeError(
            "The NVIDIA driver on your system is too old: CUDA driver version is insufficient"
        ),
        C.HARDWARE,
    ),
    (cuda("unknown error", 999), C.HARDWARE),
    (RuntimeError("CUDA error: unknown error"), C.HARDWARE),
    # the numbers
    (NumericalInstabilityError("3 of 10 rows are not finite"), C.NUMERICAL_INSTABILITY),
    (RuntimeError("Numerical instability in layer 12"), C.NUMERICAL_INSTABILITY),
    (CircuitBreakerOpenError("batch 42"), C.CIRCUIT_OPEN),
    (RuntimeError("circuit breaker open for batch 42"), C.CIRCUIT_OPEN),
    # the disk
    (os_error(errno.ENOSPC), C.DISK_FULL),
    (os_error(errno.EDQUOT), C.DISK_FULL),
    (caused_by(StorageError("batch_00001.pt: make room"), os_error(errno.ENOSPC)), C.DISK_FULL),
    (CheckpointWriteError("1 checkpoint write(s) failed: No space left on device"), C.STORAGE),
    (
        caused_by(
            CheckpointWriteError("1 checkpoints"),
            caused_by(StorageError("x"), os_error(errno.EDQUOT)),
        ),
        C.DISK_FULL,
    ),
    (
        RuntimeError("PytorchStreamWriter failed writing file data.pkl: No space left on device"),
        C.DISK_FULL,
    ),
    (os_error(errno.EIO), C.STORAGE),
    (os_error(errno.EROFS), C.STORAGE),
    (os_error(errno.ESTALE), C.STORAGE),
    (os_error(errno.ENOTCONN), C.STORAGE),
    (os_error(errno.EREMOTEIO), C.STORAGE),
    (RuntimeError("unable to read: Input/output error"), C.STORAGE),
    (CheckpointError("its digest is another"), C.STORAGE),
    (LockTimeoutError("held by process 7"), C.STORAGE),
    (StorageError("plan.json is missing"), C.STORAGE),
    (StorageFailingError("5 of 9 checkpoints are damaged"), C.STORAGE_FAILING),
    # what a person has to fix
    (ConfigError("there is no GPU 3"), C.CONFIGURATION),
    (FastaError("x.fasta: there is no such file"), C.CONFIGURATION),
    (WeightsError("w.pt is damaged"), C.CONFIGURATION),
    (FingerprintMismatchError("another run"), C.CONFIGURATION),
    (ImportError("libcudart.so.12: cannot open shared object file"), C.CONFIGURATION),
    (ModuleNotFoundError("No module named 'torch'"), C.CONFIGURATION),
    (os_error(errno.EACCES), C.CONFIGURATION),
    (os_error(errno.EPERM), C.CONFIGURATION),
    (TypeError("run() got an unexpected keyword argument"), C.BUG),
    (ValueError("shape mismatch"), C.BUG),
    (KeyError("representations"), C.BUG),
    (IndexError("list index out of range"), C.BUG),
    (AttributeError("'NoneType' object has no attribute 'to'"), C.BUG),
    (AssertionError(), C.BUG),
    (NotImplementedError("varlen_attn on this device"), C.BUG),
    # the machine is about to be preempted
    (RuntimeError("Received SIGTERM, shutting down"), C.PREEMPTED),
    (RuntimeError("EC2 spot interruption: termination notice"), C.PREEMPTED),
    # everything else
    (RuntimeError("NCCL communicator was aborted"), C.UNKNOWN),
    (TimeoutError("timed out"), C.UNKNOWN),
    (ConnectionResetError(errno.ECONNRESET, "Connection reset by peer"), C.UNKNOWN),
    (os_error(errno.EMFILE), C.UNKNOWN),
    (Exception("something"), C.UNKNOWN),
]

EXITS = [
    (143, C.PREEMPTED),
    (-signal.SIGTERM, C.PREEMPTED),
    (137, C.KILLED),
    (-signal.SIGKILL, C.KILLED),
    (-signal.SIGBUS, C.STORAGE),
    (135, C.STORAGE),
    (-signal.SIGSEGV, C.NATIVE_CRASH),
    (139, C.NATIVE_CRASH),
    (-signal.SIGABRT, C.NATIVE_CRASH),
    (134, C.NATIVE_CRASH),
    (-signal.SIGILL, C.NATIVE_CRASH),
    (-signal.SIGFPE, C.NATIVE_CRASH),
    (1, C.SILENT_EXIT),
    (2, C.SILENT_EXIT),
    (42, C.SILENT_EXIT),
    (129, C.PREEMPTED),
    (-signal.SIGXCPU, C.CONFIGURATION),
    (128 + signal.SIGWINCH, C.SILENT_EXIT),
    (255, C.SILENT_EXIT),
]


@pytest.mark.parametrize(("error", "cause"), EXCEPTIONS, ids=lambda value: str(value)[:60])
def test_an_exception_has_its_cause(error, cause):
    assert classify_exception(error).cause == cause


@pytest.mark.parametrize(("exit_code", "cause"), EXITS)
def test_an_exit_code_has_its_cause(exit_code, cause):
    failure = classify_exit(exit_code)
    assert (failure.cause, failure.exit_code) == (cause, exit_code)


CRASHES = {signal.SIGSEGV, signal.SIGABRT, signal.SIGILL, signal.SIGFPE}
REQUESTS = {
    signal.SIGTERM,
    signal.SIGHUP,
    signal.SIGINT,
    signal.SIGQUIT,
    signal.SIGUSR1,
    signal.SIGUSR2,
}
LIMITS = {signal.SIGXCPU: "ulimit -t", signal.SIGXFSZ: "ulimit -f", signal.SIGSYS: "seccomp"}


HARMLESS = {
    signal.SIGCHLD,
    signal.SIGCONT,
    signal.SIGURG,
    signal.SIGWINCH,
    *range(signal.SIGSTOP, signal.SIGURG),
}


def test_only_crash_signals_accuse_a_protein(tmp_path):
    """Every signal that ends a process is sent to a real one."""
    codes = {signum: exit_code_of(signum, tmp_path) for signum in signal.valid_signals() - HARMLESS}
    judged = {signum: classify_exit(code, batch_idx=3, ordinal=7) for signum, code in codes.items()}
    assert len(judged) > 50
    assert {signum for signum, failure in judged.items() if failure.accuses_batch} == CRASHES
    assert {
        signum for signum, failure in judged.items() if failure.kind == FailureKind.SPOT_PREEMPTION
    } == REQUESTS
    assert {signum for signum, failure in judged.items() if failure.is_permanent} == {*LIMITS}
    assert all(limit in judged[signum].message for signum, limit in LIMITS.items())


def by_default(signum: int) -> None:
    if signum != signal.SIGKILL:
        signal.signal(signum, signal.SIG_DFL)


def exit_code_of(signum: int, cwd: Path) -> int:
    """Return the exit code of a process that receives a signal for which it has no handler."""
    process = subprocess.Popen(["sleep", "60"], cwd=cwd, preexec_fn=partial(by_default, signum))
    process.send_signal(signum)
    return process.wait(timeout=60)


@pytest.mark.parametrize("signum", [*signal.Signals])
def test_an_exit_code_of_a_shell_means_the_signal(signum):
    """But 128 + a signal that does not end a process is an ordinary exit code."""
    by_shell, itself = (classify_exit(code, batch_idx=3) for code in (128 + signum, -signum))
    assert by_shell.cause == itself.cause or (by_shell.cause, itself.cause) == (
        C.SILENT_EXIT,
        C.KILLED,
    )


@pytest.mark.parametrize("exit_code", [137, -signal.SIGKILL])
def test_sigkill_is_host_oom_if_the_kernel_counted_one(exit_code):
    assert classify_exit(exit_code, ran_out_of_host_memory=True).cause == C.HOST_OOM


def test_an_oom_kill_does_not_explain_a_segmentation_fault():
    """The OOM killer may have struck another process of the machine."""
    assert classify_exit(-signal.SIGSEGV, ran_out_of_host_memory=True).cause == C.NATIVE_CRASH


@pytest.mark.parametrize(("error", "cause"), EXCEPTIONS, ids=lambda value: str(value)[:60])
def test_in_a_batch_only_unclassified_errors_change_their_cause(error, cause):
    """A failure of hardware, host or disk never accuses the batch that was being computed."""
    failure = classify_exception(caused_by(BatchFailedError(7, ("a", "b")), error))
    expected = C.COMPUTE_ERROR if cause in (C.UNKNOWN, C.BUG) else cause
    assert (failure.cause, failure.batch_idx, failure.sequence_ids) == (expected, 7, ("a", "b"))


def test_hardware_host_and_disk_never_accuse_a_batch():
    innocent = {
        C.HARDWARE,
        C.HOST_OOM,
        C.GPU_OOM,
        C.KILLED,
        C.PREEMPTED,
        C.DISK_FULL,
        C.STORAGE,
        C.STORAGE_FAILING,
    }
    for cause in innocent:
        failure = Failure(cause=cause, message="", batch_idx=3)
        assert not failure.accuses_batch
        assert failure.kind != FailureKind.POISON_INPUT


def test_only_what_a_person_must_fix_is_permanent():
    permanent = {cause for cause in C if Failure(cause=cause, message="").is_permanent}
    assert permanent == {C.CONFIGURATION, C.BUG, C.STORAGE_FAILING, C.QUARANTINE_FULL, C.GIVEN_UP}


def test_every_cause_has_one_of_the_four_kinds():
    kinds = {cause: Failure(cause=cause, message="").kind for cause in C}
    assert set(kinds.values()) == set(FailureKind)
    assert kinds[C.PREEMPTED] == FailureKind.SPOT_PREEMPTION
    assert kinds[C.HOST_OOM] == kinds[C.GPU_OOM] == FailureKind.OOM


def test_a_failure_is_read_back_from_json_with_more_keys():
    failure = Failure(
        cause=C.DEVICE_ASSERT, message="x", batch_idx=3, ordinal=5, sequence_ids=("a",), exit_code=1
    )
    assert Failure.from_json(failure.to_json() | {"session": "s", "at": "now"}) == failure
    assert failure.to_json()["kind"] == "poison_input"


@pytest.mark.parametrize(
    "error", [BatchFailedError(3, ("a",)), ShardFailedError(Failure(cause=C.HANG, message="x"))]
)
def test_errors_survive_pickling(error):
    """Prefect may pickle an exception and load it again."""
    again = pickle.loads(pickle.dumps(error))
    assert str(again) == str(error)


def test_the_repr_of_a_failed_attempt_is_readable():
    """Prefect logs an exception's repr before each retry."""
    error = ShardFailedError(
        Failure(cause=C.KILLED, message="worker process killed by SIGKILL", batch_idx=3)
    )
    assert (
        repr(error)
        == "ShardFailedError('transient (killed) at batch 3: worker process killed by SIGKILL')"
    )


@pytest.mark.parametrize(
    ("code", "name"), [(1, "exit code 1"), (-9, "SIGKILL"), (137, "SIGKILL"), (-63, "signal 63")]
)
def test_exit_codes_are_named(code, name):
    assert describe_exit(code) == name


@pytest.mark.parametrize(
    ("exit_code", "message"),
    [
        (1, "worker process exited with exit code 1 (last event: loading)"),
        (-11, "worker process killed by SIGSEGV (last event: loading)"),
        (137, "worker process killed by SIGKILL (last event: loading)"),
    ],
)
def test_the_message_of_a_silent_exit_names_code_and_last_event(exit_code, message):
    assert classify_exit(exit_code, last_event="loading").message == message


def test_the_table_has_eighty_cases():
    assert len(EXCEPTIONS) + len(EXITS) >= 80


@pytest.mark.parametrize(
    ("exit_code", "cause"),
    [(-11, C.HARDWARE), (1, C.HARDWARE), (143, C.PREEMPTED), (-9, C.KILLED), (-7, C.STORAGE)],
)
def test_a_crash_on_a_harmless_sequence_is_hardware(exit_code, cause):
    assert classify_exit(exit_code, is_probing=True).cause == cause
