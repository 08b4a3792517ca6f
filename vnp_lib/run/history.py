"""The history of a shard's attempts: when each began, what it saved and how it ended.

`history.jsonl` in the shard's directory has one line for each of these. It is a record for people:
nothing is decided by it, no line is synced, and a line that cannot be written is dropped. A worker
process that was killed writes no last line; the manifest's failures then say how it ended.
"""

from __future__ import annotations

import os
import socket
import stat
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from itertools import pairwise
from pathlib import Path
from types import TracebackType
from typing import Annotated, Any, Literal, Self

import numpy as np
from pydantic import (
    AwareDatetime,
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    TypeAdapter,
)

from vnp_lib.checkpoint import CheckpointManifest
from vnp_lib.errors import StorageError
from vnp_lib.failures import classify_exception
from vnp_lib.formatting import utc_now
from vnp_lib.plan import RunPaths, RunPlan
from vnp_lib.storage import FileLock, read_marker

MAX_HISTORY_BYTES = 32 * 1024**2

_MAX_MESSAGE_CHARS = 300


class Ending(StrEnum):
    """How an attempt ended."""

    DONE = "done"  # no work of the shard is left
    STOPPED = "stopped"  # on request, with its work saved
    FAILED = "failed"
    LOST = "lost"  # killed, or its machine was lost: there is no last line
    RUNNING = "running"  # it has not ended


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointEntry:
    """A checkpoint that an attempt wrote."""

    at: datetime
    number: int
    rows: int
    tokens: int  # BOS and EOS included
    seconds: float  # since the previous one, or since the model was loaded

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / self.seconds if self.seconds > 0 else 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Attempt:
    """One worker process on one shard, as far as is known."""

    rank: int
    number: int | None  # from 1, over all runs on the directory
    device: str
    host: str
    pid: int
    started_at: datetime
    pending: int  # sequences left when it began
    checkpoints: tuple[CheckpointEntry, ...] = ()
    ended_at: datetime  # of its last line, if it was lost
    ending: Ending
    kind: str | None = None  # FailureKind, if it failed
    cause: str | None = None  # FailureCause
    message: str = ""

    @property
    def duration(self) -> timedelta:
        return max(self.ended_at - self.started_at, timedelta())


class AttemptHistory:
    """Writes the history of one attempt. An error in here never harms the attempt.

    An exception that leaves the context is recorded as the attempt's end.
    """

    def __init__(
        self,
        paths: RunPaths,
        rank: int,
        *,
        clock: Callable[[], datetime] = utc_now,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._paths = paths
        self._rank = rank
        self._clock = clock
        self._monotonic = monotonic
        self._is_started = False
        self._since_s = monotonic()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._is_started and isinstance(error, Exception):
            failure = classify_exception(error)
            self._append(
                _Ended,
                ending=Ending.FAILED,
                kind=failure.kind,
                cause=failure.cause,
                # JSON holds Unicode only, and the names of files may be anything.
                message=failure.message[:_MAX_MESSAGE_CHARS].encode("utf-8", "replace").decode(),
            )

    def started(self, *, device: str, pending: int) -> None:
        """Record the start, with the number and device that the manifest has, if readable."""
        recorded: dict[str, Any] = {}
        with suppress(StorageError, OSError):
            recorded = CheckpointManifest(self._paths.manifest).get_shard_status(self._rank) or {}
        number, name = recorded.get("attempts") or None, recorded.get("device") or device
        self._is_started = True
        self._append(_Started, number=number, device=name, pending=pending)
        self.loaded()

    def loaded(self) -> None:
        """Count the seconds of the first checkpoint from now: loading a model is not computing."""
        self._since_s = self._monotonic()

    def checkpoint(self, plan: RunPlan, number: int, rows: int) -> None:
        """Record a durable checkpoint, with the tokens of the sequences in its marker."""
        now_s = self._monotonic()
        seconds, self._since_s = now_s - self._since_s, now_s
        with suppress(StorageError, OSError, LookupError):
            ordinals = np.array(
                read_marker(self._paths.checkpoint(self._rank, number))["ordinals"], dtype=np.int64
            )
            self._append(
                _Checkpoint,
                number=number,
                rows=rows,
                tokens=plan.num_tokens(ordinals),
                seconds=seconds,
            )

    def ended(self, ending: Ending) -> None:
        self._append(_Ended, ending=ending)

    def _append(self, line: type[_Line], **fields: Any) -> None:
        """Append a line; end a torn one first."""
        with suppress(OSError, ValueError):
            record = line(at=self._clock(), host=socket.gethostname(), pid=os.getpid(), **fields)
            data = record.model_dump_json(exclude_none=True).encode()
            fd = _open_plain(self._paths.history(self._rank), os.O_RDWR | os.O_APPEND | os.O_CREAT)
            try:
                size_bytes = os.fstat(fd).st_size
                is_torn = size_bytes > 0 and os.pread(fd, 1, size_bytes - 1) != b"\n"
                # One write, so that the lines of two processes do not mix.
                os.write(fd, b"\n" * is_torn + data + b"\n")
            finally:
                os.close(fd)


def read_attempts(
    paths: RunPaths, rank: int, failures: Sequence[dict[str, Any]] = ()
) -> list[Attempt]:
    """Read a shard's attempts in the order in which they began; none if there is no history.

    Torn and unknown lines are skipped, and so is all before the last 32 MiB.

    Args:
        paths: The paths of the run.
        rank: The shard.
        failures: Its failures in the manifest, which say how an attempt without a last line ended.
    """
    begun: list[_Begun] = []
    for line in _lines(paths.history(rank)):
        if isinstance(line, _Started):
            begun.append(_Begun(started=line))
        elif owner := next((each for each in reversed(begun) if each.is_of(line)), None):
            owner.add(line)
    attempts = [each.attempt(rank) for each in begun]
    if attempts:
        last = attempts[-1]
        holder = FileLock(paths.shard_lock(rank), purpose="").presumed_holder()
        is_held = holder is not None and (holder.host, holder.pid) == (last.host, last.pid)
        if last.ending == Ending.LOST and is_held:
            attempts[-1] = replace(last, ending=Ending.RUNNING)
    return _with_failures(attempts, failures)


class _Line(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore", allow_inf_nan=False)

    at: AwareDatetime
    host: str
    pid: int


class _Started(_Line):
    event: Literal["started"] = "started"
    number: int | None = None
    device: str
    pending: NonNegativeInt


class _Checkpoint(_Line):
    event: Literal["checkpoint"] = "checkpoint"
    number: NonNegativeInt
    rows: NonNegativeInt
    tokens: NonNegativeInt
    seconds: NonNegativeFloat


class _Ended(_Line):
    event: Literal["ended"] = "ended"
    ending: Ending
    kind: str | None = None
    cause: str | None = None
    message: str = ""


_ANY_LINE: TypeAdapter[_Started | _Checkpoint | _Ended] = TypeAdapter(
    Annotated[_Started | _Checkpoint | _Ended, Field(discriminator="event")]
)


@dataclass(slots=True)
class _Begun:
    """An attempt while its lines are being read."""

    started: _Started
    checkpoints: list[_Checkpoint] = field(default_factory=list)
    ended: _Ended | None = None

    def is_of(self, line: _Line) -> bool:
        return (line.host, line.pid) == (self.started.host, self.started.pid)

    def add(self, line: _Checkpoint | _Ended) -> None:
        if isinstance(line, _Ended):
            self.ended = line
        else:
            self.checkpoints.append(line)

    def attempt(self, rank: int) -> Attempt:
        started, ended = self.started, self.ended
        return Attempt(
            rank=rank,
            number=started.number,
            device=started.device,
            host=started.host,
            pid=started.pid,
            started_at=started.at,
            pending=started.pending,
            checkpoints=tuple(
                CheckpointEntry(
                    at=line.at,
                    number=line.number,
                    rows=line.rows,
                    tokens=line.tokens,
                    seconds=line.seconds,
                )
                for line in self.checkpoints
            ),
            ended_at=ended.at
            if ended
            else self.checkpoints[-1].at
            if self.checkpoints
            else started.at,
            ending=ended.ending if ended else Ending.LOST,
            kind=ended.kind if ended else None,
            cause=ended.cause if ended else None,
            message=ended.message if ended else "",
        )


def _with_failures(
    attempts: Sequence[Attempt], failures: Sequence[dict[str, Any]]
) -> list[Attempt]:
    """Add to each attempt the failure recorded between its last line and the next attempt."""
    timed: list[tuple[datetime, dict[str, Any]]] = []
    for failure in failures:
        with suppress(LookupError, TypeError, ValueError):
            time_ = datetime.fromisoformat(failure["at"])
            if time_.tzinfo:
                timed.append((time_, failure))
    completed = []
    for attempt, following in pairwise([*attempts, None]):
        assert attempt is not None
        until = following.started_at if following else datetime.max.replace(tzinfo=UTC)
        own = [failure for time_, failure in timed if attempt.ended_at <= time_ < until]
        if own:
            kind, cause, message = (own[0].get(name) for name in ("kind", "cause", "message"))
            attempt = replace(
                attempt,
                kind=str(kind or attempt.kind),
                cause=str(cause or attempt.cause),
                message=str(message or attempt.message),
            )
        completed.append(attempt)
    return completed


def _lines(path: Path) -> Iterator[_Started | _Checkpoint | _Ended]:
    with suppress(OSError):
        with open(_open_plain(path, os.O_RDONLY), "rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - MAX_HISTORY_BYTES))
            data = file.read(MAX_HISTORY_BYTES)
        for line in data.split(b"\n"):
            with suppress(ValueError):
                yield _ANY_LINE.validate_json(line)


def _open_plain(path: Path, flags: int) -> int:
    """Open a regular file, through no link and without blocking on a pipe; OSError otherwise."""
    fd = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o640)
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise OSError(f"{path} is not a regular file")
    return fd
