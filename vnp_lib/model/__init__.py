"""The ESM-2 model: weights, tokens, layers, attention, heads and pooling."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vnp_lib.lazy import lazy_face

if TYPE_CHECKING:
    from vnp_lib.model.esm2 import ESM2, MODELS, Architecture, architecture_of
    from vnp_lib.model.foreign import representations_of
    from vnp_lib.model.heads import MAP_VALUES, check_heads, with_heads
    from vnp_lib.model.pooling import mean_pool, rows_of, split_rows
    from vnp_lib.model.reference import fair_esm_network
    from vnp_lib.model.tokens import RESIDUES, PackedBatch, pack_batch
    from vnp_lib.model.weights import (
        Weights,
        inspect_weights,
        is_official,
        load_model,
        model_of,
        parameters_of,
        published_path,
        resolve_weights,
    )
    from vnp_lib.model.windows import join_windows, long_mean_of

__all__ = [
    "ESM2",
    "MAP_VALUES",
    "MODELS",
    "RESIDUES",
    "Architecture",
    "PackedBatch",
    "Weights",
    "architecture_of",
    "check_heads",
    "fair_esm_network",
    "inspect_weights",
    "is_official",
    "join_windows",
    "load_model",
    "long_mean_of",
    "mean_pool",
    "model_of",
    "pack_batch",
    "parameters_of",
    "published_path",
    "representations_of",
    "resolve_weights",
    "rows_of",
    "split_rows",
    "with_heads",
]

__getattr__, __dir__ = lazy_face(
    __name__,
    {
        "Architecture": "vnp_lib.model.esm2",
        "ESM2": "vnp_lib.model.esm2",
        "MAP_VALUES": "vnp_lib.model.heads",
        "MODELS": "vnp_lib.model.esm2",
        "PackedBatch": "vnp_lib.model.tokens",
        "RESIDUES": "vnp_lib.model.tokens",
        "Weights": "vnp_lib.model.weights",
        "architecture_of": "vnp_lib.model.esm2",
        "check_heads": "vnp_lib.model.heads",
        "fair_esm_network": "vnp_lib.model.reference",
        "is_official": "vnp_lib.model.weights",
        "join_windows": "vnp_lib.model.windows",
        "load_model": "vnp_lib.model.weights",
        "long_mean_of": "vnp_lib.model.windows",
        "inspect_weights": "vnp_lib.model.weights",
        "mean_pool": "vnp_lib.model.pooling",
        "model_of": "vnp_lib.model.weights",
        "pack_batch": "vnp_lib.model.tokens",
        "parameters_of": "vnp_lib.model.weights",
        "published_path": "vnp_lib.model.weights",
        "representations_of": "vnp_lib.model.foreign",
        "resolve_weights": "vnp_lib.model.weights",
        "rows_of": "vnp_lib.model.pooling",
        "split_rows": "vnp_lib.model.pooling",
        "with_heads": "vnp_lib.model.heads",
    },
)
