"""Decide what a run computes: its outputs, sequences, windows, shards and batches."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vnp_lib.lazy import lazy_face

if TYPE_CHECKING:
    from vnp_lib.plan.outputs import (
        MEAN_OF_LAST_LAYER,
        NUM_LOGITS,
        Output,
        OutputKind,
        RowLayout,
        StoreDtype,
        Values,
        as_stored,
        choose_outputs,
        offsets_of,
    )
    from vnp_lib.plan.packing import NUM_SPECIAL_TOKENS, pack, packed_tokens, split_batches
    from vnp_lib.plan.paths import RunPaths, checkpoint_path
    from vnp_lib.plan.plan import (
        ROW_OVERHEAD_BYTES,
        ModelIdentity,
        Ordinals,
        RunPlan,
        describe_input,
        load_plan,
        longest_first,
        model_tokens,
        required_bytes,
    )
    from vnp_lib.plan.planner import (
        check_free_space,
        is_input_gone,
        kept_store_dtype,
        kept_token_budget,
        make_plan,
    )
    from vnp_lib.plan.scan import InputScan, no_sequences_error
    from vnp_lib.plan.windows import VIRNUCPRO_RESIDUES, Windows

__all__ = [
    "MEAN_OF_LAST_LAYER",
    "NUM_LOGITS",
    "NUM_SPECIAL_TOKENS",
    "ROW_OVERHEAD_BYTES",
    "VIRNUCPRO_RESIDUES",
    "InputScan",
    "ModelIdentity",
    "Ordinals",
    "Output",
    "OutputKind",
    "RowLayout",
    "RunPaths",
    "RunPlan",
    "StoreDtype",
    "Values",
    "Windows",
    "as_stored",
    "check_free_space",
    "checkpoint_path",
    "choose_outputs",
    "describe_input",
    "is_input_gone",
    "kept_store_dtype",
    "kept_token_budget",
    "load_plan",
    "longest_first",
    "make_plan",
    "model_tokens",
    "no_sequences_error",
    "offsets_of",
    "pack",
    "packed_tokens",
    "required_bytes",
    "split_batches",
]

__getattr__, __dir__ = lazy_face(
    __name__,
    {
        "MEAN_OF_LAST_LAYER": "vnp_lib.plan.outputs",
        "ModelIdentity": "vnp_lib.plan.plan",
        "NUM_LOGITS": "vnp_lib.plan.outputs",
        "NUM_SPECIAL_TOKENS": "vnp_lib.plan.packing",
        "Ordinals": "vnp_lib.plan.plan",
        "Output": "vnp_lib.plan.outputs",
        "OutputKind": "vnp_lib.plan.outputs",
        "ROW_OVERHEAD_BYTES": "vnp_lib.plan.plan",
        "RowLayout": "vnp_lib.plan.outputs",
        "RunPaths": "vnp_lib.plan.paths",
        "RunPlan": "vnp_lib.plan.plan",
        "StoreDtype": "vnp_lib.plan.outputs",
        "InputScan": "vnp_lib.plan.scan",
        "VIRNUCPRO_RESIDUES": "vnp_lib.plan.windows",
        "Values": "vnp_lib.plan.outputs",
        "Windows": "vnp_lib.plan.windows",
        "as_stored": "vnp_lib.plan.outputs",
        "check_free_space": "vnp_lib.plan.planner",
        "checkpoint_path": "vnp_lib.plan.paths",
        "choose_outputs": "vnp_lib.plan.outputs",
        "describe_input": "vnp_lib.plan.plan",
        "is_input_gone": "vnp_lib.plan.planner",
        "kept_store_dtype": "vnp_lib.plan.planner",
        "kept_token_budget": "vnp_lib.plan.planner",
        "load_plan": "vnp_lib.plan.plan",
        "longest_first": "vnp_lib.plan.plan",
        "make_plan": "vnp_lib.plan.planner",
        "model_tokens": "vnp_lib.plan.plan",
        "no_sequences_error": "vnp_lib.plan.scan",
        "offsets_of": "vnp_lib.plan.outputs",
        "pack": "vnp_lib.plan.packing",
        "packed_tokens": "vnp_lib.plan.packing",
        "required_bytes": "vnp_lib.plan.plan",
        "split_batches": "vnp_lib.plan.packing",
    },
)
