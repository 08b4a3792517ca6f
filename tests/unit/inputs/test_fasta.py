"""Read FASTA files: records, normalisation and the wording of refusals."""

import bz2
import gzip
import json
import lzma
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from backports import zstd

from vnp_lib.errors import FastaError
from vnp_lib.inputs.chunks import InputChunk
from vnp_lib.inputs.locations import RecordLocator
from vnp_lib.inputs.policy import InputCounts, InputPolicy
from vnp_lib.inputs.reader import read_records
from vnp_lib.inputs.records import RESIDUES, CharacterCounts
from vnp_lib.inputs.sources import Source, find_sources

COMPRESSORS: dict[str, Callable[[bytes], bytes]] = {
    "gz": gzip.compress,
    "bz2": bz2.compress,
    "xz": lzma.compress,
    "zst": zstd.compress,
}

Record = tuple[str, str, str]  # id, description, sequence


def write(path: Path, text: str | bytes) -> Path:
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def chunks_of(*paths: Path, chunk_size: int = 8192, **policy: Any) -> list[InputChunk]:
    sources = find_sources(paths, stdin=Path("unused"))
    return [
        chunk
        for each in sources
        for chunk in read_records(each, InputPolicy(**policy), chunk_size=chunk_size)
    ]


def read(*paths: Path, chunk_size: int = 8192, **policy: Any) -> list[Record]:
    return [
        record
        for chunk in chunks_of(*paths, chunk_size=chunk_size, **policy)
        for record in zip(
            chunk.usable.ids, chunk.usable.descriptions, chunk.usable.sequences, strict=True
        )
    ]


def refusal(*paths: Path, chunk_size: int = 8192, **policy: Any) -> str:
    with pytest.raises(FastaError) as caught:
        read(*paths, chunk_size=chunk_size, **policy)
    return str(caught.value)


def random_records(rng: np.random.Generator, num_records: int) -> list[Record]:
    residues = np.array(list(RESIDUES))
    return [
        (
            f"sp|P{i}|X",
            f"protein {i}  of {num_records}" if i % 3 else "",
            "".join(rng.choice(residues, rng.integers(1, 200))),
        )
        for i in range(num_records)
    ]


def as_fasta(records: list[Record], *, width: int, newline: str) -> str:
    lines = []
    for sequence_id, description, sequence in records:
        lines.append(f">{sequence_id} {description}".rstrip())
        lines += [sequence[start : start + width] for start in range(0, len(sequence), width)]
    return newline.join([*lines, ""])


@pytest.mark.parametrize(
    ("text", "records"),
    [
        pytest.param(">a\nMKV\n", [("a", "", "MKV")], id="plain"),
        pytest.param(">a\nMKV", [("a", "", "MKV")], id="no newline at the end"),
        pytest.param(
            ">a\nMK\nV\n\n\n>b\n\nW\n",
            [("a", "", "MKV"), ("b", "", "W")],
            id="lines and blank lines",
        ),
        pytest.param(">a\r\nMK\r\nV\r\n", [("a", "", "MKV")], id="Windows"),
        pytest.param(">a\rMK\rV\r", [("a", "", "MKV")], id="old Macintosh"),
        pytest.param("\n\n>a\nMKV\n", [("a", "", "MKV")], id="blank lines first"),
        pytest.param(
            ">a b  c\nMKV\n", [("a", "b  c", "MKV")], id="the rest of the header is the description"
        ),
        pytest.param(">a\tb\tc \nMKV\n", [("a", "b\tc", "MKV")], id="an id ends at a tab"),
        pytest.param(
            ">β1 β-lactamase\nMKV\n", [("β1", "β-lactamase", "MKV")], id="headers in UTF-8"
        ),
        pytest.param(
            ">../../etc/x\nMKV\n", [("../../etc/x", "", "MKV")], id="an id is data, never a path"
        ),
        pytest.param(">a\nmkV\n", [("a", "", "MKV")], id="lower case is raised"),
        pytest.param(">a\nM K\tV \n", [("a", "", "MKV")], id="white space is taken out"),
        pytest.param(
            ">a\nMKV*\n>b\nMK\n*\n",
            [("a", "", "MKV"), ("b", "", "MK")],
            id="one stop at the end is dropped",
        ),
        pytest.param(">a\nMJj\n", [("a", "", "MXX")], id="J is read as X"),
        pytest.param(f">a\n{RESIDUES}\n", [("a", "", RESIDUES)], id="all residues of the model"),
    ],
)
@pytest.mark.parametrize("chunk_size", [1, 2, 8192])
def test_records_are_read_and_normalised(
    tmp_path: Path, text: str, records: list[Record], chunk_size: int
) -> None:
    assert read(write(tmp_path / "x.fasta", text), chunk_size=chunk_size) == records


@pytest.mark.parametrize("seed", range(20))
def test_what_was_written_is_read_back(tmp_path: Path, seed: int) -> None:
    rng = np.random.default_rng(seed)
    records = random_records(rng, num_records=int(rng.integers(1, 60)))
    text = as_fasta(
        records, width=int(rng.integers(1, 90)), newline=str(rng.choice(["\n", "\r\n"]))
    )
    assert read(write(tmp_path / "x.fasta", text), chunk_size=int(rng.integers(1, 70))) == records


@pytest.mark.parametrize(
    "character",
    sorted({*map(chr, range(ord("!"), ord("~") + 1))} - {*f"{RESIDUES}{RESIDUES.lower()}Jj"}),
)
def test_any_other_character_is_refused(tmp_path: Path, character: str) -> None:
    """Even between good records."""
    path = write(tmp_path / "x.fasta", f">a\nMKV\n>b\nMK{character}V\n>c\nMKV\n")
    assert f"{path}, line 3: sequence 'b' has {character!r} at position 3" in refusal(path)


@pytest.mark.parametrize("extension", COMPRESSORS)
def test_compressed_files_are_read_under_any_name(tmp_path: Path, extension: str) -> None:
    records = random_records(np.random.default_rng(0), num_records=300)
    data = COMPRESSORS[extension](as_fasta(records, width=60, newline="\n").encode())
    assert read(write(tmp_path / f"x.fasta.{extension}", data)) == records
    assert read(write(tmp_path / "x.fasta", data)) == records


def test_files_joined_from_several_gz_are_read_to_the_end(tmp_path: Path) -> None:
    data = gzip.compress(b">a\nMKV\n") + gzip.compress(b">b\nMWW\n")
    assert read(write(tmp_path / "x.gz", data)) == [("a", "", "MKV"), ("b", "", "MWW")]


def test_several_files_are_read_in_order_and_never_share_a_chunk(tmp_path: Path) -> None:
    first = write(tmp_path / "1.fasta", ">a\nMKV\n>b\nMKW\n>c\nMKY")
    second = write(tmp_path / "2.fasta.gz", gzip.compress(b">d\nMKL\n"))
    chunks = [chunk.usable.ids for chunk in chunks_of(first, second, chunk_size=2)]
    assert chunks == [["a", "b"], ["c"], ["d"]]


@pytest.mark.parametrize(
    ("record", "what"),
    [
        pytest.param(
            ">bad x\nMK*V\n",
            "sequence 'bad' has '*' at position 3; a stop codon inside",
            id="stop inside",
        ),
        pytest.param(">bad\nMKV**\n", "sequence 'bad' has '*' at position 4", id="two stops"),
        pytest.param(
            ">bad\nM-KV\n",
            "sequence 'bad' has '-' at position 2; gaps belong to an alignment",
            id="gap",
        ),
        pytest.param(
            ">bad\nMK\n V.\n", "sequence 'bad' has '.' at position 4; gaps belong", id="dot"
        ),
        pytest.param(
            ">bad\nMK1\n",
            "sequence 'bad' has '1' at position 3; the lines are numbered",
            id="digit",
        ),
        pytest.param(
            ">bad\nMK<mask>\n", "sequence 'bad' has '<' at position 3", id="the model's own tokens"
        ),
        pytest.param(">bad\nMKé\n", "sequence 'bad' has 'é' at position 3", id="not ASCII"),
        pytest.param(">bad\nMK\0V\n", r"sequence 'bad' has '\x00' at position 3", id="NUL"),
        pytest.param(
            ">bad words\n>c\nMKV\n",
            "sequence 'bad' has no residues",
            id="nothing between two headers",
        ),
        pytest.param(">bad\n*\n", "sequence 'bad' has no residues", id="only a stop"),
        pytest.param(">\nMKV\n", "a record has no id (its header is '>')", id="no header"),
        pytest.param(
            "> \nMKV\n", "a record has no id (its header is '> ')", id="white space alone"
        ),
        pytest.param(
            ">b\0d x\nMKV\n",
            r"the id 'b\x00d' has the control character '\x00' in it",
            id="NUL in an id",
        ),
        pytest.param(
            ">P1;CRAB\nCRYSTALLIN\n", "the header of 'P1;CRAB' is one of NBRF/PIR format", id="NBRF"
        ),
    ],
)
@pytest.mark.parametrize("chunk_size", [1, 3, 8192])
def test_a_bad_record_is_refused_by_file_line_and_id(
    tmp_path: Path, record: str, what: str, chunk_size: int
) -> None:
    path = write(tmp_path / "x.fasta", f">a\nMKV\nMKV\n\n# a comment\n>b\nMKV*\n{record}")
    assert refusal(path, chunk_size=chunk_size).startswith(f"{path}, line 8: {what}")


def test_the_line_is_that_of_the_file_at_fault(tmp_path: Path) -> None:
    good = write(tmp_path / "good.fasta", ">a\nMKV\n>b\nMKV\n")
    bad = write(tmp_path / "bad.fasta.gz", gzip.compress(b">c\nMKV\n>d\nMK-V\n"))
    assert refusal(good, bad).startswith(f"{bad}, line 3: sequence 'd' has '-'")


@pytest.mark.parametrize(
    ("content", "what"),
    [
        pytest.param(b"", "there is no sequence in it", id="empty"),
        pytest.param(b"\n \n", "there is no sequence in it", id="blank"),
        pytest.param(
            b"id,sequence\n", "this is not FASTA but text that starts with 'id,sequence'", id="CSV"
        ),
        pytest.param(
            b"MKV\n>a\nMKV\n",
            "this is not FASTA but text that starts with 'MKV'",
            id="no header first",
        ),
        pytest.param(b"\x90\r\n\x1a\n\xff\x00", "this is not FASTA but a binary file", id="binary"),
        pytest.param(
            b"\x00\x01\x02", "this is not FASTA but a binary file", id="control characters"
        ),
    ],
)
def test_a_file_that_is_no_fasta_is_refused_by_what_it_is(
    tmp_path: Path, content: bytes, what: str
) -> None:
    path = write(tmp_path / "x.fasta", content)
    assert refusal(path).startswith(f"{path}: {what}")


def test_a_header_that_is_not_utf8_is_refused_by_its_line(tmp_path: Path) -> None:
    path = write(tmp_path / "x.fasta", b">a\nMKV\n>b \xe9\nMKV\n")
    assert refusal(path).startswith(f"{path}, line 3: this is not UTF-8 text")


def test_a_missing_file_and_a_directory_are_refused(tmp_path: Path) -> None:
    assert refusal(tmp_path / "x.fasta") == f"{tmp_path / 'x.fasta'}: there is no such file"
    (tmp_path / "x.fasta").mkdir()
    assert refusal(tmp_path / "*.fasta").startswith(
        f"{tmp_path / '*.fasta'}: only directories match this pattern"
    )


def test_a_file_that_cannot_be_read_is_refused_with_the_reason(tmp_path: Path) -> None:
    path = tmp_path / "x.fasta"
    path.symlink_to(path)
    assert "the file cannot be read (Too many levels of symbolic links)" in refusal(path)


@pytest.mark.parametrize("extension", COMPRESSORS)
@pytest.mark.parametrize("kept", [0.01, 0.5, 0.999])
def test_a_compressed_file_cut_short_is_refused(
    tmp_path: Path, extension: str, kept: float
) -> None:
    records = random_records(np.random.default_rng(1), num_records=3000)
    data = COMPRESSORS[extension](as_fasta(records, width=60, newline="\n").encode())
    path = write(tmp_path / f"x.fasta.{extension}", data[: int(len(data) * kept)])
    assert refusal(path).startswith(f"{path}: the compressed file is cut short or damaged")


@pytest.mark.parametrize("extension", ["gz", "bz2", "xz"])  # zst has a checksum only on request
def test_a_damaged_compressed_file_is_refused(tmp_path: Path, extension: str) -> None:
    records = random_records(np.random.default_rng(2), num_records=300)
    data = bytearray(COMPRESSORS[extension](as_fasta(records, width=60, newline="\n").encode()))
    for position in range(10, len(data), len(data) // 20):
        damaged = data.copy()
        damaged[position] ^= 0xFF
        path = write(tmp_path / f"x.fasta.{extension}", bytes(damaged))
        assert refusal(path).startswith(str(path))


@pytest.mark.parametrize(
    "text", [">a\nACGTACGTNN\n", ">a\nacguacgu\n>b\nACG\n", ">a\nACGTACGTACGTACGTACGR\n"]
)
def test_nucleotides_are_refused_with_what_to_do(tmp_path: Path, text: str) -> None:
    path = write(tmp_path / "x.fna", text)
    message = refusal(path)
    assert message.startswith(f"{path}: this looks like nucleotides")
    assert "translate it first" in message


def test_nucleotides_are_recognised_in_any_file(
    tmp_path: Path,
) -> None:
    """Its first 1,000 records decide."""
    proteins = write(tmp_path / "x.faa", ">p\nMKLVEEDRW\n")
    genes = write(
        tmp_path / "x.fna",
        "".join(f">{i}\nACGT\n" for i in range(1000)) + ">last\n" + "MKLV" * 5000,
    )
    assert refusal(proteins, genes).startswith(
        f"{genes}: this looks like nucleotides (100% of the residues in the first 1000"
    )


def test_proteins_rich_in_alanine_and_glycine_are_read(tmp_path: Path) -> None:
    assert read(write(tmp_path / "x.faa", ">a\nGAGAGAGATCNVVAAGGAA\n")) == [
        ("a", "", "GAGAGAGATCNVVAAGGAA")
    ]


def test_the_first_faulty_records_are_named_together(tmp_path: Path) -> None:
    """Five of them, and the number of the others."""
    path = write(tmp_path / "x.fasta", "".join(f">p{number}\nMK-\n" for number in range(8)))
    lines = refusal(path).splitlines()
    assert [line.split(":")[0] for line in lines[:5]] == [
        f"{path}, line {number}" for number in (1, 3, 5, 7, 9)
    ]
    assert lines[5:] == ["and 3 more among the first that were read"]


ODD = """>good
MKVL
>accent one
MÉKVL
>stop
MK*VL**
>empty
>script
mβ一*
"""


def test_unknown_characters_are_mapped_on_request(
    tmp_path: Path,
) -> None:
    """One X per character, after the normalisation of others. An empty record is still refused."""
    path = write(tmp_path / "x.fasta", ODD)
    assert refusal(path, invalid_residues="map").startswith(
        f"{path}, line 7: sequence 'empty' has no residues"
    )
    corrected = write(tmp_path / "y.fasta", ODD.replace(">empty\n", ""))
    assert read(corrected, invalid_residues="map") == [
        ("good", "", "MKVL"),
        ("accent", "one", "MXKVL"),
        ("stop", "", "MKXVLX"),
        ("script", "", "MXX"),
    ]
    (chunk,) = chunks_of(corrected, invalid_residues="map")
    assert chunk.counts.letters == CharacterCounts(mapped=5, final_stops=2, lower_case=1)
    assert chunk.counts.describe() == "5 residues read as unknown"


@pytest.mark.parametrize("chunk_size", [1, 2, 8192])
def test_faulty_records_are_skipped_on_request(tmp_path: Path, chunk_size: int) -> None:
    path = write(tmp_path / "x.fasta", ODD + ">\nMK\n>last\nMKV\n")
    assert read(path, chunk_size=chunk_size, invalid_residues="skip") == [
        ("good", "", "MKVL"),
        ("last", "", "MKV"),
    ]
    chunks = chunks_of(path, chunk_size=chunk_size, invalid_residues="skip")
    skipped = [(fault.record, fault.sequence_id) for chunk in chunks for fault in chunk.skipped]
    assert skipped == [(1, "accent"), (2, "stop"), (3, "empty"), (4, "script"), (5, "")]
    assert [record for chunk in chunks for record in chunk.records] == [0, 6]


@pytest.mark.parametrize("policy", [{"invalid_residues": "map"}, {"invalid_residues": "skip"}])
def test_nucleotides_are_refused_under_every_policy(tmp_path: Path, policy: dict[str, Any]) -> None:
    path = write(tmp_path / "x.fna", ">a\nACGTACGT\n>b\n\n>c\nACG\n")
    assert "looks like nucleotides" in refusal(path, **policy)


LONG = ">a\nMKVLAA\n>b\nMKV\n>c\nMKVL\n>d\nMKVLA*\n"


@pytest.mark.parametrize(
    ("long", "records", "original_lengths"),
    [
        ("whole", [("a", "MKVLAA"), ("b", "MKV"), ("c", "MKVL"), ("d", "MKVLA")], [6, 3, 4, 5]),
        ("truncate", [("a", "MKVL"), ("b", "MKV"), ("c", "MKVL"), ("d", "MKVL")], [6, 3, 4, 5]),
        ("skip", [("b", "MKV"), ("c", "MKVL")], [3, 4]),
    ],
)
def test_long_sequences_are_taken_cut_or_left_out(
    tmp_path: Path, long: str, records: list[tuple[str, str]], original_lengths: list[int]
) -> None:
    path = write(tmp_path / "x.fasta", LONG)
    (chunk,) = chunks_of(path, long=long, max_length=4)
    assert list(zip(chunk.usable.ids, chunk.usable.sequences, strict=True)) == records
    assert chunk.lengths.tolist() == [len(sequence) for _, sequence in records]
    assert chunk.original_lengths.tolist() == original_lengths
    counts = InputCounts(num_cut=2 * (long == "truncate"), num_skipped=2 * (long == "skip"))
    assert replace(chunk.counts, letters=CharacterCounts()) == counts
    assert [(fault.record, fault.sequence_id) for fault in chunk.skipped] == (
        [(0, "a"), (3, "d")] if long == "skip" else []
    )


def test_means_over_windows_or_a_part_are_counted(
    tmp_path: Path,
) -> None:
    """Sequences whose mean is not that of all residues."""
    (chunk,) = chunks_of(write(tmp_path / "x.fasta", LONG), long="window", max_length=4)
    assert chunk.counts.describe() == "2 sequences averaged over windows"
    long = "".join(f">p{length}\n{'M' * length}\n" for length in (1023, 1024, 1025, 4000))
    (chunk,) = chunks_of(write(tmp_path / "y.fasta", long), long="virnucpro")
    assert chunk.counts.describe() == "2 sequences averaged over the first 1,024 residues"
    assert chunk.counts.is_altered


def test_counts_are_described_for_one_and_for_many() -> None:
    characters = CharacterCounts(
        unknown=9, read_as_unknown=1, mapped=1200, lower_case=5, final_stops=7
    )
    counts = InputCounts(
        num_skipped=1,
        num_cut=2,
        num_windowed=1,
        num_in_part=2,
        num_duplicates=1,
        letters=characters,
    )
    assert counts.describe() == (
        "1 record skipped, 2 sequences cut short, 1 sequence averaged over windows, "
        "2 sequences averaged over the first 1,024 residues, 1,201 residues read as unknown, "
        "1 duplicate not computed again"
    )
    assert (
        InputCounts.from_json(json.loads(json.dumps((counts + counts).to_json())))
        == counts + counts
    )
    of_an_earlier_version = {"num_skipped": 1, "num_cut": 0, "letters": {}}
    assert InputCounts.from_json(of_an_earlier_version) == InputCounts(num_skipped=1)


@pytest.mark.parametrize(
    ("counts", "is_altered"),
    [
        (InputCounts(), False),
        (InputCounts(num_duplicates=3), False),
        (InputCounts(letters=CharacterCounts(unknown=3, lower_case=3, final_stops=3)), False),
        (InputCounts(letters=CharacterCounts(read_as_unknown=1)), True),
        (InputCounts(num_cut=1, num_duplicates=3), True),
    ],
)
def test_input_is_altered_if_a_row_is_not_of_its_record(
    counts: InputCounts, is_altered: bool
) -> None:
    assert counts.is_altered == is_altered


def test_long_sequences_are_refused_by_line_on_request(tmp_path: Path) -> None:
    path = write(tmp_path / "x.fasta", LONG)
    first, second = refusal(path, long="error", max_length=4).splitlines()
    assert first.startswith(
        f"{path}, line 1: sequence 'a' has 6 residues, and at most 4 are allowed; cut it"
    )
    assert second.startswith(f"{path}, line 7: sequence 'd' has 5 residues")
    assert len(read(path, long="error", max_length=6)) == 4


def test_long_and_faulty_records_are_left_out_in_order(tmp_path: Path) -> None:
    path = write(tmp_path / "x.fasta", ">a\nMKVLAA\n>b\nM-\n>c\nMK\n>d\nMKVLA\n")
    (chunk,) = chunks_of(path, long="skip", max_length=4, invalid_residues="skip")
    assert [fault.record for fault in chunk.skipped] == [0, 1, 3]
    assert chunk.usable.ids == ["c"]
    (chunk,) = chunks_of(
        write(tmp_path / "y.fasta", ">a\nMKVLAA\n>b\nMKVLAAA\n"), long="skip", max_length=4
    )
    assert (chunk.usable.ids, chunk.counts.num_skipped) == ([], 2)


def test_a_file_that_is_being_written_is_refused_at_its_end(tmp_path: Path) -> None:
    """Even if its last record is at fault, since the file is incomplete."""
    path = write(tmp_path / "x.fasta", LONG)
    for added in (b">e\nMK\n", b">e\n"):
        (source,) = find_sources([path], stdin=Path("unused"))
        chunks = read_records(source, InputPolicy(), chunk_size=1)
        next(chunks)
        with path.open("ab") as file:
            file.write(added)
        with pytest.raises(
            FastaError, match=r"x\.fasta: the file was changed while it was read \(\d+ bytes"
        ):
            list(chunks)


def test_a_file_that_shrinks_or_is_written_over_is_refused(tmp_path: Path) -> None:
    text = "".join(f">p{number}\nMKVLAA\n" for number in range(50_000))
    path = write(tmp_path / "x.fasta", text)
    for change in (lambda: write(path, text[: len(text) // 2]), lambda: os.utime(path, ns=(0, 0))):
        (source,) = find_sources([path], stdin=Path("unused"))
        chunks = read_records(source, InputPolicy(), chunk_size=10)
        next(chunks)
        change()
        with pytest.raises(FastaError, match="was changed while it was read"):
            list(chunks)


def test_a_pipe_is_refused_since_input_is_read_more_than_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    assert "this is a pipe or a device" in refusal(tmp_path / "pipe")


def test_lines_are_found_in_any_order(tmp_path: Path) -> None:
    path = write(tmp_path / "x.fasta", ">a\nMK\nV\n>b\nMK\n\n# no record\n>c\nMK\n")
    places = RecordLocator(Source(path=path, name="x"))
    asked = [0, 2, 2, 1, 0, 2]
    assert [places.find(record)["line"] for record in asked] == [
        {0: 1, 1: 4, 2: 8}[record] for record in asked
    ]


def test_long_records_make_small_chunks(tmp_path: Path) -> None:
    """A chunk of thousands of chromosomes would not fit into memory."""
    path = write(
        tmp_path / "x.fasta", "".join(f">p{number}\n{'MKVL' * 1_000_000}\n" for number in range(12))
    )
    sizes = [len(chunk.usable.ids) for chunk in chunks_of(path)]
    assert sum(sizes) == 12
    assert max(sizes) <= 5


def test_the_example_is_what_its_readme_says() -> None:
    records = read(Path(__file__).parents[3] / "examples" / "viral_proteins.fasta")
    lengths = [len(sequence) for _, _, sequence in records]
    assert len(records) == len({sequence_id for sequence_id, _, _ in records}) == 122
    assert len({sequence for _, _, sequence in records}) == 119
    assert (min(lengths), max(lengths), sum(lengths)) == (23, 1030, 28375)
    assert sum(length > 1022 for length in lengths) == 2
