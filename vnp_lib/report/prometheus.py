"""Serve the metrics of a run to Prometheus, from a daemon thread."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from itertools import accumulate
from operator import attrgetter
from typing import Any

from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from vnp_lib.checkpoint import Quarantine
from vnp_lib.config import EmbedConfig
from vnp_lib.devices import ask_nvml
from vnp_lib.errors import ConfigError, StorageError
from vnp_lib.run import RunMetrics

_SHARD_METRICS = (
    (
        GaugeMetricFamily,
        "vnp_shard_sequences",
        "Distinct sequences of a shard.",
        attrgetter("num_sequences"),
    ),
    (
        GaugeMetricFamily,
        "vnp_shard_sequences_done",
        "Of them, those computed or quarantined, by this run or an earlier one.",
        attrgetter("num_done"),
    ),
    (
        CounterMetricFamily,
        "vnp_sequences_embedded",
        "Sequences that went through the model here; counted again if an attempt was lost before "
        "its checkpoint.",
        attrgetter("sequences_embedded"),
    ),
    (
        CounterMetricFamily,
        "vnp_tokens_embedded",
        "Their tokens, BOS and EOS included.",
        attrgetter("tokens_embedded"),
    ),
    (
        CounterMetricFamily,
        "vnp_checkpoint_sequences",
        "Sequences written to checkpoints here.",
        attrgetter("sequences_in_checkpoints"),
    ),
    (
        GaugeMetricFamily,
        "vnp_batches_queued",
        "Prefetched batches that wait for the model; 0 if the model waits for input.",
        attrgetter("batches_queued"),
    ),
    (
        CounterMetricFamily,
        "vnp_attempts",
        "Worker processes started here.",
        attrgetter("attempts"),
    ),
)
_GPU_METRICS: tuple[tuple[str, str, Callable[[Any, Any], float]], ...] = (
    (
        "vnp_gpu_memory_used_bytes",
        "Memory in use on a GPU, by its number in nvidia-smi.",
        lambda nvml, gpu: nvml.nvmlDeviceGetMemoryInfo(gpu).used,
    ),
    (
        "vnp_gpu_memory_total_bytes",
        "Memory of a GPU.",
        lambda nvml, gpu: nvml.nvmlDeviceGetMemoryInfo(gpu).total,
    ),
    (
        "vnp_gpu_utilization_ratio",
        "Share of the last sample period in which a GPU was busy, 0 to 1.",
        lambda nvml, gpu: nvml.nvmlDeviceGetUtilizationRates(gpu).gpu / 100,
    ),
)


def validate_metrics_port(config: EmbedConfig) -> None:
    """Raise ConfigError if the metrics of a run on this machine cannot be served.

    In a work pool, a shard of the last run may still have the port.
    """
    if config.metrics_port is not None and config.executor == "local":
        require_free_port(config.metrics_address, config.metrics_port)


def require_free_port(address: str, port: int) -> None:
    """Raise ConfigError if the address and the port cannot be bound."""
    try:
        family, *_, place = socket.getaddrinfo(address, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, socket.SOCK_STREAM) as listener:
            # As the server does: a connection of the last run may still be in TIME_WAIT.
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(place)
    except OSError as error:
        raise ConfigError(
            f"--metrics-port {port}: cannot serve metrics on {address}: {error.strerror}; give "
            f"another port or --metrics-address, or omit the option"
        ) from None


@contextmanager
def serving(
    metrics: RunMetrics, quarantine: Quarantine, *, address: str, port: int
) -> Iterator[None]:
    """Serve the metrics at `/metrics` while the block runs.

    Raises:
        OSError: If the address cannot be bound; the block is not entered.
    """
    server, thread = start_http_server(port, address, registry_of(metrics, quarantine))
    try:
        yield
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def registry_of(metrics: RunMetrics, quarantine: Quarantine) -> CollectorRegistry:
    """Return the collectors of the run and of this machine's GPUs."""
    registry = CollectorRegistry()
    registry.register(_RunCollector(metrics, quarantine))
    registry.register(_GpuCollector())
    return registry


class _RunCollector(Collector):
    """Collect the counts of a run, and the number of quarantined sequences from their file."""

    def __init__(self, metrics: RunMetrics, quarantine: Quarantine) -> None:
        self._metrics = metrics
        self._quarantine = quarantine

    def collect(self) -> Iterator[Metric]:
        shards = sorted(self._metrics.shards.copy().items())
        for make_family, name, meaning, count_of in _SHARD_METRICS:
            family = make_family(name, meaning, labels=["shard"])
            for rank, shard in shards:
                family.add_metric([str(rank)], count_of(shard))
            yield family
        failures = CounterMetricFamily(
            "vnp_failures", "Attempts that failed, by kind of failure.", labels=["kind"]
        )
        for kind, count in self._metrics.failures.items():
            failures.add_metric([kind], count)
        yield failures
        written = self._metrics.checkpoint_write_s
        bounds = [*map(floatToGoString, written.bounds), "+Inf"]
        yield HistogramMetricFamily(
            "vnp_checkpoint_write_seconds",
            "Time until a checkpoint was durable.",
            buckets=list(zip(bounds, accumulate(written.counts), strict=True)),
            sum_value=written.sum,
        )
        with suppress(StorageError, OSError):
            yield GaugeMetricFamily(
                "vnp_quarantined_sequences",
                "Sequences in quarantine.",
                value=len(self._quarantine.read()),
            )


class _GpuCollector(Collector):
    """Query NVML for this machine's GPUs at every scrape. Unknown values are omitted."""

    def collect(self) -> Iterator[Metric]:
        families = [
            GaugeMetricFamily(name, meaning, labels=["gpu"]) for name, meaning, _ in _GPU_METRICS
        ]

        def add_samples(nvml: Any) -> None:
            for index in range(nvml.nvmlDeviceGetCount()):
                for family, (_, _, read) in zip(families, _GPU_METRICS, strict=True):
                    with suppress(nvml.NVMLError):
                        gpu = nvml.nvmlDeviceGetHandleByIndex(index)
                        family.add_metric([str(index)], read(nvml, gpu))

        ask_nvml(add_samples)
        yield from (family for family in families if family.samples)
