"""Doubles of the durable system calls, and processes to test files and locks with."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from typing import Any

from vnp_lib.storage.durable import DurableOps

_IMPORTS = """import json, os, sys, time
from pathlib import Path
from vnp_lib.storage.durable import *
from vnp_lib.storage.locks import *
"""


class RecordingOps(DurableOps):
    """Records the names of the calls; the one at `fail_at` (from 0) fails with `code`."""

    def __init__(self, fail_at: int | None = None, code: int = errno.EIO) -> None:
        self.calls: list[str] = []
        self._fail_at = fail_at
        self._code = code

    def __getattribute__(self, name: str) -> Any:
        value = super().__getattribute__(name)
        if name.startswith("_") or name == "calls":
            return value

        def recorded(*args: Any) -> Any:
            self.calls.append(name)
            if len(self.calls) - 1 == self._fail_at:
                raise OSError(self._code, os.strerror(self._code))
            return value(*args)

        return recorded


def start_python(code: str, *arguments: object) -> subprocess.Popen[str]:
    """Start a process that has the names of the `durable` and `locks` modules."""
    command = [sys.executable, "-c", _IMPORTS + code, *map(str, arguments)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
