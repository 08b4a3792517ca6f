"""Code for the workers of a soak: patches, and a journal of computed rows and faults."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.helpers import ROOT
from tests.poison import Way

# Everything but the model is the real code.
SMALL_NETWORK = """
import vnp_lib.model.esm2, vnp_lib.model.weights
vnp_lib.model.weights.architecture_of = lambda model: vnp_lib.model.esm2.Architecture(
    num_layers=1, embed_dim=64, attention_heads=1
)
"""

# Follows the patch of the poison, whose `ways` and `ACTIVE` it uses.
_JOURNAL = """
import errno, json, os, time
from vnp_lib.storage import durable
from vnp_lib.checkpoint.writer import AsyncCheckpointWriter

descriptor = os.open(os.path.join(DIRECTORY, "journal"), os.O_WRONLY | os.O_APPEND | os.O_CREAT)

def note(what, count=1):
    line = json.dumps({"pid": os.getpid(), "what": what, "count": count})
    os.write(descriptor, line.encode() + b"\\n")

def is_there(name):
    return os.path.exists(os.path.join(DIRECTORY, name))

def noted_forward(self, input_ids, cu_seqlens, *others):
    marks = ways(input_ids, cu_seqlens)
    if set(marks) & set(LETHAL):
        note("lethal")
    if "M" in marks and input_ids.numel() > 40:
        note("out_of_memory")
    if os.getppid() != parent:
        note("orphaned")
    time.sleep(PAUSE_S)
    output = poisoned_forward(self, input_ids, cu_seqlens, *others)
    residues = "".join(RESIDUES[t - FIRST_RESIDUE] for t in input_ids[1:-1].tolist())
    is_harmless = len(marks) == 1 and residues == RESIDUES[:20]
    if rows := sum(mark not in BAD for mark in marks) - is_harmless:
        note("rows", rows)
    return output

class FaultyOps(durable.DurableOps):
    def write(self, fd, data):
        if is_there("disk_full"):
            note("disk_full")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return super().write(fd, data)

    def fsync(self, fd):
        if is_there("slow_disk"):
            time.sleep(0.1)
        super().fsync(fd)

parent = os.getppid()
poisoned_forward, ESM2.forward_packed = ESM2.forward_packed, noted_forward
AsyncCheckpointWriter.__init__.__kwdefaults__["disk_full_delays_s"] = (0.1, 0.2, 0.4)
durable.ops = FaultyOps()
note("started")
"""


@contextmanager
def sabotaged(directory: Path, code: str) -> Iterator[None]:
    """Make every worker that starts within the block run `code` first, as a `sitecustomize`."""
    guarded = (
        "import sys\nif sys.orig_argv[-1].endswith('job.json'):\n"
        f"    exec(compile({code!r}, 'sabotage', 'exec'))\n"
    )
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "sitecustomize.py").write_text(guarded)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", f"{directory}{os.pathsep}{ROOT}")
        yield


def journalling(directory: Path, *, pause_s: float) -> str:
    """Return code that keeps a journal in `directory`, and follows `poison.patch`.

    The files `disk_full` and `slow_disk` in it take effect as long as they exist. Each forward pass
    takes `pause_s` longer.
    """
    settings = {
        "DIRECTORY": str(directory),
        "PAUSE_S": pause_s,
        "LETHAL": [Way.EXIT.value, Way.SEGFAULT.value, Way.HANG.value],
        "BAD": [way.value for way in Way if way != Way.MEMORY],
    }
    return "\n".join(f"{name} = {value!r}" for name, value in settings.items()) + _JOURNAL


@dataclass(frozen=True, slots=True, kw_only=True)
class Journal:
    """What the workers of one run recorded."""

    num_workers: int
    rows_computed: int  # of proteins that are not bad
    lethal_passes: int  # forward passes that crash the process
    out_of_memory: int
    orphaned_passes: int  # most per worker, after its parent exited
    met_a_full_disk: frozenset[int]  # process ids


def read_journal(directory: Path) -> Journal:
    path = directory / "journal"
    lines = path.read_text().splitlines() if path.exists() else []
    notes = [json.loads(line) for line in lines]
    counts: Counter[str] = Counter()
    for each in notes:
        counts[each["what"]] += each["count"]
    orphaned = Counter(each["pid"] for each in notes if each["what"] == "orphaned")
    return Journal(
        num_workers=counts["started"],
        rows_computed=counts["rows"],
        lethal_passes=counts["lethal"],
        out_of_memory=counts["out_of_memory"],
        orphaned_passes=max(orphaned.values(), default=0),
        met_a_full_disk=frozenset(each["pid"] for each in notes if each["what"] == "disk_full"),
    )
