"""Six-frame translation, as VirNucPro does it before it embeds: nucleotides in, proteins and their ids out.

What is done is that of `split_fasta_chunk` and `identify_seq` in VirNucPro's units.py (Li-Jing-1997/VirNucPro on GitHub; its
prediction.py leaves out empty proteins):

1. A record of n letters becomes k = ceil(n / c) chunks of c letters, c being 300 or 500. The s = k * c - n letters that they
   have too many of are spread over the overlaps of neighbours: with b = floor(s / k), each of the first s - b * (k - 1)
   overlaps is b + 1 letters, the others are b. Of few chunks the last may then reach over the end of the record, which cuts
   it short: 1,200 letters in chunks of 500 are 0 to 500, 399 to 899 and 798 to 1,200. Chunks are numbered from 1.
2. Each chunk is translated by the standard genetic code in three frames, F1 to F3, and its reverse complement in three, R1 to
   R3. A codon with any letter but A, C, G and T is left out, and the protein goes on without it; letters at the end that are
   no whole codon are left out too.
3. A frame with a stop codon gives nothing; nor does one without any codon. Every other one is a protein, with the id
   `{record}_chunk_{number}{frame}`, as in `contig_7_chunk_12R3`.

Lower case is raised. Other letters than those of nucleotides, which VirNucPro would leave out with their codons in silence, are
faults here; U is one of them. Read as N, they are left out here too.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice, product

import numpy as np
from numpy.typing import NDArray

from vnp_lib.inputs.records import Alphabet, SequenceChunk

_RNA = "this is RNA: write T instead, for example with `seqkit seq --rna2dna`"

NUCLEOTIDES = Alphabet(
    letters="ACGTRYSWKMBDHVN",
    residue="nucleotide",
    unknown="N",
    advice={
        "U": _RNA,
        "u": _RNA,
        "*": "this is no nucleotide: write {unknown} for an unknown {residue}",
    },
)

_BASES = "TCAG"  # each two places from its complement
_AMINO_ACIDS = (
    "FFLLSSSSYY**CC*WLLLLPPPPHHQQRRRRIIIMTTTTNNKKSSRRVVVVAAAADDEEGGGG"  # of TTT, TTC, ..., GGG
)
_NUM_CODES = len(_BASES) + 1  # the last is that of every other letter
_LEFT_OUT = b"\0"
_FRAMES = range(3)
_NUM_PIECES = 4096  # that are translated at a time

_Piece = tuple[int, str, str]  # place of its record, id so far, letters


def six_frames(
    chunk: SequenceChunk, *, chunk_length: int
) -> Iterator[tuple[SequenceChunk, list[int]]]:
    """Translate records of nucleotides; with each chunk of proteins come the places in `chunk` of what they are of."""
    pieces = _pieces(chunk, chunk_length)
    while some := list(islice(pieces, _NUM_PIECES)):
        yield _translate(some)


def _pieces(chunk: SequenceChunk, chunk_length: int) -> Iterator[_Piece]:
    for place, (sequence_id, sequence) in enumerate(zip(chunk.ids, chunk.sequences, strict=True)):
        for number, start in enumerate(_starts(len(sequence), chunk_length), start=1):
            yield place, f"{sequence_id}_chunk_{number}", sequence[start : start + chunk_length]


def _starts(length: int, chunk_length: int) -> Iterator[int]:
    num_chunks = -(-length // chunk_length)
    surplus = num_chunks * chunk_length - length
    overlap = surplus // num_chunks
    num_longer = surplus - overlap * (num_chunks - 1)
    for index in range(num_chunks):
        yield index * (chunk_length - overlap) - min(index, num_longer)


def _translate(pieces: Sequence[_Piece]) -> tuple[SequenceChunk, list[int]]:
    ids: list[str] = []
    proteins: list[str] = []
    places: list[int] = []
    forward, backward = _amino_acids("".join(letters for _, _, letters in pieces))
    start = 0
    for place, prefix, letters in pieces:
        stop = start + len(letters)
        last = len(backward) - start
        frames = [
            (f"F{frame + 1}", forward[start + frame : max(start, stop - 2) : 3])
            for frame in _FRAMES
        ]
        frames += [
            (f"R{frame + 1}", backward[last - len(letters) + 2 + frame : last : 3])
            for frame in _FRAMES
        ]
        for name, protein in frames:
            if b"*" not in protein and (letters_left := protein.replace(_LEFT_OUT, b"")):
                ids.append(prefix + name)
                proteins.append(letters_left.decode())
                places.append(place)
        start = stop
    return SequenceChunk(ids=ids, descriptions=[""] * len(ids), sequences=proteins), places


def _amino_acids(letters: str) -> tuple[bytes, bytes]:
    """What the codon that begins at each letter stands for; and, last letter first, what its reverse complement does."""
    codes = _CODE_OF_BYTE[np.frombuffer(letters.encode() + 2 * _LEFT_OUT, dtype=np.uint8)]
    codons = (codes[:-2] * _NUM_CODES + codes[1:-1]) * _NUM_CODES + codes[2:]
    return _FORWARD[codons].tobytes(), _BACKWARD[codons][::-1].tobytes()


def _code_of_byte() -> NDArray[np.uint8]:
    table = np.full(256, len(_BASES), dtype=np.uint8)
    table[np.frombuffer(_BASES.encode(), dtype=np.uint8)] = np.arange(len(_BASES))
    return table


def _tables() -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """The amino acid of each codon and of its reverse complement, by the codes of its letters."""
    forward = np.full((_NUM_CODES,) * 3, _LEFT_OUT[0], dtype=np.uint8)
    backward = forward.copy()
    for (first, second, third), amino_acid in zip(
        product(range(4), repeat=3), _AMINO_ACIDS, strict=True
    ):
        forward[first, second, third] = ord(amino_acid)
        backward[(third + 2) % 4, (second + 2) % 4, (first + 2) % 4] = ord(amino_acid)
    return forward.ravel(), backward.ravel()


_CODE_OF_BYTE = _code_of_byte()
_FORWARD, _BACKWARD = _tables()
