"""Keep a run's manifest in memory too: trouble with the file neither ends nor delays a run."""

from __future__ import annotations

import copy
import logging
import threading
import time
import uuid
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from vnp_lib.checkpoint import CheckpointManifest, CommittedCheckpoint, is_of_run
from vnp_lib.errors import StorageError

# For the file to be up to date, which takes milliseconds. The caller may be an event loop.
PATIENCE_S = 0.25
LOCK_TIMEOUT_S = 5.0
RETRY_S = 2.0

_MOST_WRITERS = 64

logger = logging.getLogger(__name__)

T = TypeVar("T")


class _Change(NamedTuple):
    number: int  # from 1, per writer
    apply: Callable[[dict[str, Any]], Any]


class RunRecord(CheckpointManifest):
    """A manifest whose changes are made in memory at once, and in the file as soon as possible.

    A lock that another process holds, a full, read-only or failing disk, and a damaged file are
    logged once. The changes wait in memory, and all readers of this object see them. A thread
    writes them in order and each exactly once: the file names the last change of each writer.
    """

    def __init__(
        self,
        manifest_path: Path,
        *,
        world_size: int,
        input_fingerprint: str,
        model_config_hash: str,
        clock: Callable[[], float] = time.time,
    ) -> None:
        super().__init__(manifest_path, clock=clock)
        self._writer = uuid.uuid4().hex[:12]
        self._changed = threading.Condition()
        self._known = self._new_state(world_size, input_fingerprint, model_config_hash)
        self._is_opened = False
        self._waiting: list[_Change] = []
        self._num_changes = 0
        self._thread: threading.Thread | None = None
        self._trouble: Exception | None = None
        # If the file is behind, no caller waits for it.
        self._is_behind = False
        self._is_closing = False

    def open_or_rebuild(
        self,
        world_size: int,
        input_fingerprint: str,
        model_config_hash: str,
        records: Iterable[CommittedCheckpoint],
    ) -> None:
        """As the manifest's. From now on a missing or damaged file is rebuilt from memory."""
        listed = list(records)
        found = self._state_to_keep(input_fingerprint, model_config_hash)
        with self._changed:
            self._known = self._fitted(
                found, world_size, input_fingerprint, model_config_hash, listed
            )
            self._is_opened = True

        def change(state: dict[str, Any]) -> None:
            kept = (
                copy.copy(state) if is_of_run(state, input_fingerprint, model_config_hash) else None
            )
            fitted = self._fitted(kept, world_size, input_fingerprint, model_config_hash, listed)
            state.clear()
            state.update(fitted)

        self._change(change)

    def close(self) -> None:
        """Wait until all changes are in the file, unless writing fails; log those that are not."""
        with self._changed:
            self._is_closing = True
            self._begin_to_write()
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._thread is None, timeout=LOCK_TIMEOUT_S + RETRY_S)
            if self._waiting:
                # What a worker has to record, its parent counts from the checkpoints.
                level = logging.WARNING if self._is_opened else logging.INFO
                logger.log(
                    level,
                    "%s lacks the last %d changes (%s): "
                    "the next run sets its counts from the checkpoints",
                    self.path,
                    len(self._waiting),
                    self._trouble or "writing them takes too long",
                )
            self._is_closing = False

    def _change(self, change: Callable[[dict[str, Any]], T]) -> T:
        result = change(self._read())
        with self._changed:
            self._num_changes += 1
            number = self._num_changes
            self._waiting.append(_Change(number, change))
            self._begin_to_write()
            self._changed.notify_all()
            if not self._is_behind:
                is_decided = self._changed.wait_for(
                    lambda: (
                        not self._waiting or self._waiting[0].number > number or self._is_behind
                    ),
                    PATIENCE_S,
                )
                self._is_behind = self._is_behind or not is_decided
        return result

    def _read(self) -> dict[str, Any]:
        """Return the state of the file, or its last known state, with the changes it lacks."""
        # Read before the file: a change that is written meanwhile is in both, and recognised by its
        # number.
        with self._changed:
            waiting, known = list(self._waiting), self._known
        try:
            state = super()._read()
        except (StorageError, OSError):
            state = copy.deepcopy(known)
        self._apply(waiting, state)
        return state

    def _begin_to_write(self) -> None:
        if self._waiting and self._thread is None:
            self._thread = threading.Thread(
                target=self._write_in_background, name="run-record", daemon=True
            )
            self._thread.start()

    def _write_in_background(self) -> None:
        while True:
            with self._changed:
                is_last_try = self._is_closing
            try:
                self._write_waiting()
            # The loop of a thread: the run continues, whatever it was.
            except Exception as error:
                with self._changed:
                    is_new = type(error) is not type(self._trouble)
                    self._trouble = error
                    self._is_behind = True
                    self._changed.notify_all()
                if is_new:
                    logger.warning(
                        "%s cannot be brought up to date: %s. The run continues; the changes are "
                        "kept in memory, and written as soon as possible",
                        self.path,
                        error,
                    )
            with self._changed:
                is_given_up = is_last_try and self._trouble is not None
                if is_given_up or not self._waiting:
                    self._thread = None
                    self._changed.notify_all()
                    return
                if self._trouble is not None and not self._is_closing:
                    self._changed.wait(RETRY_S)

    def _write_waiting(self) -> None:
        with self._changed:
            if not self._waiting:
                return
        with self._lock.held(timeout_s=LOCK_TIMEOUT_S):
            with self._changed:
                waiting, known = list(self._waiting), self._known
            try:
                state = super()._read()
            except StorageError:
                if not self._is_opened:
                    raise
                state = copy.deepcopy(known)
            self._apply(waiting, state)
            others = [each for each in state.get("writers", []) if each[0] != self._writer]
            state["writers"] = [*others, [self._writer, waiting[-1].number]][-_MOST_WRITERS:]
            self._write(state)
        with self._changed:
            self._known = state
            self._waiting = [
                change for change in self._waiting if change.number > waiting[-1].number
            ]
            if self._trouble is not None:
                logger.info("%s is up to date again", self.path)
            self._trouble = None
            self._is_behind = False
            self._changed.notify_all()

    def _apply(self, changes: Iterable[_Change], state: dict[str, Any]) -> None:
        num_applied = dict(map(tuple, state.get("writers", []))).get(self._writer, 0)
        for change in changes:
            if change.number > num_applied:
                try:
                    change.apply(state)
                # The file is another run's by now, and has no such shard.
                except ValueError as error:
                    logger.debug("%s: %s", self.path, error)
