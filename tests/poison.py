"""Proteins that crash a worker: they begin with `WWWW` and a letter for the way it fails."""

from __future__ import annotations

import os
import random
import textwrap
from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path

import pytest

from tests.helpers import ROOT

_MARK = "WWWW"
# Without W: no protein is marked by chance.
_ALPHABET = "ACDEFGHIKLMNPQRSTVY"

# Run by a worker process as it starts; only the ways in `ACTIVE` have an effect.
_PATCH = """
import os, signal, time
import torch
from vnp_lib.model.esm2 import ESM2
from vnp_lib.model.tokens import FIRST_RESIDUE, RESIDUES

def ways(input_ids, cu_seqlens):
    heads = [input_ids[start + 1 : start + 6].tolist() for start in cu_seqlens[:-1].tolist()]
    texts = [
        "".join(RESIDUES[token - FIRST_RESIDUE] for token in head if token >= FIRST_RESIDUE)
        for head in heads
    ]
    return [text[4:] if text.startswith("WWWW") and text[4] in ACTIVE else "" for text in texts]

def forward_packed(self, input_ids, cu_seqlens, max_seqlen, repr_layers=None):
    marked = ways(input_ids, cu_seqlens)
    if "E" in marked:
        raise IndexError("index out of range in self")
    if "Q" in marked:
        os._exit(1)
    if "S" in marked:
        os.kill(os.getpid(), signal.SIGSEGV)
    if "H" in marked:
        time.sleep(3600)
    if "M" in marked and input_ids.numel() > 40:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
    if "L" in marked:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
    output = original(self, input_ids, cu_seqlens, max_seqlen, repr_layers)
    for way, start in zip(marked, cu_seqlens.tolist()):
        if way == "N":
            for states in output["representations"].values():
                states[start + 2] = float("nan")
    return output

original, ESM2.forward_packed = ESM2.forward_packed, forward_packed
"""


def patch(*ways: Way) -> str:
    """Return code for the start of a worker process that makes it fail on these marks."""
    return f"ACTIVE = {''.join(ways)!r}\n{_PATCH}"


class Way(StrEnum):
    """How a worker process fails on a marked protein: the letter of the mark."""

    EXCEPTION = "E"
    EXIT = "Q"
    SEGFAULT = "S"
    HANG = "H"
    NAN = "N"  # the process survives, with a non-finite row
    MEMORY = "M"  # out of memory in a batch, but not alone
    TOO_LARGE = "L"  # out of memory even alone


def marked_as(sequence: str, way: Way) -> str:
    """Mark a protein as bad; its length stays."""
    head = _MARK + way
    return head + sequence[len(head) :]


def draw_protein(draw: random.Random, residues: int) -> str:
    """Draw a protein without a mark."""
    return "".join(draw.choices(_ALPHABET, k=residues))


def write_proteins(path: Path, count: int, marked: Mapping[int, Way], *, seed: int = 0) -> None:
    """Write proteins of some 30 residues; those at the positions in `marked` are bad.

    Their ids name the way, such as `exit_4`.
    """
    draw = random.Random(seed)
    with path.open("w") as file:
        for number in range(count):
            body = draw_protein(draw, draw.randint(24, 30))
            way = marked.get(number)
            name, head = ("good", "") if way is None else (way.name.lower(), _MARK + way)
            file.write(f">{name}_{number}\n{head}{body}\n")


def sabotage_workers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str) -> None:
    """Make worker processes run code as they start, as the fixture `sabotage` does."""
    directory = tmp_path / "sabotage"
    directory.mkdir()
    preamble = f"""
import os, pathlib, re, sys
job = re.search(r"shard_([0-9]+)/job.json$", sys.orig_argv[-1])
if job:
    rank = int(job[1])
    tally = pathlib.Path({str(directory)!r}, f"shard_{{rank}}")
    with tally.open("a") as file:
        file.write("x")
    attempt = len(tally.read_text())
"""
    text = preamble + textwrap.indent(textwrap.dedent(code), "    ")
    (directory / "sitecustomize.py").write_text(text)
    # ROOT, so that a copy of the repository imports itself.
    monkeypatch.setenv("PYTHONPATH", f"{directory}{os.pathsep}{ROOT}")
