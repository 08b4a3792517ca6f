"""One attempt on one shard in a worker process: start it, watch it, retry it."""

from __future__ import annotations

from vnp_lib.worker.attempt import ShardAttempt, StopFlag
from vnp_lib.worker.heartbeat import HeartbeatWatch, beating
from vnp_lib.worker.recovery import judge
from vnp_lib.worker.retry import RetryDecision, RetryPolicy
from vnp_lib.worker.stop_signals import Request, StopRequests
from vnp_lib.worker.supervisor import has_children, kill_children, run_child

__all__ = [
    "HeartbeatWatch",
    "Request",
    "RetryDecision",
    "RetryPolicy",
    "ShardAttempt",
    "StopFlag",
    "StopRequests",
    "beating",
    "has_children",
    "judge",
    "kill_children",
    "run_child",
]
