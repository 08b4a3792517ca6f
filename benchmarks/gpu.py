"""Compare the speed on one GPU with its peak, fair-esm and transformers.

Run it with `python -m benchmarks.gpu`. It needs torch, numpy, fair-esm and this directory with
vnp_lib, and transformers for that comparison. Parameters are random, proteins drawn. Tokens are on
the CPU when the clock starts, and rows are when it stops. `--device cpu
--models esm2_t6_8M_UR50D --smoke` shows that it works.
"""

from __future__ import annotations

import argparse
import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.engines import Engine, FairEsm, InBatches, Ours, Transformers
from benchmarks.hardware import cpu_name, describe_machine, results_path, timed
from benchmarks.networks import fair_esm_network, our_network, transformers_network
from benchmarks.results import gpu_table, markdown_table, write_json
from benchmarks.workload import STOCK_TOKENS, forward_flops, log_normal_mix, num_tokens
from vnp_lib.model.esm2 import MODELS, Architecture
from vnp_lib.model.weights import random_tensors

State = Mapping[str, Tensor]

LEAST_COSINE = 0.99  # compared with our float32
PROFILED_BUDGET = 16_384  # default of a run for 3B
FAIR_ESM = "fair-esm float32"
_MOST_PROFILED = 15


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """A network on the device, and its engines by the tokens of a padded or packed batch."""

    name: str
    gemm_dtype: torch.dtype  # whose matrix products are the ceiling
    build: Callable[[Architecture, State, torch.device], nn.Module]
    engine: Callable[[nn.Module, torch.device, int], Engine]
    budgets: tuple[int, ...]


def variants(dtypes: Sequence[torch.dtype], budgets: tuple[int, ...]) -> Iterator[Variant]:
    """Return fair-esm and transformers with small and large batches; ours with all budgets."""
    yield from _peers(dtypes, (STOCK_TOKENS, *budgets[:2]))
    yield from _ours(dtypes, budgets)


def gemm_tflops(dtype: torch.dtype, device: torch.device, *, size: int, repeats: int) -> float:
    """Measure dense square matrix products, long enough to reach the card's power limit."""
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))

    def multiply() -> None:
        for _ in range(repeats):
            a @ b
        _synchronize(device)

    multiply()
    return 2 * size**3 * repeats / timed(multiply)[0] / 1e12


def measure_variant(
    variant: Variant,
    model: str,
    state: State,
    sequences: Sequence[str],
    exact: Tensor,
    given: argparse.Namespace,
) -> Iterator[dict[str, Any]]:
    """Measure one record per token budget. A failure is a record too, and the others continue."""
    architecture, device = MODELS[model], torch.device(given.device)
    about = {"model": model, "variant": variant.name}
    try:
        network = variant.build(architecture, state, device)
    except (ImportError, RuntimeError) as error:
        yield about | {
            "token_budget": 0,
            "failed": f"{type(error).__name__}: {str(error).splitlines()[0]}",
        }
        return
    for budget in variant.budgets:
        engine = variant.engine(network, device, budget)
        try:
            yield (
                about
                | {"token_budget": budget}
                | _measure(variant, engine, architecture, sequences, exact, given)
            )
        except RuntimeError as error:  # out of memory is one
            yield about | {
                "token_budget": budget,
                "failed": f"{type(error).__name__}: {str(error).splitlines()[0][:60]}",
            }
        del engine
        _free(device)


def _peers(dtypes: Sequence[torch.dtype], budgets: tuple[int, ...]) -> Iterator[Variant]:
    for name, autocast, gemm_dtype in (
        (FAIR_ESM, None, torch.float32),
        ("fair-esm autocast bfloat16", torch.bfloat16, torch.bfloat16),
    ):
        yield Variant(
            name=name,
            gemm_dtype=gemm_dtype,
            build=lambda architecture, state, device: fair_esm_network(
                architecture, state, device=device
            ),
            engine=lambda network, device, budget, autocast=autocast: InBatches(
                FairEsm(network, device=device, autocast=autocast), budget
            ),
            budgets=budgets,
        )
    if torch.float16 in dtypes:
        yield Variant(
            name="fair-esm half()",
            gemm_dtype=torch.float16,
            build=lambda architecture, state, device: fair_esm_network(
                architecture, state, device=device
            ).half(),
            engine=lambda network, device, budget: InBatches(
                FairEsm(network, device=device), budget
            ),
            budgets=budgets,
        )
    yield Variant(
        name="transformers SDPA bfloat16",
        gemm_dtype=torch.bfloat16,
        build=lambda architecture, state, device: _with_parameters_in(
            transformers_network(architecture, state, device=device), torch.bfloat16
        ),
        engine=lambda network, device, budget: InBatches(
            Transformers(network, device=device), budget
        ),
        budgets=budgets,
    )


def _ours(dtypes: Sequence[torch.dtype], budgets: tuple[int, ...]) -> Iterator[Variant]:
    for dtype in dtypes:
        yield Variant(
            name=f"ours {_name(dtype)}",
            gemm_dtype=dtype,
            build=lambda architecture, state, device, dtype=dtype: our_network(
                architecture, state, dtype=dtype, device=device
            ),
            engine=lambda network, device, budget: Ours(
                network, token_budget=budget, device=device
            ),
            budgets=budgets,
        )
    yield Variant(
        name=f"ours {_name(dtypes[0])}, compiled",
        gemm_dtype=dtypes[0],
        build=lambda architecture, state, device: _compiled(
            our_network(architecture, state, dtype=dtypes[0], device=device)
        ),
        engine=lambda network, device, budget: Ours(network, token_budget=budget, device=device),
        budgets=budgets,
    )


def _measure(
    variant: Variant,
    engine: Engine,
    architecture: Architecture,
    sequences: Sequence[str],
    exact: Tensor,
    given: argparse.Namespace,
) -> dict[str, Any]:
    device = torch.device(given.device)
    gemm = gemm_tflops(variant.gemm_dtype, device, size=given.gemm_size, repeats=given.gemm_repeats)
    prepared = engine.prepare(sequences)
    is_gpu = device.type == "cuda"
    _synchronize(device)
    if is_gpu:
        torch.cuda.reset_peak_memory_stats(device)
    rows = engine.embed(prepared)  # warms up, too
    cosine = float(torch.nn.functional.cosine_similarity(rows[: len(exact)], exact).min())
    if not cosine >= LEAST_COSINE:
        return {"failed": f"least cosine {cosine:.4f}: other work"}
    return {
        "proteins": len(sequences),
        "tokens": num_tokens(sequences),
        "flops": forward_flops(architecture, sequences),
        "seconds": [timed(engine.embed, prepared)[0] for _ in range(given.rounds)],
        "gemm_tflops": gemm,
        "least_cosine": cosine,
        "peak_gib": torch.cuda.max_memory_allocated(device) / 2**30 if is_gpu else None,
    }


def measure_model(model: str, given: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Measure all variants of a model, one network at a time, compared with our float32."""
    device = torch.device(given.device)
    state = dict(random_tensors(MODELS[model]))
    sequences = _drawn(given.tokens)
    dtypes = [getattr(torch, name) for name in given.dtypes]
    exact_network = our_network(MODELS[model], state, dtype=torch.float32, device=device)
    exactly = Ours(exact_network, token_budget=STOCK_TOKENS, device=device)
    exact = exactly.embed(exactly.prepare(sequences[:16]))
    del exact_network, exactly
    _free(device)
    for variant in variants(dtypes, tuple(given.budgets)):
        yield from measure_variant(variant, model, state, sequences, exact, given)
        _free(device)


def profile_ours(model: str, given: argparse.Namespace) -> list[dict[str, Any]]:
    """Profile our forward passes in the first of the dtypes: the longest kernels, in ms."""
    device, dtype = torch.device(given.device), getattr(torch, given.dtypes[0])
    network = our_network(
        MODELS[model], dict(random_tensors(MODELS[model])), dtype=dtype, device=device
    )
    engine = Ours(network, token_budget=PROFILED_BUDGET, device=device)
    prepared = engine.prepare(_drawn(min(given.tokens, 4 * PROFILED_BUDGET)))
    engine.embed(prepared)
    with torch.profiler.profile() as profiler:
        engine.embed(prepared)
        _synchronize(device)
    attribute = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
    found = {
        event.key: (getattr(event, attribute) / 1e3, event.count)
        for event in profiler.key_averages()
    }
    total_ms = sum(ms for ms, _ in found.values())
    longest = sorted(found.items(), key=lambda item: -item[1][0])[:_MOST_PROFILED]
    return [
        {"kernel": key, "ms": ms, "share": ms / total_ms, "calls": calls}
        for key, (ms, calls) in longest
    ]


def profile_table(profile: Sequence[Mapping[str, Any]]) -> str:
    rows = [
        (one["kernel"][:90], f"{one['ms']:.1f}", f"{one['share']:.1%}", one["calls"])
        for one in profile
    ]
    return markdown_table(("kernel", "ms", "share", "calls"), rows)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda")
    parser.add_argument(
        "--models", nargs="+", choices=MODELS, default=["esm2_t33_650M_UR50D", "esm2_t36_3B_UR50D"]
    )
    parser.add_argument(
        "--dtypes", nargs="+", choices=["bfloat16", "float16"], default=["bfloat16", "float16"]
    )
    parser.add_argument(
        "--budgets",
        nargs="+",
        type=int,
        default=[8192, 16_384, 32_768, 65_536],
        help="tokens a pass",
    )
    parser.add_argument(
        "--tokens", type=int, default=262_144, help="tokens of one measurement, about"
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--gemm-size", type=int, default=8192)
    parser.add_argument("--gemm-repeats", type=int, default=100)
    parser.add_argument(
        "--profile", action="store_true", help="also say which kernels our time goes to"
    )
    parser.add_argument(
        "--smoke", action="store_true", help="so little work that a CPU does it in a minute"
    )
    parser.add_argument(
        "--output", type=Path, help="JSON file; by default benchmarks/results/<date>-<gpu>.json"
    )
    given = parser.parse_args()
    if given.smoke:
        given.budgets, given.tokens, given.rounds, given.gemm_size, given.gemm_repeats = (
            [256, 512],
            1024,
            1,
            256,
            2,
        )
        given.dtypes = ["bfloat16"]  # CPUs multiply float16 a hundred times more slowly
    return given


def main() -> None:
    given = parse_arguments()
    device = torch.device(given.device)
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    output = given.output or results_path(f"{gpu or cpu_name()}{'-smoke' * given.smoke}")
    results: dict[str, Any] = {
        "machine": describe_machine() | {"gpu": gpu},
        "settings": vars(given),
        "measurements": [],
        "profiles": {},
    }
    for model in given.models:
        for record in measure_model(model, given):
            results["measurements"].append(record)
            write_json(output, results)
        if given.profile:
            results["profiles"][model] = profile_ours(model, given)
            write_json(output, results)
            print(profile_table(results["profiles"][model]))
        _free(device)
    print(gpu_table(results["measurements"]))
    print(f"written: {output}")


def _drawn(tokens: int) -> list[str]:
    """A log-normal mix of about so many tokens."""
    return log_normal_mix(max(4, round(tokens / 255)))


def _with_parameters_in(network: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Cast parameters, not buffers: rotary frequencies stay float32, as in transformers."""
    for parameter in network.parameters():
        parameter.data = parameter.data.to(dtype)
    return network


def _compiled(network: nn.Module) -> nn.Module:
    """Compile each layer at its first use: once for all, since they are alike, for any shape."""
    for layer in network.layers:
        layer.compile(dynamic=True)
    return network


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _free(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
