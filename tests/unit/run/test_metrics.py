"""Tests of the counters of a run and their page, read by Prometheus's own parser."""

from __future__ import annotations

import logging
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from prometheus_client import generate_latest

from flows import work_pool
from flows.metrics import metrics_served
from flows.program import main
from tests.helpers import EXAMPLE, SMALL_MODEL, free_port, read_page, scrape, small_config
from vnp_lib.checkpoint.manifest import CheckpointManifest
from vnp_lib.checkpoint.quarantine import Quarantine, QuarantinedSequence
from vnp_lib.errors import ConfigError, ExitCode
from vnp_lib.failures import Failure, FailureCause, FailureKind
from vnp_lib.plan.paths import RunPaths
from vnp_lib.plan.plan import ModelIdentity
from vnp_lib.plan.planner import make_plan
from vnp_lib.report.progress import RunProgress
from vnp_lib.report.prometheus import registry_of, require_free_port, serving, validate_metrics_port
from vnp_lib.run.events import (
    AttemptStarted,
    BatchComputed,
    BatchStarted,
    CheckpointSaved,
    SequenceQuarantined,
)
from vnp_lib.run.metrics import RunMetrics
from vnp_lib.run.resume import ShardProgress


@pytest.fixture
def quarantine(tmp_path: Path) -> Quarantine:
    return Quarantine(
        tmp_path / "quarantine.jsonl", num_sequences=100, num_computed=100, fingerprint="f"
    )


@contextmanager
def served(metrics: RunMetrics, quarantine: Quarantine) -> Iterator[int]:
    """Serve the page, and give its port."""
    port = free_port()
    with serving(metrics, quarantine, address="127.0.0.1", port=port):
        yield port


def page_of(metrics: RunMetrics, quarantine: Quarantine) -> dict[str, float]:
    """The page, without a server."""
    return read_page(generate_latest(registry_of(metrics, quarantine)).decode())


def batch(*, sequences: int = 3, tokens: int = 90, queued: int = 4) -> BatchComputed:
    return BatchComputed(batch_idx=0, sequences=sequences, tokens=tokens, queued=queued)


def test_worker_events_are_on_the_page_by_shard(quarantine: Quarantine) -> None:
    metrics = RunMetrics()
    metrics.set_progress(0, num_sequences=20, num_done=5)
    metrics.set_progress(11, num_sequences=19, num_done=19)
    metrics.attempt(0)
    for event in [
        AttemptStarted(pending=14, done=6, tokens_done=300),
        BatchStarted(batch_idx=0, ordinal=None),
        batch(),
        SequenceQuarantined(id="bad", message="not finite"),
        batch(sequences=2, tokens=50, queued=3),
        CheckpointSaved(number=0, rows=5, seconds=0.2),
    ]:
        metrics.on_event(0, event)
    page = page_of(metrics, quarantine)
    assert {name: value for name, value in page.items() if "shard=" in name} == {
        "vnp_shard_sequences{shard=0}": 20,
        "vnp_shard_sequences{shard=11}": 19,
        "vnp_shard_sequences_done{shard=0}": 6 + 3 + 1 + 2,
        "vnp_shard_sequences_done{shard=11}": 19,
        "vnp_sequences_embedded_total{shard=0}": 5,
        "vnp_sequences_embedded_total{shard=11}": 0,
        "vnp_tokens_embedded_total{shard=0}": 140,
        "vnp_tokens_embedded_total{shard=11}": 0,
        "vnp_checkpoint_sequences_total{shard=0}": 5,
        "vnp_checkpoint_sequences_total{shard=11}": 0,
        "vnp_batches_queued{shard=0}": 3,
        "vnp_batches_queued{shard=11}": 0,
        "vnp_attempts_total{shard=0}": 1,
        "vnp_attempts_total{shard=11}": 0,
    }


def test_what_an_attempt_lost_is_done_no_more_and_embedded_twice(quarantine: Quarantine) -> None:
    """The worker exits with two batches in no checkpoint, and with queued batches."""
    metrics = RunMetrics()
    for _ in range(2):
        metrics.attempt(0)
        metrics.on_event(0, AttemptStarted(pending=6, done=0, tokens_done=0))
        metrics.on_event(0, batch())
        metrics.on_event(0, batch())
        assert page_of(metrics, quarantine)["vnp_shard_sequences_done{shard=0}"] == 6
        metrics.failed(0, FailureKind.TRANSIENT)
    page = page_of(metrics, quarantine)
    assert page["vnp_sequences_embedded_total{shard=0}"] == 12
    assert page["vnp_attempts_total{shard=0}"] == 2
    assert page["vnp_batches_queued{shard=0}"] == 0


def test_failures_are_counted_by_kind(quarantine: Quarantine) -> None:
    """From the first scrape on: Prometheus cannot tell the rise of what was not there before."""
    metrics = RunMetrics()
    for kind in (FailureKind.OOM, FailureKind.SPOT_PREEMPTION, FailureKind.OOM):
        metrics.failed(0, kind)
    page = page_of(metrics, quarantine)
    counted = {name: value for name, value in page.items() if name.startswith("vnp_failures")}
    expected = dict.fromkeys((f"vnp_failures_total{{kind={kind}}}" for kind in FailureKind), 0)
    assert counted == expected | {
        "vnp_failures_total{kind=oom}": 2,
        "vnp_failures_total{kind=spot_preemption}": 1,
    }


def test_the_times_of_checkpoints_are_a_histogram(quarantine: Quarantine) -> None:
    """A bucket counts all values up to its bound, that included."""
    metrics = RunMetrics()
    for seconds in (0.005, 0.3, 0.5, 1000.0):
        metrics.on_event(0, CheckpointSaved(number=0, rows=1, seconds=seconds))
    page = page_of(metrics, quarantine)
    buckets = {
        bound: page[f"vnp_checkpoint_write_seconds_bucket{{le={bound}}}"]
        for bound in ("0.1", "0.3", "1.0")
    }
    assert buckets == {"0.1": 1, "0.3": 2, "1.0": 3}
    assert (
        page["vnp_checkpoint_write_seconds_bucket{le=+Inf}"]
        == page["vnp_checkpoint_write_seconds_count"]
        == 4
    )
    assert page["vnp_checkpoint_write_seconds_sum"] == pytest.approx(1000.805)


def test_the_quarantine_is_counted_as_it_is_on_disk(quarantine: Quarantine) -> None:
    """Whoever has set them aside. Where the file is damaged the rest of the page is served."""
    metrics = RunMetrics()
    assert page_of(metrics, quarantine)["vnp_quarantined_sequences"] == 0
    failure = Failure(cause=FailureCause.NUMERICAL_INSTABILITY, message="not finite")
    quarantine.add(
        QuarantinedSequence(
            ordinal=7,
            id="bad",
            length=30,
            kind=failure.kind,
            cause=failure.cause,
            message=failure.message,
            attempts=2,
            at="2026-11-22T00:00:00+00:00",
            fingerprint="f",
            sequence_sha256="",
        )
    )
    assert page_of(metrics, quarantine)["vnp_quarantined_sequences"] == 1
    quarantine.path.write_text("damaged\n")
    page = page_of(metrics, quarantine)
    assert "vnp_quarantined_sequences" not in page
    assert page["vnp_failures_total{kind=oom}"] == 0


def test_progress_on_other_machines_is_from_the_manifest(
    tmp_path: Path, tiny_fasta: Path, quarantine: Quarantine
) -> None:
    """What they embed is counted where they are."""
    paths = RunPaths(tmp_path / "run")
    model = ModelIdentity(model="m", weights_digest="w", layer=6, dtype="float32")
    run = SimpleNamespace(
        plan=make_plan(paths, [tiny_fasta], model, num_shards=2, token_budget=200),
        manifest=CheckpointManifest(paths.manifest),
        metrics=RunMetrics(),
        shard_progress=lambda rank: ShardProgress(
            rank=rank, num_sequences=20, num_done=3, tokens_done=100
        ),
    )
    run.manifest.initialize(2, run.plan.fingerprint, "w")
    run.manifest.update_shard_checkpoint(1, 0, 3, "batch_00000.pt")
    shown = work_pool._ShownProgress(
        run, run.shard_progress(1), RunProgress(total_sequences=40, total_tokens=1_000)
    )
    run.manifest.update_shard_checkpoint(1, 1, 9, "batch_00001.pt")
    shown.update()
    page = page_of(run.metrics, quarantine)
    assert page["vnp_shard_sequences{shard=1}"] == 20
    assert page["vnp_shard_sequences_done{shard=1}"] == 12
    assert page["vnp_sequences_embedded_total{shard=1}"] == 0


class NVMLError(Exception):
    """What pynvml raises for all that goes wrong."""


class FakeNVML(ModuleType):
    """`pynvml` on a machine with two GPUs; the first is divided and has no utilisation."""

    NVMLError = NVMLError

    def __init__(self) -> None:
        super().__init__("pynvml")
        self.calls: list[str] = []

    def nvmlInit(self) -> None:
        self.calls.append("init")

    def nvmlShutdown(self) -> None:
        self.calls.append("shutdown")

    def nvmlDeviceGetCount(self) -> int:
        return 2

    def nvmlDeviceGetHandleByIndex(self, index: int) -> str:
        return f"handle {index}"

    def nvmlDeviceGetMemoryInfo(self, handle: str) -> Any:
        return SimpleNamespace(used={"handle 0": 3_000, "handle 1": 5_000}[handle], total=80_000)

    def nvmlDeviceGetUtilizationRates(self, handle: str) -> Any:
        if handle == "handle 0":
            raise NVMLError("Not Supported")
        return SimpleNamespace(gpu=87, memory=40)


def gpu_series(page: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in page.items() if "gpu" in name}


def test_gpus_are_read_when_the_page_is_requested(
    quarantine: Quarantine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And only then. What NVML cannot tell of one GPU is left out."""
    nvml = FakeNVML()
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    with served(RunMetrics(), quarantine) as port:
        assert nvml.calls == []
        page = scrape(port)
        assert nvml.calls == ["init", "shutdown"]
    assert gpu_series(page) == {
        "vnp_gpu_memory_used_bytes{gpu=0}": 3_000,
        "vnp_gpu_memory_used_bytes{gpu=1}": 5_000,
        "vnp_gpu_memory_total_bytes{gpu=0}": 80_000,
        "vnp_gpu_memory_total_bytes{gpu=1}": 80_000,
        "vnp_gpu_utilization_ratio{gpu=1}": 0.87,
    }


class WithoutDriver(FakeNVML):
    def nvmlInit(self) -> None:
        raise NVMLError("NVML Shared Library Not Found")


class WithoutGPU(FakeNVML):
    def nvmlDeviceGetCount(self) -> int:
        return 0


@pytest.mark.parametrize(
    "nvml", [None, WithoutDriver(), WithoutGPU()], ids=["no pynvml", "no driver", "no GPU"]
)
def test_without_a_gpu_there_are_no_series_of_gpus(
    quarantine: Quarantine, monkeypatch: pytest.MonkeyPatch, nvml: ModuleType | None
) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    page = page_of(RunMetrics(), quarantine)
    assert gpu_series(page) == {}
    assert page["vnp_failures_total{kind=oom}"] == 0


def test_nobody_waits_for_a_scrape_that_hangs(
    quarantine: Quarantine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither the counting, nor the end of the run."""
    hangs, may_continue = threading.Event(), threading.Event()

    class Hanging(FakeNVML):
        def nvmlInit(self) -> None:
            hangs.set()
            assert may_continue.wait(timeout=120)

    monkeypatch.setitem(sys.modules, "pynvml", Hanging())
    metrics = RunMetrics()
    with served(metrics, quarantine) as port:
        scraper = threading.Thread(target=scrape, args=(port,))
        scraper.start()
        assert hangs.wait(timeout=120)
        metrics.on_event(0, batch())
        metrics.failed(0, FailureKind.OOM)
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port))
    assert metrics.shards[0].sequences_embedded == 3
    may_continue.set()
    scraper.join()


def run_with(tmp_path: Path, quarantine: Quarantine, **settings: Any) -> Any:
    return SimpleNamespace(
        config=small_config(EXAMPLE, tmp_path / "run", **settings),
        metrics=RunMetrics(),
        quarantine=quarantine,
    )


@pytest.fixture
def flow_log(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> pytest.LogCaptureFixture:
    """The flow run's log, without a flow run."""
    monkeypatch.setattr("flows.metrics.get_run_logger", lambda: logging.getLogger("flow_run"))
    caplog.set_level(logging.INFO, "flow_run")
    return caplog


def listening_ports() -> set[int]:
    """Of this process, by the kernel's word."""
    ours = {link.readlink().name for link in Path("/proc/self/fd").iterdir() if link.is_symlink()}
    sockets = [line.split() for line in Path("/proc/self/net/tcp").read_text().splitlines()[1:]]
    return {
        int(each[1].split(":")[1], 16)
        for each in sockets
        if each[3] == "0A" and f"socket:[{each[9]}]" in ours
    }


def test_without_a_port_nothing_listens(
    tmp_path: Path, quarantine: Quarantine, flow_log: pytest.LogCaptureFixture
) -> None:
    before, port = listening_ports(), free_port()
    with metrics_served(run_with(tmp_path, quarantine)):
        assert listening_ports() == before
    with metrics_served(run_with(tmp_path, quarantine, metrics_port=port)):
        assert listening_ports() == before | {port}
    assert listening_ports() == before


def test_a_run_continues_without_metrics_if_the_port_is_taken(
    tmp_path: Path, quarantine: Quarantine, flow_log: pytest.LogCaptureFixture
) -> None:
    """As by another shard's flow run on the same machine."""
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with metrics_served(run_with(tmp_path, quarantine, metrics_port=port)):
            went_on = True
    assert went_on
    (record,) = flow_log.records
    assert (record.levelno, str(port) in record.getMessage()) == (logging.WARNING, True)


def test_a_taken_port_is_refused_up_front(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """On the command line: exit code 2, one sentence, and nothing on disk."""
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        arguments = [
            "--fasta",
            str(EXAMPLE),
            "--output-dir",
            str(tmp_path / "run"),
            "--metrics-port",
            str(port),
        ]
        assert main([*arguments, *SMALL_MODEL]) == ExitCode.UNUSABLE_INPUT
    out, err = capsys.readouterr()
    assert (out, len(err.splitlines())) == ("", 1)
    assert err.startswith(
        f"--metrics-port {port}: cannot serve metrics on 127.0.0.1: Address already in use"
    )
    assert list(tmp_path.iterdir()) == []


def test_a_taken_port_keeps_no_run_in_a_work_pool_out(tmp_path: Path) -> None:
    """A shard of the last run may have it on this machine; that ends once the run has begun."""
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        config = small_config(EXAMPLE, tmp_path / "run", metrics_port=port, executor="work-pool")
        validate_metrics_port(config)
        with pytest.raises(ConfigError):
            validate_metrics_port(config.model_copy(update={"executor": "local"}))


def test_a_port_that_the_last_run_has_just_left_is_free(quarantine: Quarantine) -> None:
    """Its connections linger for a minute in the kernel."""
    with (
        served(RunMetrics(), quarantine) as port,
        socket.create_connection(("127.0.0.1", port)) as scraper,
    ):
        scraper.sendall(b"GET /metrics HTTP/1.0\r\n\r\n")
        while scraper.recv(
            65_536
        ):  # to its end: the server is the one that closes first, and has to linger
            pass
    require_free_port("127.0.0.1", port)
    with serving(RunMetrics(), quarantine, address="127.0.0.1", port=port):
        assert scrape(port)["vnp_failures_total{kind=oom}"] == 0


def test_who_serves_no_metrics_does_without_the_library() -> None:
    modules = "vnp_lib.cli, vnp_lib.run.directory, vnp_lib.worker.attempt, vnp_lib.run.metrics"
    loaded = "bool({'prometheus_client', 'pynvml'} & set(sys.modules))"
    code = f"import sys, {modules}; sys.exit({loaded})"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
