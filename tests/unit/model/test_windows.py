"""Rows of long sequences, in windows and as in VirNucPro, equal fair-esm's with NumPy."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from tests.fair_esm import FairEsm, assert_close
from tests.networks import CPU, TINY
from vnp_lib.inference.executor import BatchExecutor
from vnp_lib.inference.token_budget import TokenBudget
from vnp_lib.model.esm2 import ESM2
from vnp_lib.model.tokens import RESIDUES, PackedBatch, pack_batch
from vnp_lib.model.weights import random_tensors
from vnp_lib.model.windows import MeanOverWindows
from vnp_lib.plan.outputs import OutputKind, RowLayout, choose_outputs
from vnp_lib.plan.windows import Windows

LENGTHS = [95, 61, 41, 40, 12, 1]
OUTPUTS = choose_outputs([OutputKind.MEAN], [1, 3], num_layers=3)


@cache
def state() -> dict[str, Tensor]:
    return dict(random_tensors(TINY, seed=7))


@cache
def fair_esm() -> FairEsm:
    return FairEsm(TINY, state())


@cache
def outputs(sequence: str) -> dict[str, NDArray[np.float32]]:
    return fair_esm().outputs(sequence, [1, 3], with_contacts=False)


def residues(sequence: str, layer: int) -> NDArray[np.float32]:
    """The states of a sequence's residues, by fair-esm."""
    return outputs(sequence)[f"per_tok_{layer}"]


def proteins(lengths: list[int]) -> list[str]:
    draw = np.random.default_rng(5)
    return ["".join(draw.choice(list(RESIDUES), size=length)) for length in lengths]


def batch_of(sequences: list[str]) -> PackedBatch:
    return pack_batch(
        sequences, [f"s{i}" for i in range(len(sequences))], range(len(sequences)), batch_idx=0
    )


def executor(policy: str, model: Any = None, **options: Any) -> BatchExecutor:
    budget = TokenBudget(options.pop("tokens", 10**9))
    network = model or ESM2.from_fair_esm(TINY, state().items())
    return BatchExecutor(
        network, CPU, budget=budget, layout=RowLayout(OUTPUTS, TINY.embed_dim, policy), **options
    )


def collected(executor: BatchExecutor, batch: PackedBatch) -> Any:
    return executor.collect(executor.launch(batch))


def windowed_by_hand(sequence: str, layer: int, length: int, overlap: int) -> NDArray[np.float32]:
    """Sum up the states of each residue over the windows, divide by their number, and average."""
    if len(sequence) <= length:
        return residues(sequence, layer).mean(axis=0)
    sums = np.zeros((len(sequence), TINY.embed_dim))
    counts = np.zeros((len(sequence), 1))
    start = 0
    while True:
        start = min(start, len(sequence) - length)
        sums[start : start + length] += residues(sequence[start : start + length], layer)
        counts[start : start + length] += 1
        if start + length == len(sequence):
            return (sums / counts).mean(axis=0).astype(np.float32)
        start += length - overlap


@pytest.mark.parametrize(("length", "overlap"), [(40, 10), (40, 0), (40, 35), (7, 2), (1, 0)])
@pytest.mark.parametrize("tokens", [10**9, 60], ids=["whole", "in-pieces"])
def test_windows_come_to_what_is_reckoned_by_hand(length, overlap, tokens):
    """Also where the windows of one sequence go through the model in several passes."""
    sequences = proteins(LENGTHS)
    found = collected(executor(f"window:{length}:{overlap}", tokens=tokens), batch_of(sequences))
    assert found.batch.sequence_ids == tuple(f"s{i}" for i in range(6))
    for sequence, row in zip(sequences, found.rows.numpy(), strict=True):
        for layer, values in zip((1, 3), np.split(row, 2), strict=True):
            assert_close(
                values, windowed_by_hand(sequence, layer, length, overlap), what=f"layer {layer}"
            )


def test_windows_are_where_they_are_said_to_be():
    assert Windows(length=10, overlap=4).starts(25) == [0, 6, 12, 15]
    assert Windows(length=10, overlap=4).starts(22) == [0, 6, 12]
    assert Windows(length=10, overlap=4).starts(11) == [0, 1]
    assert Windows(length=10, overlap=4).starts(10) == [0]


@pytest.mark.parametrize(("length", "overlap"), [(40, 10), (40, 0), (40, 39), (7, 2), (1, 0)])
def test_windows_are_counted_without_being_made(length, overlap):
    windows = Windows(length=length, overlap=overlap)
    lengths = np.arange(1, 200, dtype=np.int32)
    assert windows.counts(lengths).tolist() == [
        len(windows.starts(each)) for each in lengths.tolist()
    ]


def test_without_a_long_sequence_a_batch_is_computed_as_ever():
    batch = batch_of(proteins([40, 12]))
    assert MeanOverWindows(windows=Windows(length=40, overlap=10)).divide(batch) is batch
    assert torch.equal(
        collected(executor("window:40:10"), batch).rows, collected(executor("whole"), batch).rows
    )


def test_virnucpros_mean_is_that_of_the_first_1024_residues():
    """Each state has seen the whole sequence: the mean over a cut sequence is another."""
    sequences = proteins([1300, 1024, 30])
    found = collected(executor("virnucpro"), batch_of(sequences))
    for sequence, row in zip(sequences, found.rows.numpy(), strict=True):
        for layer, values in zip((1, 3), np.split(row, 2), strict=True):
            assert_close(
                values, residues(sequence, layer)[:1024].mean(axis=0), what=f"layer {layer}"
            )
    of_the_cut = residues(sequences[0][:1024], 3).mean(axis=0)
    assert np.abs(found.rows[0].numpy()[TINY.embed_dim :] - of_the_cut).max() > 1e-3


class Limited:
    """Our network on a device with memory for some tokens, which fails on a first residue Z."""

    def __init__(self, *, memory: int = 10**9, is_spoilt: bool = False) -> None:
        self._network = ESM2.from_fair_esm(TINY, state().items())
        self._memory = memory
        self._is_spoilt = is_spoilt

    def forward_packed(self, input_ids: Tensor, *arguments: Any, **options: Any) -> dict[str, Any]:
        if input_ids.numel() > self._memory:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        given = self._network.forward_packed(input_ids, *arguments, **options)
        if self._is_spoilt:
            given["representations"][3][input_ids == RESIDUES.index("Z") + 4] = float("nan")
        return given


def without_z(lengths: list[int]) -> list[str]:
    return [sequence.replace("Z", "A") for sequence in proteins(lengths)]


def test_a_long_sequence_needs_memory_for_a_window_only():
    sequences = proteins([95, 61, 12])
    found = collected(executor("window:20:5", Limited(memory=22)), batch_of(sequences))
    assert found.too_large is None
    for sequence, row in zip(sequences, found.rows.numpy(), strict=True):
        assert_close(row[TINY.embed_dim :], windowed_by_hand(sequence, 3, 20, 5), what="layer 3")


def test_a_sequence_with_a_window_that_does_not_fit_is_too_large():
    sequences = proteins([95, 12, 61, 9])
    found = collected(executor("window:20:5", Limited(memory=21)), batch_of(sequences))
    assert found.too_large.sequence_ids == ("s0", "s2")
    assert found.batch.sequence_ids == ("s1", "s3")
    assert_close(
        found.rows.numpy()[1][TINY.embed_dim :],
        residues(sequences[3], 3).mean(axis=0),
        what="layer 3",
    )


def test_a_sequence_with_a_non_finite_window_is_recomputed():
    """The more exact model computes the sequence, not the window."""
    sequences = without_z([95, 61, 12])
    sequences[1] = sequences[1][:50] + "Z" + sequences[1][51:]
    asked: list[PackedBatch] = []

    def exactly(alone: PackedBatch) -> Tensor:
        asked.append(alone)
        return torch.full((1, 2 * TINY.embed_dim), 7.0)

    found = collected(
        executor("window:20:5", Limited(is_spoilt=True), recompute=exactly), batch_of(sequences)
    )
    assert [alone.sequence_ids for alone in asked] == [("s1",)]
    assert asked[0].lengths.tolist() == [61]
    assert (found.rows[1] == 7.0).all()
    assert_close(
        found.rows.numpy()[0][TINY.embed_dim :],
        windowed_by_hand(sequences[0], 3, 20, 5),
        what="layer 3",
    )
    assert_close(
        found.rows.numpy()[2][TINY.embed_dim :],
        residues(sequences[2], 3).mean(axis=0),
        what="layer 3",
    )
