"""What a run would be, is and was: estimate, status, report, verification, metrics."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vnp_lib.lazy import lazy_face

if TYPE_CHECKING:
    from vnp_lib.report.estimate import RunEstimate, estimate_run, render_estimate
    from vnp_lib.report.html import write_report
    from vnp_lib.report.progress import RunProgress
    from vnp_lib.report.prometheus import serving, validate_metrics_port
    from vnp_lib.report.status import (
        RunStatus,
        ShardRow,
        load_plan_of,
        open_status,
        read_status,
        render_status,
        watch,
    )
    from vnp_lib.report.verify import verify_run
    from vnp_lib.report.verify_model import ModelReport, compare_with_fair_esm, render_model_report

__all__ = [
    "ModelReport",
    "RunEstimate",
    "RunProgress",
    "RunStatus",
    "ShardRow",
    "compare_with_fair_esm",
    "estimate_run",
    "load_plan_of",
    "open_status",
    "read_status",
    "render_estimate",
    "render_model_report",
    "render_status",
    "serving",
    "validate_metrics_port",
    "verify_run",
    "watch",
    "write_report",
]

__getattr__, __dir__ = lazy_face(
    __name__,
    {
        "ModelReport": "vnp_lib.report.verify_model",
        "RunEstimate": "vnp_lib.report.estimate",
        "RunProgress": "vnp_lib.report.progress",
        "RunStatus": "vnp_lib.report.status",
        "ShardRow": "vnp_lib.report.status",
        "compare_with_fair_esm": "vnp_lib.report.verify_model",
        "estimate_run": "vnp_lib.report.estimate",
        "load_plan_of": "vnp_lib.report.status",
        "open_status": "vnp_lib.report.status",
        "read_status": "vnp_lib.report.status",
        "render_estimate": "vnp_lib.report.estimate",
        "render_model_report": "vnp_lib.report.verify_model",
        "render_status": "vnp_lib.report.status",
        "serving": "vnp_lib.report.prometheus",
        "validate_metrics_port": "vnp_lib.report.prometheus",
        "verify_run": "vnp_lib.report.verify",
        "watch": "vnp_lib.report.status",
        "write_report": "vnp_lib.report.html",
    },
)
