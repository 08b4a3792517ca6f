"""Prefect's persisted results: which of them Prefect may be let read.

A result is read by whatever serializer its own file names, pickle among them. So a file is looked at before: one that is not
exactly what our own task makes Prefect write is not read, and the task looks at the disk instead.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

from prefect.serializers import JSONSerializer

NOWHERE = Path(
    os.devnull
)  # result storage of flows, which persist nothing: else Prefect looks up a team's default block

_PLAIN_JSON = JSONSerializer().model_dump(mode="json")
_LARGEST_BYTES = 64 * 1024


def is_plain_result(path: Path) -> bool:
    """Whether a persisted result is a JSON object of whole numbers, in the very bytes that Prefect writes for one."""
    try:
        data = _read(path)
        record = json.loads(data)
        numbers = json.loads(record["result"])
        serializer = record["metadata"]["serializer"]
        # Else another parser might take another one of two keys of the same name.
        is_as_written = (
            json.dumps(record, ensure_ascii=False, separators=(",", ":")).encode() == data
        )
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return False
    return (
        is_as_written
        and record.keys() == {"metadata", "result"}
        and serializer == _PLAIN_JSON
        and isinstance(numbers, dict)
        and all(type(number) is int for number in numbers.values())
    )


def _read(path: Path) -> bytes:
    fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    with open(fd, "rb") as file:
        return file.read(_LARGEST_BYTES)
