"""Measure the cost of checkpoints at the rate of ESM-2 3B on an H100, with a stub model.

The runner and the writer are real. The stub returns fake rows of 2,560 floats, and sleeps until a
GPU with 83,000 tokens/s would have computed them.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vnp_lib.inference import executor, runner
from vnp_lib.inference.runner import AsyncInferenceRunner
from vnp_lib.model.tokens import PackedBatch, pack_batch

TOKENS_PER_S = 83_000.0
WIDTH = 2560
RESIDUES = 150
ROWS_OF_A_BATCH = 16_384 // (RESIDUES + 2)


@dataclass(frozen=True, slots=True, kw_only=True)
class LoopFigures:
    """A run of the loop."""

    elapsed_s: float
    overhead_s: (
        float  # all that was not in the stub, the wait for the last checkpoint's writing included
    )
    last_write_s: float  # that wait
    handovers_s: tuple[float, ...]  # how long each checkpoint held up the loop


@dataclass(slots=True)
class _Clock:
    in_model_s: float = 0.0
    ended_at_s: float = 0.0
    handovers_s: list[float] = field(default_factory=list)


def run_loop(num_batches: int, checkpoint_dir: Path | None) -> LoopFigures:
    """Embed fake sequences at 3B's rate, with checkpoints if there is a directory for them."""
    clock = _Clock()
    torch.set_num_threads(1)
    with _patched(clock):
        runner = AsyncInferenceRunner(_NoModel(), "cpu", checkpoint_dir=checkpoint_dir)
        started_at = time.perf_counter()
        for result in runner.embed(_batches(num_batches)):
            if result.batch_idx == num_batches - 1:
                clock.ended_at_s = time.perf_counter()
        ended_at = time.perf_counter()
    return LoopFigures(
        elapsed_s=ended_at - started_at,
        overhead_s=ended_at - started_at - clock.in_model_s,
        last_write_s=ended_at - clock.ended_at_s,
        handovers_s=tuple(clock.handovers_s),
    )


def measure_checkpointing(num_batches: int) -> tuple[LoopFigures, LoopFigures]:
    """The same loop with and without checkpoints."""
    with tempfile.TemporaryDirectory() as directory:
        with_checkpoints = run_loop(num_batches, Path(directory))
    return with_checkpoints, run_loop(num_batches, None)


class _NoModel:
    def forward_packed(
        self, input_ids: Tensor, cu_seqlens: Tensor, max_seqlen: int
    ) -> Mapping[str, Any]:
        raise NotImplementedError


def _batches(num_batches: int) -> Iterator[PackedBatch]:
    for batch_idx in range(num_batches):
        ordinals = np.arange(ROWS_OF_A_BATCH) + batch_idx * ROWS_OF_A_BATCH
        ids = [f"protein_{ordinal}" for ordinal in ordinals.tolist()]
        yield pack_batch(
            ["M" * RESIDUES] * ROWS_OF_A_BATCH,
            sequence_ids=ids,
            ordinals=ordinals,
            batch_idx=batch_idx,
        )


@contextmanager
def _patched(clock: _Clock) -> Iterator[None]:
    embed_batch, write = executor.embed_batch, runner._UnsavedRows.write

    def sleeping(_model: object, batch: PackedBatch, _layout: object = None) -> Tensor:
        begun_at = time.perf_counter()
        rows = torch.full((batch.num_sequences, WIDTH), float(batch.batch_idx))
        time.sleep(max(0.0, begun_at + batch.num_tokens / TOKENS_PER_S - time.perf_counter()))
        clock.in_model_s += time.perf_counter() - begun_at
        return rows

    def timed(unsaved: runner._UnsavedRows, reason: str) -> None:
        begun_at = time.perf_counter()
        write(unsaved, reason)
        clock.handovers_s.append(time.perf_counter() - begun_at)

    executor.embed_batch, runner._UnsavedRows.write = sleeping, timed  # type: ignore[assignment,method-assign]
    try:
        yield
    finally:
        executor.embed_batch, runner._UnsavedRows.write = embed_batch, write  # type: ignore[method-assign]
