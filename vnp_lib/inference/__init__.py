"""Inference of one model on one device: from packed batches to rows and checkpoints."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vnp_lib.lazy import lazy_face

if TYPE_CHECKING:
    from vnp_lib.inference.runner import AsyncInferenceRunner, InferenceResult

__all__ = ["AsyncInferenceRunner", "InferenceResult"]

__getattr__, __dir__ = lazy_face(
    __name__,
    {
        "AsyncInferenceRunner": "vnp_lib.inference.runner",
        "InferenceResult": "vnp_lib.inference.runner",
    },
)
