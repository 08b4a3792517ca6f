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

if TYPE_CHECKING:
    from vnp_lib.model import Weights


def plan_run(
    config: EmbedConfig, paths: RunPaths, devices: tuple[str, ...], weights: Weights
) -> RunPlan:
    from vnp_lib.model import check_heads

    layout = layout_from_config(config)
    num_shards = config.shards or len(devices)
    token_budget = planned_token_budget(config, devices)
    division = None
    if config.deterministic:
        software = exact_software_of(devices, executor=config.executor)
        division = f"{num_shards} shards, {token_budget} tokens a batch, {software}"
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
            division=division,
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
    """Name the software and devices that decide the last bits of an embedding.

    The GPUs of a work pool are left out: the machine that opens the run does not see them.
    """
    import torch

    seen = [device for device in devices if device == "cpu" or executor == "local"]
    return exact_software(torch.device(torch_device_name(device)) for device in seen)


def layout_from_config(config: EmbedConfig) -> RowLayout:
    """Return the layout of a run's rows.

    Raises:
        ConfigError: The model has no such layer, or the policy for long sequences does not fit.
    """
    # The face of `model` imports torch, which takes seconds.
    from vnp_lib.model import architecture_of

    architecture = architecture_of(config.model)
    outputs = choose_outputs(
        set(map(OutputKind, config.include)), config.repr_layers, num_layers=architecture.num_layers
    )
    return RowLayout(outputs, architecture.embed_dim, _long_policy(config))


def _long_policy(config: EmbedConfig) -> str:
    if config.long not in ("window", "virnucpro"):
        # Other policies are applied to the input.
        return "whole"
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
            f"--window-overlap {overlap}: "
            f"windows of {config.max_length} residues overlap by less than that"
        )
    return f"window:{config.max_length}:{overlap}"


def _planned_store_dtype(config: EmbedConfig, paths: RunPaths) -> StoreDtype:
    """Return the dtype of the dataset; by default, the one with which the run was begun.

    Raises:
        ConfigError: The dataset has another dtype, and the checkpoints to rebuild it are gone.
    """
    kept = kept_store_dtype(paths)
    requested = (
        StoreDtype(config.store_dtype)
        if config.store_dtype is not None
        else kept or StoreDtype.FLOAT32
    )
    stored = stored_dtype(paths.embeddings_dir)
    if stored not in (None, requested) and not any(
        paths.checkpoints_dir.glob("shard_*/batch_*.pt")
    ):
        raise ConfigError(
            f"--store-dtype {requested}: the dataset in {paths.embeddings_dir} is in {stored}, and "
            f"the checkpoints to rebuild it are gone; start the run with --store-dtype {stored}, "
            f"or compute all of it again, in another output directory or with --force-restart"
        )
    return requested


def planned_token_budget(config: EmbedConfig, devices: tuple[str, ...]) -> int:
    """Return the most tokens of a forward pass.

    On GPUs it stays by default what the run was begun with: free memory differs from day to day,
    but the batches, which `--deterministic` depends on, must not. Otherwise it suits the devices.

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
