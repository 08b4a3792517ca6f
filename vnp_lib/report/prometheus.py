"""The page on which Prometheus reads a run's metrics: made when it is asked for, by a thread that nobody waits for."""

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
from vnp_lib.run import Histogram, RunMetrics

_OF_A_SHARD = (
    (
        GaugeMetricFamily,
        "vnp_shard_sequences",
        "Distinct sequences of a shard.",
        attrgetter("num_sequences"),
    ),
    (
        GaugeMetricFamily,
        "vnp_shard_sequences_done",
        "Of them, those that are computed or set aside, by this run or an earlier one.",
        attrgetter("num_done"),
    ),
    (
        CounterMetricFamily,
        "vnp_sequences_embedded",
        "Sequences that went through the model here; again where an attempt was lost before its checkpoint.",
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
        "Sequences that were brought into checkpoints here.",
        attrgetter("sequences_in_checkpoints"),
    ),
    (
        GaugeMetricFamily,
        "vnp_batches_queued",
        "Batches that are read ahead and wait for the model; 0 where the model waits for the reading.",
        attrgetter("batches_queued"),
    ),
    (
        CounterMetricFamily,
        "vnp_attempts",
        "Children that were started here.",
        attrgetter("attempts"),
    ),
)
_OF_A_GPU: tuple[tuple[str, str, Callable[[Any, Any], float]], ...] = (
    (
        "vnp_gpu_memory_used_bytes",
        "Memory in use on a GPU, by nvidia-smi's number.",
        lambda nvml, gpu: nvml.nvmlDeviceGetMemoryInfo(gpu).used,
    ),
    (
        "vnp_gpu_memory_total_bytes",
        "Memory of a GPU.",
        lambda nvml, gpu: nvml.nvmlDeviceGetMemoryInfo(gpu).total,
    ),
    (
        "vnp_gpu_utilization_ratio",
        "Share of the last moments in which a GPU was at work, 0 to 1.",
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
    """Raise ConfigError where nothing can be served there."""
    try:
        family, *_, place = socket.getaddrinfo(address, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, socket.SOCK_STREAM) as listener:
            listener.setsockopt(
                socket.SOL_SOCKET, socket.SO_REUSEADDR, 1
            )  # as the server does: the last run's is gone
            listener.bind(place)
    except OSError as error:
        raise ConfigError(
            f"--metrics-port {port}: nothing can be served on {address}: {error.strerror}; give another port or "
            f"--metrics-address, or leave it out"
        ) from None


@contextmanager
def serving(
    metrics: RunMetrics, quarantine: Quarantine, *, address: str, port: int
) -> Iterator[None]:
    """Serve the page at `/metrics` while the block runs.

    Raises:
        OSError: Nothing can be served there; the block is not entered.
    """
    server, thread = start_http_server(port, address, registry_of(metrics, quarantine))
    try:
        yield
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def registry_of(metrics: RunMetrics, quarantine: Quarantine) -> CollectorRegistry:
    """What the page is made of."""
    registry = CollectorRegistry()
    registry.register(_RunCollector(metrics, quarantine))
    registry.register(_GpuCollector())
    return registry


class _RunCollector(Collector):
    """What is counted of a run, by shard where it is a shard's, and how many are in quarantine by its file."""

    def __init__(self, metrics: RunMetrics, quarantine: Quarantine) -> None:
        self._metrics = metrics
        self._quarantine = quarantine

    def collect(self) -> Iterator[Metric]:
        shards = sorted(self._metrics.shards.copy().items())
        for make_family, name, meaning, count_of in _OF_A_SHARD:
            family = make_family(name, meaning, labels=["shard"])
            for rank, shard in shards:
                family.add_metric([str(rank)], count_of(shard))
            yield family
        failures = CounterMetricFamily(
            "vnp_failures", "Attempts that failed, by how.", labels=["kind"]
        )
        for kind, count in self._metrics.failures.items():
            failures.add_metric([kind], count)
        yield failures
        yield HistogramMetricFamily(
            "vnp_checkpoint_write_seconds",
            "Time until a checkpoint was durable.",
            buckets=_cumulative(self._metrics.checkpoint_write_s),
            sum_value=self._metrics.checkpoint_write_s.sum,
        )
        with suppress(StorageError, OSError):
            yield GaugeMetricFamily(
                "vnp_quarantined_sequences",
                "Sequences that are set aside.",
                value=len(self._quarantine.read()),
            )


class _GpuCollector(Collector):
    """The machine's GPUs, asked of NVML at every scrape. What there is not, or cannot be told, is left out."""

    def collect(self) -> Iterator[Metric]:
        families = [
            GaugeMetricFamily(name, meaning, labels=["gpu"]) for name, meaning, _ in _OF_A_GPU
        ]
        ask_nvml(lambda nvml: _ask(nvml, families))
        yield from (family for family in families if family.samples)


def _ask(nvml: Any, families: list[GaugeMetricFamily]) -> None:
    for index in range(nvml.nvmlDeviceGetCount()):
        for family, (_, _, read) in zip(families, _OF_A_GPU, strict=True):
            with suppress(nvml.NVMLError):
                family.add_metric([str(index)], read(nvml, nvml.nvmlDeviceGetHandleByIndex(index)))


def _cumulative(histogram: Histogram) -> list[tuple[str, float]]:
    bounds = [*map(floatToGoString, histogram.bounds), "+Inf"]
    return list(zip(bounds, accumulate(histogram.counts), strict=True))
