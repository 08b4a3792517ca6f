"""A run directory: open it, resolve its settings, find the work left, record attempts, assemble the dataset."""

from __future__ import annotations

from vnp_lib.run.assembly import DatasetSummary, assemble
from vnp_lib.run.directory import attach_run, check_model, open_run, validate_config
from vnp_lib.run.events import Event, EventReader, EventStream
from vnp_lib.run.history import Attempt, AttemptHistory, CheckpointEntry, Ending, read_attempts
from vnp_lib.run.job import ShardJob
from vnp_lib.run.metrics import Histogram, RunMetrics
from vnp_lib.run.record import RunRecord
from vnp_lib.run.resolve import CPU_TOKEN_BUDGET, layout_from_config, planned_token_budget
from vnp_lib.run.resume import (
    PendingWork,
    failure_reason,
    find_pending_work,
    read_checkpoints,
    with_copies,
)
from vnp_lib.run.run import RANDOM_WEIGHTS, Run, ShardProgress

__all__ = [
    "CPU_TOKEN_BUDGET",
    "RANDOM_WEIGHTS",
    "Attempt",
    "AttemptHistory",
    "CheckpointEntry",
    "DatasetSummary",
    "Ending",
    "Event",
    "EventReader",
    "EventStream",
    "Histogram",
    "PendingWork",
    "Run",
    "RunMetrics",
    "RunRecord",
    "ShardJob",
    "ShardProgress",
    "assemble",
    "attach_run",
    "check_model",
    "failure_reason",
    "find_pending_work",
    "layout_from_config",
    "open_run",
    "planned_token_budget",
    "read_attempts",
    "read_checkpoints",
    "validate_config",
    "with_copies",
]
