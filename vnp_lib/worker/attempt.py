"""One attempt on one shard, in a worker process that `__main__` starts.

It reports its events as JSON lines on standard output and logs to standard error. On SIGTERM, or if
its parent is gone, it stops at the next batch boundary with everything that it computed on disk.
Before the first batch there is nothing to save, and SIGTERM simply ends it.
"""

from __future__ import annotations

import json
import logging
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from vnp_lib.checkpoint import Quarantine, QuarantinedSequence, too_many_non_finite
from vnp_lib.errors import ExitCode, InputError, LockTimeoutError
from vnp_lib.failures import Failure, FailureCause, classify_exception
from vnp_lib.inference import Callbacks, ExactRows, TokenBudget, read_batches, sampled_ordinals
from vnp_lib.plan import (
    MEAN_OF_LAST_LAYER,
    NUM_SPECIAL_TOKENS,
    OutputKind,
    RowLayout,
    RunPaths,
    RunPlan,
    load_plan,
)
from vnp_lib.run import (
    AttemptDone,
    AttemptFailed,
    AttemptHistory,
    AttemptStarted,
    AttemptStopped,
    BatchComputed,
    BatchStarted,
    CheckpointSaved,
    DeviceProbing,
    Ending,
    EventStream,
    ExactRowComputed,
    LayerStarted,
    LogMessage,
    ModelLoaded,
    ModelLoading,
    PendingWork,
    RunRecord,
    SavingStarted,
    SequenceQuarantined,
    ShardJob,
    TokenBudgetChanged,
    WaitingForShard,
    WorkerEvent,
    find_pending_work,
)
from vnp_lib.software import require_same_package
from vnp_lib.storage import FileLock, remove_orphaned_temporaries
from vnp_lib.streams import standard_streams
from vnp_lib.worker.stop_signals import Request, StopRequests

# torch takes seconds to import, and a worker process that waits for its shard does not need it.
if TYPE_CHECKING:
    from vnp_lib.inference import AsyncInferenceRunner, ExactModel
    from vnp_lib.model import ESM2, PackedBatch, Weights

logger = logging.getLogger(__name__)

_LOCK_POLL_S = 5.0
_SIGN_OF_LIFE_S = 1.0
_SLOWEST_CPU = 5e8  # operations per second: a hundredth of an idle core
_SLOWEST_GPU = 5e11  # operations per second: a tenth of the oldest GPU in use
_MAX_NON_FINITE_IN_A_ROW = 20  # sequences
_ORPHAN_LIMIT_S = 60
# Ten times the multiplications of the trial that finds the faster way to multiply.
_MIN_MULTIPLICATIONS_FOR_TRIAL = 200_000_000_000


class StopFlag:
    """The request to stop, set by SIGTERM, by the parent or by its end, and read by the loop.

    A SIGTERM that comes 8 s or more after the first ends the process at once, see `StopRequests`.
    The parent's request comes on its pipe before the parent's SIGTERM: however late that signal is,
    it is not a second request.
    """

    def __init__(self, *, clock: Callable[[], float] = time.monotonic) -> None:
        self.is_installed = False
        self._requests = StopRequests(clock=clock)
        self._is_set = False

    def install(self) -> None:
        def on_signal(signum: int, frame: FrameType | None) -> None:
            # The thread that reads the pipe may not have run yet.
            if _has_stop_request():
                self._requests.restart()
            if self._requests.on_signal() == Request.EXIT_NOW:
                os._exit(ExitCode.STOPPED)
            self._is_set = True

        signal.signal(signal.SIGTERM, on_signal)
        self.is_installed = True

    def set(self) -> None:
        """Record the request of the parent, or its end."""
        self._requests.restart()
        self._is_set = True

    def is_set(self) -> bool:
        return self._is_set


class Events(Protocol):
    """Where an attempt reports what it does."""

    def send(self, event: WorkerEvent) -> None: ...


class _EventLogHandler(logging.Handler):
    """Sends log records to the parent, which adds them to the log of the task run."""

    def __init__(self, events: EventStream) -> None:
        super().__init__()
        self._events = events

    def emit(self, record: logging.LogRecord) -> None:
        self._events.send(LogMessage(level=record.levelno, message=record.getMessage()))


class ShardAttempt:
    """Embeds the pending sequences of one shard into checkpoints."""

    def __init__(self, job: ShardJob, events: Events, stop: StopFlag) -> None:
        self._job = job
        self._events = events
        self._stop = stop
        self._paths = RunPaths(job.run_dir)
        self._lock = FileLock(self._paths.shard_lock(job.rank), purpose=f"embed shard {job.rank}")
        self._history = AttemptHistory(self._paths, job.rank)
        self._record: RunRecord | None = None

    def run(self) -> ExitCode:
        """Run the attempt under the lock of the shard.

        The lock is held until this process exits: the next attempt waits until all is saved.
        """
        self._wait_for_lock()
        return self.run_in_lock()

    def run_in_lock(self) -> ExitCode:
        """Run the attempt for a caller that holds the lock of the shard, and keeps it meanwhile."""
        with self._history:
            try:
                return self._embed_pending()
            finally:
                if self._record is not None:
                    self._record.close()

    def _embed_pending(self) -> ExitCode:
        plan = load_plan(self._paths)
        if plan.fingerprint != self._job.fingerprint:
            raise InputError(
                f"{self._paths.plan_json} now belongs to another run; start the run again"
            )
        remove_orphaned_temporaries(self._paths.shard_dir(self._job.rank))
        work = find_pending_work(
            plan,
            self._paths,
            self._job.rank,
            suspects=self._job.suspects,
            deferred=self._job.deferred,
        )
        self._events.send(
            AttemptStarted(
                pending=work.num_sequences, done=work.num_done, tokens_done=work.tokens_done
            )
        )
        self._history.started(device=self._job.device, pending=work.num_sequences)
        if work.batches:
            runner = self._load_runner(plan, work)
            self._events.send(ModelLoaded())
            self._history.loaded()
            self._stop.install()
            if self._job.suspects or self._job.deferred:
                self._events.send(DeviceProbing())
                runner.probe()
            self._embed(runner, plan, work)
            if self._stop.is_set():
                self._history.ended(Ending.STOPPED)
                self._events.send(AttemptStopped())
                return ExitCode.STOPPED
        self._history.ended(Ending.DONE)
        self._events.send(AttemptDone())
        return ExitCode.DONE

    def _wait_for_lock(self) -> None:
        while True:
            try:
                return self._lock.acquire(timeout_s=_LOCK_POLL_S)
            except LockTimeoutError as error:
                logger.info("%s", error)
                self._events.send(WaitingForShard(message=str(error)))

    def _load_runner(self, plan: RunPlan, work: PendingWork) -> AsyncInferenceRunner:
        import torch

        from vnp_lib.inference import AsyncInferenceRunner, ExactModel, InferenceOptions
        from vnp_lib.model import load_model, with_heads

        job = self._job
        if job.num_threads is not None:
            torch.set_num_threads(job.num_threads)
        if job.is_deterministic:
            # `use_deterministic_algorithms` would import torch's compiler.
            torch.set_deterministic_debug_mode("warn")
        device = torch.device(job.device)
        is_exact = job.dtype == "float32"
        layout = self._layout(plan)
        weights = self._unchanged_weights(plan, layout.heads)
        liveness = LivenessReporter(self._events)
        watched: dict[str, Any] = {"on_loading": liveness.loading, "on_loaded": liveness.watch}
        exact_model = ExactModel(weights, device=device, layout=layout, **watched)
        exact_rows = {} if is_exact else self._exact_rows(plan, work, exact_model)
        if device.type == "cuda":
            # Release what the exact model used.
            torch.cuda.empty_cache()
        model = load_model(
            weights,
            dtype=getattr(torch, job.dtype),
            device=device,
            by_convolution=None if self._should_try_both_ways(work, weights) else True,
        )
        liveness.watch(model)
        self._record = RunRecord(
            self._paths.manifest,
            world_size=plan.num_shards,
            input_fingerprint=job.fingerprint,
            model_config_hash=job.weights_digest,
        )
        return AsyncInferenceRunner(
            with_heads(model, weights, layout.heads),
            device,
            enable_streams=not job.is_careful,
            checkpoint_dir=self._paths.checkpoints_dir,
            rank=job.rank,
            **_checkpoint_thresholds(job),
            manifest=self._record,
            input_fingerprint=job.fingerprint,
            model_config_hash=job.weights_digest,
            options=InferenceOptions(
                budget=TokenBudget(
                    plan.token_budget,
                    job.token_budget,
                    on_change=lambda tokens: self._events.send(TokenBudgetChanged(tokens=tokens)),
                    is_pinned=job.is_deterministic,
                ),
                layout=layout,
                recompute=None if is_exact else ExactModel(weights, layout=layout, **watched),
                exact_rows=exact_rows,
            ),
        )

    def _should_try_both_ways(self, work: PendingWork, weights: Weights) -> bool:
        """Whether a trial of the faster way to multiply pays off, and attempts may differ in it."""
        architecture = weights.architecture
        num_weights = 12 * architecture.num_layers * architecture.embed_dim**2
        num_multiplications = work.tokens_left * num_weights
        return (
            not self._job.is_deterministic and num_multiplications > _MIN_MULTIPLICATIONS_FOR_TRIAL
        )

    def _unchanged_weights(self, plan: RunPlan, heads: Sequence[OutputKind]) -> Weights:
        """Return the weights with which the run started; raise InputError if they have changed."""
        from vnp_lib.model import check_heads, resolve_weights

        job = self._job
        weights = resolve_weights(job.model, job.weights)
        if weights.digest != job.weights_digest:
            raise InputError(
                f"the weights of {job.model} ({job.weights}) have changed since the run started"
            )
        if check_heads(weights, heads) != plan.identity.get("contact_regression"):
            raise InputError(
                f"the contact regression of {job.model} has changed since the run started"
            )
        return weights

    def _layout(self, plan: RunPlan) -> RowLayout:
        """Return the layout of a row."""
        from vnp_lib.model import architecture_of

        architecture = architecture_of(self._job.model)
        layout = RowLayout.of_identity(plan.identity, embed_dim=architecture.embed_dim)
        mean_of_last = RowLayout.of_identity(
            {"layer": architecture.num_layers}, embed_dim=architecture.embed_dim
        )
        return MEAN_OF_LAST_LAYER if layout == mean_of_last else layout

    def _exact_rows(
        self, plan: RunPlan, work: PendingWork, model: ExactModel
    ) -> Mapping[int, NDArray[np.float32]]:
        """Embed this shard's part of the sample in float32, before the run's model uses the memory.

        Each sequence is reported like a batch, so that it is accused if it crashes the process. An
        error here has no consequence: the sequence is computed again in its batch.
        """
        sample = sampled_ordinals(plan)
        batches_of_one = [
            (batch_idx, ordinals[place : place + 1])
            for batch_idx, ordinals in work.batches
            for place in np.flatnonzero(np.isin(ordinals, sample))
        ]
        rows = ExactRows(self._paths.shard_dir(self._job.rank))
        try:
            if batches_of_one:
                model.load()
        except Exception as error:
            # Its float32 weights may not fit into the memory of the device.
            logger.warning("no embedding is compared with float32: %s", error)
            return rows
        for batch in read_batches(plan, batches_of_one):
            ordinal = int(batch.ordinals[0])
            self._events.send(_batch_started(self._job, batch))
            try:
                rows.keep(ordinal, model(batch).flatten().numpy())
            except Exception as error:
                logger.warning("%r is not compared with float32: %s", batch.sequence_ids[0], error)
            self._events.send(ExactRowComputed(ordinal=ordinal))
        return rows

    def _embed(self, runner: AsyncInferenceRunner, plan: RunPlan, work: PendingWork) -> None:
        callbacks = _AttemptCallbacks(self._job, plan, self._events, self._stop, self._history)
        batches = read_batches(plan, work.batches)
        with closing(
            runner.embed(batches, next_checkpoint=work.next_checkpoint, callbacks=callbacks)
        ) as results:
            for result in results:
                self._events.send(
                    BatchComputed(
                        batch_idx=result.batch_idx,
                        sequences=len(result.sequence_ids),
                        tokens=result.num_tokens,
                        queued=result.num_queued,
                    )
                )
                if result.sequence_ids:
                    callbacks.quarantine_non_finite()
                callbacks.require_finite_rows()
        if not self._stop.is_set():
            callbacks.quarantine_non_finite()


class LivenessReporter:
    """Reports that a forward pass is running, at each layer, but at most once per second.

    On a GPU layers are only launched: there, the end of the batch is the sign of life.
    """

    def __init__(self, events: Events, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._events = events
        self._clock = clock
        self._sent_at_s = clock()

    def watch(self, network: ESM2) -> None:
        """Report the layers of a network from now on."""

        def on_layer(module: object, inputs: object) -> None:
            now_s = self._clock()
            if now_s - self._sent_at_s >= _SIGN_OF_LIFE_S:
                self._sent_at_s = now_s
                self._events.send(LayerStarted())

        for layer in network.layers:
            layer.register_forward_pre_hook(on_layer)

    def loading(self) -> None:
        """Report that a model is being loaded: no protein is accused of the time that takes."""
        self._events.send(ModelLoading())


def _batch_started(job: ShardJob, batch: PackedBatch) -> BatchStarted:
    """Describe a batch that goes into the model: what to accuse, and the time that it may take."""
    ordinal = int(batch.ordinals[0]) if batch.num_sequences == 1 else None
    return BatchStarted(
        batch_idx=batch.batch_idx,
        ordinal=ordinal,
        is_deferred=ordinal in job.deferred,
        slowest_s=slowest_s(job.model, batch.lengths + NUM_SPECIAL_TOKENS, device=job.device),
    )


def slowest_s(model: str, seqlens: NDArray[np.int64], *, device: str) -> float:
    """Return the seconds between two signs of life on the slowest machine that is supported.

    On a CPU each layer is a sign of life, on a GPU each pass. The result has one decimal.

    Args:
        model: Its name in fair-esm.
        seqlens: Tokens of each sequence of the pass, (B,).
        device: "cpu" or "cuda".
    """
    from vnp_lib.model import architecture_of

    architecture = architecture_of(model)
    dim = architecture.embed_dim
    exact = seqlens.astype(np.float64)
    # Of a layer: its projections and its attention.
    operations = 24 * dim**2 * exact.sum() + 4 * dim * (exact**2).sum()
    if device == "cpu":
        return round(float(operations) / _SLOWEST_CPU, 1)
    return round(float(operations) * architecture.num_layers / _SLOWEST_GPU, 1)


class _AttemptCallbacks(Callbacks):
    """Reports events to the parent, and quarantines sequences without a finite embedding."""

    def __init__(
        self, job: ShardJob, plan: RunPlan, events: Events, stop: StopFlag, history: AttemptHistory
    ) -> None:
        self._job = job
        self._plan = plan
        self._events = events
        self._stop = stop
        self._history = history
        self._quarantine = Quarantine.of(plan, RunPaths(job.run_dir))
        # In a row: without a sequence in between that has a finite embedding.
        self._not_finite: list[QuarantinedSequence] = []

    def should_stop(self) -> bool:
        return self._stop.is_set()

    def on_batch(self, batch: PackedBatch) -> None:
        self._events.send(_batch_started(self._job, batch))

    def on_saving(self) -> None:
        self._events.send(SavingStarted())

    def on_checkpoint(self, number: int, rows: int, seconds: float) -> None:
        self._events.send(CheckpointSaved(number=number, rows=rows, seconds=seconds))
        self._history.checkpoint(self._plan, number, rows)

    def on_not_finite(self, batch: PackedBatch) -> None:
        if not self._job.quarantines:
            super().on_not_finite(batch)
        cause = FailureCause.NUMERICAL_INSTABILITY
        failure = Failure(
            cause=cause, message="its embedding is not finite, even if computed alone in float32"
        )
        self._not_finite += [
            QuarantinedSequence.of_failure(self._plan, each, failure, attempts=2)
            for each in batch.ordinals.tolist()
        ]

    def quarantine_non_finite(self) -> None:
        """Quarantine the sequences without a finite embedding.

        To be called only once another embedding is finite, or nothing is left to compute: if no
        embedding is finite any more, the device or the weights are at fault, and these sequences
        are to be tried again.
        """
        if not self._not_finite:
            return
        self._quarantine.add(*self._not_finite)
        for sequence in self._not_finite:
            self._events.send(SequenceQuarantined(id=sequence.id, message=sequence.message))
        self._not_finite = []

    def require_finite_rows(self) -> None:
        """Raise QuarantineFullError if too many sequences in a row have no finite embedding."""
        if len(self._not_finite) >= _MAX_NON_FINITE_IN_A_ROW:
            raise too_many_non_finite(
                f"{len(self._not_finite)} consecutive sequences", self._quarantine.path
            )


def _checkpoint_thresholds(job: ShardJob) -> dict[str, Any]:
    """Return the thresholds of a job; none for the defaults, which the environment may change."""
    from vnp_lib.checkpoint import DEFAULT_SEQ_THRESHOLD, DEFAULT_TIME_THRESHOLD_S

    thresholds = (job.checkpoint_seq_threshold, job.checkpoint_time_threshold)
    if thresholds == (DEFAULT_SEQ_THRESHOLD, DEFAULT_TIME_THRESHOLD_S):
        return {}
    return dict(
        zip(("checkpoint_seq_threshold", "checkpoint_time_threshold"), thresholds, strict=True)
    )


def main(arguments: Sequence[str]) -> int:
    """Run the attempt that a job file describes; the last event says what went wrong.

    Standard error is the log of the shard: an attempt does not fail because its disk is full.
    """
    with standard_streams():
        stop = StopFlag()
        events = EventStream(is_stopping=stop.is_set)
        logging.basicConfig(
            stream=sys.stderr,
            level=logging.INFO,
            format="%(asctime)s %(levelname)s %(name)s: %(message)s",
        )
        logging.getLogger("vnp_lib").addHandler(_EventLogHandler(events))
        threading.Thread(target=_watch_parent, args=(stop,), daemon=True).start()
        try:
            text = Path(arguments[0]).read_text(encoding="utf-8")
            # Checked first, since the other fields may be those of another version.
            require_same_package(json.loads(text).get("package"))
            job = ShardJob.model_validate_json(text)
            return ShardAttempt(job, events, stop).run()
        except Exception as error:
            # The outermost frame: any error is reported to the parent.
            logger.exception("the attempt failed")
            events.send(AttemptFailed(failure=classify_exception(error)))
            return ExitCode.FAILED


def _watch_parent(stop: StopFlag) -> None:
    """Stop if the parent requests it on standard input, or if that ends with the parent."""
    while True:
        select.select([0], [], [])
        # Before the request is taken out of the pipe, where the handler of SIGTERM looks for it.
        stop.set()
        # Not by sys.stdin: a daemon thread inside its lock aborts the interpreter's exit.
        request = os.read(0, 4096)
        if not stop.is_installed:
            # Nothing has been computed yet.
            os.kill(os.getpid(), signal.SIGTERM)
        if not request:
            break
    # In steps of a second, since this process may be stopped and continued in between.
    for _ in range(_ORPHAN_LIMIT_S):
        time.sleep(1.0)
    # It hangs, and no parent is left to notice.
    os._exit(ExitCode.STOPPED)


def _has_stop_request() -> bool:
    try:
        return bool(select.select([0], [], [], 0)[0])
    except (OSError, ValueError):
        # There is no standard input.
        return False


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
