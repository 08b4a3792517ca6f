"""Reading FASTA files: what comes out, what is mended, and what is refused in which words."""

import bz2
import gzip
import lzma
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from backports import zstd

from vnp_lib.failures import FastaError
from vnp_lib.fasta import LETTERS, read_fasta

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


def read(*paths: Path, chunk_size: int = 8192) -> list[Record]:
    return [
        record
        for chunk in read_fasta(paths, chunk_size=chunk_size)
        for record in zip(chunk.ids, chunk.descriptions, chunk.sequences, strict=True)
    ]


def refusal(*paths: Path, chunk_size: int = 8192) -> str:
    with pytest.raises(FastaError) as caught:
        read(*paths, chunk_size=chunk_size)
    return str(caught.value)


def random_records(rng: np.random.Generator, num_records: int) -> list[Record]:
    letters = np.array(list(LETTERS))
    return [
        (
            f"sp|P{i}|X",
            f"protein {i}  of {num_records}" if i % 3 else "",
            "".join(rng.choice(letters, rng.integers(1, 200))),
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
        pytest.param(">a\nMK\nV\n\n\n>b\n\nW\n", [("a", "", "MKV"), ("b", "", "W")], id="lines and blank lines"),
        pytest.param(">a\r\nMK\r\nV\r\n", [("a", "", "MKV")], id="Windows"),
        pytest.param(">a\rMK\rV\r", [("a", "", "MKV")], id="old Macintosh"),
        pytest.param("\n\n>a\nMKV\n", [("a", "", "MKV")], id="blank lines first"),
        pytest.param(">a b  c\nMKV\n", [("a", "b  c", "MKV")], id="the rest of the header is the description"),
        pytest.param(">a\tb\tc \nMKV\n", [("a", "b\tc", "MKV")], id="an id ends at a tab"),
        pytest.param(">β1 β-lactamase\nMKV\n", [("β1", "β-lactamase", "MKV")], id="headers in UTF-8"),
        pytest.param(">../../etc/x\nMKV\n", [("../../etc/x", "", "MKV")], id="an id is data, never a path"),
        pytest.param(">a\nmkV\n", [("a", "", "MKV")], id="lower case is raised"),
        pytest.param(">a\nM K\tV \n", [("a", "", "MKV")], id="white space is taken out"),
        pytest.param(">a\nMKV*\n>b\nMK\n*\n", [("a", "", "MKV"), ("b", "", "MK")], id="one stop at the end is dropped"),
        pytest.param(">a\nMJj\n", [("a", "", "MXX")], id="J is read as X"),
        pytest.param(f">a\n{LETTERS}\n", [("a", "", LETTERS)], id="all letters of the model"),
    ],
)
@pytest.mark.parametrize("chunk_size", [1, 2, 8192])
def test_records_are_read_and_normalised(tmp_path: Path, text: str, records: list[Record], chunk_size: int) -> None:
    assert read(write(tmp_path / "x.fasta", text), chunk_size=chunk_size) == records


@pytest.mark.parametrize("seed", range(20))
def test_what_was_written_is_read_back(tmp_path: Path, seed: int) -> None:
    rng = np.random.default_rng(seed)
    records = random_records(rng, num_records=int(rng.integers(1, 60)))
    text = as_fasta(records, width=int(rng.integers(1, 90)), newline=str(rng.choice(["\n", "\r\n"])))
    assert read(write(tmp_path / "x.fasta", text), chunk_size=int(rng.integers(1, 70))) == records


@pytest.mark.parametrize(
    "character", sorted({*map(chr, range(ord("!"), ord("~") + 1))} - {*f"{LETTERS}{LETTERS.lower()}Jj"})
)
def test_any_other_character_is_refused_in_the_midst_of_good_records(tmp_path: Path, character: str) -> None:
    path = write(tmp_path / "x.fasta", f">a\nMKV\n>b\nMK{character}V\n>c\nMKV\n")
    assert f"{path}, line 3: sequence 'b' has {character!r} at position 3" in refusal(path)


@pytest.mark.parametrize("extension", COMPRESSORS)
def test_compressed_files_are_read_whatever_their_name(tmp_path: Path, extension: str) -> None:
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
    chunks = [chunk.ids for chunk in read_fasta([first, second], chunk_size=2)]
    assert chunks == [["a", "b"], ["c"], ["d"]]


@pytest.mark.parametrize(
    ("record", "what"),
    [
        pytest.param(">bad x\nMK*V\n", "sequence 'bad' has '*' at position 3; a stop codon inside", id="stop inside"),
        pytest.param(">bad\nMKV**\n", "sequence 'bad' has '*' at position 4", id="two stops"),
        pytest.param(">bad\nM-KV\n", "sequence 'bad' has '-' at position 2; gaps belong to an alignment", id="gap"),
        pytest.param(">bad\nMK\n V.\n", "sequence 'bad' has '.' at position 4; gaps belong", id="dot"),
        pytest.param(">bad\nMK1\n", "sequence 'bad' has '1' at position 3; allowed are the letters ABCDEF", id="digit"),
        pytest.param(">bad\nMK<mask>\n", "sequence 'bad' has '<' at position 3", id="the model's own tokens"),
        pytest.param(">bad\nMKé\n", "sequence 'bad' has 'é' at position 3", id="not ASCII"),
        pytest.param(">bad\nMK\0V\n", r"sequence 'bad' has '\x00' at position 3", id="NUL"),
        pytest.param(">bad words\n>c\nMKV\n", "sequence 'bad' has no residues", id="nothing between two headers"),
        pytest.param(">bad\n*\n", "sequence 'bad' has no residues", id="only a stop"),
        pytest.param(">\nMKV\n", "a record has no id (its header is '>')", id="no header"),
        pytest.param("> bad\nMKV\n", "a record has no id (its header is '> bad')", id="white space before the id"),
    ],
)
@pytest.mark.parametrize("chunk_size", [1, 3, 8192])
def test_a_bad_record_is_refused_by_file_line_and_id(tmp_path: Path, record: str, what: str, chunk_size: int) -> None:
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
        pytest.param(b"@r1\nACGT\n+\nIIII\n", "this is not FASTA but FASTQ", id="FASTQ"),
        pytest.param(b"LOCUS       NC_1  5 bp\n", "this is not FASTA but a GenBank, EMBL or UniProt", id="GenBank"),
        pytest.param(b"id,sequence\n", "this is not FASTA but text that starts with 'id,sequence'", id="CSV"),
        pytest.param(b"MKV\n>a\nMKV\n", "this is not FASTA but text that starts with 'MKV'", id="no header first"),
        pytest.param(b"\x89PNG\r\n\x1a\n\xff\x00", "this is not FASTA but a binary file", id="binary"),
        pytest.param(b"\x00\x01\x02", "this is not FASTA but a binary file", id="control characters"),
    ],
)
def test_a_file_that_is_no_fasta_is_refused_by_what_it_is(tmp_path: Path, content: bytes, what: str) -> None:
    path = write(tmp_path / "x.fasta", content)
    assert refusal(path).startswith(f"{path}: {what}")


def test_a_header_that_is_not_utf8_is_refused_by_its_line(tmp_path: Path) -> None:
    path = write(tmp_path / "x.fasta", b">a\nMKV\n>b \xe9\nMKV\n")
    assert refusal(path).startswith(f"{path}, line 3: this is not UTF-8 text")


def test_a_missing_file_and_a_directory_are_refused(tmp_path: Path) -> None:
    assert refusal(tmp_path / "x.fasta") == f"{tmp_path / 'x.fasta'}: there is no such file"
    assert refusal(tmp_path).startswith(f"{tmp_path}: this is a directory")


def test_a_file_that_cannot_be_read_is_refused_with_the_reason(tmp_path: Path) -> None:
    path = tmp_path / "x.fasta"
    path.symlink_to(path)
    assert "the file cannot be read (Too many levels of symbolic links)" in refusal(path)


@pytest.mark.parametrize("extension", COMPRESSORS)
@pytest.mark.parametrize("kept", [0.01, 0.5, 0.999])
def test_a_compressed_file_cut_short_is_refused(tmp_path: Path, extension: str, kept: float) -> None:
    records = random_records(np.random.default_rng(1), num_records=3000)
    data = COMPRESSORS[extension](as_fasta(records, width=60, newline="\n").encode())
    path = write(tmp_path / f"x.fasta.{extension}", data[: int(len(data) * kept)])
    assert refusal(path).startswith(f"{path}: the compressed file is cut short or damaged")


@pytest.mark.parametrize("extension", ["gz", "bz2", "xz"])  # zst has a checksum only where it was asked for
def test_a_damaged_compressed_file_is_refused(tmp_path: Path, extension: str) -> None:
    records = random_records(np.random.default_rng(2), num_records=300)
    data = bytearray(COMPRESSORS[extension](as_fasta(records, width=60, newline="\n").encode()))
    for position in range(10, len(data), len(data) // 20):
        damaged = data.copy()
        damaged[position] ^= 0xFF
        path = write(tmp_path / f"x.fasta.{extension}", bytes(damaged))
        assert refusal(path).startswith(str(path))


@pytest.mark.parametrize("text", [">a\nACGTACGTNN\n", ">a\nacguacgu\n>b\nACG\n", ">a\nACGTACGTACGTACGTACGR\n"])
def test_nucleotides_are_refused_with_what_to_do(tmp_path: Path, text: str) -> None:
    path = write(tmp_path / "x.fna", text)
    message = refusal(path)
    assert message.startswith(f"{path}: this looks like nucleotides")
    assert "translate it first" in message


def test_nucleotides_are_noticed_in_any_file_and_judged_by_its_first_1000_records(tmp_path: Path) -> None:
    proteins = write(tmp_path / "x.faa", ">p\nMKLVEEDRW\n")
    genes = write(tmp_path / "x.fna", "".join(f">{i}\nACGT\n" for i in range(1000)) + ">last\n" + "MKLV" * 5000)
    assert refusal(proteins, genes).startswith(
        f"{genes}: this looks like nucleotides (100% of the letters in the first 1000"
    )


def test_proteins_rich_in_alanine_and_glycine_are_read(tmp_path: Path) -> None:
    assert read(write(tmp_path / "x.faa", ">a\nGAGAGAGATCNVVAAGGAA\n")) == [("a", "", "GAGAGAGATCNVVAAGGAA")]


def test_the_example_is_what_its_readme_says() -> None:
    records = read(Path(__file__).parents[2] / "examples" / "viral_proteins.fasta")
    lengths = [len(sequence) for _, _, sequence in records]
    assert len(records) == len({sequence_id for sequence_id, _, _ in records}) == 122
    assert len({sequence for _, _, sequence in records}) == 119
    assert (min(lengths), max(lengths), sum(lengths)) == (23, 1030, 28375)
    assert sum(length > 1022 for length in lengths) == 2
