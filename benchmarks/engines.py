"""Engines that embed proteins: fair-esm's, transformers' and ours."""

from __future__ import annotations

import tempfile
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from esm import Alphabet
from torch import Tensor, nn

from benchmarks.networks import CPU, load_fair_esm, transformers_network
from benchmarks.workload import stock_batches
from vnp_lib.inference.executor import BatchExecutor
from vnp_lib.inference.token_budget import TokenBudget
from vnp_lib.model.esm2 import ESM2, architecture_of
from vnp_lib.model.tokens import PackedBatch, pack_batch
from vnp_lib.model.weights import load_model, resolve_weights
from vnp_lib.plan.packing import NUM_SPECIAL_TOKENS, pack

CPU_TOKEN_BUDGET = 2048  # default of a run on a CPU


class Engine(Protocol):
    def prepare(self, sequences: Sequence[str]) -> Any:
        """Tokenise, on the CPU."""

    def embed(self, prepared: Any) -> Tensor:
        """Return the means of the last layer, float32 (B, D), on the CPU, in input order."""


class FairEsm:
    """Do what fair-esm's extract.py does: a padded batch, logits too, a mean per row."""

    def __init__(
        self, network: nn.Module, *, device: torch.device = CPU, autocast: torch.dtype | None = None
    ) -> None:
        self._network = network
        self._device = device
        self._autocast = autocast
        self._to_tokens = network.alphabet.get_batch_converter()

    def prepare(self, sequences: Sequence[str]) -> tuple[Tensor, list[int]]:
        _, _, tokens = self._to_tokens([("", sequence) for sequence in sequences])
        return tokens, [len(sequence) for sequence in sequences]

    @torch.no_grad()
    def embed(self, prepared: tuple[Tensor, list[int]]) -> Tensor:
        tokens, lengths = prepared
        last = self._network.num_layers
        with torch.autocast(
            self._device.type, dtype=self._autocast, enabled=self._autocast is not None
        ):
            output = self._network(
                tokens.to(self._device), repr_layers=[last], return_contacts=False
            )
        states = output["representations"][last]
        return torch.stack(
            [states[row, 1 : length + 1].float().mean(0) for row, length in enumerate(lengths)]
        ).cpu()


class Transformers:
    """EsmModel over one padded batch."""

    def __init__(self, network: nn.Module, *, device: torch.device = CPU) -> None:
        from transformers import EsmTokenizer

        self._network = network
        self._device = device
        with tempfile.NamedTemporaryFile("w", suffix=".txt") as vocabulary:
            vocabulary.write("\n".join(Alphabet.from_architecture("ESM-1b").all_toks))
            vocabulary.flush()
            self._to_tokens = EsmTokenizer(vocabulary.name)

    def prepare(self, sequences: Sequence[str]) -> tuple[Any, list[int]]:
        tokens = self._to_tokens(list(sequences), padding=True, return_tensors="pt")
        return tokens, [len(sequence) for sequence in sequences]

    @torch.inference_mode()
    def embed(self, prepared: tuple[Any, list[int]]) -> Tensor:
        tokens, lengths = prepared
        states = self._network(
            **{name: x.to(self._device) for name, x in tokens.items()}
        ).last_hidden_state
        return torch.stack(
            [states[row, 1 : length + 1].float().mean(0) for row, length in enumerate(lengths)]
        ).cpu()


class InBatches:
    """Another engine over extract.py's batches, sorted by length; budget 1 means one protein."""

    def __init__(self, engine: Engine, token_budget: int) -> None:
        self._engine = engine
        self._token_budget = token_budget

    def prepare(self, sequences: Sequence[str]) -> tuple[list[Any], list[int]]:
        batches = stock_batches(sequences, self._token_budget)
        prepared = [
            self._engine.prepare([sequences[index] for index in batch]) for batch in batches
        ]
        return prepared, [index for batch in batches for index in batch]

    def embed(self, prepared: tuple[list[Any], list[int]]) -> Tensor:
        batches, order = prepared
        return torch.cat([self._engine.embed(batch) for batch in batches])[np.argsort(order)]


class Ours:
    """What a worker process does: longest first, packed, one batch ahead of its rows on a GPU."""

    def __init__(
        self, network: ESM2, *, token_budget: int = CPU_TOKEN_BUDGET, device: torch.device = CPU
    ) -> None:
        self._executor = BatchExecutor(network, device, budget=TokenBudget())
        self._token_budget = token_budget
        self._in_flight = 1 if device.type == "cuda" else 0

    def prepare(self, sequences: Sequence[str]) -> tuple[list[PackedBatch], list[int]]:
        order = sorted(range(len(sequences)), key=lambda index: -len(sequences[index]))
        boundaries = pack(
            np.array([len(sequences[index]) + NUM_SPECIAL_TOKENS for index in order]),
            self._token_budget,
        )
        batches = []
        for number, (start, stop) in enumerate(pairwise(boundaries)):
            ordinals = order[start:stop]
            chosen, ids = (
                [sequences[index] for index in ordinals],
                [str(index) for index in ordinals],
            )
            batches.append(pack_batch(chosen, ids, ordinals, batch_idx=number))
        return batches, order

    def embed(self, prepared: tuple[list[PackedBatch], list[int]]) -> Tensor:
        batches, order = prepared
        rows, launched = [], deque()
        for batch in batches:
            launched.append(self._executor.launch(batch))
            if len(launched) > self._in_flight:
                rows.append(self._executor.collect(launched.popleft()).rows)
        rows.extend(self._executor.collect(left).rows for left in launched)
        return torch.cat(rows)[np.argsort(order)]


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineSpec:
    """An engine on the CPU, in a form that can be sent to another process."""

    name: str  # extract, transformers, one_at_a_time or ours
    model: str
    weights: Path
    dtype: str = "float32"


def embed_with(spec: EngineSpec, sequences: Sequence[str]) -> np.ndarray:
    """Embed from residues to rows; the network is read at its first use."""
    if not sequences:  # more processes than proteins in a chunk
        return np.empty((0, architecture_of(spec.model).embed_dim), dtype=np.float32)
    engine = _engine(spec)
    return engine.embed(engine.prepare(sequences)).numpy()


@cache
def _engine(spec: EngineSpec) -> Engine:
    if spec.name == "ours":
        weights = resolve_weights(spec.model, str(spec.weights))
        return Ours(load_model(weights, dtype=getattr(torch, spec.dtype), device=CPU))
    fair_esm = _fair_esm(spec.weights)
    if spec.name == "transformers":
        architecture = architecture_of(spec.model)
        trunk = {
            name: x
            for name, x in fair_esm.state_dict().items()
            if not name.startswith(("lm_head", "contact"))
        }
        state = {name: x for name, x in trunk.items() if not name.endswith("inv_freq")}
        return Transformers(transformers_network(architecture, state))
    engine = FairEsm(fair_esm)
    return InBatches(engine, 1) if spec.name == "one_at_a_time" else engine


@cache
def _fair_esm(weights: Path) -> nn.Module:
    return load_fair_esm(weights)
