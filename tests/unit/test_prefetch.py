"""Work that is begun before it is asked for."""

from __future__ import annotations

import threading

import pytest

from vnp_lib.prefetch import map_ahead


def test_results_come_in_the_order_of_their_items_whichever_is_ready_first() -> None:
    second_is_made = threading.Event()

    def double(item: int) -> int:
        if item == 0:
            assert second_is_made.wait(timeout=60)
        elif item == 1:
            second_is_made.set()
        return 2 * item

    assert list(map_ahead(double, range(20), threads=2)) == [2 * item for item in range(20)]


@pytest.mark.parametrize("threads", [1, 3])
def test_no_more_are_begun_than_there_are_threads_beside_the_one_that_is_given(
    threads: int,
) -> None:
    begun: list[int] = []
    results = map_ahead(begun.append, range(100), threads=threads)

    for num_given in range(1, 5):
        next(results)
        assert len(begun) <= num_given + threads

    results.close()
    assert len(begun) <= 4 + threads


def test_an_error_comes_at_its_place_and_ends_it() -> None:
    def halve(item: int) -> int:
        if item == 2:
            raise ValueError("two")
        return item // 2

    results = map_ahead(halve, range(10), threads=2)

    assert [next(results), next(results)] == [0, 0]
    with pytest.raises(ValueError, match="two"):
        next(results)
    with pytest.raises(StopIteration):
        next(results)
