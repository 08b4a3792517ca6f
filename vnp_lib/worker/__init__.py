"""One attempt on one shard in a worker process: start it, watch it, retry it."""

from __future__ import annotations

from vnp_lib.worker.attempt import ShardAttempt, StopFlag
from vnp_lib.worker.heartbeat import HeartbeatWatch, send_heartbeats
from vnp_lib.worker.recovery import handle_failure
from vnp_lib.worker.retry import RetryDecision, RetryPolicy
from vnp_lib.worker.stop_signals import Request, StopRequests
from vnp_lib.worker.supervisor import has_workers, kill_workers, run_worker

__all__ = [
    "HeartbeatWatch",
    "Request",
    "RetryDecision",
    "RetryPolicy",
    "ShardAttempt",
    "StopFlag",
    "StopRequests",
    "handle_failure",
    "has_workers",
    "kill_workers",
    "run_worker",
    "send_heartbeats",
]
