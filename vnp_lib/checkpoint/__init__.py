"""What survives a crash: checkpoint files, the manifest of a run, and its quarantine."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vnp_lib.lazy import lazy_face

if TYPE_CHECKING:
    from vnp_lib.checkpoint.manifest import CheckpointManifest
    from vnp_lib.checkpoint.resume import resume_from_checkpoints, validate_checkpoint_pt
    from vnp_lib.checkpoint.writer import AsyncCheckpointWriter, CheckpointTrigger

__all__ = [
    "AsyncCheckpointWriter",
    "CheckpointManifest",
    "CheckpointTrigger",
    "resume_from_checkpoints",
    "validate_checkpoint_pt",
]

__getattr__, __dir__ = lazy_face(
    __name__,
    {
        "AsyncCheckpointWriter": "vnp_lib.checkpoint.writer",
        "CheckpointManifest": "vnp_lib.checkpoint.manifest",
        "CheckpointTrigger": "vnp_lib.checkpoint.writer",
        "resume_from_checkpoints": "vnp_lib.checkpoint.resume",
        "torch": "",  # users patch `vnp_lib.checkpoint.torch.save`
        "validate_checkpoint_pt": "vnp_lib.checkpoint.resume",
    },
)
