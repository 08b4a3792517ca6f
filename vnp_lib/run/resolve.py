"""Resolve settings to concrete values: layout, token budget, dtype."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from vnp_lib.config import EmbedConfig
from vnp_lib.dataset import stored_dtype
from vnp_lib.devices import device_type, resolve_dtype, torch_device_name
from vnp_lib.errors import ConfigError
from vnp_lib.inputs import InputPolicy
from vnp_lib.plan import (
    ModelIdentity,
    OutputKind,
    RowLayout,
    RunPaths,
    RunPlan,
    StoreDtype,
    check_free_space,
    choose_outputs,
    kept_store_dtype,
    kept_token_budget,
    make_plan,
)
from vnp_lib.software import NUMERICS_VERSION, exact_software

if TYPE_CHECKING:  # torch takes seconds to import: what a command line gets wrong is said before
    from vnp_lib.model import Weights


def plan_run(
    config: EmbedConfig, paths: RunPaths, devices: tuple[str, ...], weights: Weights
) -> RunPlan:
    from vnp_lib.model import check_heads

    layout = layout_from_config(config)
    num_shards = config.shards or len(devices)
    token_budget = planned_token_budget(config, devices)
    plan = make_plan(
        paths,
        config.fasta,
        ModelIdentity(
            model=config.model,
            weights_digest=weights.digest,
            layer=max(layout.layers, default=weights.architecture.num_layers),
            pooling=",".join(dict.fromkeys(output.kind.value for output in layout.outputs)),
            long_policy=layout.long_policy,
            **layout.identity(),
            contact_regression=check_heads(weights, layout.heads),
            dtype=resolve_dtype(config.dtype, devices[0]),
            division=f"{num_shards} shards, {token_budget} tokens a batch, {exact_software_of(devices, executor=config.executor)}"
            if config.deterministic
            else None,
            numerics=None if NUMERICS_VERSION == 1 else NUMERICS_VERSION,
        ),
        num_shards=num_shards,
        token_budget=token_budget,
        policy=InputPolicy.of(config),
        store_dtype=_planned_store_dtype(config, paths),
    )
    check_free_space(paths, plan, layout)
    return plan


def exact_software_of(devices: Sequence[str], *, executor: str) -> str:
    """Name what decides the last bits. A work pool's GPUs are not among it: the machine that opens the run does not see them."""
    import torch

    seen = [device for device in devices if device == "cpu" or executor == "local"]
    return exact_software(torch.device(torch_device_name(device)) for device in seen)


def layout_from_config(config: EmbedConfig) -> RowLayout:
    """Say what a row of a run is.

    Raises:
        ConfigError: The model has no such layer, or what is asked for of long sequences cannot be.
    """
    from vnp_lib.model import architecture_of  # imports torch, which takes seconds

    architecture = architecture_of(config.model)
    outputs = choose_outputs(
        set(map(OutputKind, config.include)), config.repr_layers, num_layers=architecture.num_layers
    )
    return RowLayout(outputs, architecture.embed_dim, _long_policy(config))


def _long_policy(config: EmbedConfig) -> str:
    if config.long not in ("window", "virnucpro"):
        return "whole"  # or the input's affair
    if set(config.include) != {"mean"}:
        raise ConfigError(
            f"--long {config.long} says how a mean is taken: it goes with --include mean alone"
        )
    if config.long == "virnucpro":
        return config.long
    assert config.max_length is not None
    overlap = config.max_length // 4 if config.window_overlap is None else config.window_overlap
    if overlap >= config.max_length:
        raise ConfigError(
            f"--window-overlap {overlap}: windows of {config.max_length} residues overlap by less than that"
        )
    return f"window:{config.max_length}:{overlap}"


def _planned_store_dtype(config: EmbedConfig, paths: RunPaths) -> StoreDtype:
    """Say how the dataset's values are stored; if the user says nothing, as they were to be when the run was begun.

    Raises:
        ConfigError: The dataset is there in another precision, and the checkpoints to make it anew are not.
    """
    kept = kept_store_dtype(paths)
    asked = (
        StoreDtype(config.store_dtype)
        if config.store_dtype is not None
        else kept or StoreDtype.FLOAT32
    )
    stored = stored_dtype(paths.embeddings_dir)
    if stored not in (None, asked) and not any(paths.checkpoints_dir.glob("shard_*/batch_*.pt")):
        raise ConfigError(
            f"--store-dtype {asked}: the dataset in {paths.embeddings_dir} is in {stored}, and the checkpoints to put it together "
            f"anew are gone; start the run with --store-dtype {stored}, or compute all of it again, in another output directory or "
            f"with --force-restart"
        )
    return asked


def planned_token_budget(config: EmbedConfig, devices: tuple[str, ...]) -> int:
    """Say how many tokens a forward pass of a run has at most.

    On GPUs, and if the user says nothing, it stays what the run was begun with: memory that is free differs from one day to
    the next, and its batches, which `--deterministic` holds a run to, are not to. Else it is what suits the devices.

    Raises:
        ConfigError: The model does not fit into a GPU.
    """
    if config.token_budget is not None:
        return config.token_budget
    import torch

    from vnp_lib.inference import TOKENS_UNSEEN, choose_token_budget

    if device_type(devices[0]) != "cpu":
        if (kept := kept_token_budget(RunPaths(config.output_dir))) is not None:
            return kept
        if config.executor != "local":
            return TOKENS_UNSEEN

    dtype = getattr(torch, resolve_dtype(config.dtype, devices[0]))
    return choose_token_budget(config.model, dtype, devices, layout_from_config(config))
