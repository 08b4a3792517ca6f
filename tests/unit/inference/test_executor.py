"""Rows are never mixed up or silently lost on out-of-memory or non-finite values."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from vnp_lib.errors import BatchFailedError, DeviceFailedError
from vnp_lib.failures import FailureCause, classify_exception
from vnp_lib.inference.executor import BatchExecutor
from vnp_lib.inference.token_budget import TokenBudget
from vnp_lib.model.tokens import PackedBatch, pack_batch

SEQUENCES = ["MKV", "MKLAAA", "W", "ACDEFGH", "KK", "LLLLL"]
NAN = float("nan")


class StubModel:
    """Gives every token its number, holds so many tokens, and may spoil what `spoil` says."""

    def __init__(
        self, *, memory: int = 10**9, spoil: Callable[[Tensor], None] = lambda states: None
    ) -> None:
        self.memory = memory
        self.passes: list[int] = []
        self._spoil = spoil

    def forward_packed(
        self, input_ids: Tensor, cu_seqlens: Tensor, max_seqlen: int
    ) -> Mapping[str, Any]:
        self.passes.append(input_ids.numel())
        if input_ids.numel() > self.memory:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        states = input_ids[:, None].float().repeat(1, 4)
        self._spoil(states)
        return {"representations": {6: states}}


def batch_of(sequences: list[str]) -> PackedBatch:
    ids = [f"id_{sequence}" for sequence in sequences]
    return pack_batch(
        sequences, sequence_ids=ids, ordinals=range(10, 10 + len(sequences)), batch_idx=7
    )


def expected_rows(sequences: list[str]) -> Tensor:
    """Each sequence's row, computed alone."""
    return torch.cat([rows_of(StubModel(), [sequence]) for sequence in sequences])


def embed(model: StubModel, sequences: list[str], **options: Any) -> Any:
    executor = BatchExecutor(model, torch.device("cpu"), **{"budget": TokenBudget(), **options})
    return executor.collect(executor.launch(batch_of(sequences)))


def rows_of(model: StubModel, sequences: list[str], **options: Any) -> Tensor:
    embedded = embed(model, sequences, **options)
    assert embedded.batch.sequence_ids == tuple(f"id_{sequence}" for sequence in sequences)
    assert (embedded.not_finite, embedded.too_large) == (None, None)
    rows: Tensor = embedded.rows
    return rows


@pytest.mark.parametrize("memory", [9, 10, 12, 16, 20, 30])
def test_a_batch_that_does_not_fit_is_computed_in_pieces_row_for_row(memory: int) -> None:
    torch.testing.assert_close(
        rows_of(StubModel(memory=memory), SEQUENCES), expected_rows(SEQUENCES)
    )


def test_the_next_batch_keeps_to_the_lowered_budget() -> None:
    model, budget = StubModel(memory=20), TokenBudget(100)
    rows_of(model, SEQUENCES, budget=budget)
    assert model.passes[0] > 20
    first = len(model.passes)
    rows_of(model, SEQUENCES, budget=budget)
    assert max(model.passes[first:]) <= budget.tokens <= 20


def test_a_pinned_budget_splits_nothing() -> None:
    """Another batch would be other bits; what does not fit is an error."""
    model, budget = StubModel(memory=20), TokenBudget(100, 30, is_pinned=True)
    with pytest.raises(BatchFailedError) as caught:
        embed(model, SEQUENCES, budget=budget)
    assert isinstance(caught.value.__cause__, torch.OutOfMemoryError)
    assert (budget.tokens, len(model.passes)) == (100, 1)


def test_a_sequence_that_does_not_fit_alone_costs_itself_only() -> None:
    embedded = embed(StubModel(memory=8), SEQUENCES)  # "ACDEFGH" takes 9
    others = [sequence for sequence in SEQUENCES if sequence != "ACDEFGH"]
    assert embedded.too_large.sequence_ids == ("id_ACDEFGH",)
    assert embedded.batch.sequence_ids == tuple(f"id_{sequence}" for sequence in others)
    torch.testing.assert_close(embedded.rows, expected_rows(others))


def test_a_batch_of_which_nothing_fits_has_no_rows() -> None:
    embedded = embed(StubModel(memory=2), ["MKV", "MKL"])
    assert (embedded.batch, embedded.not_finite) == (None, None)
    assert embedded.too_large.sequence_ids == ("id_MKV", "id_MKL")


def spoil_where(token_sum: float) -> Callable[[Tensor], None]:
    """Put a NaN into all states of a pass of so many tokens or more."""

    def spoil(states: Tensor) -> None:
        if len(states) >= token_sum:
            states[2] = NAN

    return spoil


def test_a_non_finite_row_is_recomputed_alone() -> None:
    """Here by the same model, which does better with a single sequence."""
    torch.testing.assert_close(
        rows_of(StubModel(spoil=spoil_where(10)), SEQUENCES), expected_rows(SEQUENCES)
    )


def test_the_row_of_a_more_exact_model_takes_its_place_and_no_others() -> None:
    asked: list[PackedBatch] = []

    def exactly(alone: PackedBatch) -> Tensor:
        asked.append(alone)
        return torch.full((1, 4), 3.5)

    rows = rows_of(StubModel(spoil=spoil_where(1)), SEQUENCES, recompute=exactly)
    assert [alone.sequence_ids for alone in asked] == [("id_MKV",)]
    torch.testing.assert_close(rows[0], torch.full((4,), 3.5))
    torch.testing.assert_close(rows[1:], expected_rows(SEQUENCES)[1:])


def test_a_row_that_stays_non_finite_is_reported_apart() -> None:
    model = StubModel(spoil=spoil_where(1))
    embedded = embed(model, SEQUENCES, recompute=lambda alone: torch.full((1, 4), NAN))
    assert embedded.not_finite.sequence_ids == ("id_MKV",)
    assert embedded.not_finite.ordinals.tolist() == [10]
    assert embedded.batch.sequence_ids == tuple(f"id_{sequence}" for sequence in SEQUENCES[1:])
    torch.testing.assert_close(embedded.rows, expected_rows(SEQUENCES)[1:])


def test_too_large_and_non_finite_rows_in_one_batch() -> None:
    """All three fates at once: the masks of one must not shift the others'."""
    model = StubModel(
        memory=8, spoil=lambda states: states.__setitem__(1, NAN) if states[1, 0] == 15 else None
    )
    sequences = ["ACDEFGH", "MKV", "KKK"]  # K is token 15
    embedded = embed(model, sequences, recompute=lambda alone: torch.full((1, 4), NAN))
    assert embedded.too_large.sequence_ids == ("id_ACDEFGH",)
    assert embedded.not_finite.sequence_ids == ("id_KKK",)
    assert embedded.batch.sequence_ids == ("id_MKV",)
    torch.testing.assert_close(embedded.rows, expected_rows(["MKV"]))


@pytest.mark.parametrize(("sequences", "ordinal"), [(SEQUENCES, None), (["MKV"], 10)])
def test_any_other_error_blames_the_batch_or_the_only_sequence(
    sequences: list[str], ordinal: int | None
) -> None:
    with pytest.raises(BatchFailedError) as caught:
        embed(StubModel(spoil=fail), sequences)
    assert (caught.value.batch_idx, caught.value.ordinal) == (7, ordinal)


def fail(states: Tensor) -> None:
    raise RuntimeError("CUDA error: an illegal memory access was encountered")


@pytest.mark.parametrize(
    "model", [StubModel(memory=1), StubModel(spoil=spoil_where(1)), StubModel(spoil=fail)]
)
def test_a_device_that_fails_at_a_harmless_sequence_is_what_is_broken(model: StubModel) -> None:
    """And no sequence: whatever the device has said, it is the device that is accused."""
    with pytest.raises(DeviceFailedError) as caught:
        BatchExecutor(model, torch.device("cpu"), budget=TokenBudget()).probe()
    failure = classify_exception(caught.value)
    assert (failure.cause, failure.batch_idx, failure.ordinal) == (
        FailureCause.HARDWARE,
        None,
        None,
    )


def test_a_sound_device_passes_the_probe() -> None:
    BatchExecutor(StubModel(), torch.device("cpu"), budget=TokenBudget()).probe()
