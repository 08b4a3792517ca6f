"""A run directory: open it, resolve settings, find the work left, record and assemble."""

from __future__ import annotations

from vnp_lib.run.assembly import DatasetSummary, assemble
from vnp_lib.run.directory import (
    attach_run,
    check_model,
    nearest_existing,
    open_run,
    validate_config,
)
from vnp_lib.run.events import (
    AttemptDone,
    AttemptFailed,
    AttemptStarted,
    AttemptStopped,
    BatchComputed,
    BatchStarted,
    CheckpointSaved,
    DeviceProbing,
    Event,
    EventReader,
    EventStream,
    ExactRowComputed,
    LayerStarted,
    LogMessage,
    ModelLoaded,
    ModelLoading,
    SavingStarted,
    SequenceQuarantined,
    TokenBudgetChanged,
    UnknownEvent,
    WaitingForShard,
    WorkerEvent,
)
from vnp_lib.run.history import Attempt, AttemptHistory, CheckpointEntry, Ending, read_attempts
from vnp_lib.run.job import ShardJob
from vnp_lib.run.metrics import Histogram, RunMetrics
from vnp_lib.run.record import RunRecord
from vnp_lib.run.resolve import layout_from_config, planned_token_budget
from vnp_lib.run.resume import Coverage, PendingWork, ShardProgress, find_pending_work
from vnp_lib.run.run import RANDOM_WEIGHTS, Run
from vnp_lib.run.validation import failure_reason, read_checkpoints

__all__ = [
    "RANDOM_WEIGHTS",
    "Attempt",
    "AttemptDone",
    "AttemptFailed",
    "AttemptHistory",
    "AttemptStarted",
    "AttemptStopped",
    "BatchComputed",
    "BatchStarted",
    "CheckpointEntry",
    "CheckpointSaved",
    "Coverage",
    "DatasetSummary",
    "DeviceProbing",
    "Ending",
    "Event",
    "EventReader",
    "EventStream",
    "ExactRowComputed",
    "Histogram",
    "LayerStarted",
    "LogMessage",
    "ModelLoaded",
    "ModelLoading",
    "PendingWork",
    "Run",
    "RunMetrics",
    "RunRecord",
    "SavingStarted",
    "SequenceQuarantined",
    "ShardJob",
    "ShardProgress",
    "TokenBudgetChanged",
    "UnknownEvent",
    "WaitingForShard",
    "WorkerEvent",
    "assemble",
    "attach_run",
    "check_model",
    "failure_reason",
    "find_pending_work",
    "layout_from_config",
    "nearest_existing",
    "open_run",
    "planned_token_budget",
    "read_attempts",
    "read_checkpoints",
    "validate_config",
]
