"""Read the manifest and the quarantine of a run, or report why they cannot be read."""

from __future__ import annotations

from vnp_lib.checkpoint import CheckpointManifest, Quarantine, QuarantinedSequence, ShardRecord
from vnp_lib.errors import StorageError
from vnp_lib.plan import RunPaths, RunPlan


def read_shards(paths: RunPaths) -> tuple[dict[int, ShardRecord], str]:
    """Return the manifest's record of each shard, by rank, and "" or why there is none."""
    try:
        return CheckpointManifest(paths.manifest).shards(), ""
    except (StorageError, OSError) as error:
        return {}, str(error)


def read_quarantine(plan: RunPlan, paths: RunPaths) -> tuple[list[QuarantinedSequence] | None, str]:
    """Return the quarantined sequences and "", or None and why they are not known."""
    try:
        return Quarantine.of(plan, paths).read(), ""
    except (StorageError, OSError) as error:
        return None, str(error)
