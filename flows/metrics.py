"""Serve the metrics of a flow run while it runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from prefect import get_run_logger

from vnp_lib.run import Run


@contextmanager
def metrics_served(run: Run) -> Iterator[None]:
    """Serve a run's metrics during the block, if a port was given.

    If the port is in use, the run continues without metrics.
    """
    port, address = run.config.metrics_port, run.config.metrics_address
    if port is None:
        yield
        return
    # Here, not above: a run without metrics does not need prometheus_client.
    from vnp_lib.report import serving

    with ExitStack() as stack:
        try:
            stack.enter_context(serving(run.metrics, run.quarantine, address=address, port=port))
        except OSError as error:
            get_run_logger().warning(
                "cannot serve metrics: port %d on %s: %s; another shard's run may be using it",
                port,
                address,
                error.strerror,
            )
        else:
            get_run_logger().info("metrics are served on %s, port %d", address, port)
        yield
