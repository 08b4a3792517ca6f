"""The metrics of a flow run, served while it runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from prefect import get_run_logger

from vnp_lib.run import Run


@contextmanager
def metrics_served(run: Run) -> Iterator[None]:
    """Serve a run's metrics during the block, where a port was given. One that is taken costs the metrics, not the run."""
    port, address = run.config.metrics_port, run.config.metrics_address
    if port is None:
        yield
        return
    from vnp_lib.report import (
        serving,  # here, not above: a run without metrics does without prometheus_client
    )

    with ExitStack() as stack:
        try:
            stack.enter_context(serving(run.metrics, run.quarantine, address=address, port=port))
        except OSError as error:
            told = "no metrics: port %d on %s cannot be had (%s); is another shard's run serving there?"
            get_run_logger().warning(told, port, address, error.strerror)
        else:
            get_run_logger().info("metrics are served on %s, port %d", address, port)
        yield
