"""The events that a worker process reports: their types, and whole, short lines on a pipe."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import threading
from typing import Any

import pytest

from vnp_lib.failures import Failure, FailureCause
from vnp_lib.run import events
from vnp_lib.run.events import (
    AttemptDone,
    AttemptFailed,
    AttemptStarted,
    BatchComputed,
    BatchStarted,
    CheckpointSaved,
    Event,
    EventReader,
    LogMessage,
    UnknownEvent,
    WorkerEvent,
    decode_event,
    encode_event,
)

DONE = AttemptDone()
FAILURE = Failure(cause=FailureCause.NATIVE_CRASH, message="SIGSEGV", batch_idx=3, ordinal=None)
LINES: list[tuple[WorkerEvent, dict[str, Any]]] = [
    (
        AttemptStarted(pending=3, done=4, tokens_done=90),
        {"event": "started", "pending": 3, "done": 4, "tokens_done": 90},
    ),
    (
        BatchStarted(batch_idx=7, ordinal=None, is_deferred=True, slowest_s=0.5),
        {
            "event": "computing",
            "batch_idx": 7,
            "ordinal": None,
            "is_deferred": True,
            "slowest_s": 0.5,
        },
    ),
    (
        BatchComputed(batch_idx=7, sequences=2, tokens=40, queued=4),
        {"event": "batch", "batch_idx": 7, "sequences": 2, "tokens": 40, "queued": 4},
    ),
    (
        CheckpointSaved(number=0, rows=10, seconds=0.25),
        {"event": "checkpoint", "number": 0, "rows": 10, "seconds": 0.25},
    ),
    (AttemptFailed(failure=FAILURE), {"event": "failed", "failure": FAILURE.to_json()}),
    (DONE, {"event": "done"}),
]


def read_all(*blocks: bytes, within_s: float = 5.0) -> list[Event]:
    """Read the events in these bytes, which arrive block by block."""

    async def read() -> list[Event]:
        stream = asyncio.StreamReader()
        reader = EventReader(stream)
        received = []
        for block in blocks:
            stream.feed_data(block)
        stream.feed_eof()
        while not reader.is_at_end:
            if (event := await reader.next(within_s=within_s)) is not None:
                received.append(event)
        return received

    return asyncio.run(read())


@pytest.mark.parametrize(("event", "record"), LINES, ids=lambda value: getattr(value, "name", ""))
def test_an_event_is_one_json_object(event: WorkerEvent, record: dict[str, Any]) -> None:
    """The lines on the pipe are an interface: names and keys, in this order."""
    assert encode_event(event) == json.dumps(record).encode() + b"\n"
    assert decode_event(encode_event(event)) == event


def test_every_event_has_a_name_of_its_own() -> None:
    kinds = [kind for kind in vars(events).values() if isinstance(kind, type)]
    kinds = [kind for kind in kinds if issubclass(kind, WorkerEvent) and kind is not WorkerEvent]
    assert {kind.name: kind for kind in kinds} == events._KINDS
    assert len(kinds) == len(events._KINDS)


def test_unknown_fields_are_ignored() -> None:
    line = b'{"event": "computing", "batch_idx": 7, "ordinal": 5, "since": "1.1"}'
    assert decode_event(line) == BatchStarted(batch_idx=7, ordinal=5)
    line = b'{"event": "checkpoint", "number": 0, "rows": 1, "seconds": 2}'
    assert decode_event(line) == CheckpointSaved(number=0, rows=1, seconds=2.0)


@pytest.mark.parametrize(
    "line",
    [
        b'{"event": "of a later version", "rows": 3}',
        b'{"event": "batch"}',
        b'{"event": "batch", "batch_idx": 0, "sequences": "3", "tokens": 90, "queued": 4}',
        b'{"event": "failed"}',
        b'{"event": "failed", "failure": "it"}',
        b'{"event": "failed", "failure": {"cause": "no such cause"}}',
    ],
)
def test_an_event_that_cannot_be_read_keeps_its_name(line: bytes) -> None:
    """It is a sign of life, and the last event that an error message quotes."""
    assert decode_event(line) == UnknownEvent(name=json.loads(line)["event"])


def test_events_arrive_however_the_bytes_are_cut() -> None:
    sent = [
        AttemptStarted(pending=3, done=0, tokens_done=0),
        LogMessage(level=20, message="ä\n\udcff"),
    ]
    data = b"".join(map(encode_event, sent))
    assert read_all(*(data[i : i + 1] for i in range(len(data)))) == sent


@pytest.mark.parametrize(
    "stray",
    [
        b"libgomp: warning",
        b"[1, 2]",
        b'"started"',
        b'{"message": "no name"}',
        b'{"event": 7}',
        b"\xff\xfe\x00",
        b"",
        b"[" * 100_000,
        b'{"event": "batch"}{"event": "batch"}',
    ],
)
def test_a_line_that_is_not_an_event_is_logged(stray: bytes) -> None:
    """Whoever wrote it: a library in C, or two threads at once."""
    first, second = read_all(stray + b"\n" + encode_event(DONE))
    assert isinstance(first, LogMessage)
    assert first.message.startswith("the worker process wrote: ")
    assert len(first.message) < 1100
    assert second == DONE


def test_the_beginning_of_an_endless_line_is_logged() -> None:
    """The rest is skipped, and the next event is read."""
    huge, done = b"x" * 2**20, encode_event(DONE)
    received = read_all(huge, huge, huge, b"x\n" + done + done)
    assert [event.name for event in received] == ["log", "done", "done"]


def test_half_a_line_at_the_end_is_not_an_event() -> None:
    computed = BatchComputed(batch_idx=0, sequences=1, tokens=9, queued=0)
    assert read_all(encode_event(computed) + b'{"event": "do') == [computed]


def test_an_event_that_comes_after_the_timeout_is_not_lost() -> None:
    async def read() -> list[Any]:
        stream = asyncio.StreamReader()
        reader = EventReader(stream)
        line = encode_event(DONE)
        stream.feed_data(line[:5])
        first = await reader.next(within_s=0.01)
        stream.feed_data(line[5:])
        return [first, await reader.next(within_s=5.0), reader.is_at_end]

    assert asyncio.run(read()) == [None, DONE, False]


def test_only_a_long_event_is_shortened() -> None:
    """Here, 40 ids of a megabyte each, in the failure that names them."""
    ids = [chr(97 + i) * 2**20 for i in range(40)]
    failure = Failure(
        cause=FailureCause.UNKNOWN, message="m" * 10**6, batch_idx=3, sequence_ids=tuple(ids)
    )
    line = encode_event(AttemptFailed(failure=failure))
    assert len(line) < 16 * 1024
    record = json.loads(line)["failure"]
    assert record["batch_idx"] == 3
    assert [each[:2] for each in record["sequence_ids"]] == [each[:2] for each in ids[:20]]
    short = LogMessage(level=20, message="m" * 10_000)
    assert decode_event(encode_event(short)) == short


def run_sender(code: str, **options: Any) -> subprocess.Popen[bytes]:
    begin = (
        "import json, sys, threading, time\n"
        "from vnp_lib.run.events import EventStream, LogMessage\n"
    )
    return subprocess.Popen([sys.executable, "-c", begin + code], stdout=subprocess.PIPE, **options)


def test_lines_of_several_threads_do_not_mix() -> None:
    """Lines are longer than what a pipe takes at once, and the reader is slow."""
    code = """
events = EventStream()
def send(name):
    for number in range(50):
        events.send(LogMessage(level=number, message=name * 14000))
threads = [threading.Thread(target=send, args=(name,)) for name in "abcd"]
for thread in threads: thread.start()
for thread in threads: thread.join()
print("a stray print")
"""
    with run_sender(code, stderr=subprocess.DEVNULL) as process:
        assert process.stdout is not None
        records = [json.loads(line) for line in process.stdout]
    assert process.returncode == 0
    assert len(records) == 200
    for name in "abcd":
        own = [record for record in records if record["message"] == name * 14000]
        assert [record["level"] for record in own] == list(range(50))


@pytest.mark.parametrize("is_closed", [False, True], ids=["does not read", "is gone"])
def test_a_parent_that_reads_nothing_does_not_block_saving(is_closed: bool) -> None:
    code = """
import signal
signal.signal(signal.SIGTERM, lambda *_: stop.set())
stop = threading.Event()
events = EventStream(is_stopping=stop.is_set)
print("ready", file=sys.stderr, flush=True)
for number in range(2000):
    events.send(LogMessage(level=20, message="x" * 1000))
stop.wait()
print("saved", file=sys.stderr)
"""
    with run_sender(code, stderr=subprocess.PIPE) as process:
        assert process.stderr is not None
        assert process.stdout is not None
        process.stderr.readline()
        if is_closed:
            process.stdout.close()
        threading.Event().wait(0.3)
        process.terminate()
        assert process.stderr.read() == b"saved\n"
        assert process.wait(timeout=60) == 0
