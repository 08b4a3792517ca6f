"""The events of a worker process: their types, and how they pass a pipe as JSON lines."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import select
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Self, get_type_hints

from vnp_lib.failures import Failure

_MAX_LINE_BYTES = 16 * 1024  # of an event; texts in a longer one are cut
_MAX_TEXT_CHARS = 500
_MAX_ITEMS = 20
_MAX_UNREAD_BYTES = 2**20  # of a line that is not an event
_MAX_STRAY_BYTES = 1000  # of such a line, in the log
_POLL_MS = 500


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerEvent:
    """Base of all events. As JSON: an object with the name under `event`, and one key per field."""

    name: ClassVar[str]

    def to_json(self) -> dict[str, Any]:
        """Return the event as a JSON object."""
        return {"event": self.name} | {
            field.name: getattr(self, field.name) for field in fields(self)
        }

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> Self:
        """Read what `to_json` wrote, and ignore keys that are not fields.

        Raises:
            TypeError: A field is missing or has another type.
        """
        types = _FIELD_TYPES[cls.name]
        values = {name: record[name] for name in types if name in record}
        for name, value in values.items():
            if not isinstance(value, types[name]):
                raise TypeError(f"{cls.name}: {name} is {value!r}")
        return cls(**values)


@dataclass(frozen=True, slots=True, kw_only=True)
class WaitingForShard(WorkerEvent):
    """Another process holds the shard's lock."""

    name: ClassVar = "waiting"
    message: str


@dataclass(frozen=True, slots=True, kw_only=True)
class AttemptStarted(WorkerEvent):
    """The attempt holds the lock and knows its work."""

    name: ClassVar = "started"
    pending: int  # sequences to compute
    done: int  # sequences in checkpoints or in quarantine
    tokens_done: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelLoading(WorkerEvent):
    """A model is being loaded while batches are already announced."""

    name: ClassVar = "loading"


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelLoaded(WorkerEvent):
    """The model is on its device."""

    name: ClassVar = "loaded"


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceProbing(WorkerEvent):
    """The device computes a harmless sequence, before any that is suspected."""

    name: ClassVar = "probing"


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchStarted(WorkerEvent):
    """A batch goes into the model: if the process ends now, this batch is accused."""

    name: ClassVar = "computing"
    batch_idx: int
    ordinal: int | None  # of the only sequence of the batch; None if it has several
    is_deferred: bool = False  # an earlier attempt gave no sign of life at this sequence
    slowest_s: float = 0.0  # seconds to the next sign of life on the slowest supported machine


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerStarted(WorkerEvent):
    """A sign of life within a batch."""

    name: ClassVar = "alive"


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchComputed(WorkerEvent):
    """A batch has left the model."""

    name: ClassVar = "batch"
    batch_idx: int
    sequences: int
    tokens: int
    queued: int  # batches that wait for the model


@dataclass(frozen=True, slots=True, kw_only=True)
class ExactRowComputed(WorkerEvent):
    """A sequence of the sample has been computed in float32."""

    name: ClassVar = "exact_row"
    ordinal: int


@dataclass(frozen=True, slots=True, kw_only=True)
class SavingStarted(WorkerEvent):
    """Nothing is left in the model, and the last rows are being saved."""

    name: ClassVar = "saving"


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointSaved(WorkerEvent):
    """A checkpoint and its marker are on disk."""

    name: ClassVar = "checkpoint"
    number: int
    rows: int
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class SequenceQuarantined(WorkerEvent):
    """A sequence has no finite embedding and is in quarantine."""

    name: ClassVar = "quarantined"
    id: str
    message: str


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenBudgetChanged(WorkerEvent):
    """Memory ran out or is free again: another number of tokens per forward pass."""

    name: ClassVar = "token_budget"
    tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class AttemptStopped(WorkerEvent):
    """The attempt stopped on request, with all that it computed on disk."""

    name: ClassVar = "stopped"


@dataclass(frozen=True, slots=True, kw_only=True)
class AttemptDone(WorkerEvent):
    """Nothing of the shard is left to compute."""

    name: ClassVar = "done"


@dataclass(frozen=True, slots=True, kw_only=True)
class AttemptFailed(WorkerEvent):
    """The attempt ended by an exception."""

    name: ClassVar = "failed"
    failure: Failure

    def to_json(self) -> dict[str, Any]:
        return {"event": self.name, "failure": self.failure.to_json()}

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> Self:
        return cls(failure=Failure.from_json(record["failure"]))


@dataclass(frozen=True, slots=True, kw_only=True)
class LogMessage(WorkerEvent):
    """A log record, or a line that the worker process wrote and that is not an event."""

    name: ClassVar = "log"
    level: int
    message: str


@dataclass(frozen=True, slots=True, kw_only=True)
class UnknownEvent:
    """An event of another name, or one whose fields cannot be read: no more than a sign of life."""

    name: str


Event = WorkerEvent | UnknownEvent

_KINDS: dict[str, type[WorkerEvent]] = {
    kind.name: kind
    for kind in (
        WaitingForShard,
        AttemptStarted,
        ModelLoading,
        ModelLoaded,
        DeviceProbing,
        BatchStarted,
        LayerStarted,
        BatchComputed,
        ExactRowComputed,
        SavingStarted,
        CheckpointSaved,
        SequenceQuarantined,
        TokenBudgetChanged,
        AttemptStopped,
        AttemptDone,
        AttemptFailed,
        LogMessage,
    )
}


_FIELD_TYPES: dict[str, dict[str, Any]] = {
    name: {
        # A float without a fraction may be an integer in JSON.
        field.name: int | float if hints[field.name] is float else hints[field.name]
        for field in fields(kind)
    }
    for name, kind in _KINDS.items()
    for hints in [get_type_hints(kind)]
}


class EventStream:
    """Writes events to a copy of standard output, and redirects other output to standard error.

    Several threads may send: a line is never interleaved with another. If the parent is gone, or
    does not read while the worker is to stop, no more events are written: saving comes first.
    """

    def __init__(self, *, is_stopping: Callable[[], bool] = lambda: False) -> None:
        self._descriptor = os.dup(1)
        os.dup2(2, 1)
        os.set_blocking(self._descriptor, False)
        self._is_stopping = is_stopping
        self._is_broken = False
        self._lock = threading.Lock()

    def send(self, event: WorkerEvent) -> None:
        """Write one line."""
        line = encode_event(event)
        with self._lock:
            if not self._is_broken:
                self._is_broken = not self._write(line)

    def _write(self, line: bytes) -> bool:
        """Write a line and return whether all of it was written.

        After half a line, the reader could not read any that follow.
        """
        left = memoryview(line)
        poll = select.poll()
        poll.register(self._descriptor, select.POLLOUT)
        while left:
            try:
                left = left[os.write(self._descriptor, left) :]
            except BlockingIOError:
                if self._is_stopping() and not poll.poll(_POLL_MS):
                    return False
                poll.poll(_POLL_MS)
            except OSError:
                return False
        return True


def encode_event(event: WorkerEvent) -> bytes:
    """Return an event as a line of at most 16 KiB; if it is longer, cut texts and lists."""
    record = event.to_json()
    line = json.dumps(record).encode() + b"\n"
    if len(line) > _MAX_LINE_BYTES:
        line = json.dumps(_shortened(record)).encode() + b"\n"
    return line


def _shortened(value: object) -> object:
    match value:
        case str():
            return value if len(value) <= _MAX_TEXT_CHARS else value[:_MAX_TEXT_CHARS] + "..."
        case dict():
            return {key: _shortened(each) for key, each in value.items()}
        case list() | tuple():
            return [_shortened(each) for each in value[:_MAX_ITEMS]]
        case _:
            return value


class EventReader:
    """Reads a worker's events. A line that is not one, whatever wrote it, becomes a LogMessage."""

    def __init__(self, stream: asyncio.StreamReader) -> None:
        self._stream = stream
        self._unread = bytearray()
        self._is_skipping = False
        self.is_at_end = False

    async def next(self, *, within_s: float) -> Event | None:
        """Return the next event; None if none arrives in time, or at the end of the stream.

        Half a line at the end, as a killed writer leaves it, is not an event.
        """
        with suppress(TimeoutError):
            # What has been read when the timeout strikes stays in the buffers.
            async with asyncio.timeout(within_s):
                while True:
                    if (line := self._take_line()) is not None:
                        return decode_event(line)
                    if not (block := await self._stream.read(2**16)):
                        self.is_at_end = True
                        return None
                    self._unread += block
        return None

    def _take_line(self) -> bytes | None:
        """Take one line out of the buffer; of a line longer than 1 MiB, skip the rest."""
        end = self._unread.find(b"\n")
        if end < 0 and len(self._unread) <= _MAX_UNREAD_BYTES:
            return None
        line = bytes(self._unread[: end if end >= 0 else _MAX_UNREAD_BYTES])
        del self._unread[: end + 1 if end >= 0 else len(self._unread)]
        was_skipping, self._is_skipping = self._is_skipping, end < 0
        return self._take_line() if was_skipping else line


def decode_event(line: bytes) -> Event:
    """Read one line that a worker process wrote."""
    with suppress(ValueError, RecursionError):
        record = json.loads(line)
        if isinstance(record, dict) and isinstance(name := record.get("event"), str):
            with suppress(KeyError, TypeError, ValueError, AttributeError):
                return _KINDS[name].from_json(record)
            return UnknownEvent(name=name)
    stray = line[:_MAX_STRAY_BYTES].decode(errors="replace")
    return LogMessage(level=logging.INFO, message=f"the worker process wrote: {stray}")
