"""The rows of a batch from a model on a device: in pieces where memory runs out, once more where a row is not finite."""

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
from vnp_lib.plan import RowLayout, offsets_of

_NUM_AMINO_ACIDS = 20  # the first of the letters
_CPU = torch.device("cpu")

logger = logging.getLogger(__name__)


class PackedModel(Protocol):
    """What is needed of a model."""

    def forward_packed(
        self, input_ids: Tensor, cu_seqlens: Tensor, max_seqlen: int
    ) -> Mapping[str, Any]:
        """Give `{"representations": {layer: states}}`, the states (T, D).

        A model that takes `repr_layers` too is always told them. One with a `forward` of its own need not have this method.
        """


def embed_batch(model: PackedModel, batch: PackedBatch, layout: RowLayout | None = None) -> Tensor:
    """The rows of a batch's sequences, float32, as `rows_of` gives them. Model and batch are on one device.

    Without a layout they are the mean over the residues of the highest layer that the model gives, (B, D).
    """
    if layout is None:
        representations = representations_of(model, batch)
        return mean_pool(representations[max(representations)], batch.cu_seqlens)
    asked: dict[str, Any] = {"repr_layers": layout.layers}
    computed = model.forward_packed(batch.input_ids, batch.cu_seqlens, batch.max_seqlen, **asked)
    return rows_of(computed, batch.cu_seqlens, layout, batch.shares)


def _divided(batch: PackedBatch, layout: RowLayout | None) -> PackedBatch:
    """What is computed in the place of a batch: windows in the place of its long sequences, where that is how it is done."""
    long_mean = long_mean_of(layout.long_policy) if layout is not None else None
    return batch if long_mean is None else long_mean.divide(batch)


def _embed_at_once(
    model: PackedModel, batch: PackedBatch, device: torch.device, layout: RowLayout | None
) -> Tensor:
    """The rows of a batch's sequences, on the CPU, in one pass."""
    divided = _divided(batch, layout)
    rows = embed_batch(model, divided.to(device), layout).cpu()
    return rows if divided is batch else join_windows(rows, divided.ordinals)


@dataclass(frozen=True, slots=True, kw_only=True)
class LaunchedBatch:
    """A batch whose rows are on their way to the CPU."""

    batch: PackedBatch
    computed: PackedBatch  # the same, or with windows in the place of its sequences
    fits: NDArray[np.bool_]  # of these: False for one that does not fit into memory, even alone
    rows: Tensor  # of those that fit, on the CPU, float32 (fits.sum(), W), or end to end; complete once `arrived`
    arrived: torch.cuda.Event | None


@dataclass(frozen=True, slots=True, kw_only=True)
class EmbeddedBatch:
    """What a batch has come to: each of its sequences is in one of three. None stands for no sequence."""

    batch_idx: int
    batch: PackedBatch | None  # those that have a row
    rows: Tensor  # on the CPU, float32 (B, W), or end to end; finite; row i belongs to the i-th sequence of `batch`
    not_finite: PackedBatch | None
    too_large: PackedBatch | None


class ExactModel:
    """A model in float32, loaded when it is first asked for a row.

    Args:
        on_loading: Called before it is loaded, which may take minutes.
        on_loaded: Called with the network.
    """

    def __init__(
        self,
        weights: Weights,
        *,
        device: torch.device = _CPU,
        layout: RowLayout | None = None,
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
        """The rows of a batch, as `embed_batch` gives them, on the CPU."""
        return _embed_at_once(self._loaded, batch, self._device, self._layout)

    def load(self) -> None:
        """Load the model, if it is not loaded yet."""
        _ = self._loaded

    @cached_property
    def _loaded(self) -> PackedModel:
        self._on_loading()
        network = load_model(self._weights, dtype=torch.float32, device=self._device)
        self._on_loaded(network)
        return with_heads(
            network,
            self._weights,
            self._layout.heads if self._layout is not None else (),
        )


class BatchExecutor:
    """A model on a device.

    Args:
        model: In eval mode.
        device: Where it is.
        budget: Most tokens of a forward pass; what is learned about memory is kept there.
        layout: What a row is; None: the mean of the highest layer that the model gives.
        exactly: Gives the row, float32 on the CPU, of a single sequence whose row was not finite, with more care; by default
            the same model computes it alone.
    """

    def __init__(
        self,
        model: PackedModel,
        device: torch.device,
        *,
        budget: TokenBudget,
        layout: RowLayout | None = None,
        exactly: Callable[[PackedBatch], Tensor] | None = None,
    ) -> None:
        self._model = model
        self._device = device
        self._budget = budget
        self._layout = layout
        self._exactly = exactly or (lambda alone: _embed_at_once(model, alone, device, layout))

    @torch.inference_mode()
    def launch(self, batch: PackedBatch) -> LaunchedBatch:
        """Begin with a batch. On a GPU its rows are still on their way when this returns.

        Raises:
            BatchFailedError: From whatever goes wrong, except that memory runs out.
        """
        with blaming(batch):
            computed = _divided(batch, self._layout)
            pieces = list(self._pieces(computed))
            fits = [np.full(piece.num_sequences, rows is not None) for piece, rows in pieces]
            rows, arrived = _fetch([rows for _, rows in pieces if rows is not None])
            return LaunchedBatch(
                batch=batch,
                computed=computed,
                fits=np.concatenate(fits),
                rows=rows,
                arrived=arrived,
            )

    @torch.inference_mode()
    def collect(self, launched: LaunchedBatch) -> EmbeddedBatch:
        """Wait for a batch's rows. Those that are not finite are computed once more, each alone.

        Raises:
            BatchFailedError: From whatever goes wrong.
        """
        batch = launched.batch
        with blaming(batch):
            if launched.arrived is not None:
                launched.arrived.synchronize()
            fits, rows = _joined(launched)
            fitting = _those(batch, fits)
            is_finite = self._mend(fitting, rows) if fitting is not None else np.ones(0, dtype=bool)
            return EmbeddedBatch(
                batch_idx=batch.batch_idx,
                batch=fitting if is_finite.all() else _those(batch, _within(fits, is_finite)),
                rows=rows if is_finite.all() else self._kept(fitting, rows, is_finite),
                not_finite=_those(batch, _within(fits, ~is_finite)),
                too_large=_those(batch, ~fits),
            )

    def probe(self) -> None:
        """Compute a harmless sequence, before one that may be is blamed for what the device does.

        Raises:
            DeviceFailedError: The device fails at that too.
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

    def _mend(self, batch: PackedBatch, rows: Tensor) -> NDArray[np.bool_]:
        """Compute rows that are not finite once more, in place, and say which are finite now, (B,)."""
        is_finite = self._are_finite(batch, rows)
        bad = np.flatnonzero(~is_finite).tolist()
        if not bad:
            return is_finite
        logger.warning(
            "%d rows of batch %d are not finite: computed again", len(bad), batch.batch_idx
        )
        views = split_rows(rows, self._widths(batch))
        for row in bad:
            views[row].copy_(
                self._exactly(batch.select(np.arange(batch.num_sequences) == row)).flatten()
            )
            is_finite[row] = torch.isfinite(views[row]).all()
        return is_finite

    def _are_finite(self, batch: PackedBatch, rows: Tensor) -> NDArray[np.bool_]:
        if rows.dim() == 2:
            return torch.isfinite(rows).all(dim=1).numpy()
        starts = offsets_of(self._widths(batch))[:-1]
        return np.logical_and.reduceat(torch.isfinite(rows).numpy(), starts)

    def _kept(self, batch: PackedBatch | None, rows: Tensor, keep: NDArray[np.bool_]) -> Tensor:
        assert batch is not None  # or there is no row that could go
        is_kept = keep if rows.dim() == 2 else np.repeat(keep, self._widths(batch))
        return rows[torch.from_numpy(is_kept)]

    def _widths(self, batch: PackedBatch) -> NDArray[np.int64]:
        """Of rows that lie end to end; others need none."""
        lengths = batch.lengths
        return self._layout.widths(lengths) if self._layout is not None else np.zeros_like(lengths)

    def _pieces(self, batch: PackedBatch) -> Iterator[tuple[PackedBatch, Tensor | None]]:
        """The batch in pieces that fit, with their rows on the device; a single sequence that does not fit has None."""
        if batch.num_sequences > 1 and batch.num_tokens > self._budget.tokens:
            for piece in batch.split(self._budget.tokens):
                yield from self._pieces(piece)
            return
        rows = self._rows_if_they_fit(batch)
        if rows is None and batch.num_sequences > 1:
            self._budget.shrink(batch.num_tokens)
            yield from self._pieces(batch)
            return
        if rows is not None:
            self._budget.grow()
        yield batch, rows

    def _rows_if_they_fit(self, batch: PackedBatch) -> Tensor | None:
        try:
            return embed_batch(self._model, self._sent(batch), self._layout)
        except (RuntimeError, MemoryError) as error:
            if self._budget.is_pinned or classify_exception(error).kind != FailureKind.OOM:
                raise
            logger.warning("%d tokens do not fit into memory: %s", batch.num_tokens, error)
        if self._device.type == "cuda":
            torch.cuda.empty_cache()  # only here: the error's traceback held what did not fit
        return None

    def _sent(self, batch: PackedBatch) -> PackedBatch:
        """Have a batch copied to the device. A GPU does it after the batch before, and nobody waits for that.

        In the stream of the forward passes: the copy is of 8 bytes a token, which takes some microseconds.
        """
        if self._device.type == "cuda":
            batch = batch.pinned()
        return batch.to(self._device, non_blocking=True)


def _joined(launched: LaunchedBatch) -> tuple[NDArray[np.bool_], Tensor]:
    """Which sequences fit, and the rows of those, of what was computed in their place. All windows of one have to fit."""
    ordinals, fits, rows = launched.computed.ordinals, launched.fits, launched.rows
    if launched.computed is launched.batch:
        return fits, rows
    first_windows = np.flatnonzero(np.diff(ordinals, prepend=ordinals[0] - 1))
    all_fit = np.logical_and.reduceat(fits, first_windows)
    is_wanted = np.repeat(all_fit, np.diff(first_windows, append=fits.size))
    return all_fit, join_windows(rows[torch.from_numpy(is_wanted[fits])], ordinals[is_wanted])


def _those(batch: PackedBatch, mask: NDArray[np.bool_]) -> PackedBatch | None:
    if mask.all():
        return batch
    return batch.select(mask) if mask.any() else None


def _within(outer: NDArray[np.bool_], inner: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """The mask of those that `inner` picks out of what `outer` picks: 1 0 1 1 and 0 1 1 give 0 0 1 1."""
    mask = np.zeros_like(outer)
    mask[outer] = inner
    return mask


@contextmanager
def blaming(batch: PackedBatch) -> Iterator[None]:
    """Raise BatchFailedError from whatever goes wrong in the block."""
    try:
        yield
    except Exception as error:
        ordinal = int(batch.ordinals[0]) if batch.num_sequences == 1 else None
        raise BatchFailedError(batch.batch_idx, batch.sequence_ids, ordinal) from error


def _fetch(pieces: list[Tensor]) -> tuple[Tensor, torch.cuda.Event | None]:
    """Bring rows to the CPU, on a GPU without waiting for them."""
    rows = torch.cat(pieces) if pieces else torch.empty(0, 0)
    if rows.device.type != "cuda":
        return rows, None
    on_host = torch.empty(rows.shape, dtype=rows.dtype, pin_memory=True)
    on_host.copy_(rows, non_blocking=True)
    arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]  # torch ships no type for it
    arrived.record()
    return on_host, arrived
