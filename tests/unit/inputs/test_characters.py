"""The table of character classes: what each policy does with each class."""

from __future__ import annotations

import gzip
import unicodedata
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from vnp_lib.errors import FastaError
from vnp_lib.inputs.characters import CLASSES, CharacterClass, Treatment, class_of
from vnp_lib.inputs.chunks import InputChunk
from vnp_lib.inputs.policy import InputPolicy
from vnp_lib.inputs.reader import chunk_from_memory, read_records
from vnp_lib.inputs.records import RESIDUES, CharacterCounts, nucleotide_share
from vnp_lib.inputs.sources import Source

BY_NAME = {each.name: each for each in CLASSES}
# Members of each class, by its name in the table, as they occur inside a sequence.
MEMBERS = {
    "inner stop": "*",
    "white space": " \t\v\f\x85\xa0\u1680\u2000\u2003\u2007\u2009\u200a"
    "\u2028\u2029\u202f\u205f\u3000",
    "invisible characters": "\x1a\xad\u034f\u061c\u180e\u200b\u200c\u200d\u200e\u200f"
    "\u202a\u202e\u2060\u2066\u2069\ufeff\ufe0f\U000e0041",
    "other alphabetic characters": "Éßñøβλπжשع一カ한ªＭ𝐌",
    "gaps": "-.~–—−‐…·",  # noqa: RUF001
    "header marks": ">",
    "digits": "0123456789²½Ⅳ٣",
    "chain separators": ":/|\\",
    "brackets": "[](){}<+#",
    "lists": ",;\"'`“”‘’",  # noqa: RUF001
    "other punctuation": "?!@_=&%$^°©€→。",
    "control characters": "\0\x01\x07\b\x1b\x1c\x1d\x1e\x1f\x7f\x80\x9f",
    "everything else": "\u0301\ue000\u0378\U0010ffff",
}


def in_fasta(directory: Path, sequence: str) -> Path:
    path = directory / "x.fasta"
    path.write_bytes(f">a\n{sequence}\n".encode())
    return path


def in_gz(directory: Path, sequence: str) -> Path:
    path = directory / "x"
    path.write_bytes(gzip.compress(f">a\r\n{sequence}\r\n".encode()))
    return path


def in_csv(directory: Path, sequence: str) -> Path:
    path = directory / "x.csv"
    quoted = sequence.replace('"', '""')
    path.write_bytes(f'id,sequence\na,"{quoted}"\n'.encode())
    return path


def in_parquet(directory: Path, sequence: str) -> Path:
    path = directory / "x.parquet"
    pq.write_table(pa.table({"id": ["a"], "sequence": [sequence]}), path)
    return path


def chunk_of(path: Path, policy: str = "error") -> InputChunk:
    input_policy = InputPolicy(invalid_residues=policy)  # type: ignore[arg-type]
    (chunk,) = read_records(Source(path=path, name=str(path)), input_policy)
    return chunk


@pytest.mark.parametrize("source", [in_fasta, in_gz, in_csv, in_parquet])
@pytest.mark.parametrize("name", MEMBERS)
def test_a_file_is_treated_as_the_table_says(
    tmp_path: Path, name: str, source: Callable[[Path, str], Path]
) -> None:
    for character in MEMBERS[name]:
        path = source(tmp_path, f"MK{character}VL")
        for policy in ("error", "map", "skip"):
            require_treated(path, character, BY_NAME[name], policy)


def require_treated(path: Path, character: str, its_class: CharacterClass, policy: str) -> None:
    treatment = getattr(its_class, policy)
    if treatment == Treatment.REFUSED:
        with pytest.raises(FastaError) as caught:
            chunk_of(path, policy)
        message = str(caught.value)
        assert f"sequence 'a' has {character!r} at position 3; {its_class.advice[:12]}" in message
        assert "\n" not in message
        return
    chunk = chunk_of(path, policy)
    expected = {Treatment.REMOVED: ["MKVL"], Treatment.UNKNOWN: ["MKXVL"], Treatment.LEFT_OUT: []}[
        treatment
    ]
    assert chunk.usable.sequences == expected, character
    assert len(chunk.skipped) == (treatment == Treatment.LEFT_OUT)
    assert chunk.letters.mapped == (treatment == Treatment.UNKNOWN)
    removed = chunk.letters.white_space + chunk.letters.invisible
    assert removed == (treatment == Treatment.REMOVED)


@pytest.mark.parametrize("name", MEMBERS)
def test_memory_is_treated_as_the_table_says(name: str) -> None:
    for character in MEMBERS[name]:
        if BY_NAME[name].error == Treatment.REMOVED:
            assert chunk_from_memory(["a"], [f"MK{character}VL"]).usable.sequences == ["MKVL"]
            continue
        with pytest.raises(FastaError, match=r"record 0: sequence 'a' has .* at position 3; "):
            chunk_from_memory(["a"], [f"MK{character}VL"])


def members_of(is_member: Callable[[CharacterClass], bool]) -> set[str]:
    """Return all characters of the Basic Multilingual Plane."""
    return {each for each in map(chr, range(0x10000)) if is_member(class_of.__wrapped__(each))}


def test_only_alphabetic_characters_and_stops_are_mapped() -> None:
    mapped = members_of(lambda each: each.map == Treatment.UNKNOWN)
    assert {each for each in mapped if not unicodedata.category(each).startswith("L")} == {"*"}
    assert len(mapped) > 10_000


def test_white_space_is_what_unicode_says() -> None:
    """Python's `isspace` has four control characters that are not in the property White_Space."""
    spaces = set(filter(str.isspace, map(chr, range(0x10000))))
    assert members_of(lambda each: each.name == "white space") == spaces - {*"\x1c\x1d\x1e\x1f"}


@pytest.mark.parametrize(
    ("sequence", "expected"),
    [
        (RESIDUES, RESIDUES),
        (RESIDUES.lower(), RESIDUES),
        ("MJj", "MXX"),
        ("MK*", "MK"),
        ("MK* \ufeff", "MK"),
        ("M K\xa0\u200bV\t*\x1a", "MKV"),
    ],
)
def test_characters_are_kept_raised_or_dropped(
    tmp_path: Path, sequence: str, expected: str
) -> None:
    for source in (in_fasta, in_csv, in_parquet):
        assert chunk_of(source(tmp_path, sequence)).usable.sequences == [expected]
    assert chunk_from_memory(["a"], [sequence]).usable.sequences == [expected]


def test_removed_characters_are_counted_by_class(tmp_path: Path) -> None:
    """Marks before a header are counted with its record."""
    path = tmp_path / "x.fasta"
    path.write_bytes("\ufeff>a\nMK\xa0 V\t\n \ufeff\u200b>b\nM\xad\x1aKé\n".encode())
    chunk = chunk_of(path, "map")
    assert chunk.usable.sequences == ["MKV", "MKX"]
    assert chunk.letters == CharacterCounts(white_space=4, invisible=5, mapped=1)


@pytest.mark.parametrize(
    "text", ["ACGT ACGT\nAC GT", "acgu-acgu", "1 ACGTACGT 8", "\ufeffACGT\u200bNN"]
)
def test_nucleotides_are_recognised_despite_other_text(text: str) -> None:
    assert nucleotide_share([text]) == 1


@pytest.mark.parametrize(
    ("header", "expected"),
    [
        ("> a one", ("a", "one")),
        (">\ta\tone", ("a", "one")),
        (">\xa0a\u3000one  two ", ("a", "one  two")),
        (">\u2028a\u2029one", ("a", "one")),
        (">\ufeffa one", ("a", "one")),
        (">\u200b a\u200b one", ("a", "one")),
        (">a\u200db one", ("a\u200db", "one")),
        (">sp|P1|β_x one\x01gi|2", ("sp|P1|β_x", "one\x01gi|2")),
    ],
)
def test_the_id_is_the_first_word_of_a_header(
    tmp_path: Path, header: str, expected: tuple[str, str]
) -> None:
    """In a table and in FASTA."""
    path = tmp_path / "x.fasta"
    path.write_bytes(f"{header}\nMK\n".encode())
    table = tmp_path / "x.parquet"
    pq.write_table(pa.table({"id": [header[1:]], "sequence": ["MK"]}), table)
    for each in (path, table):
        texts = chunk_of(each).usable
        assert (texts.ids, texts.descriptions) == ([expected[0]], [expected[1]])


@pytest.mark.parametrize("character", "\0\x01\x07\x1b\x7f\x9f")
def test_a_control_character_in_an_id_is_refused(tmp_path: Path, character: str) -> None:
    path = in_parquet(tmp_path, "MK")
    pq.write_table(pa.table({"id": [f"a{character}b"], "sequence": ["MK"]}), path)
    for policy in ("error", "map"):
        with pytest.raises(
            FastaError,
            match=f"the id .* has the control character {character!r}".replace("\\", r"\\"),
        ):
            chunk_of(path, policy)
    assert [fault.record for fault in chunk_of(path, "skip").skipped] == [0]


@pytest.mark.parametrize("header", ["", " ", "\ufeff", "\u200b \xa0"])
def test_a_header_that_shows_nothing_has_no_id(tmp_path: Path, header: str) -> None:
    path = tmp_path / "x.fasta"
    path.write_bytes(f">{header}\nMK\n".encode())
    with pytest.raises(FastaError, match="line 1: a record has no id"):
        chunk_of(path)


@pytest.mark.parametrize(
    "text", ["MET LYS VAL LEU ALA", "MetLysValLeu", "met lys\tval\xa0leu gly", "Met-free Lys"]
)
def test_three_letter_codes_are_not_read_as_residues(tmp_path: Path, text: str) -> None:
    path = in_fasta(tmp_path, text.replace("-free ", "ValLeu "))
    for policy in ("error", "map"):
        with pytest.raises(
            FastaError, match=r"line 1: sequence 'a' is in three-letter codes \(MET"
        ):
            chunk_of(path, policy)
    assert [fault.record for fault in chunk_of(path, "skip").skipped] == [0]


@pytest.mark.parametrize(
    "text", ["ala ala ala ala", "met lys val", "met lys val leu a", "METVALLYSALA"]
)
def test_proteins_that_look_like_codes_are_read(tmp_path: Path, text: str) -> None:
    """Repeats of one residue, few residues, or no case and no spaces that show the codes."""
    expected = text.replace(" ", "").upper()
    assert chunk_of(in_fasta(tmp_path, text)).usable.sequences == [expected]
    with_others = chunk_of(in_fasta(tmp_path, f"{text}\n>b\nM-K\n>c\nMet Lys Val Leu"), "skip")
    assert (with_others.usable.sequences, len(with_others.skipped)) == ([expected], 2)
