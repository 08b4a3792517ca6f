"""How many tokens a GPU is given: by hand, and by what a forward pass really holds."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Collection, Iterator, Sequence
from functools import cache
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from vnp_lib.errors import ConfigError
from vnp_lib.inference.executor import embed_batch
from vnp_lib.inference.gpu_memory import (
    TOKENS_UNSEEN,
    choose_token_budget,
    most_useful_tokens,
    pass_bytes,
    tokens_that_fit,
)
from vnp_lib.inference.token_budget import CPU_TOKEN_BUDGET
from vnp_lib.model.esm2 import ESM2, MODELS, Architecture
from vnp_lib.model.heads import ContactRegression, HeadedModel, LanguageModelHead
from vnp_lib.model.tokens import pack_batch
from vnp_lib.model.weights import random_tensors
from vnp_lib.plan.outputs import OutputKind, RowLayout, choose_outputs

GB = 10**9
M8, M650, B3, B15 = (
    "esm2_t6_8M_UR50D",
    "esm2_t33_650M_UR50D",
    "esm2_t36_3B_UR50D",
    "esm2_t48_15B_UR50D",
)
BFLOAT16 = torch.bfloat16


class NVMLError(Exception):
    """What pynvml raises for all that goes wrong."""


class StandInNVML(ModuleType):
    """Patch `pynvml` to report free bytes of GPUs, by number or UUID; None reports nothing."""

    NVMLError = NVMLError

    def __init__(self, **free_bytes: int | None) -> None:
        super().__init__("pynvml")
        self._free_bytes = free_bytes
        self.is_open = False

    def nvmlInit(self) -> None:
        self.is_open = True

    def nvmlShutdown(self) -> None:
        self.is_open = False

    def nvmlDeviceGetHandleByIndex(self, index: int) -> str:
        return self.nvmlDeviceGetHandleByUUID(f"number_{index}")

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:
        if uuid not in self._free_bytes:
            raise NVMLError("Not Found")
        return uuid

    def nvmlDeviceGetMemoryInfo(self, handle: str) -> Any:
        if self._free_bytes[handle] is None:
            raise NVMLError("Not Supported")
        return SimpleNamespace(free=self._free_bytes[handle])


def a_machine_with(
    monkeypatch: pytest.MonkeyPatch, *, mask: str = "", **free_bytes: int | None
) -> StandInNVML:
    nvml = StandInNVML(**free_bytes)
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", mask)
    return nvml


@pytest.mark.parametrize(
    ("model", "dtype", "free_bytes", "tokens"),
    [
        # (80e9 - 2 * 2,832,442,880 - 2**30) * 0.8 / (10 * 2560 * 2 + 8 + 4 * 64) = 1,138,836
        (B3, torch.bfloat16, 80 * GB, 1_138_688),
        (B3, torch.bfloat16, 16 * GB, 143_360),  # 143,966
        (B3, torch.bfloat16, 8 * GB, 19_456),  # 19,607
        (
            B3,
            torch.float32,
            16 * GB,
            27_648,
        ),  # (16e9 - 4 * 2,832,442,880 - 2**30) * 0.8 / 102,664 = 28,025
        (
            B15,
            torch.bfloat16,
            40 * GB,
            67_584,
        ),  # (40e9 - 2 * 15,102,868,480 - 2**30) * 0.8 / 102,920 = 67,784
        (B15, torch.bfloat16, 24 * GB, 0),
        # (24e9 - 4 * 649,400,320 - 2**30) * 0.8 / (10 * 1280 * 4 + 8 + 4 * 64) = 316,006
        (M650, torch.float32, 24 * GB, 315_392),
    ],
)
def test_memory_next_to_the_weights_holds_the_tokens(
    model: str, dtype: torch.dtype, free_bytes: int, tokens: int
) -> None:
    assert (
        tokens_that_fit(MODELS[model], dtype, free_bytes, layout_of(MODELS[model], ["mean"]))
        == tokens
    )


def test_contacts_take_the_more_the_longer_a_sequence_may_be() -> None:
    """One sequence of all tokens fits: its maps of one layer, twice, and the sums of all layers.

    324 T**2 + (5 * 2560 * 2 + 2 * 2560 * 4 + 8 + 4 * 64) T = 58.6e9 usable bytes, T = 13,379.
    """
    layout = layout_of(MODELS[B3], ["contacts"])
    assert tokens_that_fit(MODELS[B3], BFLOAT16, 80 * GB, layout) == 13_312


def test_residues_of_every_layer_are_there_twice_in_float32() -> None:
    """States and rows coexist: 37 * (2 + 4 + 4) * 2560 + 8 + 4 * 64 bytes per token, T = 61,859."""
    layout = layout_of(MODELS[B3], ["per_tok"], range(37))
    assert tokens_that_fit(MODELS[B3], BFLOAT16, 80 * GB, layout) == 61_440


TINY = Architecture(num_layers=4, embed_dim=128, attention_heads=4)


def layout_of(
    architecture: Architecture, include: Sequence[str], layers: Collection[int] | None = None
) -> RowLayout:
    outputs = choose_outputs(
        list(map(OutputKind, include)), layers, num_layers=architecture.num_layers
    )
    return RowLayout(outputs, architecture.embed_dim)


@cache
def headed(dtype: torch.dtype, kinds: tuple[OutputKind, ...]) -> ESM2 | HeadedModel:
    network = ESM2.from_fair_esm(TINY, random_tensors(TINY), dtype=dtype)
    dim = TINY.embed_dim
    shapes = {
        "dense_weight": (dim, dim),
        "dense_bias": (dim,),
        "norm_weight": (dim,),
        "norm_bias": (dim,),
        "bias": (33,),
    }
    language_model = LanguageModelHead(
        **{name: torch.ones(shape, dtype=dtype) for name, shape in shapes.items()}
    )
    regression = ContactRegression(
        weight=torch.ones(TINY.num_layers, TINY.attention_heads), bias=torch.zeros(1)
    )
    return (
        HeadedModel(
            network,
            language_model=language_model if OutputKind.LOGITS in kinds else None,
            contact_regression=regression if OutputKind.CONTACTS in kinds else None,
        )
        if kinds
        else network
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "lengths",
    [[98] * 8, range(200, 20, -20), [400], [30] * 30, [5] * 90],
    ids=["equal", "mixed", "one", "short", "tiny"],
)
@pytest.mark.parametrize(
    ("include", "layers"),
    [
        (["mean"], None),
        (["mean"], [1, 2, 4]),
        (["mean", "bos", "max", "std"], range(5)),
        (["per_tok"], None),
        (["per_tok"], range(5)),
        (["logits"], None),
        (["contacts"], None),
        (list(OutputKind), [1, 4]),
    ],
    ids=lambda given: ",".join(map(str, given or ["last"])),
)
@pytest.mark.usefixtures("two_threads")
def test_a_forward_pass_holds_what_is_reckoned(
    dtype: torch.dtype, lengths: list[int], include: list[str], layers: Collection[int] | None
) -> None:
    """Count the peak bytes of all tensors that exist at once, without the weights.

    Of several outputs it is reckoned as if the largest of all stages came last.
    """
    layout = layout_of(TINY, include, layers)
    model = headed(dtype, layout.heads)
    ids = [str(length) for length in range(len(lengths))]
    batch = pack_batch(["A" * length for length in lengths], ids, range(len(ids)), batch_idx=0)
    with torch.inference_mode():
        embed_batch(
            model, pack_batch(["A"], ["a"], [0], batch_idx=0), layout
        )  # what it looks up is kept from now on
        with LiveBytes() as live:
            embed_batch(model, batch, layout)
    reckoned = pass_bytes(TINY, dtype, layout, np.diff(batch.cu_seqlens.numpy()))
    assert 0.999 <= reckoned / live.most <= (1.02 if len(include) == 1 and layers is None else 1.15)


@pytest.fixture
def two_threads() -> Iterator[None]:
    """Exclude the attention that one thread of a CPU uses: it takes more memory than a GPU's."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of what operations make, for as long as it lives."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        given = {
            x.untyped_storage()._cdata
            for x in tree_leaves((args, kwargs))
            if isinstance(x, torch.Tensor)
        }
        for tensor in tree_leaves(made):
            if isinstance(tensor, torch.Tensor):
                self._count(tensor.untyped_storage(), given)
        return made

    def _count(self, storage: torch.UntypedStorage, given: set[int]) -> None:
        key = storage._cdata
        if key in given or key in self._known:
            return
        self._known.add(key)
        self.now += storage.nbytes()
        self.most = max(self.most, self.now)
        weakref.finalize(storage, self._forget, key, storage.nbytes())

    def _forget(self, key: int, num_bytes: int) -> None:
        self._known.discard(key)
        self.now -= num_bytes


@pytest.mark.parametrize("model", MODELS)
def test_parameters_are_counted_as_the_network_has_them(model: str) -> None:
    with torch.device("meta"):
        network = ESM2(MODELS[model])
    assert MODELS[model].num_parameters == sum(
        parameter.numel() for parameter in network.parameters()
    )


@pytest.mark.parametrize(
    ("model", "tokens"), [(M8, 65_536), (M650, 65_536), (B3, 16_384), (B15, 16_384)]
)
def test_more_memory_makes_no_longer_passes_than_do_good(
    monkeypatch: pytest.MonkeyPatch, model: str, tokens: int
) -> None:
    assert most_useful_tokens(MODELS[model]) == tokens
    nvml = a_machine_with(monkeypatch, number_0=140 * GB)
    assert choose_token_budget(model, BFLOAT16, ["0"], layout_of(MODELS[model], ["mean"])) == tokens
    assert not nvml.is_open


@pytest.mark.parametrize(
    ("mask", "devices", "tokens"),
    [
        ("", ["0"], 65_536),
        (
            "",
            ["0", "1"],
            13_312,
        ),  # (1.2e9 - 2 * 7,408,960 - 2**30) * 0.8 / (10 * 320 * 2 + 8 + 4 * 16) = 13,774
        ("1", ["0"], 13_312),
        ("GPU-1-2, MIG-3-4", ["0"], TOKENS_UNSEEN),
        ("GPU-1-2, MIG-3-4", ["0", "1"], 13_312),
        ("2", ["0"], TOKENS_UNSEEN),
        ("7", ["0"], TOKENS_UNSEEN),
    ],
)
def test_the_gpu_with_the_least_memory_free_decides(
    monkeypatch: pytest.MonkeyPatch, mask: str, devices: list[str], tokens: int
) -> None:
    """Of those that the run has. One that does not tell does not count."""
    gpus = {
        "number_0": 80 * GB,
        "number_1": 1_200_000_000,
        "number_2": None,
        "MIG-3-4": 1_200_000_000,
    }
    a_machine_with(monkeypatch, mask=mask, **gpus)
    assert choose_token_budget(M8, BFLOAT16, devices, layout_of(MODELS[M8], ["mean"])) == tokens


def test_without_nvml_it_is_what_suits_most_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert choose_token_budget(B3, BFLOAT16, ["0"], layout_of(MODELS[B3], ["mean"])) == 16_384


def test_a_model_that_does_not_fit_is_refused_with_both_figures(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    a_machine_with(monkeypatch, number_0=80 * GB, number_1=24 * GB)
    with pytest.raises(
        ConfigError, match=r"15B.* 28\.1 GiB .* GPU 1, which has 22\.4 GiB free; choose .*--model"
    ):
        choose_token_budget(B15, BFLOAT16, ["0", "1"], layout_of(MODELS[B15], ["mean"]))


def test_a_cpu_has_a_fixed_budget() -> None:
    layout = layout_of(MODELS[M8], ["mean"])
    assert choose_token_budget(M8, torch.float32, ["cpu"], layout) == CPU_TOKEN_BUDGET
