"""Processes that stay between calls, so that imports and models are loaded once."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from typing import Any

# glibc returns large blocks to the kernel at once, which zeroes every page again for the next one.
# That costs extract.py a quarter of its time and us nothing, so all compared processes keep memory.
_KEEP_MEMORY = "glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=1099511627776"
_IN_HUGE_PAGES = ":glibc.malloc.hugetlb=1"  # as in our workers


class Team:
    """A number of processes, with a number of threads each."""

    def __init__(self, *, processes: int, threads: int, huge_pages: bool = False) -> None:
        self.size = processes
        context = multiprocessing.get_context("spawn")
        before = dict(os.environ)
        os.environ["GLIBC_TUNABLES"] = _KEEP_MEMORY + (_IN_HUGE_PAGES if huge_pages else "")
        try:
            self._members = [context.Pipe() for _ in range(processes)]
            self._processes = [
                context.Process(target=_serve, args=(theirs, threads), daemon=True)
                for _, theirs in self._members
            ]
            for process in self._processes:
                process.start()
        finally:
            os.environ.clear()
            os.environ.update(before)
        for _, theirs in self._members:
            theirs.close()  # else the death of a member would go unnoticed

    def call(self, function: Callable[..., Any], *arguments: Sequence[Any]) -> list[Any]:
        """Call a function in every member, each with its own arguments; return results in order.

        Raises:
            EOFError: A member has died; it has said why on standard error.
        """
        connections = [ours for ours, _ in self._members]
        for connection, own in zip(connections, arguments, strict=True):
            connection.send((function, own))
        return [connection.recv() for connection in connections]

    def stop(self) -> None:
        for connection, _ in self._members:
            connection.close()
        for process in self._processes:
            process.join()


def _serve(connection: Connection, threads: int) -> None:
    import torch

    torch.set_num_threads(threads)
    while True:
        try:
            function, arguments = connection.recv()
        except EOFError:
            return
        connection.send(function(*arguments))
