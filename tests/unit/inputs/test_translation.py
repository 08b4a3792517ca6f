"""Six-frame translation: VirNucPro's chunks, frames, proteins and ids."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from Bio.Data import CodonTable
from Bio.Seq import Seq

from vnp_lib.errors import FastaError, FingerprintMismatchError
from vnp_lib.inputs.policy import InputPolicy
from vnp_lib.inputs.reader import read_records
from vnp_lib.inputs.records import SequenceChunk
from vnp_lib.inputs.sources import Source
from vnp_lib.inputs.translation import six_frames
from vnp_lib.plan.paths import RunPaths
from vnp_lib.plan.plan import ModelIdentity, RunPlan
from vnp_lib.plan.planner import make_plan

MODEL = ModelIdentity(model="m", weights_digest="w", layer=6, dtype="float32")

Proteins = list[tuple[str, str]]  # id, sequence


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def translated(*sequences: str, chunk_length: int = 300) -> Proteins:
    ids = [f"r{number}" for number in range(len(sequences))]
    chunk = SequenceChunk(ids=ids, descriptions=[""] * len(ids), sequences=list(sequences))
    return [
        pair
        for proteins, _ in six_frames(chunk, chunk_length=chunk_length)
        for pair in zip(proteins.ids, proteins.sequences, strict=True)
    ]


def read_all(path: Path, chunk_size: int = 8192, **policy: Any) -> Proteins:
    source = Source(path=path, name=str(path))
    return [
        pair
        for chunk in read_records(
            source, InputPolicy(translate="six-frame", **policy), chunk_size=chunk_size
        )
        for pair in zip(chunk.usable.ids, chunk.usable.sequences, strict=True)
    ]


def chunks_by_the_book(length: int, chunk_length: int) -> list[tuple[int, int]]:
    """Spread the surplus over the gaps one nucleotide at a time, by rule 1."""
    num_chunks = 1
    while num_chunks * chunk_length < length:
        num_chunks += 1
    surplus = num_chunks * chunk_length - length
    least = surplus // num_chunks
    left = surplus - least * (num_chunks - 1)
    starts = [0]
    for _ in range(num_chunks - 1):
        starts.append(starts[-1] + chunk_length - least - (1 if left > 0 else 0))
        left -= 1
    return [(start, min(start + chunk_length, length)) for start in starts]


def translate_by_the_book(codons: list[str]) -> str:
    """Translate by Biopython's standard table, without codons of other characters."""
    return "".join(
        str(Seq(codon).translate(table=1)) for codon in codons if set(codon) <= set("ACGT")
    )


def expected_proteins(sequence_id: str, sequence: str, chunk_length: int) -> Proteins:
    proteins = []
    for number, (start, stop) in enumerate(
        chunks_by_the_book(len(sequence), chunk_length), start=1
    ):
        chunk = sequence[start:stop]
        other = "".join(
            {"A": "T", "C": "G", "G": "C", "T": "A"}.get(letter, letter)
            for letter in reversed(chunk)
        )
        for strand, nucleotides in (("F", chunk), ("R", other)):
            for frame in range(3):
                codons = [nucleotides[at : at + 3] for at in range(frame, len(nucleotides) - 2, 3)]
                protein = translate_by_the_book(codons)
                if protein and "*" not in protein:
                    proteins.append((f"{sequence_id}_chunk_{number}{strand}{frame + 1}", protein))
    return proteins


@pytest.mark.parametrize(
    ("length", "chunk_length", "chunks"),
    [
        (1, 500, [(0, 1)]),
        (500, 500, [(0, 500)]),
        (501, 500, [(0, 500), (250, 501)]),
        (1000, 500, [(0, 500), (500, 1000)]),
        (1200, 500, [(0, 500), (399, 899), (798, 1200)]),
        (301, 300, [(0, 300), (150, 301)]),
    ],
)
def test_chunks_overlap_evenly(
    length: int, chunk_length: int, chunks: list[tuple[int, int]]
) -> None:
    """Worked out by hand; the chunks are read off their proteins, which have no stop."""
    assert chunks_by_the_book(length, chunk_length) == chunks
    nucleotides = "".join(
        np.random.default_rng(0).choice(list("ACC"), length)
    )  # no stop codon on this strand
    proteins = dict(translated(nucleotides, chunk_length=chunk_length))
    for number, (start, stop) in enumerate(chunks, start=1):
        codons = [nucleotides[at : at + 3] for at in range(start, stop - 2, 3)]
        assert proteins.get(f"r0_chunk_{number}F1", "") == translate_by_the_book(codons)
    assert f"r0_chunk_{len(chunks) + 1}F1" not in proteins


def test_the_chunks_of_a_long_record_are_equally_long() -> None:
    chunks = chunks_by_the_book(29_903, 500)
    assert {stop - start for start, stop in chunks} == {500}
    assert chunks[-1] == (29_403, 29_903)
    assert translated("ACC" * 9967 + "AC", chunk_length=500)[-1][0].startswith("r0_chunk_60")


def test_frames_are_those_of_both_strands() -> None:
    """Written by hand: ATGAAACC is ATG AAA, TGA (a stop), GAA ACC.

    Backwards GGTTTCAT is GGT TTC, GTT TCA, TTT CAT.
    """
    assert translated("ATGAAACC") == [
        ("r0_chunk_1F1", "MK"),
        ("r0_chunk_1F3", "ET"),
        ("r0_chunk_1R1", "GF"),
        ("r0_chunk_1R2", "VS"),
        ("r0_chunk_1R3", "FH"),
    ]


def test_codons_with_other_characters_are_left_out() -> None:
    """ATG NAA AAA is M and K; backwards TTT TTN CAT is F and H.

    The same holds for characters that stand for several nucleotides.
    """
    for letter in "NRYSWKMBDHV":
        proteins = dict(translated(f"ATG{letter}AAAAA"))
        assert (proteins["r0_chunk_1F1"], proteins["r0_chunk_1R1"]) == ("MK", "FH")
    assert translated("NNNNNN") == translated("NA") == translated("A") == []


def test_a_frame_with_a_stop_codon_gives_nothing() -> None:
    ids = [
        name for name, _ in translated("ATGTAAAAA")
    ]  # ATG TAA AAA; TGT AAA; GTA AAA; TTT TTA CAT; TTT TAC; TTT ACA
    assert ids == ["r0_chunk_1F2", "r0_chunk_1F3", "r0_chunk_1R1", "r0_chunk_1R2", "r0_chunk_1R3"]


def test_the_genetic_code_is_the_standard_one() -> None:
    table = CodonTable.unambiguous_dna_by_id[1]
    codons = [a + b + c for a in "ACGT" for b in "ACGT" for c in "ACGT"]
    for codon in codons:
        ids = dict(translated(codon))
        assert ids.get("r0_chunk_1F1") == table.forward_table.get(codon)
        assert ids.get("r0_chunk_1R1") == table.forward_table.get(
            str(Seq(codon).reverse_complement())
        )
    assert (
        sum("r0_chunk_1F1" not in dict(translated(codon)) for codon in codons)
        == len(table.stop_codons)
        == 3
    )


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("chunk_length", [300, 500])
def test_proteins_and_ids_equal_those_of_an_oracle(
    tmp_path: Path, seed: int, chunk_length: int
) -> None:
    """Contigs and reads of all lengths, lower case, some unknown nucleotides, few stops."""
    rng = np.random.default_rng(seed)
    records = []
    for number in range(60):
        nucleotides = rng.choice(
            list("ACGTNacg"),
            rng.integers(1, 2500),
            p=[0.2, 0.25, 0.25, 0.05, 0.01, 0.08, 0.08, 0.08],
        )
        records.append((f"contig_{number}|x", "".join(nucleotides)))
    path = write(
        tmp_path / "x.fna",
        "".join(f">{name} about\n{nucleotides}\n" for name, nucleotides in records),
    )
    expected = [
        pair
        for name, nucleotides in records
        for pair in expected_proteins(name, nucleotides.upper(), chunk_length)
    ]
    assert len(expected) > 60
    assert read_all(path, chunk_length=chunk_length) == expected
    assert read_all(path, chunk_size=7, chunk_length=chunk_length) == expected


def test_proteins_that_are_given_by_mistake_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "x.faa", ">a\nMKVLATTWQERSILPEDGH\n")
    with pytest.raises(
        FastaError,
        match=r"x\.faa: this looks like proteins \(\d+% of the residues in the first 1 records",
    ):
        read_all(path)


@pytest.mark.parametrize(
    ("nucleotides", "what"),
    [
        ("ACGU", "sequence 'b' has 'U' at position 4; this is RNA: write T instead"),
        ("ACG-", "sequence 'b' has '-' at position 4; gaps belong to an alignment"),
        (
            "ACGE",
            "sequence 'b' has 'E' at position 4; allowed are ABCDGHKMNRSTVWY: write N for",
        ),
        ("", "sequence 'b' has no residues"),
    ],
)
def test_characters_of_no_nucleotide_are_refused_by_line(
    tmp_path: Path, nucleotides: str, what: str
) -> None:
    path = write(tmp_path / "x.fna", f">a\nACGT\n>b\n{nucleotides}\n")
    with pytest.raises(FastaError) as caught:
        read_all(path)
    assert str(caught.value).startswith(f"{path}, line 3: {what}")


def test_codons_with_unknown_nucleotides_are_left_out(tmp_path: Path) -> None:
    """As in VirNucPro."""
    path = write(tmp_path / "x.fna", ">a\nATGAAUAAA\n")
    assert dict(read_all(path, invalid_residues="map"))["a_chunk_1F1"] == "MK"


def plan_of(run_dir: Path, *fasta: Path, **policy: Any) -> RunPlan:
    return make_plan(
        RunPaths(run_dir),
        fasta,
        MODEL,
        num_shards=1,
        token_budget=500,
        policy=InputPolicy(**policy),
    )


def test_a_plan_of_nucleotides_has_its_own_identity(
    tmp_path: Path,
) -> None:
    """It has the same proteins as a plan of these, and another fingerprint."""
    nucleotides = write(tmp_path / "x.fna", ">a\nATGAAACC\n>b\nATGAAACCTT\n")
    plan = plan_of(tmp_path / "run", nucleotides, translate="six-frame")
    ids, sequences = plan.fetch(np.arange(plan.num_sequences))
    expected = expected_proteins("a", "ATGAAACC", 500) + expected_proteins("b", "ATGAAACCTT", 500)
    assert list(zip(ids, sequences, strict=True)) == expected
    assert plan.identity["translation"] == "six-frame:500"
    with pytest.raises(
        FingerprintMismatchError,
        match="translation is 'six-frame:500' there and 'six-frame:300' here",
    ):
        plan_of(tmp_path / "run", nucleotides, translate="six-frame", chunk_length=300)
    proteins = write(
        tmp_path / "x.faa", "".join(f">{name}\n{nucleotides}\n" for name, nucleotides in expected)
    )
    with pytest.raises(
        FingerprintMismatchError, match="translation is 'six-frame:500' there and None here"
    ):
        plan_of(tmp_path / "run", proteins)
    assert (
        plan_of(tmp_path / "other", proteins).identity["sequences_sha256"]
        == plan.identity["sequences_sha256"]
    )


def test_records_with_the_same_ids_or_nothing_are_refused(
    tmp_path: Path,
) -> None:
    """The error names their lines."""
    twice = write(tmp_path / "x.fna", ">a\nATG\n>b\nACG\n>a\nATG\n")
    with pytest.raises(FastaError, match=r"'a_chunk_1F1': .*x\.fna, line 1 and .*x\.fna, line 5;"):
        plan_of(tmp_path / "run", twice, translate="six-frame")
    with pytest.raises(FastaError, match="no record has a frame without a stop codon"):
        plan_of(tmp_path / "run", write(tmp_path / "z.fna", ">a\nNN\n"), translate="six-frame")


def test_records_that_are_skipped_are_listed_by_their_lines(tmp_path: Path) -> None:
    path = write(tmp_path / "x.fna", ">a\nATGAAACC\n>b\nACGE\n>c\nATG\n")
    plan = plan_of(tmp_path / "run", path, translate="six-frame", invalid_residues="skip")
    (line,) = RunPaths(tmp_path / "run").skipped.read_text().splitlines()
    assert (json.loads(line)["line"], json.loads(line)["id"]) == (3, "b")
    assert {name.split("_")[0] for name in plan.ids(np.arange(plan.num_sequences))} == {"a", "c"}
