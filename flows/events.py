"""Events for Prefect's automations, such as those in `deployments/automations.yaml`."""

from __future__ import annotations

from typing import Any

from prefect.events import emit_event

from vnp_lib.failures import Failure
from vnp_lib.run import DatasetSummary, Run


def emit_preemption(run: Run, rank: int, failure: Failure) -> None:
    """Emit `vnp.shard.preempted`."""
    _emit("vnp.shard.preempted", run, rank=rank, message=failure.message)


def emit_quarantine(run: Run, sequence_id: str, message: str) -> None:
    """Emit `vnp.sequence.quarantined`."""
    _emit("vnp.sequence.quarantined", run, id=sequence_id, message=message)


def emit_completion(run: Run, summary: DatasetSummary) -> None:
    """Emit `vnp.run.completed`."""
    _emit(
        "vnp.run.completed",
        run,
        num_rows=summary.num_rows,
        num_quarantined=summary.num_quarantined,
        num_missing=summary.num_missing,
    )


def _emit(event: str, run: Run, **payload: Any) -> None:
    fields = {"run_dir": str(run.paths.run_dir.resolve()), "model": run.config.model}
    resource = {
        "prefect.resource.id": f"vnp.run.{run.plan.fingerprint}",
        "prefect.resource.name": fields["run_dir"],
    }
    emit_event(event, resource=resource, payload=fields | payload)
