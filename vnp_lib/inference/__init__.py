"""Inference of one model on one device: from packed batches to rows and checkpoints."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vnp_lib.lazy import lazy_face

if TYPE_CHECKING:
    from vnp_lib.inference.batches import divide_into_batches, pack_batches, read_batches
    from vnp_lib.inference.callbacks import Callbacks
    from vnp_lib.inference.executor import ExactModel, PackedModel, embed_batch
    from vnp_lib.inference.gpu_memory import TOKENS_UNSEEN, choose_token_budget
    from vnp_lib.inference.precision import (
        LEAST_COSINE,
        Certificate,
        Comparison,
        ExactRows,
        from_metadata,
        sampled_ordinals,
    )
    from vnp_lib.inference.runner import AsyncInferenceRunner, InferenceOptions, InferenceResult
    from vnp_lib.inference.token_budget import TokenBudget

__all__ = [
    "LEAST_COSINE",
    "TOKENS_UNSEEN",
    "AsyncInferenceRunner",
    "Callbacks",
    "Certificate",
    "Comparison",
    "ExactModel",
    "ExactRows",
    "InferenceOptions",
    "InferenceResult",
    "PackedModel",
    "TokenBudget",
    "choose_token_budget",
    "divide_into_batches",
    "embed_batch",
    "from_metadata",
    "pack_batches",
    "read_batches",
    "sampled_ordinals",
]

__getattr__, __dir__ = lazy_face(
    __name__,
    {
        "AsyncInferenceRunner": "vnp_lib.inference.runner",
        "Certificate": "vnp_lib.inference.precision",
        "Comparison": "vnp_lib.inference.precision",
        "ExactModel": "vnp_lib.inference.executor",
        "ExactRows": "vnp_lib.inference.precision",
        "InferenceOptions": "vnp_lib.inference.runner",
        "InferenceResult": "vnp_lib.inference.runner",
        "LEAST_COSINE": "vnp_lib.inference.precision",
        "Callbacks": "vnp_lib.inference.callbacks",
        "PackedModel": "vnp_lib.inference.executor",
        "TOKENS_UNSEEN": "vnp_lib.inference.gpu_memory",
        "TokenBudget": "vnp_lib.inference.token_budget",
        "choose_token_budget": "vnp_lib.inference.gpu_memory",
        "divide_into_batches": "vnp_lib.inference.batches",
        "embed_batch": "vnp_lib.inference.executor",
        "from_metadata": "vnp_lib.inference.precision",
        "pack_batches": "vnp_lib.inference.batches",
        "read_batches": "vnp_lib.inference.batches",
        "sampled_ordinals": "vnp_lib.inference.precision",
    },
)
