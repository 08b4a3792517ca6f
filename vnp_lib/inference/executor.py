"""Run batches on one device: split on out-of-memory, recompute non-finite embeddings in float32."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vnp_lib.errors import BatchFailedError, DeviceFailedError
from vnp_lib.failures import FailureKind, classify_exception
from vnp_lib.inference.token_budget import TokenBudget
from vnp_lib.model import (
    ESM2,
    RESIDUES,
    PackedBatch,
    Weights,
    join_windows,
    load_model,
    long_mean_of,
    mean_pool,
    pack_batch,
    representations_of,
    rows_of,
    split_rows,
    with_heads,
)
from vnp_lib.plan import MEAN_OF_LAST_LAYER, RowLayout, offsets_of

# The standard amino acids are the first of the residues in the alphabet.
_NUM_AMINO_ACIDS = 20

_CPU = torch.device("cpu")

logger = logging.getLogger(__name__)


class PackedModel(Protocol):
    """A model over packed batches."""

    def forward_packed(
        self, input_ids: Tensor, cu_seqlens: Tensor, max_seqlen: int
    ) -> Mapping[str, Any]:
        """Return `{"representations": {layer: states}}`, the states (T, D).

        If the method has a parameter `repr_layers`, it is always passed. A model with a `forward`
        of its own does not need this method.
        """


def embed_batch(
    model: PackedModel, batch: PackedBatch, layout: RowLayout = MEAN_OF_LAST_LAYER
) -> Tensor:
    """Compute the rows of a batch, float32, shaped as by `rows_of`, on the device of the batch.

    The model has to be on the same device. The default layout takes the highest layer that the
    model returns, so that a model of another project is served too.
    """
    if layout == MEAN_OF_LAST_LAYER:
        representations = representations_of(model, batch)
        return mean_pool(representations[max(representations)], batch.cu_seqlens)
    # The protocol does not name `repr_layers`, which is optional.
    options: dict[str, Any] = {"repr_layers": layout.layers}
    computed = model.forward_packed(batch.input_ids, batch.cu_seqlens, batch.max_seqlen, **options)
    return rows_of(computed, batch.cu_seqlens, layout, batch.shares)


def _divide_long(batch: PackedBatch, layout: RowLayout) -> PackedBatch:
    """Return a batch with its long sequences replaced as the long policy of the layout says."""
    long_mean = long_mean_of(layout.long_policy)
    return batch if long_mean is None else long_mean.divide(batch)


def _embed_at_once(
    model: PackedModel, batch: PackedBatch, device: torch.device, layout: RowLayout
) -> Tensor:
    """Compute the rows of a batch in one pass, and return them on the CPU."""
    divided = _divide_long(batch, layout)
    rows = embed_batch(model, divided.to(device), layout).cpu()
    return rows if divided is batch else join_windows(rows, divided.ordinals)


@dataclass(frozen=True, slots=True, kw_only=True)
class LaunchedBatch:
    """A batch whose rows are being copied to the CPU."""

    batch: PackedBatch

    # The same batch, or its windows.
    computed: PackedBatch

    # Of the computed sequences: False for one that does not fit into memory, even alone.
    fits: NDArray[np.bool_]

    # Of those that fit, on the CPU, float32 (fits.sum(), W), or end to end; complete once `arrived`
    # has happened.
    rows: Tensor

    arrived: torch.cuda.Event | None


@dataclass(frozen=True, slots=True, kw_only=True)
class EmbeddedBatch:
    """The result of a batch: each sequence is in one of three parts, None if the part is empty."""

    batch_idx: int
    batch: PackedBatch | None  # the sequences that have a row

    # On the CPU, float32 (B, W), or end to end; finite; row i belongs to sequence i of `batch`.
    rows: Tensor

    not_finite: PackedBatch | None
    too_large: PackedBatch | None


class ExactModel:
    """A model in float32 that is loaded when the first row is requested.

    Args:
        on_loading: Called before the model is loaded, which may take minutes.
        on_loaded: Called with the network.
    """

    def __init__(
        self,
        weights: Weights,
        *,
        device: torch.device = _CPU,
        layout: RowLayout = MEAN_OF_LAST_LAYER,
        on_loading: Callable[[], None] = lambda: None,
        on_loaded: Callable[[ESM2], None] = lambda network: None,
    ) -> None:
        self._weights = weights
        self._device = device
        self._layout = layout
        self._on_loading = on_loading
        self._on_loaded = on_loaded

    @torch.inference_mode()
    def __call__(self, batch: PackedBatch) -> Tensor:
        """Compute the rows of a batch, shaped as by `embed_batch`, and return them on the CPU."""
        return _embed_at_once(self._loaded, batch, self._device, self._layout)

    def load(self) -> None:
        """Load the model, unless it has been loaded."""
        _ = self._loaded

    @cached_property
    def _loaded(self) -> PackedModel:
        self._on_loading()
        network = load_model(self._weights, dtype=torch.float32, device=self._device)
        self._on_loaded(network)
        return with_heads(network, self._weights, self._layout.heads)


class BatchExecutor:
    """Computes batches with one model on one device.

    Args:
        model: In eval mode.
        device: The device of the model.
        budget: Largest number of tokens in a forward pass; adapts when memory runs out.
        layout: The outputs in a row.
        recompute: Computes the row, float32 on the CPU, of one sequence whose row was not finite,
            more exactly; by default the same model computes it alone.
    """

    def __init__(
        self,
        model: PackedModel,
        device: torch.device,
        *,
        budget: TokenBudget,
        layout: RowLayout = MEAN_OF_LAST_LAYER,
        recompute: Callable[[PackedBatch], Tensor] | None = None,
    ) -> None:
        self._model = model
        self._device = device
        self._budget = budget
        self._layout = layout
        self._recompute = recompute or (lambda alone: _embed_at_once(model, alone, device, layout))

    @torch.inference_mode()
    def launch(self, batch: PackedBatch) -> LaunchedBatch:
        """Start to compute a batch. On a GPU this returns before the rows are on the CPU.

        Raises:
            BatchFailedError: Any error except a lack of memory.
        """
        with attribute_errors_to(batch):
            computed = _divide_long(batch, self._layout)
            pieces = list(self._compute_pieces(computed))
            fits = [np.full(piece.num_sequences, rows is not None) for piece, rows in pieces]
            rows, arrived = _copy_to_cpu([rows for _, rows in pieces if rows is not None])
            return LaunchedBatch(
                batch=batch,
                computed=computed,
                fits=np.concatenate(fits),
                rows=rows,
                arrived=arrived,
            )

    @torch.inference_mode()
    def collect(self, launched: LaunchedBatch) -> EmbeddedBatch:
        """Wait for the rows of a batch. Rows that are not finite are computed again, each alone.

        Raises:
            BatchFailedError: Any error.
        """
        batch = launched.batch
        with attribute_errors_to(batch):
            if launched.arrived is not None:
                launched.arrived.synchronize()
            fits, rows = _join_windows_of(launched)
            fitting = _select_or_none(batch, fits)
            is_finite = np.ones(0, dtype=bool)
            if fitting is not None:
                is_finite, rows = self._recompute_non_finite(fitting, rows)
            return EmbeddedBatch(
                batch_idx=batch.batch_idx,
                batch=_select_or_none(batch, _nested_mask(fits, is_finite)),
                rows=rows,
                not_finite=_select_or_none(batch, _nested_mask(fits, ~is_finite)),
                too_large=_select_or_none(batch, ~fits),
            )

    def probe(self) -> None:
        """Compute a harmless sequence, so that no sequence is blamed for a broken device.

        Raises:
            DeviceFailedError: The device fails on that sequence too.
        """
        harmless = pack_batch(
            [RESIDUES[:_NUM_AMINO_ACIDS]], sequence_ids=["harmless"], ordinals=[0], batch_idx=0
        )
        try:
            embedded = self.collect(self.launch(harmless))
        except BatchFailedError as error:
            raise DeviceFailedError(
                f"{self._device} fails at a harmless sequence: {error}"
            ) from error.__cause__
        if embedded.batch is None:
            raise DeviceFailedError(
                f"{self._device} has no finite row, or no memory, for a harmless sequence"
            )

    def _recompute_non_finite(
        self, batch: PackedBatch, rows: Tensor
    ) -> tuple[NDArray[np.bool_], Tensor]:
        """Compute non-finite rows again. Return which are finite now, (B,), and only their rows."""
        if self._layout.is_fixed:
            is_finite = torch.isfinite(rows).all(dim=1).numpy()
        else:
            starts = offsets_of(self._layout.widths(batch.lengths))[:-1]
            is_finite = np.logical_and.reduceat(torch.isfinite(rows).numpy(), starts)
        bad = np.flatnonzero(~is_finite).tolist()
        if not bad:
            return is_finite, rows
        logger.warning(
            "%d rows of batch %d are not finite: computed again", len(bad), batch.batch_idx
        )
        views = split_rows(rows, self._layout, batch.lengths)
        for row in bad:
            alone = batch.select(np.arange(batch.num_sequences) == row)
            views[row].copy_(self._recompute(alone).flatten())
            is_finite[row] = torch.isfinite(views[row]).all()
        if is_finite.all():
            return is_finite, rows
        keep = is_finite
        if not self._layout.is_fixed:
            keep = np.repeat(keep, self._layout.widths(batch.lengths))
        return is_finite, rows[torch.from_numpy(keep)]

    def _compute_pieces(self, batch: PackedBatch) -> Iterator[tuple[PackedBatch, Tensor | None]]:
        """Compute a batch in pieces that fit into memory.

        Yields:
            Each piece with its rows on the device; None for a single sequence that does not fit.
        """
        if batch.num_sequences > 1 and batch.num_tokens > self._budget.tokens:
            for piece in batch.split(self._budget.tokens):
                yield from self._compute_pieces(piece)
            return
        rows = self._rows_if_they_fit(batch)
        if rows is None and batch.num_sequences > 1:
            self._budget.shrink(batch.num_tokens)
            yield from self._compute_pieces(batch)
            return
        if rows is not None:
            self._budget.grow()
        yield batch, rows

    def _rows_if_they_fit(self, batch: PackedBatch) -> Tensor | None:
        try:
            # The copy to the GPU is queued in the stream of the forward passes, behind the pass
            # before, and nothing waits for it. It is of 8 bytes per token: some microseconds.
            if self._device.type == "cuda":
                batch = batch.pinned()
            return embed_batch(self._model, batch.to(self._device, non_blocking=True), self._layout)
        except (RuntimeError, MemoryError) as error:
            if self._budget.is_pinned or classify_exception(error).kind != FailureKind.OOM:
                raise
            logger.warning("%d tokens do not fit into memory: %s", batch.num_tokens, error)
        # Not within the handler: the traceback of the error refers to the tensors of the pass.
        if self._device.type == "cuda":
            torch.cuda.empty_cache()
        return None


def _join_windows_of(launched: LaunchedBatch) -> tuple[NDArray[np.bool_], Tensor]:
    """Return which sequences fit, and their rows. A sequence fits if all of its windows do."""
    ordinals, fits, rows = launched.computed.ordinals, launched.fits, launched.rows
    if launched.computed is launched.batch:
        return fits, rows
    first_windows = np.flatnonzero(np.diff(ordinals, prepend=ordinals[0] - 1))
    all_fit = np.logical_and.reduceat(fits, first_windows)
    is_wanted = np.repeat(all_fit, np.diff(first_windows, append=fits.size))
    return all_fit, join_windows(rows[torch.from_numpy(is_wanted[fits])], ordinals[is_wanted])


def _select_or_none(batch: PackedBatch, mask: NDArray[np.bool_]) -> PackedBatch | None:
    if mask.all():
        return batch
    return batch.select(mask) if mask.any() else None


def _nested_mask(outer: NDArray[np.bool_], inner: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Apply `inner` to what `outer` selects: 1 0 1 1 and 0 1 1 give 0 0 1 1."""
    mask = np.zeros_like(outer)
    mask[outer] = inner
    return mask


@contextmanager
def attribute_errors_to(batch: PackedBatch) -> Iterator[None]:
    """Raise BatchFailedError from any error in the block."""
    try:
        yield
    except Exception as error:
        ordinal = int(batch.ordinals[0]) if batch.num_sequences == 1 else None
        raise BatchFailedError(batch.batch_idx, batch.sequence_ids, ordinal) from error


def _copy_to_cpu(pieces: list[Tensor]) -> tuple[Tensor, torch.cuda.Event | None]:
    """Copy rows to the CPU; from a GPU without waiting, with the event of their arrival."""
    rows = torch.cat(pieces) if pieces else torch.empty(0, 0)
    if rows.device.type != "cuda":
        return rows, None
    on_host = torch.empty(rows.shape, dtype=rows.dtype, pin_memory=True)
    on_host.copy_(rows, non_blocking=True)
    arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
    arrived.record()
    return on_host, arrived
