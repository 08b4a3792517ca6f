"""A mini run: everything that a run does to its directory, with a stub model, in one process.

Everything but the model is the real code. A run takes some 30 ms, and writes several checkpoints
per shard.
"""

from __future__ import annotations

import random
import sys
import tempfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import vnp_lib.model
from vnp_lib.checkpoint.writer import AsyncCheckpointWriter
from vnp_lib.config import EmbedConfig, RuntimeConfig
from vnp_lib.errors import CheckpointError, ExitCode
from vnp_lib.inference import runner
from vnp_lib.model.tokens import FIRST_RESIDUE, RESIDUES
from vnp_lib.plan.paths import RunPaths
from vnp_lib.plan.plan import ROW_OVERHEAD_BYTES
from vnp_lib.run import record
from vnp_lib.run.assembly import assemble
from vnp_lib.run.directory import open_run
from vnp_lib.run.events import AttemptStarted, CheckpointSaved, WorkerEvent
from vnp_lib.run.run import Run
from vnp_lib.storage.durable import make_directory, read_marker, write_file
from vnp_lib.worker.attempt import ShardAttempt, StopFlag

WIDTH = 8
# Ten rows, so that the dataset has several parts.
PART_BYTES = 10 * (WIDTH * 4 + ROW_OVERHEAD_BYTES)
FASTA = Path("proteins.fasta")

_NUM_PROTEINS = 28
ALPHABET = "ACDEFGHIKLMNPQRSTVWY"
_WEIGHTS = torch.randint(1, 200, (33, WIDTH), generator=torch.Generator().manual_seed(1)).float()


def proteins() -> dict[str, str]:
    """Return 28 proteins by id; every seventh repeats the sequence of the third before it."""
    draw = random.Random(3)
    sequences: list[str] = []
    for number in range(_NUM_PROTEINS):
        is_copy = number % 7 == 6
        sequences.append(
            sequences[number - 3]
            if is_copy
            else "".join(draw.choices(ALPHABET, k=draw.randint(5, 40)))
        )
    return {f"protein_{number}": sequence for number, sequence in enumerate(sequences)}


def expected_rows() -> list[tuple[str, bytes]]:
    """Compute id and row of every protein in input order, only with the library's alphabet."""
    return [
        (sequence_id, _expected_row(sequence).tobytes())
        for sequence_id, sequence in proteins().items()
    ]


def write_fasta(directory: Path) -> None:
    records = (
        f">{sequence_id} a description\n{sequence}\n"
        for sequence_id, sequence in proteins().items()
    )
    (directory / FASTA).write_text("".join(records))


class Events:
    """Receive the events of an attempt, and pass the ordinals reported as durable on."""

    def __init__(
        self, paths: RunPaths, rank: int, acknowledge: Callable[[list[int]], None]
    ) -> None:
        self._paths = paths
        self._rank = rank
        self._acknowledge = acknowledge

    def send(self, event: WorkerEvent) -> None:
        if isinstance(event, CheckpointSaved):
            path = self._paths.checkpoint(self._rank, event.number)
            self._acknowledge(read_marker(path)["ordinals"])
        # An attempt that starts counts what it found on disk as done.
        if isinstance(event, AttemptStarted):
            for path in self._paths.shard_dir(self._rank).glob("batch_*.pt"):
                self._acknowledge(read_marker(path)["ordinals"])


class StubModel:
    """A model whose states are integers, so that sums are exact and independent of the batch."""

    # Layers send heartbeats.
    layers = ()

    def forward_packed(
        self, input_ids: Tensor, cu_seqlens: Tensor, max_seqlen: int
    ) -> Mapping[str, Any]:
        starts = torch.repeat_interleave(cu_seqlens[:-1], cu_seqlens.diff())
        positions = torch.arange(input_ids.numel()) - starts
        return {"representations": {6: _WEIGHTS[input_ids] * (positions[:, None] % 5 + 1)}}


def config_for(directory: Path, *, shards: int = 2) -> EmbedConfig:
    """Return the settings of the run in `directory`; the input is next to it."""
    return EmbedConfig(
        fasta=(directory.parent / FASTA,),
        output_dir=directory,
        model="esm2_t6_8M_UR50D",
        weights="random",
        devices="cpu",
        shards=shards,
        token_budget=64,
        runtime=RuntimeConfig(checkpoint_seq_threshold=3),
    )


def run_to_the_end(
    directory: Path,
    *,
    shards: int = 2,
    acknowledge: Callable[[list[int]], None] = lambda ordinals: None,
) -> bool:
    """Do what the flow does: plan, embed the shards one after the other, assemble the dataset.

    Call it once per process: like in a worker process, an attempt holds its shard's lock until the
    process exits.

    Args:
        directory: The run's.
        shards: How many; another number than the last run's is allowed.
        acknowledge: Called with the ordinals of every checkpoint, and then of every shard, that is
            reported as durable, from any thread.

    Returns:
        Whether the dataset is complete. If not, damaged checkpoints have been moved to `damaged/`,
        and another run is needed.
    """
    with open_run(config_for(directory, shards=shards)) as run:
        for rank in range(run.plan.num_shards):
            if not run.all_shard_progress()[rank].is_complete:
                _attempt(run, rank, acknowledge)
            run.manifest.mark_shard_complete(rank)
            acknowledge(run.plan.shard_ordinals(rank).tolist())
        try:
            assemble(run.plan, run.paths, run.checkpoints().valid, part_bytes=PART_BYTES)
        except CheckpointError:
            run.move_damaged_checkpoints()
            return False
    return True


def modules_of_a_run() -> list[str]:
    """Make a run and return the modules it has imported. Call it in a separate process."""
    from tests.faults.compare import outcome_of

    with tempfile.TemporaryDirectory() as directory:
        write_fasta(Path(directory))
        run_to_the_end(Path(directory) / "run")
        outcome_of(Path(directory) / "run")
    # A module without a specification has no file, such as the one that Cython's modules share.
    return sorted(
        name
        for name, module in sys.modules.items()
        if getattr(module, "__spec__", None) is not None
    )


def put_doubles_in_place() -> None:
    """Replace the model by the stub, and the writer's waits for a full disk by none.

    For processes of trials only.
    """
    vnp_lib.model.load_model = lambda *args, **kwargs: StubModel()
    runner.AsyncCheckpointWriter = partial(AsyncCheckpointWriter, sleep=lambda delay_s: None)
    # Long enough for eight processes.
    record.LOCK_TIMEOUT_S = 1.0


def _attempt(run: Run, rank: int, acknowledge: Callable[[list[int]], None]) -> None:
    run.manifest.start_attempt(rank)
    make_directory(run.paths.shard_dir(rank))
    job = run.shard_job(rank, "cpu")
    write_file(run.paths.job(rank), job.model_dump_json(indent=1).encode(), replace=True)
    attempt = ShardAttempt(job, Events(run.paths, rank, acknowledge), StopFlag())
    assert attempt.run() == ExitCode.DONE


def _expected_row(sequence: str) -> np.ndarray[Any, Any]:
    tokens = [FIRST_RESIDUE + RESIDUES.index(letter) for letter in sequence]
    states = [
        _WEIGHTS[token].numpy() * (position % 5 + 1)
        for position, token in enumerate(tokens, start=1)
    ]
    return (np.sum(states, axis=0, dtype=np.float64) / len(states)).astype(np.float32)
