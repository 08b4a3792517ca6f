"""The loop on one device: batches in, rows out, checkpoints on the way.

Reading and tokenising run ahead in a thread, a GPU computes one batch while the rows of the one before come back,
and checkpoints are written by a thread of their own.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import closing, contextmanager
from dataclasses import dataclass
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
    blaming,
)
from vnp_lib.inference.precision import compare, to_metadata
from vnp_lib.inference.token_budget import TokenBudget
from vnp_lib.model import PackedBatch
from vnp_lib.plan import NUM_SPECIAL_TOKENS, RowLayout, checkpoint_path, model_tokens, offsets_of
from vnp_lib.prefetch import Prefetcher
from vnp_lib.software import Software

RESUMED = -1  # batch_idx of the result that holds what earlier attempts computed

_BATCHES_AHEAD = 4
_MAX_SHOWN = 10
_MOST_UNSAVED_BYTES = (
    256 * 1024**2
)  # ten thousand rows that are as long as their sequences may not fit into memory


@dataclass(frozen=True, slots=True, kw_only=True)
class InferenceResult:
    """The rows of one batch, or, under `RESUMED`, those that checkpoints held already."""

    sequence_ids: tuple[str, ...]  # B
    embeddings: (
        Tensor  # float32 (B, W), on the CPU, or end to end; row i belongs to sequence_ids[i]
    )
    batch_idx: int
    num_tokens: int = 0  # that went through the model
    num_queued: int = 0  # batches that were read ahead and waited for the model


class AsyncInferenceRunner:
    """Embeds batches on one device and keeps what it has computed in `checkpoint_dir/shard_{rank}/`.

    Args:
        model: A model on `device`, in eval mode, with `forward_packed`, `forward` for padded batches, or both.
        device: Where it is.
        enable_streams: On a GPU, fetch the rows of a batch while the next one is computed.
        checkpoint_dir: Folder of all shards' checkpoints; None keeps nothing.
        rank: Which shard this is.
        checkpoint_seq_threshold: Sequences after which a checkpoint is written.
        checkpoint_time_threshold: Seconds after which a checkpoint is written.
        manifest: Where finished checkpoints are recorded.
        input_fingerprint: Fingerprint of the run; in every checkpoint, and asked of those that are resumed.
        model_config_hash: Digest of the weights; in every checkpoint.
        budget: Most tokens of a forward pass. A batch that does not fit into memory is computed in pieces.
        layout: What a row is; None: the mean of the highest layer that the model gives.
        exactly: Gives the row of a single sequence whose row was not finite, with more care.
        exact_rows: Rows in float32, (W,), by ordinal; how far ours are from them goes into the checkpoints.
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
        budget: TokenBudget | None = None,
        layout: RowLayout | None = None,
        exactly: Callable[[PackedBatch], Tensor] | None = None,
        exact_rows: Mapping[int, NDArray[np.float32]] | None = None,
    ) -> None:
        if rank < 0:
            raise ValueError(f"rank must be non-negative, and is {rank}")
        device = torch.device(device)
        self._executor = BatchExecutor(
            model, device, budget=budget or TokenBudget(), layout=layout, exactly=exactly
        )
        self._layout = layout
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
        self._exact_rows = exact_rows or {}

    def run(
        self,
        dataloader: Iterable[PackedBatch | Mapping[str, Any]],
        progress_callback: Callable[[int, int], None] | None = None,
        force_restart: bool = False,
    ) -> Iterator[InferenceResult]:
        """Embed what a loader gives, less what the checkpoints of this rank hold already.

        Args:
            dataloader: Packed batches, or dicts with `input_ids` and `sequence_ids` and, where they are packed,
                `cu_seqlens` and `max_seqlen`. The same rows in the same order at every run.
            progress_callback: Called with (batch_idx, number of sequences) after each batch.
            force_restart: Move earlier checkpoints aside and compute everything.

        Yields:
            First what was resumed, if anything, in one result with batch_idx `RESUMED`; then each batch.

        Raises:
            BatchFailedError: A batch that the model failed at; also a NumericalInstabilityError, for a row that is not
                finite, is its cause. What was computed before it is kept.
            SequenceTooLargeError: Sequences that do not fit into memory. All others are computed and kept.
            StorageError: A checkpoint that could not be written.
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

        However the loop ends, what was computed is durable when it has ended.

        Raises:
            BatchFailedError, SequenceTooLargeError, StorageError: As `run` does.
        """
        callbacks = callbacks or Callbacks()
        too_large: list[PackedBatch] = []
        ahead = Prefetcher(batches, _BATCHES_AHEAD)
        with closing(iter(ahead)) as read, self._keeping(next_checkpoint, callbacks) as keep:
            for embedded in self._embedded(read, callbacks):
                if embedded.too_large is not None:
                    too_large.append(embedded.too_large)
                if embedded.not_finite is not None:
                    with blaming(embedded.not_finite):
                        callbacks.on_not_finite(embedded.not_finite)
                if embedded.batch is not None:
                    keep(embedded.batch, embedded.rows)
                yield InferenceResult(
                    sequence_ids=embedded.batch.sequence_ids if embedded.batch else (),
                    embeddings=embedded.rows,
                    batch_idx=embedded.batch_idx,
                    num_tokens=self._model_tokens(embedded.batch) if embedded.batch else 0,
                    num_queued=ahead.num_ready(),
                )
                if callbacks.should_stop():
                    return
        _refuse(too_large)

    def probe(self) -> None:
        """Raise DeviceFailedError where the device fails at a harmless sequence."""
        self._executor.probe()

    def _model_tokens(self, batch: PackedBatch) -> int:
        if self._layout is None:
            return batch.num_tokens
        return model_tokens(batch.lengths, self._layout.long_policy)

    def _embedded(
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
    def _keeping(
        self, next_checkpoint: int, callbacks: Callbacks
    ) -> Iterator[Callable[[PackedBatch, Tensor], None]]:
        """Give a function that keeps a batch's rows; on the way out, for whatever reason, write what is left."""
        if self._checkpoint_dir is None:
            yield lambda batch, rows: None
            return
        with AsyncCheckpointWriter(manifest=self._manifest, rank=self._rank) as writer:
            unsaved = _Unsaved(
                writer=writer,
                directory=self._checkpoint_dir,
                rank=self._rank,
                next_checkpoint=next_checkpoint,
                metadata=self._metadata,
                layout=self._layout,
                exact_rows=self._exact_rows,
                on_checkpoint=callbacks.on_checkpoint,
            )

            def keep(batch: PackedBatch, rows: Tensor) -> None:
                unsaved.add(batch, rows)
                is_due, reason = self._trigger.should_checkpoint(batch.num_sequences)
                if is_due or unsaved.size_bytes >= _MOST_UNSAVED_BYTES:
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
    """Give each batch of a loader its number, and each row its position, where the loader does not say them."""
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
    """Leave out the rows that are done, an id that is done twice at its first two places."""
    left = Counter(done_ids)
    for batch in batches:
        keep = np.ones(batch.num_sequences, dtype=bool)
        for row, sequence_id in enumerate(batch.sequence_ids):
            if left[sequence_id] > 0:
                left[sequence_id] -= 1
                keep[row] = False
        if keep.any():
            yield batch if keep.all() else batch.select(keep)


def _refuse(too_large: list[PackedBatch]) -> None:
    """Raise SequenceTooLargeError where there is a sequence that did not fit into memory."""
    told = [
        f"{sequence_id!r} ({tokens - NUM_SPECIAL_TOKENS:,} residues)"
        for batch in too_large
        for sequence_id, tokens in zip(
            batch.sequence_ids, np.diff(batch.cu_seqlens.numpy()), strict=True
        )
    ]
    if told:
        raise SequenceTooLargeError(
            f"{len(told)} sequences do not fit into the device's memory, each alone: {listed(told, _MAX_SHOWN)}; "
            f"use a device with more memory, or take them out"
        )


class _Unsaved:
    """Rows that are in no checkpoint yet."""

    def __init__(
        self,
        *,
        writer: AsyncCheckpointWriter,
        directory: Path,
        rank: int,
        next_checkpoint: int,
        metadata: Mapping[str, Any],
        layout: RowLayout | None,
        exact_rows: Mapping[int, NDArray[np.float32]],
        on_checkpoint: Callable[[int, int, float], None],
    ) -> None:
        self._writer = writer
        self._directory = directory
        self._rank = rank
        self._next_checkpoint = next_checkpoint
        self._metadata = metadata
        self._layout = layout
        self._exact_rows = exact_rows
        self._on_checkpoint = on_checkpoint
        self._batches: list[PackedBatch] = []
        self._rows: list[Tensor] = []

    def add(self, batch: PackedBatch, rows: Tensor) -> None:
        self._batches.append(batch)
        self._rows.append(rows.clone())  # whoever takes the results of the loop has the same tensor

    @property
    def size_bytes(self) -> int:
        return sum(rows.nbytes for rows in self._rows)

    def write(self, reason: str) -> None:
        """Hand what there is to the writer, as one checkpoint."""
        if not self._batches:
            return
        number, batches, rows = self._next_checkpoint, self._batches, self._rows
        self._next_checkpoint, self._batches, self._rows = number + 1, [], []
        ordinals = np.concatenate([batch.ordinals for batch in batches])
        compared = [
            comparison
            for batch, own in zip(batches, rows, strict=True)
            for comparison in compare(
                batch.ordinals, self._one_by_one(batch, own), self._exact_rows
            )
        ]
        written = self._writer.hand_over(
            checkpoint_path(self._directory, self._rank, number),
            rows,
            [sequence_id for batch in batches for sequence_id in batch.sequence_ids],
            {
                **self._metadata,
                **to_metadata(compared),
                **self._offsets(batches),
                "ordinals": ordinals.tolist(),
                "batches": [batch.batch_idx for batch in batches],
                "reason": reason,
                "trigger_reason": reason,  # these three by VirNucPro's names
                "batch_idx": number,
                "num_sequences": ordinals.size,
            },
        )
        written.add_done_callback(lambda future: self._announce(future, number, ordinals.size))

    def _one_by_one(
        self, batch: PackedBatch, rows: Tensor
    ) -> NDArray[np.float32] | list[NDArray[np.float32]]:
        if self._layout is None or self._layout.is_fixed:
            return rows.numpy()
        return np.split(rows.numpy(), offsets_of(self._layout.widths(batch.lengths))[1:-1])

    def _offsets(self, batches: Sequence[PackedBatch]) -> dict[str, Any]:
        """Where rows that lie end to end begin and end, for the checkpoint's metadata."""
        if self._layout is None or self._layout.is_fixed:
            return {}
        widths = self._layout.widths(np.concatenate([batch.lengths for batch in batches]))
        return {"offsets": offsets_of(widths).tolist()}

    def _announce(self, written: Future[float], number: int, num_rows: int) -> None:
        if not written.cancelled() and written.exception() is None:
            self._on_checkpoint(number, num_rows, written.result())
