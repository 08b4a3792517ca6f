"""Input that several test modules share."""

from __future__ import annotations

import random

import pytest

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
