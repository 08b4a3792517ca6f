"""Input that several test modules share."""

from __future__ import annotations

import random

import dnaio
import pytest

from tests.support import EXAMPLE

ALPHABET = "ACDEFGHIKLMNPQRSTVWY"


@pytest.fixture
def tiny_fasta(tmp_path):
    """Forty proteins of 5 to 60 residues."""
    draw = random.Random(7)
    path = tmp_path / "tiny.fasta"
    records = (
        f">protein_{i} of no importance\n{''.join(draw.choices(ALPHABET, k=draw.randint(5, 60)))}\n" for i in range(40)
    )
    path.write_text("".join(records))
    return path


@pytest.fixture(scope="session")
def short_fasta(tmp_path_factory):
    """The 69 proteins of the example that have up to 200 residues: long enough to be interrupted in."""
    path = tmp_path_factory.mktemp("short") / "short.fasta"
    with dnaio.open(EXAMPLE) as records, dnaio.open(path, mode="w") as short:
        for record in records:
            if len(record) <= 200:
                short.write(record)
    return path
