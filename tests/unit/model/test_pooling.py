"""Every output equals fair-esm's, however a batch is packed, split, recomputed or spoilt."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from tests.fair_esm import FairEsm, assert_close
from tests.networks import CPU, TINY
from vnp_lib.checkpoint.file import load_checkpoint
from vnp_lib.inference import runner
from vnp_lib.inference.executor import BatchExecutor
from vnp_lib.inference.runner import AsyncInferenceRunner, InferenceOptions
from vnp_lib.inference.token_budget import TokenBudget
from vnp_lib.model.esm2 import ESM2
from vnp_lib.model.tokens import RESIDUES, PackedBatch, pack_batch
from vnp_lib.model.weights import random_tensors
from vnp_lib.plan.outputs import RowLayout
from vnp_lib.plan.paths import checkpoint_path

LAYERS = [0, 2, 3]
FIXED = ["mean_2", "mean_3", "bos_0", "max_3", "std_2", "std_3"]
RAGGED = ["mean_3", "per_tok_2", "per_tok_3"]
LAYOUTS = [[name] for name in FIXED] + [FIXED, ["per_tok_3"], RAGGED]


def proteins(lengths: list[int]) -> list[str]:
    draw = np.random.default_rng(5)
    return ["".join(draw.choice(list(RESIDUES), size=length)) for length in lengths]


SEQUENCES = proteins([40, 40, 40, 17, 5, 5, 2, 1, 1])


@cache
def state() -> dict[str, Tensor]:
    return dict(random_tensors(TINY, seed=7))


@cache
def expected(sequence: str) -> dict[str, NDArray[np.float32]]:
    return FairEsm(TINY, state()).outputs(sequence, LAYERS)


def network() -> ESM2:
    return ESM2.from_fair_esm(TINY, state().items())


def layout_of(names: list[str]) -> RowLayout:
    return RowLayout.of_names(names, embed_dim=TINY.embed_dim)


def batch_of(sequences: list[str], *, first: int = 0) -> PackedBatch:
    ordinals = list(range(first, first + len(sequences)))
    return pack_batch(sequences, [f"s{ordinal}" for ordinal in ordinals], ordinals, batch_idx=0)


def by_id(
    layout: RowLayout, batch: PackedBatch, rows: Tensor
) -> dict[str, dict[str, NDArray[np.float32]]]:
    """The outputs in each row, read as their names and the sequences' lengths say."""
    values = rows.numpy().ravel()
    found: dict[str, dict[str, NDArray[np.float32]]] = {}
    start = 0
    for sequence_id, length in zip(batch.sequence_ids, batch.lengths.tolist(), strict=True):
        found[sequence_id] = {}
        for output in layout.outputs:
            shape = output.shape(length, TINY.embed_dim)
            found[sequence_id][output.name] = values[start : start + np.prod(shape)].reshape(shape)
            start += int(np.prod(shape))
    assert start == values.size
    return found


def assert_rows(
    layout: RowLayout, batch: PackedBatch, rows: Tensor, sequences: dict[str, str]
) -> None:
    found = by_id(layout, batch, rows)
    for sequence_id, outputs in found.items():
        for name, values in outputs.items():
            assert_close(
                values, expected(sequences[sequence_id])[name], what=f"{name} of {sequence_id}"
            )


def embedded(executor: BatchExecutor, batch: PackedBatch) -> Any:
    return executor.collect(executor.launch(batch))


@pytest.mark.parametrize("names", LAYOUTS, ids=",".join)
@pytest.mark.parametrize("tokens", [10**9, 50], ids=["whole", "in-pieces"])
def test_each_row_is_what_fair_esm_gives_for_its_sequence_alone(names, tokens):
    layout = layout_of(names)
    batch = batch_of(SEQUENCES)
    found = embedded(
        BatchExecutor(network(), CPU, budget=TokenBudget(tokens), layout=layout), batch
    )
    assert found.batch is batch
    assert_rows(layout, batch, found.rows, dict(zip(batch.sequence_ids, SEQUENCES, strict=True)))


class Spoilt:
    """Our network, with non-finite states of one token in one layer, unless it is alone."""

    def __init__(self, *, layer: int, token: int, always: bool = False) -> None:
        self._network = network()
        self._layer = layer
        self._token = token
        self._always = always

    def forward_packed(self, *arguments: Any, **options: Any) -> dict[str, Any]:
        given = self._network.forward_packed(*arguments, **options)
        if self._always or len(arguments[0]) > 10:
            given["representations"][self._layer][self._token, 3] = float("nan")
        return given


@pytest.mark.parametrize("names", [FIXED, RAGGED], ids=",".join)
def test_a_row_with_a_non_finite_value_is_recomputed_alone(names):
    """Token 146 is of s4, whose five residues are seven tokens."""
    layout, batch = layout_of(names), batch_of(SEQUENCES)
    assert batch.cu_seqlens[4] <= 146 < batch.cu_seqlens[5] - 1
    found = embedded(
        BatchExecutor(Spoilt(layer=2, token=146), CPU, budget=TokenBudget(), layout=layout), batch
    )
    assert found.not_finite is None
    assert_rows(layout, batch, found.rows, dict(zip(batch.sequence_ids, SEQUENCES, strict=True)))


@pytest.mark.parametrize("names", [FIXED, RAGGED], ids=",".join)
def test_a_row_that_is_never_finite_is_omitted(names):
    """Also those of another width: what is left out takes its own numbers with it."""
    layout, batch = layout_of(names), batch_of(SEQUENCES)

    def not_finite(alone: PackedBatch) -> Tensor:
        return torch.full((int(layout.widths(alone.lengths)[0]),), float("nan"))

    executor = BatchExecutor(
        Spoilt(layer=2, token=146), CPU, budget=TokenBudget(), layout=layout, recompute=not_finite
    )
    found = embedded(executor, batch)
    assert found.not_finite.sequence_ids == ("s4",)
    assert found.batch.sequence_ids == tuple(f"s{i}" for i in (0, 1, 2, 3, 5, 6, 7, 8))
    assert_rows(
        layout, found.batch, found.rows, dict(zip(batch.sequence_ids, SEQUENCES, strict=True))
    )


@pytest.mark.parametrize("names", [FIXED, RAGGED], ids=",".join)
def test_a_checkpoint_holds_fair_esms_rows_and_the_comparison(names, tmp_path: Path):
    """The exact row of s3 differs by 0.5 in its last value, which only a full comparison finds."""
    layout = layout_of(names)
    batches = [batch_of(SEQUENCES[:4]), batch_of(SEQUENCES[4:], first=4)]
    [own] = [
        result.embeddings
        for result in AsyncInferenceRunner(
            network(), "cpu", options=InferenceOptions(layout=layout)
        ).embed(batches[:1])
    ]
    exact = own.numpy().ravel()[-int(layout.widths(batches[0].lengths)[3]) :].copy()
    exact[-1] += 0.5
    runner = AsyncInferenceRunner(
        network(),
        "cpu",
        checkpoint_dir=tmp_path,
        options=InferenceOptions(layout=layout, exact_rows={3: exact}),
    )
    for _ in runner.embed(batches):
        pass
    kept = load_checkpoint(checkpoint_path(tmp_path, 0, 0), fingerprint=None)
    assert kept.sequence_ids == [f"s{i}" for i in range(9)]
    whole = batch_of(SEQUENCES)
    assert_rows(
        layout,
        whole,
        torch.from_numpy(kept.embeddings),
        dict(zip(kept.sequence_ids, SEQUENCES, strict=True)),
    )
    [compared] = kept.metadata["precision"]
    assert compared["ordinal"] == 3
    assert compared["max_abs_difference"] == pytest.approx(0.5, abs=1e-5)
    assert ("offsets" in kept.metadata) == (not layout.is_fixed)


def test_a_checkpoint_is_written_before_rows_take_too_much_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """However few sequences they are of; checkpoints hold whole batches all the same."""
    layout = layout_of(RAGGED)
    batches = [
        batch_of(SEQUENCES[:2]),
        batch_of(SEQUENCES[2:4], first=2),
        batch_of(SEQUENCES[4:], first=4),
    ]
    bytes_of_two = int(layout.widths(batches[0].lengths).sum()) * 4
    monkeypatch.setattr(runner, "_MAX_UNSAVED_BYTES", bytes_of_two)
    for _ in AsyncInferenceRunner(
        network(), "cpu", checkpoint_dir=tmp_path, options=InferenceOptions(layout=layout)
    ).embed(batches):
        pass
    kept = [
        load_checkpoint(checkpoint_path(tmp_path, 0, number), fingerprint=None)
        for number in range(2)
    ]
    assert [each.sequence_ids for each in kept] == [["s0", "s1"], [f"s{i}" for i in range(2, 9)]]
    assert [each.metadata["reason"] for each in kept] == ["size_threshold", "final"]
