"""Prefetched results: their order, their number, and errors."""

from __future__ import annotations

import threading

import pytest

from vnp_lib.prefetch import prefetch_map


def test_results_are_in_the_order_of_the_items() -> None:
    """Even if a later one is ready first."""
    second_is_made = threading.Event()

    def double(item: int) -> int:
        if item == 0:
            assert second_is_made.wait(timeout=60)
        elif item == 1:
            second_is_made.set()
        return 2 * item

    assert list(prefetch_map(double, range(20), threads=2)) == [2 * item for item in range(20)]


@pytest.mark.parametrize("threads", [1, 3])
def test_only_as_many_items_as_threads_are_prefetched(threads: int) -> None:
    begun: list[int] = []
    results = prefetch_map(begun.append, range(100), threads=threads)

    for num_given in range(1, 5):
        next(results)
        assert len(begun) <= num_given + threads

    results.close()
    assert len(begun) <= 4 + threads


def test_an_error_is_raised_in_order_and_ends_the_iteration() -> None:
    def halve(item: int) -> int:
        if item == 2:
            raise ValueError("two")
        return item // 2

    results = prefetch_map(halve, range(10), threads=2)

    assert [next(results), next(results)] == [0, 0]
    with pytest.raises(ValueError, match="two"):
        next(results)
    with pytest.raises(StopIteration):
        next(results)
