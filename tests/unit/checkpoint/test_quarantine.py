"""Tests of the quarantine: one line per sequence, a limit, and no effect of flipped bits."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from vnp_lib.checkpoint import quarantine
from vnp_lib.checkpoint.quarantine import Quarantine, QuarantinedSequence, QuarantineLimit
from vnp_lib.errors import LockTimeoutError, QuarantineFullError, StorageError
from vnp_lib.failures import FailureCause, FailureKind
from vnp_lib.inputs.policy import InputPolicy
from vnp_lib.inputs.reader import read_records
from vnp_lib.inputs.sources import find_sources
from vnp_lib.storage import durable
from vnp_lib.storage.durable import DurableOps, canonical_json
from vnp_lib.storage.locks import FileLock

NUM_SEQUENCES = 1000
OURS = "0123abcd"


def open_of(
    path: Path, num_sequences: int = NUM_SEQUENCES, *, fingerprint: str = OURS
) -> Quarantine:
    return Quarantine(
        path, num_sequences=num_sequences, num_computed=num_sequences, fingerprint=fingerprint
    )


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "quarantine.jsonl"


@pytest.fixture
def opened(path: Path) -> Quarantine:
    return open_of(path)


def sequence(ordinal: int, sequence_id: str | None = None) -> QuarantinedSequence:
    return QuarantinedSequence(
        ordinal=ordinal,
        id=f"p{ordinal}" if sequence_id is None else sequence_id,
        length=300 + ordinal,
        kind=FailureKind.POISON_INPUT,
        cause=FailureCause.DEVICE_ASSERT,
        message="AcceleratorError: device-side assert triggered",
        attempts=3,
        at="2026-11-22T12:00:00+00:00",
        fingerprint=OURS,
        sequence_sha256="f00d",
    )


def test_where_there_is_no_file_nothing_is_in_quarantine(opened: Quarantine, path: Path) -> None:
    assert opened.read() == []
    assert opened.ordinals() == frozenset()
    assert not path.exists()


def test_what_is_added_is_read_back_by_ordinal(opened: Quarantine, path: Path) -> None:
    assert all(opened.add(sequence(ordinal)) for ordinal in (7, 999, 0, 42))
    reopened = open_of(path)
    assert reopened.read() == [sequence(ordinal) for ordinal in (0, 7, 42, 999)]
    assert reopened.ordinals() == {0, 7, 42, 999}


def test_anybody_can_read_the_lines(opened: Quarantine, path: Path) -> None:
    opened.add(sequence(7))
    opened.add(sequence(3))
    lines = [json.loads(line) for line in path.read_text(encoding="ascii").splitlines()]
    assert [len(line.pop("sha256")) for line in lines] == [64, 64]
    assert lines == [asdict(sequence(3)), asdict(sequence(7))]
    assert lines[0]["kind"] == "poison_input"


def test_the_first_entry_of_an_ordinal_stays(opened: Quarantine, path: Path) -> None:
    assert opened.add(sequence(7))
    before = path.stat().st_ino, path.read_bytes()
    assert not opened.add(replace(sequence(7), message="another", attempts=9))
    assert (path.stat().st_ino, path.read_bytes()) == before


@pytest.mark.parametrize(
    ("num_computed", "total", "not_finite"),
    [
        (0, 3, 3),
        (1, 3, 3),
        (12, 3, 3),
        (20, 5, 3),
        (53, 10, 3),
        (999, 10, 9),
        (1_500, 15, 15),
        (10_000, 100, 100),
        (100_999, 100, 100),
        (10_000_000, 10_000, 10_000),
    ],
)
def test_a_small_share_may_be_in_quarantine(num_computed: int, total: int, not_finite: int) -> None:
    assert QuarantineLimit.of(num_computed) == QuarantineLimit(total=total, not_finite=not_finite)


@pytest.mark.parametrize(("num_sequences", "limit"), [(48, 10), (103_000, 103)])
def test_one_more_than_may_be_is_refused_and_nothing_is_written(
    path: Path, num_sequences: int, limit: int
) -> None:
    opened = open_of(path, num_sequences)
    assert all(opened.add(sequence(ordinal)) for ordinal in range(limit))
    before = path.stat().st_ino, path.read_bytes()
    with pytest.raises(
        QuarantineFullError,
        match=rf"^{limit + 1} of {num_sequences:,} sequences fail "
        rf"\({limit + 1} device_assert\).* broken set-up, not to bad",
    ):
        opened.add(sequence(limit))
    assert not opened.add(sequence(limit - 1))
    assert (path.stat().st_ino, path.read_bytes()) == before

    opened.release([5])
    assert opened.add(sequence(limit))


def test_fewer_non_finite_rows_are_allowed(path: Path) -> None:
    """All that come together are refused together, and others may be added yet."""
    opened = open_of(path, 53)
    not_finite = [
        replace(sequence(ordinal), cause=FailureCause.NUMERICAL_INSTABILITY) for ordinal in range(4)
    ]
    with pytest.raises(
        QuarantineFullError,
        match=r"^4 of 53 sequences have no finite .*weights .*device.*quarantine",
    ):
        opened.add(*not_finite)
    assert opened.read() == []
    assert opened.add(*not_finite[:3], sequence(3))
    assert opened.ordinals() == {0, 1, 2, 3}


def test_copies_do_not_raise_the_limit(path: Path) -> None:
    opened = Quarantine(path, num_sequences=100_000, num_computed=8, fingerprint=OURS)
    opened.add(*map(sequence, range(3)))
    with pytest.raises(QuarantineFullError, match="4 of 8 sequences"):
        opened.add(sequence(3))


@pytest.mark.parametrize("ordinal", [-1, NUM_SEQUENCES])
def test_what_is_not_in_the_input_is_not_added(
    opened: Quarantine, path: Path, ordinal: int
) -> None:
    with pytest.raises(ValueError, match=f"ordinal {ordinal} is not among 1,000 sequences"):
        opened.add(sequence(ordinal))
    assert not path.exists()


def test_what_is_released_is_gone_and_the_rest_stays(opened: Quarantine, path: Path) -> None:
    for ordinal in range(5):
        opened.add(sequence(ordinal))
    opened.release(ordinal for ordinal in (1, 3, 77))
    assert opened.read() == [sequence(ordinal) for ordinal in (0, 2, 4)]
    before = path.stat().st_ino
    opened.release([1, 500])
    assert path.stat().st_ino == before
    opened.release(range(NUM_SEQUENCES))
    assert opened.read() == []
    assert opened.add(sequence(3))


def test_releasing_where_there_is_no_file_makes_none(opened: Quarantine, path: Path) -> None:
    opened.release([1])
    assert not path.exists()


def test_an_entry_is_durable_when_add_returns(
    opened: Quarantine, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever added it may have died between the rename and the sync of the directory."""
    steps: list[str] = []

    class Recording(DurableOps):
        def replace(self, source: Path, target: Path) -> None:
            steps.append(f"replace {target.name}")
            super().replace(source, target)

        def fsync_directory(self, directory: Path) -> None:
            steps.append(f"sync {directory.name}/")
            super().fsync_directory(directory)

    monkeypatch.setattr(durable, "ops", Recording())
    opened.add(sequence(1))
    assert steps == ["replace quarantine.jsonl", f"sync {path.parent.name}/"]
    opened.add(sequence(1))
    assert steps[2:] == [f"sync {path.parent.name}/"]


def test_a_write_that_fails_leaves_the_file_as_it_was(
    opened: Quarantine, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened.add(sequence(1))
    before = path.read_bytes()

    class Failing(DurableOps):
        def fsync(self, fd: int) -> None:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(durable, "ops", Failing())
    with pytest.raises(OSError, match="No space left"):
        opened.add(sequence(2))
    monkeypatch.undo()
    assert path.read_bytes() == before
    assert sorted(each.name for each in path.parent.iterdir()) == [
        "quarantine.jsonl",
        "quarantine.lock",
    ]
    assert opened.add(sequence(2))


def adds_in_another_process(path: Path, first: int, count: int) -> subprocess.Popen[bytes]:
    code = """
import sys
from pathlib import Path
from vnp_lib.checkpoint.quarantine import Quarantine, QuarantinedSequence
path, (first, count, num_sequences) = Path(sys.argv[1]), map(int, sys.argv[2:])
opened = Quarantine(path, num_sequences=num_sequences, num_computed=num_sequences, fingerprint="")
added = [
    opened.add(QuarantinedSequence(
        ordinal=ordinal, id=f"p{ordinal}", length=9, kind="k", cause="c", message="m", attempts=3,
        at="2026-11-22T12:00:00+00:00", fingerprint="", sequence_sha256="",
    ))
    for ordinal in range(first, first + count)
]
print(sum(added))
"""
    command = [sys.executable, "-c", code, str(path), str(first), str(count), str(200_000)]
    return subprocess.Popen(command, stdout=subprocess.PIPE)


def test_concurrent_adds_lose_and_double_nothing(
    path: Path,
) -> None:
    """Fifty each; half of them overlap with the next process's."""
    processes = [adds_in_another_process(path, first, 50) for first in (0, 25, 50, 75)]
    added = [int(process.communicate(timeout=120)[0]) for process in processes]
    assert [process.returncode for process in processes] == [0] * 4
    assert sum(added) == 125
    assert [each.ordinal for each in open_of(path, 200_000, fingerprint="").read()] == list(
        range(125)
    )


@pytest.mark.parametrize("change", ["add", "release"])
def test_nothing_changes_while_another_holds_the_lock(
    opened: Quarantine, path: Path, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    opened.add(sequence(1))
    before = path.read_bytes()
    monkeypatch.setattr(quarantine, "LOCK_TIMEOUT_S", 0.05)
    with FileLock(path.with_name("quarantine.lock"), purpose="stay").held(timeout_s=0):
        with pytest.raises(LockTimeoutError, match="to stay; waited"):
            opened.add(sequence(2)) if change == "add" else opened.release([1])
        assert opened.ordinals() == {1}
    assert path.read_bytes() == before


def test_the_lock_file_is_never_removed(opened: Quarantine, path: Path) -> None:
    opened.add(sequence(1))
    inode = path.with_name("quarantine.lock").stat().st_ino
    opened.add(sequence(2))
    opened.release([1, 2])
    assert path.with_name("quarantine.lock").stat().st_ino == inode


def test_no_flipped_bit_passes(opened: Quarantine, path: Path) -> None:
    """Neither as another sequence nor as none."""
    for ordinal in (3, 12, 13):
        opened.add(sequence(ordinal))
    whole = path.read_bytes()
    for bit in range(len(whole) * 8):
        data = bytearray(whole)
        data[bit // 8] ^= 1 << bit % 8
        path.write_bytes(data)
        with pytest.raises(
            StorageError, match=r"quarantine\.jsonl is damaged in line [123]: .* move the file away"
        ):
            opened.read()


def test_no_byte_can_be_cut_off_but_whole_lines(opened: Quarantine, path: Path) -> None:
    """A line that is gone sets nothing aside: its sequence is tried again."""
    for ordinal in (3, 12):
        opened.add(sequence(ordinal))
    whole = path.read_bytes()
    boundaries = {0: [], len(whole.splitlines(keepends=True)[0]): [sequence(3)]}
    for size_bytes in range(len(whole)):
        path.write_bytes(whole[:size_bytes])
        if size_bytes in boundaries:
            assert opened.read() == boundaries[size_bytes]
        else:
            with pytest.raises(StorageError, match="damaged in line"):
                opened.read()


DAMAGED_LINES = [
    b"\n",
    b"null\n",
    b"[]\n",
    b'"x"\n',
    b"{}\n",
    b"\0" * 100 + b"\n",
    b"[" * 100_000 + b"\n",
    b'{"sha256":"' + b"0" * 64 + b'"}\n',
]


@pytest.mark.parametrize("line", DAMAGED_LINES, ids=lambda line: repr(line[:9]))
def test_a_line_of_another_kind_is_damage(opened: Quarantine, path: Path, line: bytes) -> None:
    opened.add(sequence(1))
    path.write_bytes(path.read_bytes() + line)
    with pytest.raises(StorageError, match="damaged in line 2: its sha256 does not fit"):
        opened.read()


def test_sealed_lines_out_of_place_are_damage(opened: Quarantine, path: Path) -> None:
    """Lines that are sealed but doubled out of order or of another input are damage."""
    for ordinal in (3, 999):
        opened.add(sequence(ordinal))
    first, second = path.read_bytes().splitlines(keepends=True)
    for data in (first + first, second + first):
        path.write_bytes(data)
        with pytest.raises(StorageError, match="damaged in line 2: ordinal 3 is out of order"):
            opened.read()
    path.write_bytes(first + second)
    with pytest.raises(
        StorageError, match="line 2: ordinal 999 is out of order, or not in the input"
    ):
        open_of(path, 999).read()


def test_a_damaged_file_is_left_as_it_is(opened: Quarantine, path: Path) -> None:
    path.write_bytes(b"{")
    with pytest.raises(StorageError, match="damaged in line 1"):
        opened.add(sequence(1))
    with pytest.raises(StorageError, match="damaged in line 1"):
        opened.release([1])
    assert path.read_bytes() == b"{"


HOSTILE_IDS = [
    "a\nb",
    "a\r\n",
    "\0",
    '"}\n{"',
    "\\",
    "\u2028\x85",
    "é" * 150,
    "x" * 300,
    "🧬𐀀",
    "\ud800",
    "../../etc",
    "",
]


def test_ids_may_hold_anything(path: Path) -> None:
    opened = open_of(path, 10_000)
    for ordinal, sequence_id in enumerate(HOSTILE_IDS):
        assert opened.add(sequence(ordinal, sequence_id))
    assert [each.id for each in opened.read()] == HOSTILE_IDS
    assert len(path.read_bytes().splitlines()) == len(HOSTILE_IDS)


def test_ids_that_the_fasta_reader_lets_through_come_back(
    opened: Quarantine, tmp_path: Path
) -> None:
    fasta = tmp_path / "x.fasta"
    fasta.write_text("".join(f">{each} x\nMKVLA\n" for each in ("\"\\'", "🧬𐀀", "é" * 150)))
    (chunk,) = read_records(*find_sources([fasta], stdin=tmp_path / "stdin"), InputPolicy())
    ids = chunk.usable.ids
    assert len(ids) == 3
    for ordinal, sequence_id in enumerate(ids):
        opened.add(sequence(ordinal, sequence_id))
    assert [each.id for each in opened.read()] == ids


def test_a_link_is_replaced_and_not_followed(
    opened: Quarantine, path: Path, tmp_path: Path
) -> None:
    (tmp_path / "precious").write_bytes(b"")
    path.symlink_to(tmp_path / "precious")
    assert opened.add(sequence(1))
    assert (tmp_path / "precious").read_bytes() == b""
    assert not path.is_symlink()
    assert opened.ordinals() == {1}


def line_of_0_1_0(ordinal: int) -> bytes:
    """As the version wrote it that did not say of which run it was."""
    fields = asdict(sequence(ordinal))
    del fields["fingerprint"], fields["sequence_sha256"]
    return canonical_json(fields | {"sha256": hashlib.sha256(canonical_json(fields)).hexdigest()})


def test_lines_of_another_run_are_ignored(opened: Quarantine, path: Path) -> None:
    """Its ordinals are other sequences, and may be more than this input has."""
    another = open_of(path, fingerprint="another")
    another.add(*(replace(sequence(ordinal), fingerprint="another") for ordinal in (1, 999)))
    path.write_bytes(path.read_bytes() + line_of_0_1_0(2))
    assert opened.read() == open_of(path, 5).read() == []
    assert opened.add(sequence(1))
    assert opened.ordinals() == {1}
    assert another.ordinals() == {1, 999}
    with pytest.raises(ValueError, match="'p3' is of the run '0123abcd', not 'another'"):
        another.add(sequence(3))


def test_lines_of_other_runs_are_kept_in_a_file_of_their_own(
    opened: Quarantine, path: Path, tmp_path: Path
) -> None:
    aside = tmp_path / "superseded.jsonl"
    assert opened.remove_other_runs(aside) == 0
    assert not path.exists()
    path.write_bytes(line_of_0_1_0(7))
    assert opened.remove_other_runs(aside) == 1
    opened.add(sequence(3))
    path.write_bytes(path.read_bytes() + line_of_0_1_0(5))
    assert opened.remove_other_runs(aside) == 1
    assert aside.read_bytes() == line_of_0_1_0(7) + line_of_0_1_0(5)
    assert opened.read() == [sequence(3)]
    assert opened.remove_other_runs(aside) == 0


def test_a_line_of_another_run_with_a_flipped_bit_is_damage(opened: Quarantine, path: Path) -> None:
    path.write_bytes(line_of_0_1_0(7).replace(b'"ordinal":7', b'"ordinal":6'))
    with pytest.raises(StorageError, match="damaged in line 1"):
        opened.read()
