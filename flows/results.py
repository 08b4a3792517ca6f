"""Check Prefect's persisted results before Prefect reads them.

Prefect reads a result with the serializer that its own file names, which may be pickle. So a file
is checked before: one that is not exactly what Prefect writes for our task is not read, and the
task reads the checkpoints instead.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

from prefect.serializers import JSONSerializer

# Result storage of flows, which persist nothing: without it, Prefect looks up the default block of
# a team.
NOWHERE = Path(os.devnull)

_PLAIN_JSON = JSONSerializer().model_dump(mode="json")
_MAX_BYTES = 64 * 1024


def is_plain_result(path: Path) -> bool:
    """Whether a result is a JSON object of integers, byte for byte as Prefect writes it."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        with open(fd, "rb") as file:
            data = file.read(_MAX_BYTES)
        record = json.loads(data)
        numbers = json.loads(record["result"])
        serializer = record["metadata"]["serializer"]
        # Otherwise another parser might choose another one of two equal keys.
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
