"""One attempt on one shard in a worker process: start it, watch it, retry it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vnp_lib.lazy import lazy_face

if TYPE_CHECKING:
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

__getattr__, __dir__ = lazy_face(
    __name__,
    {
        "HeartbeatWatch": "vnp_lib.worker.heartbeat",
        "Request": "vnp_lib.worker.stop_signals",
        "RetryDecision": "vnp_lib.worker.retry",
        "RetryPolicy": "vnp_lib.worker.retry",
        "ShardAttempt": "vnp_lib.worker.attempt",
        "StopFlag": "vnp_lib.worker.attempt",
        "StopRequests": "vnp_lib.worker.stop_signals",
        "handle_failure": "vnp_lib.worker.recovery",
        "has_workers": "vnp_lib.worker.supervisor",
        "kill_workers": "vnp_lib.worker.supervisor",
        "run_worker": "vnp_lib.worker.supervisor",
        "send_heartbeats": "vnp_lib.worker.heartbeat",
    },
)
