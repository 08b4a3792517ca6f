"""Checkpoint files, the manifest of a run and its quarantine: what survives a crash."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vnp_lib.lazy import lazy_face

if TYPE_CHECKING:
    from vnp_lib.checkpoint.file import (
        Checkpoint,
        load_checkpoint,
    )
    from vnp_lib.checkpoint.manifest import (
        CheckpointManifest,
        CommittedCheckpoint,
        ShardRecord,
        ShardStatus,
        is_of_run,
    )
    from vnp_lib.checkpoint.markers import CheckpointRecord, move_to_damaged
    from vnp_lib.checkpoint.quarantine import (
        Quarantine,
        QuarantinedSequence,
        sequence_digest,
        too_many_non_finite,
    )
    from vnp_lib.checkpoint.resume import resume_from_checkpoints, validate_checkpoint_pt
    from vnp_lib.checkpoint.survey import (
        LOOKUP_DELAYS_S,
        CommittedRows,
        Damage,
        Survey,
        heal_shard,
        refresh_listings,
        survey_checkpoints,
        wait_for_listed_files,
    )
    from vnp_lib.checkpoint.writer import (
        DEFAULT_SEQ_THRESHOLD,
        DEFAULT_TIME_THRESHOLD_S,
        AsyncCheckpointWriter,
        CheckpointTrigger,
    )

__all__ = [
    "DEFAULT_SEQ_THRESHOLD",
    "DEFAULT_TIME_THRESHOLD_S",
    "LOOKUP_DELAYS_S",
    "AsyncCheckpointWriter",
    "Checkpoint",
    "CheckpointManifest",
    "CheckpointRecord",
    "CheckpointTrigger",
    "CommittedCheckpoint",
    "CommittedRows",
    "Damage",
    "Quarantine",
    "QuarantinedSequence",
    "ShardRecord",
    "ShardStatus",
    "Survey",
    "heal_shard",
    "is_of_run",
    "load_checkpoint",
    "move_to_damaged",
    "refresh_listings",
    "resume_from_checkpoints",
    "sequence_digest",
    "survey_checkpoints",
    "too_many_non_finite",
    "validate_checkpoint_pt",
    "wait_for_listed_files",
]

__getattr__, __dir__ = lazy_face(
    __name__,
    {
        "AsyncCheckpointWriter": "vnp_lib.checkpoint.writer",
        "Checkpoint": "vnp_lib.checkpoint.file",
        "CheckpointManifest": "vnp_lib.checkpoint.manifest",
        "CheckpointRecord": "vnp_lib.checkpoint.markers",
        "CheckpointTrigger": "vnp_lib.checkpoint.writer",
        "CommittedCheckpoint": "vnp_lib.checkpoint.manifest",
        "CommittedRows": "vnp_lib.checkpoint.survey",
        "DEFAULT_SEQ_THRESHOLD": "vnp_lib.checkpoint.writer",
        "DEFAULT_TIME_THRESHOLD_S": "vnp_lib.checkpoint.writer",
        "Damage": "vnp_lib.checkpoint.survey",
        "LOOKUP_DELAYS_S": "vnp_lib.checkpoint.survey",
        "Quarantine": "vnp_lib.checkpoint.quarantine",
        "QuarantinedSequence": "vnp_lib.checkpoint.quarantine",
        "ShardRecord": "vnp_lib.checkpoint.manifest",
        "ShardStatus": "vnp_lib.checkpoint.manifest",
        "Survey": "vnp_lib.checkpoint.survey",
        "too_many_non_finite": "vnp_lib.checkpoint.quarantine",
        "heal_shard": "vnp_lib.checkpoint.survey",
        "is_of_run": "vnp_lib.checkpoint.manifest",
        "load_checkpoint": "vnp_lib.checkpoint.file",
        "refresh_listings": "vnp_lib.checkpoint.survey",
        "resume_from_checkpoints": "vnp_lib.checkpoint.resume",
        "sequence_digest": "vnp_lib.checkpoint.quarantine",
        "move_to_damaged": "vnp_lib.checkpoint.markers",
        "survey_checkpoints": "vnp_lib.checkpoint.survey",
        "validate_checkpoint_pt": "vnp_lib.checkpoint.resume",
        "wait_for_listed_files": "vnp_lib.checkpoint.survey",
    },
    modules=("torch",),
)
