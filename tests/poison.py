"""Proteins of which a child dies. The mark is a head of `WWWW` and a letter that says how."""

from __future__ import annotations

import random
from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path

_MARK = "WWWW"
_ALPHABET = "ACDEFGHIKLMNPQRSTVY"  # no W: nobody is marked by chance

# Run by a child as it starts; only the ways in `ACTIVE` have an effect.
_PATCH = """
import os, signal, time
import torch
from vnp_lib.model.esm2 import ESM2
from vnp_lib.model.tokens import FIRST_RESIDUE, RESIDUES

def ways(input_ids, cu_seqlens):
    heads = [input_ids[start + 1 : start + 6].tolist() for start in cu_seqlens[:-1].tolist()]
    texts = ["".join(RESIDUES[token - FIRST_RESIDUE] for token in head if token >= FIRST_RESIDUE) for head in heads]
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
    """Code for a child's start that makes it suffer from the proteins that are marked with one of these ways."""
    return f"ACTIVE = {''.join(ways)!r}\n{_PATCH}"


class Way(StrEnum):
    """How a child ends that is given such a protein; its letter."""

    EXCEPTION = "E"
    EXIT = "Q"
    SEGFAULT = "S"
    HANG = "H"
    NAN = "N"  # ends nothing: the row is not finite
    MEMORY = "M"  # runs out together with others; alone it fits
    TOO_LARGE = "L"  # runs out alone too


def marked_as(sequence: str, way: Way) -> str:
    """The same protein, as long as before, with the head that makes it bad."""
    head = _MARK + way
    return head + sequence[len(head) :]


def draw_protein(draw: random.Random, residues: int) -> str:
    """A protein that is not bad."""
    return "".join(draw.choices(_ALPHABET, k=residues))


def write_proteins(path: Path, count: int, marked: Mapping[int, Way], *, seed: int = 0) -> None:
    """Write proteins of some 30 residues. Those at the places in `marked` are bad, and have ids that say so: `exit_4`."""
    draw = random.Random(seed)
    with path.open("w") as file:
        for number in range(count):
            body = draw_protein(draw, draw.randint(24, 30))
            way = marked.get(number)
            name, head = ("good", "") if way is None else (way.name.lower(), _MARK + way)
            file.write(f">{name}_{number}\n{head}{body}\n")
