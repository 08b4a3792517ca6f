"""For any bytes, each record has its row, or all are refused, each in one line."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import re
import zipfile
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from backports import zstd
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vnp_lib.errors import InputError
from vnp_lib.inputs.policy import InputPolicy
from vnp_lib.inputs.reader import read_with_faults
from vnp_lib.inputs.sources import Source
from vnp_lib.plan.paths import RunPaths
from vnp_lib.plan.plan import ModelIdentity
from vnp_lib.plan.planner import make_plan

MODEL = ModelIdentity(model="m", weights_digest="w", layer=6, dtype="float32")
BOUNDED = settings(
    max_examples=150,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow],
)

WHITE = " \t\v\f\x85\xa0\u2003\u2028\u3000"
INVISIBLE = "\ufeff\u200b\u200d\u2060\xad\x1a"
RESIDUES = "ACDEFGHIKLMNPQRSTVWYBUXZO"


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """The result of a plain reader: the first word of a header, and visible characters below it."""

    id: str
    text: str


def plainly_read(text: str) -> list[Record] | None:
    """Read FASTA in the simplest way; None if there is text before the first header."""
    records: list[Record] = []
    for line in re.split("\r\n|\r|\n", text):
        shown = line.strip(WHITE + INVISIBLE)
        if shown.startswith(">"):
            words = shown[1:].strip(WHITE + INVISIBLE).split(None, 1)
            records.append(Record(id=words[0].strip(INVISIBLE) if words else "", text=""))
        elif shown and not shown.startswith(("#", ";")):
            if not records:
                return None
            characters = "".join(
                character for character in shown if character not in WHITE + INVISIBLE
            )
            records[-1] = Record(id=records[-1].id, text=records[-1].text + characters)
    return records


def residues_of(record: Record, *, maps_unknown: bool) -> str | None:
    """Normalise a sequence, character by character; None if it is refused."""
    characters = record.text[:-1] if record.text.endswith("*") else record.text
    residues = []
    for character in characters:
        if character.upper() in RESIDUES and character.isascii():
            residues.append(character.upper())
        elif character in "Jj" or (maps_unknown and (character == "*" or character.isalpha())):
            residues.append("X")
        else:
            return None
    return "".join(residues) or None


margins = st.text(WHITE + INVISIBLE, max_size=2)
usually_nothing = st.one_of(st.just(""), st.just(""), st.just(""), margins)
ids = st.text("abcdefgh0123_", min_size=2, max_size=5)
odd_ids = st.sampled_from(
    ["sp|P1|X", "β1", "é", "../x", "P1;X", "a\0b", "\x1b", "", "a\u200db", "a>b", "1", "#", ";"]
)
residues = st.text(RESIDUES, min_size=1, max_size=12)
odd_residues = st.text("MKVLacjJ*X" + WHITE + INVISIBLE, max_size=8)
any_text = st.text("MK*-.>0:/|[(+,;#\"'?@_{<\0\x1b\x1céβ一\u0301\ud7ff\U0001f9ec ", max_size=5)
descriptions = st.sampled_from(["", "", " one", "\ttwo  three ", " \x01x", " [β] é", "\u2003em"])
headers = st.builds(
    "{}>{}{}{}".format, usually_nothing, usually_nothing, st.one_of(ids, ids, odd_ids), descriptions
)
comments = st.builds("{}{}{}".format, usually_nothing, st.sampled_from("#;"), any_text)
line_ends = st.one_of(*3 * [st.just("\n")], st.sampled_from(["\r\n", "\r", "\n\n", "\n\ufeff"]))
endings = st.one_of(*5 * [line_ends], st.sampled_from(["", "\ufeff"]))
records = st.builds(
    "{}{}{}{}{}{}".format,
    *(headers, line_ends, residues, line_ends),
    st.one_of(st.just(""), residues, odd_residues, comments, usually_nothing),
    endings,
)
oddities = st.builds(
    "{}{}".format,
    st.one_of(
        headers,
        st.builds("{}{}".format, residues, any_text),
        odd_residues,
        comments,
        usually_nothing,
    ),
    endings,
)
texts = st.builds(
    lambda start, parts: start + "".join(parts),
    st.sampled_from(["", "", "\ufeff", "# x\n", "\r\n", "; x\r"]),
    st.one_of(
        st.lists(records, min_size=1, max_size=4),
        st.lists(st.one_of(records, oddities), max_size=8),
    ),
)


def zipped(data: bytes) -> bytes:
    with zipfile.ZipFile(file := io.BytesIO(), "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x.faa", data)
    return file.getvalue()


COMPRESSORS = {"gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress, "zst": zstd.compress}
wrappings = st.one_of(
    st.just("plain"),
    st.sampled_from([*COMPRESSORS, "zip", "utf-16", "utf-32", "two parts", "trailing bytes"]),
)


def wrapped(text: str, wrapping: str) -> bytes:
    """Return a text in the forms that it has in files."""
    data = text.encode()
    if wrapping.startswith("utf"):
        return text.encode(wrapping)
    if wrapping == "zip":
        return zipped(data)
    if wrapping == "two parts":
        return gzip.compress(data[: len(data) // 2]) + gzip.compress(data[len(data) // 2 :])
    if wrapping == "trailing bytes":
        return gzip.compress(data) + b"\0\0garbage"
    return COMPRESSORS[wrapping](data) if wrapping in COMPRESSORS else data


def require_one_sentence_a_record(error: InputError) -> None:
    lines = str(error).split("\n")
    assert len(lines) == 1 or all(", line " in line or line.startswith("and ") for line in lines)
    assert "Traceback" not in str(error)


def planned(data: bytes, policy: InputPolicy) -> list[tuple[str, str]] | None:
    """Return the ids and sequences of a file's plan; None if the file is refused."""
    with TemporaryDirectory() as directory:
        path = Path(directory, "x.fasta")
        path.write_bytes(data)
        try:
            plan = make_plan(
                RunPaths(Path(directory, "run")),
                [path],
                MODEL,
                num_shards=1,
                token_budget=100,
                policy=policy,
            )
        except InputError as error:
            require_one_sentence_a_record(error)
            return None
        ids, sequences = plan.fetch(np.arange(plan.num_sequences))
        return list(zip(ids, sequences, strict=True))


@given(text=texts, wrapping=wrappings, policy=st.sampled_from(["error", "map"]))
@BOUNDED
def test_each_record_has_its_row_or_the_file_is_refused(
    text: str, wrapping: str, policy: str
) -> None:
    input_policy = InputPolicy(invalid_residues=policy)  # type: ignore[arg-type]
    rows = planned(wrapped(text, wrapping), input_policy)
    if rows is None:
        return
    expected = plainly_read(text)
    assert expected is not None
    assert rows == [(each.id, residues_of(each, maps_unknown=policy == "map")) for each in expected]
    assert len({sequence_id for sequence_id, _ in rows}) == len(rows)


@given(text=texts, wrapping=wrappings)
@BOUNDED
def test_each_record_has_its_row_or_is_listed(text: str, wrapping: str) -> None:
    """If faulty records are skipped. Repeated ids are kept, so that nothing is refused."""
    with TemporaryDirectory() as directory:
        path = Path(directory, "x.fasta")
        path.write_bytes(wrapped(text, wrapping))
        rows: dict[int, tuple[str, str]] = {}
        listed: set[int] = set()
        try:
            for chunk in read_with_faults(
                Source(path=path, name="x"), InputPolicy(invalid_residues="skip"), chunk_size=2
            ):
                texts = chunk.usable
                rows |= dict(
                    zip(chunk.records, zip(texts.ids, texts.sequences, strict=True), strict=True)
                )
                listed |= {fault.record for fault in chunk.skipped}
                assert not chunk.refused
        except InputError as error:
            require_one_sentence_a_record(error)
            return
    expected = plainly_read(text)
    assert expected is not None
    assert sorted([*rows, *listed]) == list(range(len(expected)))
    for number, row in rows.items():
        assert row == (expected[number].id, residues_of(expected[number], maps_unknown=False))
    # No usable record is left out.
    assert all(
        residues_of(expected[number], maps_unknown=False) is None
        or not is_usable_id(expected[number].id)
        for number in listed
    )


def is_usable_id(sequence_id: str) -> bool:
    return bool(sequence_id) and sequence_id.isprintable() and not sequence_id.startswith("P1;")


@given(
    data=st.one_of(
        st.binary(max_size=60), st.binary(max_size=20).map(lambda rest: b">a\nMKVW\n" + rest)
    )
)
@BOUNDED
def test_bytes_of_any_kind_are_read_or_refused(data: bytes) -> None:
    rows = planned(data, InputPolicy(invalid_residues="map"))
    if rows is not None:
        expected = plainly_read(data.decode())
        assert expected is not None
        assert [sequence_id for sequence_id, _ in rows] == [each.id for each in expected]
