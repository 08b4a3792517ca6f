"""Embed batches on one device and write checkpoints.

A thread reads and tokenises the next batches, a GPU computes one batch while the rows of the
previous one are copied, and another thread writes checkpoints.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vnp_lib.checkpoint import (
    DEFAULT_SEQ_THRESHOLD,
    DEFAULT_TIME_THRESHOLD_S,
    AsyncCheckpointWriter,
    CheckpointManifest,
    CheckpointTrigger,
    resume_from_checkpoints,
)
from vnp_lib.errors import SequenceTooLargeError
from vnp_lib.formatting import listed
from vnp_lib.inference.callbacks import Callbacks
from vnp_lib.inference.executor import (
    BatchExecutor,
    EmbeddedBatch,
    LaunchedBatch,
    PackedModel,
    attribute_errors_to,
)
from vnp_lib.inference.precision import compare, to_metadata
from vnp_lib.inference.token_budget import TokenBudget
from vnp_lib.model import PackedBatch, split_rows
from vnp_lib.plan import (
    MEAN_OF_LAST_LAYER,
    RowLayout,
    checkpoint_path,
    model_tokens,
    offsets_of,
)
from vnp_lib.prefetch import Prefetcher
from vnp_lib.software import Software

# The batch_idx of the result with the rows that earlier attempts computed.
RESUMED = -1

_BATCHES_AHEAD = 4
_MAX_SHOWN = 10

# Ten thousand rows of per-residue outputs may not fit into memory, so that a checkpoint is also
# written at this size.
_MAX_UNSAVED_BYTES = 256 * 1024**2


@dataclass(frozen=True, slots=True, kw_only=True)
class InferenceResult:
    """The rows of one batch, or, with batch_idx `RESUMED`, the rows of earlier checkpoints."""

    sequence_ids: tuple[str, ...]  # B

    # On the CPU, float32 (B, W), or end to end; row i belongs to sequence_ids[i].
    embeddings: Tensor

    batch_idx: int
    num_tokens: int = 0  # tokens that the model computed
    num_queued: int = 0  # batches that are read and wait for the model


@dataclass(frozen=True, slots=True, kw_only=True)
class InferenceOptions:
    """Options of an `AsyncInferenceRunner` beyond those of VirNucPro's.

    Args:
        budget: Largest number of tokens in a forward pass. A batch that does not fit into memory
            is computed in pieces.
        layout: The outputs in a row; by default the mean of the highest layer that the model
            returns.
        recompute: Computes the row of one sequence, whose row was not finite, more exactly.
        exact_rows: Rows in float32, (W,), by ordinal. The checkpoints record how far the rows of
            the same sequences differ from them.
    """

    budget: TokenBudget = field(default_factory=TokenBudget)
    layout: RowLayout = MEAN_OF_LAST_LAYER
    recompute: Callable[[PackedBatch], Tensor] | None = None
    exact_rows: Mapping[int, NDArray[np.float32]] = field(default_factory=dict)


class AsyncInferenceRunner:
    """Embeds batches on one device, with checkpoints in `checkpoint_dir/shard_{rank}/`.

    Args:
        model: A model on `device`, in eval mode, with `forward_packed`, `forward` for padded
            batches, or both.
        device: The device of the model.
        enable_streams: On a GPU, copy the rows of a batch while the next batch is computed.
        checkpoint_dir: Directory of the checkpoints of all shards; None writes none.
        rank: Number of the shard.
        checkpoint_seq_threshold: Write a checkpoint after this number of sequences.
        checkpoint_time_threshold: Write a checkpoint after this number of seconds.
        manifest: Manifest that records the checkpoints.
        input_fingerprint: Fingerprint of the run: recorded in every checkpoint, and required of
            those that are resumed.
        model_config_hash: Digest of the weights, recorded in every checkpoint.
        options: Further options.
    """

    def __init__(
        self,
        model: PackedModel,
        device: torch.device | str,
        enable_streams: bool = True,
        checkpoint_dir: Path | None = None,
        rank: int = 0,
        checkpoint_seq_threshold: int = DEFAULT_SEQ_THRESHOLD,
        checkpoint_time_threshold: float = DEFAULT_TIME_THRESHOLD_S,
        manifest: CheckpointManifest | None = None,
        input_fingerprint: str = "",
        model_config_hash: str = "",
        *,
        options: InferenceOptions | None = None,
    ) -> None:
        if rank < 0:
            raise ValueError(f"rank must be non-negative, and is {rank}")
        device = torch.device(device)
        options = options or InferenceOptions()
        self._executor = BatchExecutor(
            model,
            device,
            budget=options.budget,
            layout=options.layout,
            recompute=options.recompute,
        )
        self._options = options
        self._batches_in_flight = 1 if enable_streams and device.type == "cuda" else 0
        self._checkpoint_dir = checkpoint_dir
        self._rank = rank
        self._trigger = CheckpointTrigger(checkpoint_seq_threshold, checkpoint_time_threshold)
        self._manifest = manifest
        self._metadata = {
            "fingerprint": input_fingerprint,
            "model_config_hash": model_config_hash,
            **Software.on(device).to_metadata(),
        }

    def run(
        self,
        dataloader: Iterable[PackedBatch | Mapping[str, Any]],
        progress_callback: Callable[[int, int], None] | None = None,
        force_restart: bool = False,
    ) -> Iterator[InferenceResult]:
        """Embed the batches of a loader, except the rows in earlier checkpoints of this rank.

        Args:
            dataloader: Packed batches, or dicts with `input_ids`, `sequence_ids` and, if they are
                packed, `cu_seqlens` and `max_seqlen`. Each run needs the same rows in the same
                order.
            progress_callback: Called with (batch_idx, number of sequences) after each batch.
            force_restart: Move earlier checkpoints away and compute everything.

        Yields:
            The resumed rows, if any, in one result with batch_idx `RESUMED`; then each batch.

        Raises:
            BatchFailedError: The model failed on a batch. If an embedding is not finite, the cause
                is a NumericalInstabilityError. Earlier batches are in a checkpoint.
            SequenceTooLargeError: Sequences do not fit into memory. All others are computed, and
                in a checkpoint.
            StorageError: A checkpoint could not be written.
        """
        resumed_ids: list[str] = []
        next_checkpoint = 0
        if self._checkpoint_dir is not None:
            resumed_ids, rows, next_checkpoint, _ = resume_from_checkpoints(
                self._checkpoint_dir,
                self._rank,
                force_restart=force_restart,
                manifest=self._manifest,
                fingerprint=self._metadata["fingerprint"] or None,
            )
            if rows is not None:
                yield InferenceResult(
                    sequence_ids=tuple(resumed_ids),
                    embeddings=torch.from_numpy(rows),
                    batch_idx=RESUMED,
                )
        batches = without_done(numbered_batches(dataloader), resumed_ids)
        for result in self.embed(batches, next_checkpoint=next_checkpoint):
            if progress_callback is not None:
                progress_callback(result.batch_idx, len(result.sequence_ids))
            yield result

    def embed(
        self,
        batches: Iterable[PackedBatch],
        *,
        next_checkpoint: int = 0,
        callbacks: Callbacks | None = None,
    ) -> Generator[InferenceResult, None, None]:
        """Embed batches and write checkpoints of whole batches, numbered from `next_checkpoint`.

        Computed rows are durable when the loop has ended, for whatever reason it ends.

        Raises:
            BatchFailedError, SequenceTooLargeError, StorageError: As `run`.
        """
        callbacks = callbacks or Callbacks()
        too_large: list[PackedBatch] = []
        ahead = Prefetcher(batches, _BATCHES_AHEAD)
        with closing(iter(ahead)) as read, self._checkpoints(next_checkpoint, callbacks) as keep:
            for embedded in self._embedded_batches(read, callbacks):
                if embedded.too_large is not None:
                    too_large.append(embedded.too_large)
                if embedded.not_finite is not None:
                    with attribute_errors_to(embedded.not_finite):
                        callbacks.on_not_finite(embedded.not_finite)
                num_tokens = 0
                if (batch := embedded.batch) is not None:
                    keep(batch, embedded.rows)
                    num_tokens = model_tokens(batch.lengths, self._options.layout.long_policy)
                yield InferenceResult(
                    sequence_ids=batch.sequence_ids if batch else (),
                    embeddings=embedded.rows,
                    batch_idx=embedded.batch_idx,
                    num_tokens=num_tokens,
                    num_queued=ahead.num_ready(),
                )
                if callbacks.should_stop():
                    return
        _require_none_too_large(too_large)

    def probe(self) -> None:
        """Raise DeviceFailedError if the device fails on a harmless sequence."""
        self._executor.probe()

    def _embedded_batches(
        self, batches: Iterable[PackedBatch], callbacks: Callbacks
    ) -> Iterator[EmbeddedBatch]:
        in_flight: deque[LaunchedBatch] = deque()
        for batch in batches:
            callbacks.on_batch(batch)
            in_flight.append(self._executor.launch(batch))
            while len(in_flight) > self._batches_in_flight:
                yield self._executor.collect(in_flight.popleft())
        while in_flight:
            yield self._executor.collect(in_flight.popleft())

    @contextmanager
    def _checkpoints(
        self, next_checkpoint: int, callbacks: Callbacks
    ) -> Iterator[Callable[[PackedBatch, Tensor], None]]:
        """Yield a function that keeps the rows of a batch; write the last checkpoint on exit."""
        if self._checkpoint_dir is None:
            yield lambda batch, rows: None
            return
        with AsyncCheckpointWriter(manifest=self._manifest, rank=self._rank) as writer:
            unsaved = _UnsavedRows(
                writer=writer,
                path_of=partial(checkpoint_path, self._checkpoint_dir, self._rank),
                next_checkpoint=next_checkpoint,
                metadata=self._metadata,
                options=self._options,
                on_checkpoint=callbacks.on_checkpoint,
            )

            def keep(batch: PackedBatch, rows: Tensor) -> None:
                unsaved.add(batch, rows)
                is_due, reason = self._trigger.should_checkpoint(batch.num_sequences)
                if is_due or unsaved.size_bytes >= _MAX_UNSAVED_BYTES:
                    unsaved.write(reason or "size_threshold")
                    self._trigger.reset()

            self._trigger.reset()
            reason = "interrupted"
            try:
                yield keep
                reason = "final"
            finally:
                callbacks.on_saving()
                unsaved.write(reason)
                writer.wait_all()


def numbered_batches(loader: Iterable[PackedBatch | Mapping[str, Any]]) -> Iterator[PackedBatch]:
    """Number the batches of a loader, and their rows if the loader gives no ordinals."""
    first_ordinal = 0
    for batch_idx, item in enumerate(loader):
        batch = (
            item
            if isinstance(item, PackedBatch)
            else PackedBatch.from_mapping(item, batch_idx=batch_idx, first_ordinal=first_ordinal)
        )
        first_ordinal += batch.num_sequences
        yield batch


def without_done(batches: Iterable[PackedBatch], done_ids: Iterable[str]) -> Iterator[PackedBatch]:
    """Remove the rows that are done. An id that is done twice is removed at its first two rows."""
    left = Counter(done_ids)
    for batch in batches:
        keep = np.ones(batch.num_sequences, dtype=bool)
        for row, sequence_id in enumerate(batch.sequence_ids):
            if left[sequence_id] > 0:
                left[sequence_id] -= 1
                keep[row] = False
        if keep.any():
            yield batch if keep.all() else batch.select(keep)


def _require_none_too_large(batches: list[PackedBatch]) -> None:
    """Raise SequenceTooLargeError if there are sequences that did not fit into memory."""
    named = [
        f"{sequence_id!r} ({length:,} residues)"
        for batch in batches
        for sequence_id, length in zip(batch.sequence_ids, batch.lengths.tolist(), strict=True)
    ]
    if named:
        raise SequenceTooLargeError(
            f"{len(named)} sequences do not fit into the device's memory, each alone: "
            f"{listed(named, _MAX_SHOWN)}; use a device with more memory, or take them out"
        )


class _UnsavedRows:
    """Rows that are not in a checkpoint yet."""

    def __init__(
        self,
        *,
        writer: AsyncCheckpointWriter,
        path_of: Callable[[int], Path],
        next_checkpoint: int,
        metadata: Mapping[str, Any],
        options: InferenceOptions,
        on_checkpoint: Callable[[int, int, float], None],
    ) -> None:
        self._writer = writer
        self._path_of = path_of
        self._next_checkpoint = next_checkpoint
        self._metadata = metadata
        self._options = options
        self._on_checkpoint = on_checkpoint
        self._batches: list[PackedBatch] = []
        self._rows: list[Tensor] = []

    def add(self, batch: PackedBatch, rows: Tensor) -> None:
        self._batches.append(batch)
        # A copy, since the consumer of the results has the same tensor and may change it.
        self._rows.append(rows.clone())

    @property
    def size_bytes(self) -> int:
        return sum(rows.nbytes for rows in self._rows)

    def write(self, reason: str) -> None:
        """Pass all rows to the writer, as one checkpoint."""
        if not self._batches:
            return
        number, batches, rows = self._next_checkpoint, self._batches, self._rows
        self._next_checkpoint, self._batches, self._rows = number + 1, [], []
        layout, ordinals = self._options.layout, np.concatenate([each.ordinals for each in batches])
        compared = [
            comparison
            for batch, own in zip(batches, rows, strict=True)
            for comparison in compare(
                batch.ordinals,
                split_rows(own, layout, batch.lengths),
                self._options.exact_rows,
            )
        ]
        offsets: dict[str, Any] = {}
        if not layout.is_fixed:
            widths = layout.widths(np.concatenate([batch.lengths for batch in batches]))
            offsets["offsets"] = offsets_of(widths).tolist()
        written = self._writer.hand_over(
            self._path_of(number),
            rows,
            [sequence_id for batch in batches for sequence_id in batch.sequence_ids],
            {
                **self._metadata,
                **to_metadata(compared),
                **offsets,
                "ordinals": ordinals.tolist(),
                "batches": [batch.batch_idx for batch in batches],
                "reason": reason,
                # VirNucPro reads the next three.
                "trigger_reason": reason,
                "batch_idx": number,
                "num_sequences": ordinals.size,
            },
        )
        written.add_done_callback(lambda future: self._announce(future, number, ordinals.size))

    def _announce(self, written: Future[float], number: int, num_rows: int) -> None:
        if not written.cancelled() and written.exception() is None:
            self._on_checkpoint(number, num_rows, written.result())
