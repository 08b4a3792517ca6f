"""What a worker says to its parent: whole lines, short ones, and nothing that the parent could not take."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import threading
from typing import Any

import pytest

from vnp_lib.run.events import EventReader, encode_event


def read_all(*blocks: bytes, within_s: float = 5.0) -> list[dict[str, Any]]:
    """What a reader makes of these bytes, which come block by block."""

    async def read() -> list[dict[str, Any]]:
        stream = asyncio.StreamReader()
        reader = EventReader(stream)
        events = []
        for block in blocks:
            stream.feed_data(block)
        stream.feed_eof()
        while not reader.is_at_end:
            if (event := await reader.next(within_s=within_s)) is not None:
                events.append(event)
        return events

    return asyncio.run(read())


def test_events_come_back_however_the_bytes_are_cut() -> None:
    sent = [
        {"event": "started", "pending": 3},
        {"event": "log", "level": 20, "message": "ä\n\udcff"},
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
def test_a_line_that_is_no_event_is_one_for_the_log(stray: bytes) -> None:
    """Whoever wrote it: a library in C, or two threads at once."""
    first, second = read_all(stray + b"\n" + encode_event({"event": "done"}))
    assert first["event"] == "log"
    assert first["message"].startswith("the worker process wrote: ")
    assert len(first["message"]) < 1100
    assert second == {"event": "done"}


def test_of_a_line_without_end_the_beginning_is_kept_and_the_next_one_is_read() -> None:
    huge, done = b"x" * 2**20, encode_event({"event": "done"})
    events = read_all(huge, huge, huge, b"x\n" + done + done)
    assert [event["event"] for event in events] == ["log", "done", "done"]


def test_half_a_line_at_the_end_is_none() -> None:
    assert read_all(encode_event({"event": "batch"}) + b'{"event": "do') == [{"event": "batch"}]


def test_nothing_in_time_is_none_and_what_comes_later_is_not_lost() -> None:
    async def read() -> list[Any]:
        stream = asyncio.StreamReader()
        reader = EventReader(stream)
        line = encode_event({"event": "done"})
        stream.feed_data(line[:5])
        first = await reader.next(within_s=0.01)
        stream.feed_data(line[5:])
        return [first, await reader.next(within_s=5.0), reader.is_at_end]

    assert asyncio.run(read()) == [None, {"event": "done"}, False]


def test_a_long_event_is_shortened_and_a_short_one_is_not() -> None:
    """Ten ids of a megabyte each, in the failure that names them."""
    ids = [chr(97 + i) * 2**20 for i in range(40)]
    line = encode_event(
        {
            "event": "failed",
            "failure": {"sequence_ids": ids, "batch_idx": 3, "message": "m" * 10**6},
        }
    )
    assert len(line) < 16 * 1024
    failure = json.loads(line)["failure"]
    assert failure["batch_idx"] == 3
    assert [each[:2] for each in failure["sequence_ids"]] == [each[:2] for each in ids[:20]]
    short = {"event": "log", "level": 20, "message": "m" * 10_000}
    assert json.loads(encode_event(short)) == short


def run_sender(code: str, **options: Any) -> subprocess.Popen[bytes]:
    begin = "import json, sys, threading, time\nfrom vnp_lib.run.events import EventStream\n"
    return subprocess.Popen([sys.executable, "-c", begin + code], stdout=subprocess.PIPE, **options)


def test_lines_of_several_threads_do_not_mix() -> None:
    """More bytes a line than a pipe takes at once, and a reader that is slow."""
    code = """
events = EventStream()
def send(name):
    for number in range(50):
        events.send(name, text=name * 14000, number=number)
threads = [threading.Thread(target=send, args=(name,)) for name in "abcd"]
for thread in threads: thread.start()
for thread in threads: thread.join()
print("a stray print")
"""
    with run_sender(code, stderr=subprocess.DEVNULL) as process:
        assert process.stdout is not None
        events = [json.loads(line) for line in process.stdout]
    assert process.returncode == 0
    for name in "abcd":
        own = [event for event in events if event["event"] == name]
        assert [event["number"] for event in own] == list(range(50))
        assert {event["text"] for event in own} == {name * 14000}


@pytest.mark.parametrize("is_closed", [False, True], ids=["does not read", "is gone"])
def test_a_parent_that_takes_nothing_keeps_nobody_from_saving(is_closed: bool) -> None:
    code = """
import signal
signal.signal(signal.SIGTERM, lambda *_: stop.set())
stop = threading.Event()
events = EventStream(is_stopping=stop.is_set)
print("ready", file=sys.stderr, flush=True)
for number in range(2000):
    events.send("log", text="x" * 1000)
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
