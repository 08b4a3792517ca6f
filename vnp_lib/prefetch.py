"""Prefetch items in background threads."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

_END = object()
S = TypeVar("S")
T = TypeVar("T")


class Prefetcher(Iterable[T]):
    """Iterate over items in order, while a thread produces the next `count`.

    An exception is raised at the position of the item that caused it.
    """

    def __init__(self, items: Iterable[T], count: int) -> None:
        self._items = iter(items)
        self._count = count
        self._ahead: deque[Future[Any]] = deque()

    def __iter__(self) -> Generator[T, None, None]:
        with ThreadPoolExecutor(max_workers=1, thread_name_prefix="prefetch") as pool:
            self._ahead.extend(pool.submit(next, self._items, _END) for _ in range(self._count))
            while (item := self._ahead.popleft().result()) is not _END:
                self._ahead.append(pool.submit(next, self._items, _END))
                yield item

    def num_ready(self) -> int:
        """Return the number of items that are produced and not yet consumed."""
        done = (future for future in self._ahead if future.done() and future.exception() is None)
        return sum(future.result() is not _END for future in done)


def prefetch_map(
    function: Callable[[S], T], items: Iterable[S], *, threads: int
) -> Generator[T, None, None]:
    """Yield `function` of each item, in order, while `threads` threads compute the next ones.

    An exception is raised at the position of the item that caused it.
    """
    with ThreadPoolExecutor(max_workers=threads, thread_name_prefix="prefetch-map") as pool:
        ahead: deque[Future[T]] = deque()
        for item in items:
            ahead.append(pool.submit(function, item))
            if len(ahead) > threads:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()
