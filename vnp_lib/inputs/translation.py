"""Translate nucleotides in six frames, as VirNucPro does before it embeds."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice, product

import numpy as np

from vnp_lib.inputs.records import Alphabet, SequenceChunk

_RNA = "this is RNA: write T instead, for example with `seqkit seq --rna2dna`"

NUCLEOTIDES = Alphabet(
    characters="ACGTRYSWKMBDHVN",
    residue="nucleotide",
    unknown="N",
    advice={
        "U": _RNA,
        "u": _RNA,
        "*": "this is no nucleotide: write {unknown} for an unknown {residue}",
    },
)

# Each base is two places from its complement.
_BASES = "TCAG"

# Amino acids of the codons TTT, TTC, ..., GGG.
_AMINO_ACIDS = "FFLLSSSSYY**CC*WLLLLPPPPHHQQRRRRIIIMTTTTNNKKSSRRVVVVAAAADDEEGGGG"

# The last code is that of every character that is no base.
_NUM_CODES = len(_BASES) + 1
_LEFT_OUT = b"\0"
_FRAMES = range(3)

# Chunks that are translated at a time.
_NUM_PIECES = 4096

_Piece = tuple[int, str, str]  # place of its record, id without the frame, nucleotides


def six_frames(
    chunk: SequenceChunk, *, chunk_length: int
) -> Iterator[tuple[SequenceChunk, list[int]]]:
    """Translate records of nucleotides.

    The rules are those of `split_fasta_chunk` and `identify_seq` in VirNucPro's units.py
    (Li-Jing-1997/VirNucPro on GitHub); its prediction.py leaves out empty proteins:

    1. A record of n nucleotides is divided into k = ceil(n / c) chunks of c nucleotides, c being
       300 or 500. The surplus s = k * c - n is spread over the overlaps of neighbours: with
       b = floor(s / k), each of the first s - b * (k - 1) overlaps has b + 1 nucleotides, the
       others have b. If there are few chunks, the last may extend beyond the end of the record,
       which shortens it: 1,200 nucleotides in chunks of 500 are 0 to 500, 399 to 899 and 798 to
       1,200. Chunks are numbered from 1.
    2. Each chunk is translated by the standard genetic code in three frames, F1 to F3, and its
       reverse complement in three, R1 to R3. A codon with any character but A, C, G and T is left
       out, and the protein continues without it; so are the last characters that are no complete
       codon.
    3. A frame with a stop codon, or without any codon, gives no protein. Every other frame gives
       one, with the id `{record}_chunk_{number}{frame}`, as in `contig_7_chunk_12R3`.

    Lower case is raised. Characters that stand for no nucleotide, whose codons VirNucPro leaves out
    without notice, are faults here; U is one of them. Those read as N are left out here too.

    Args:
        chunk: Records of nucleotides.
        chunk_length: Nucleotides in each chunk of a record.

    Yields:
        Proteins, and the place in `chunk` of the record of each.
    """
    pieces: Iterator[_Piece] = (
        (place, f"{sequence_id}_chunk_{number}", sequence[start : start + chunk_length])
        for place, (sequence_id, sequence) in enumerate(
            zip(chunk.ids, chunk.sequences, strict=True)
        )
        for number, start in enumerate(_starts(len(sequence), chunk_length), start=1)
    )
    while some := list(islice(pieces, _NUM_PIECES)):
        yield _translate(some)


def _starts(length: int, chunk_length: int) -> Iterator[int]:
    """Yield where the chunks of a record of this length begin, by rule 1."""
    num_chunks = -(-length // chunk_length)
    surplus = num_chunks * chunk_length - length
    overlap = surplus // num_chunks
    num_longer = surplus - overlap * (num_chunks - 1)
    for index in range(num_chunks):
        yield index * (chunk_length - overlap) - min(index, num_longer)


def _translate(pieces: Sequence[_Piece]) -> tuple[SequenceChunk, list[int]]:
    """Translate chunks, all at once, by rules 2 and 3."""
    ids: list[str] = []
    proteins: list[str] = []
    places: list[int] = []
    # The codon that begins at each nucleotide, with two more after the end, stands for one amino
    # acid. Those of the reverse complements are in reverse order.
    joined = "".join(nucleotides for _, _, nucleotides in pieces).encode() + 2 * _LEFT_OUT
    codes = _CODE_OF_BYTE[np.frombuffer(joined, dtype=np.uint8)]
    codons = (codes[:-2] * _NUM_CODES + codes[1:-1]) * _NUM_CODES + codes[2:]
    forward = _FORWARD.ravel()[codons].tobytes()
    backward = _BACKWARD.ravel()[codons][::-1].tobytes()
    start = 0
    for place, prefix, nucleotides in pieces:
        stop = start + len(nucleotides)
        last = len(backward) - start
        frames = [
            (f"F{frame + 1}", forward[start + frame : max(start, stop - 2) : 3])
            for frame in _FRAMES
        ]
        frames += [
            (f"R{frame + 1}", backward[last - len(nucleotides) + 2 + frame : last : 3])
            for frame in _FRAMES
        ]
        for name, protein in frames:
            if b"*" not in protein and (residues := protein.replace(_LEFT_OUT, b"")):
                ids.append(prefix + name)
                proteins.append(residues.decode())
                places.append(place)
        start = stop
    return SequenceChunk(ids=ids, descriptions=[""] * len(ids), sequences=proteins), places


_CODE_OF_BYTE = np.full(256, len(_BASES), dtype=np.uint8)
_CODE_OF_BYTE[np.frombuffer(_BASES.encode(), dtype=np.uint8)] = np.arange(len(_BASES))

# The amino acid of each codon and of its reverse complement, by the codes of its bases.
_FORWARD = np.full((_NUM_CODES,) * 3, _LEFT_OUT[0], dtype=np.uint8)
_BACKWARD = _FORWARD.copy()
for (_first, _second, _third), _amino_acid in zip(
    product(range(4), repeat=3), _AMINO_ACIDS, strict=True
):
    _FORWARD[_first, _second, _third] = ord(_amino_acid)
    _BACKWARD[(_third + 2) % 4, (_second + 2) % 4, (_first + 2) % 4] = ord(_amino_acid)
