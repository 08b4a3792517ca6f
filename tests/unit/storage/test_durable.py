"""Durable files: whole or not there, whatever fails when; sealed JSON; locks that outlive nobody."""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from vnp_lib.errors import LockTimeoutError, StorageError
from vnp_lib.processes import ProcessIdentity
from vnp_lib.storage import durable, locks
from vnp_lib.storage.durable import (
    DurableOps,
    FileDigest,
    canonical_json,
    digest_file,
    durable_directory,
    durable_file,
    durable_path,
    fsync_directory,
    make_directory,
    marker_path,
    read_marker,
    read_sealed_json,
    remove_orphaned_temporaries,
    require_free_space,
    write_file,
    write_json,
    write_marker,
    write_sealed_json,
)
from vnp_lib.storage.locks import FileLock

PUBLISH_STEPS = ["open", "write", "fsync", "close", "link", "unlink", "fsync_directory"]
REPLACE_STEPS = ["open", "write", "fsync", "close", "replace", "fsync_directory"]


class RecordingOps(DurableOps):
    """The real calls, with their names kept; the one at `fail_at` (from 0) is denied with `code`."""

    def __init__(self, fail_at: int | None = None, code: int = errno.EIO) -> None:
        self.calls: list[str] = []
        self._fail_at = fail_at
        self._code = code

    def __getattribute__(self, name: str) -> Any:
        value = super().__getattribute__(name)
        if name.startswith("_") or name == "calls":
            return value

        def recorded(*args: Any) -> Any:
            self.calls.append(name)
            if len(self.calls) - 1 == self._fail_at:
                raise OSError(self._code, os.strerror(self._code))
            return value(*args)

        return recorded


@pytest.fixture
def use_ops(monkeypatch: pytest.MonkeyPatch) -> Any:
    def use(ops: DurableOps) -> DurableOps:
        monkeypatch.setattr(durable, "ops", ops)
        return ops

    return use


def python(code: str, *arguments: object) -> subprocess.Popen[str]:
    """A real process that has everything of `vnp_lib.storage.durable` at hand."""
    script = f"import json, os, sys, time\nfrom pathlib import Path\nfrom vnp_lib.storage.durable import *\nfrom vnp_lib.storage.locks import *\n{code}"
    command = [sys.executable, "-c", script, *map(str, arguments)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def pid_of_a_dead_process() -> int:
    process = subprocess.Popen(["true"])
    process.wait()
    return process.pid


class TestDurableFile:
    def test_the_file_holds_what_was_written_and_its_digest_is_known(self, tmp_path: Path) -> None:
        path = tmp_path / "a"
        with durable_file(path) as file:
            assert file.write(b"some ") == 5
            file.write(memoryview(b"bytes"))
            assert file.tell() == 10
        assert path.read_bytes() == b"some bytes"
        assert file.digest == FileDigest(
            size_bytes=10, sha256=hashlib.sha256(b"some bytes").hexdigest()
        )
        assert digest_file(path) == file.digest
        assert os.listdir(tmp_path) == ["a"]

    def test_nothing_is_to_be_seen_until_it_is_whole(self, tmp_path: Path) -> None:
        with durable_file(tmp_path / "a") as file:
            file.write(b"half")
            assert not (tmp_path / "a").exists()

    def test_a_file_that_is_there_is_never_overwritten(self, tmp_path: Path) -> None:
        write_file(tmp_path / "a", b"first")
        with pytest.raises(FileExistsError):
            write_file(tmp_path / "a", b"second")
        assert (tmp_path / "a").read_bytes() == b"first"
        assert os.listdir(tmp_path) == ["a"]

    def test_replace_puts_the_new_file_in_the_place_of_the_old(self, tmp_path: Path) -> None:
        write_file(tmp_path / "a", b"first")
        write_file(tmp_path / "a", b"second", replace=True)
        assert (tmp_path / "a").read_bytes() == b"second"

    def test_an_error_in_the_block_leaves_nothing(self, tmp_path: Path) -> None:
        def fail_halfway() -> None:
            with durable_file(tmp_path / "a") as file:
                file.write(b"half")
                raise KeyError("x")

        with pytest.raises(KeyError):
            fail_halfway()
        assert os.listdir(tmp_path) == []

    @pytest.mark.parametrize(("replace", "steps"), [(False, PUBLISH_STEPS), (True, REPLACE_STEPS)])
    def test_it_is_synced_before_it_is_published_and_its_directory_after(
        self, tmp_path: Path, use_ops: Any, replace: bool, steps: list[str]
    ) -> None:
        ops = use_ops(RecordingOps())
        write_file(tmp_path / "a", b"x", replace=replace)
        assert ops.calls == steps

    @pytest.mark.parametrize("fail_at", range(len(PUBLISH_STEPS)), ids=PUBLISH_STEPS)
    @pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC, errno.EDQUOT, errno.EROFS])
    def test_a_publication_that_fails_anywhere_leaves_no_file(
        self, tmp_path: Path, use_ops: Any, fail_at: int, code: int
    ) -> None:
        """Nor a temporary one, and the system's own error comes out."""
        use_ops(RecordingOps(fail_at, code))
        with pytest.raises(OSError, match=os.strerror(code)) as caught:
            write_file(tmp_path / "a", b"x")
        assert caught.value.errno == code
        assert os.listdir(tmp_path) == []

    @pytest.mark.parametrize("fail_at", range(len(REPLACE_STEPS)), ids=REPLACE_STEPS)
    def test_a_replacement_that_fails_anywhere_leaves_one_whole_file(
        self, tmp_path: Path, use_ops: Any, fail_at: int
    ) -> None:
        write_file(tmp_path / "a", b"old")
        use_ops(RecordingOps(fail_at))
        with pytest.raises(OSError, match="Input/output error"):
            write_file(tmp_path / "a", b"new", replace=True)
        assert os.listdir(tmp_path) == ["a"]
        assert (tmp_path / "a").read_bytes() == (
            b"new" if REPLACE_STEPS[fail_at] == "fsync_directory" else b"old"
        )

    def test_a_failed_fsync_is_not_tried_again(self, tmp_path: Path, use_ops: Any) -> None:
        """The kernel drops the dirty pages and answers the second fsync with success."""
        ops = use_ops(RecordingOps(PUBLISH_STEPS.index("fsync")))
        with pytest.raises(OSError, match="Input/output error"):
            write_file(tmp_path / "a", b"x")
        assert ops.calls.count("fsync") == 1

    def test_short_writes_are_completed(self, tmp_path: Path, use_ops: Any) -> None:
        class ShortWrites(DurableOps):
            def write(self, fd: int, data: memoryview) -> int:
                return super().write(fd, data[:7])

        use_ops(ShortWrites())
        data = bytes(range(256)) * 3
        assert write_file(tmp_path / "a", data).sha256 == hashlib.sha256(data).hexdigest()
        assert (tmp_path / "a").read_bytes() == data

    def test_a_system_that_takes_no_byte_is_an_error(self, tmp_path: Path, use_ops: Any) -> None:
        class NoWrites(DurableOps):
            def write(self, fd: int, data: memoryview) -> int:
                return 0

        use_ops(NoWrites())
        with pytest.raises(OSError, match="took none"):
            write_file(tmp_path / "a", b"x")

    @pytest.mark.parametrize("wrapped", [None, RuntimeError("the library's own")])
    def test_a_failed_write_comes_out_though_a_library_hides_it(
        self, tmp_path: Path, use_ops: Any, wrapped: Exception | None
    ) -> None:
        def write_with_a_library() -> None:
            with durable_file(tmp_path / "a") as file:
                with pytest.raises(OSError, match="No space"):
                    file.write(b"x")
                if wrapped is not None:
                    raise wrapped

        use_ops(RecordingOps(PUBLISH_STEPS.index("write"), errno.ENOSPC))
        with pytest.raises(OSError, match="No space"):
            write_with_a_library()
        assert os.listdir(tmp_path) == []

    def test_a_link_that_succeeded_but_is_told_as_failed_counts(
        self, tmp_path: Path, use_ops: Any
    ) -> None:
        """Over NFS the reply can be lost; the request is sent again and finds the name taken: by itself."""

        class LostReply(DurableOps):
            def link(self, source: Path, target: Path) -> None:
                super().link(source, target)
                super().link(source, target)

        use_ops(LostReply())
        write_file(tmp_path / "a", b"x")
        assert os.listdir(tmp_path) == ["a"]

    def test_of_racing_writers_one_wins_and_the_others_hear_of_it(self, tmp_path: Path) -> None:
        code = """
sys.stdin.readline()
try:
    write_file(Path(sys.argv[1]), sys.argv[2].encode() * 100_000)
    print("won")
except FileExistsError:
    print("lost")
"""
        writers = {letter: python(code, tmp_path / "a", letter) for letter in "abcd"}
        for writer in writers.values():
            assert writer.stdin is not None
            writer.stdin.write("go\n")
            writer.stdin.flush()
        outcomes = {
            letter: writer.communicate(timeout=30)[0].strip() for letter, writer in writers.items()
        }
        (winner,) = (letter for letter, outcome in outcomes.items() if outcome == "won")
        assert (tmp_path / "a").read_bytes() == winner.encode() * 100_000
        assert sorted(outcomes.values()) == ["lost", "lost", "lost", "won"]
        assert os.listdir(tmp_path) == ["a"]

    def test_two_writers_of_one_name_do_not_meet_before_they_publish(self, tmp_path: Path) -> None:
        """Not even in one process: each has a temporary file of its own."""
        with durable_file(tmp_path / "a", replace=True) as later:
            later.write(b"of the ")
            write_file(tmp_path / "a", b"of the earlier")
            later.write(b"later")
        assert (tmp_path / "a").read_bytes() == b"of the later"
        assert os.listdir(tmp_path) == ["a"]

    def test_a_temporary_name_that_is_taken_is_never_written_to(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Should two writers ever draw the same one: the second hears of it, the first does not notice."""
        monkeypatch.setattr(durable.uuid, "uuid4", lambda: uuid.UUID(int=7))
        with durable_file(tmp_path / "a") as first:
            first.write(b"fir")
            with pytest.raises(FileExistsError):
                write_file(tmp_path / "a", b"second")
            first.write(b"st")
        assert (tmp_path / "a").read_bytes() == b"first"

    def test_a_killed_writer_leaves_a_temporary_file_that_is_removed_after_its_death(
        self, tmp_path: Path
    ) -> None:
        code = """
with durable_file(Path(sys.argv[1])) as file:
    file.write(b"half")
    print("writing", flush=True)
    time.sleep(60)
"""
        writer = python(code, tmp_path / "a")
        assert writer.stdout is not None
        assert writer.stdout.readline() == "writing\n"
        assert remove_orphaned_temporaries(tmp_path) == []
        (temporary,) = tmp_path.iterdir()
        assert temporary.name.startswith(f".tmp-a@{socket.gethostname()}@")
        assert f"@{writer.pid}@" in temporary.name
        writer.send_signal(signal.SIGKILL)
        writer.communicate(timeout=30)
        assert remove_orphaned_temporaries(tmp_path) == [temporary]
        assert os.listdir(tmp_path) == []


class TestDurablePath:
    def test_a_library_writes_by_name_and_the_file_appears_whole(
        self, tmp_path: Path, use_ops: Any
    ) -> None:
        ops = use_ops(RecordingOps())
        with durable_path(tmp_path / "a") as temporary:
            temporary.write_bytes(b"whole")
            assert not (tmp_path / "a").exists()
        assert (tmp_path / "a").read_bytes() == b"whole"
        assert os.listdir(tmp_path) == ["a"]
        assert ops.calls[-6:] == ["open", "fsync", "close", "link", "unlink", "fsync_directory"]

    def test_nothing_that_is_there_is_overwritten_and_nothing_is_left(self, tmp_path: Path) -> None:
        write_file(tmp_path / "a", b"first")
        with pytest.raises(FileExistsError), durable_path(tmp_path / "a") as temporary:
            temporary.write_bytes(b"second")
        assert (tmp_path / "a").read_bytes() == b"first"
        assert os.listdir(tmp_path) == ["a"]
        with durable_path(tmp_path / "a", replace=True) as temporary:
            temporary.write_bytes(b"second")
        assert (tmp_path / "a").read_bytes() == b"second"


class TestDurableDirectory:
    @staticmethod
    def write(path: Path, text: str, *, replace: bool = False) -> None:
        with durable_directory(path, replace=replace) as temporary:
            (temporary / "below").mkdir()
            (temporary / "below" / text).write_text(text)
            assert not path.exists() or replace

    def test_it_appears_with_all_that_is_in_it_once_that_is_synced(
        self, tmp_path: Path, use_ops: Any
    ) -> None:
        ops = use_ops(RecordingOps())
        self.write(tmp_path / "a", "x")
        assert (tmp_path / "a" / "below" / "x").read_text() == "x"
        assert os.listdir(tmp_path) == ["a"]
        synced = ["fsync_directory", "open", "fsync", "close", "fsync_directory"]
        assert ops.calls == ["mkdir", *synced, "replace", "fsync_directory"]

    def test_one_that_is_there_stays_as_it_is_or_goes_as_a_whole(self, tmp_path: Path) -> None:
        self.write(tmp_path / "a", "first")
        with pytest.raises(FileExistsError), durable_directory(tmp_path / "a"):
            pass
        assert os.listdir(tmp_path) == ["a"]
        assert os.listdir(tmp_path / "a" / "below") == ["first"]
        self.write(tmp_path / "a", "second", replace=True)
        assert os.listdir(tmp_path) == ["a"]
        assert os.listdir(tmp_path / "a" / "below") == ["second"]

    @pytest.mark.parametrize("step", range(8))
    def test_a_failure_anywhere_before_it_is_there_leaves_nothing(
        self, tmp_path: Path, use_ops: Any, step: int
    ) -> None:
        use_ops(RecordingOps(fail_at=step))
        with pytest.raises(OSError, match="Input/output error"):
            self.write(tmp_path / "a", "x")
        assert os.listdir(tmp_path) == (["a"] if step == 7 else [])


class TestOrphanedTemporaries:
    def test_a_directory_goes_with_all_that_is_in_it(self, tmp_path: Path) -> None:
        path = tmp_path / f".tmp-x-{socket.gethostname()}-{pid_of_a_dead_process()}-0123abcd"
        (path / "below").mkdir(parents=True)
        (path / "below" / "file").touch()
        assert remove_orphaned_temporaries(tmp_path) == [path]
        assert os.listdir(tmp_path) == []

    @pytest.mark.parametrize(
        ("name", "age_s", "goes"),
        [
            (".tmp-batch_00000.pt-{host}-{dead}-0123abcd", 0, True),
            (".tmp-batch_00000.pt-{host}-{alive}-0123abcd", 0, False),
            (".tmp-batch_00000.pt-{host}-{alive}-0123abcd", 7200, False),
            (".tmp-batch_00000.pt-some-other-host-{dead}-0123abcd", 0, False),
            (".tmp-batch_00000.pt-some-other-host-{dead}-0123abcd", 7200, True),
            (".tmp-batch_00000.pt-{host}-{dead}-0123abcg", 7200, False),
            (".tmp-batch_00000.pt-{host}-0-0123abcd", 7200, False),
            (".tmp-notes", 7200, False),
            ("batch_00000.pt.tmp", 7200, False),
            ("batch_00000.pt", 7200, False),
        ],
    )
    def test_only_our_own_and_only_those_of_the_dead_go(
        self, tmp_path: Path, name: str, age_s: float, goes: bool
    ) -> None:
        path = tmp_path / name.format(
            host=socket.gethostname(), dead=pid_of_a_dead_process(), alive=os.getpid()
        )
        path.touch()
        removed = remove_orphaned_temporaries(tmp_path, clock=lambda: time.time() + age_s)
        assert removed == ([path] if goes else [])
        assert path.exists() is not goes

    @pytest.mark.parametrize(
        ("other", "goes"),
        [
            ({}, False),
            ({"started_at": "1"}, True),  # the id is another process's by now
            ({"host": "X-" + socket.gethostname()}, False),
            ({"pid_namespace": "1"}, False),  # another container of a machine whose name it shares
            ({"boot": "00000001"}, False),  # or another machine of the same name
        ],
    )
    def test_a_writer_is_known_by_machine_boot_container_and_start(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, other: dict[str, str], goes: bool
    ) -> None:
        writer = dataclasses.replace(ProcessIdentity.current(), **other)
        with monkeypatch.context() as patch:
            patch.setattr(ProcessIdentity, "current", classmethod(lambda cls: writer))
            path = durable.temporary_path(tmp_path / "a-b@c.pt")
        path.touch()
        assert remove_orphaned_temporaries(tmp_path) == ([path] if goes else [])

    def test_of_a_host_whose_name_ends_as_ours_nothing_is_known(self, tmp_path: Path) -> None:
        """As version 1.0 named them."""
        host = f"node-{socket.gethostname()}"
        (tmp_path / f".tmp-batch_00000.pt-{host}-{pid_of_a_dead_process()}-0123abcd").touch()
        assert remove_orphaned_temporaries(tmp_path) == []

    def test_age_goes_by_the_clock_of_the_file_system(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """This machine's may be hours ahead of a file server's."""
        (tmp_path / ".tmp-batch_00000.pt-elsewhere-7-0123abcd").touch()
        monkeypatch.setattr(time, "time", lambda: 10e9)
        assert remove_orphaned_temporaries(tmp_path) == []
        assert len(os.listdir(tmp_path)) == 1


class TestSealedJson:
    FIELDS = {"rows": 3, "ordinals": [0, 1, 2], "fingerprint": "ab", "share": 0.5, "error": None}

    def test_it_comes_back(self, tmp_path: Path) -> None:
        write_sealed_json(tmp_path / "a", self.FIELDS)
        assert read_sealed_json(tmp_path / "a") == self.FIELDS

    def test_no_flipped_bit_passes(self, tmp_path: Path) -> None:
        path = tmp_path / "a"
        write_sealed_json(path, self.FIELDS)
        whole = path.read_bytes()
        for position in range(len(whole) * 8):
            flipped = bytearray(whole)
            flipped[position // 8] ^= 1 << position % 8
            path.write_bytes(flipped)
            with pytest.raises(StorageError):
                read_sealed_json(path)

    @pytest.mark.parametrize(
        "change", [bytes.rstrip, lambda data: data + b" ", lambda data: data.replace(b",", b", ")]
    )
    def test_the_same_object_in_other_bytes_does_not_pass(
        self, tmp_path: Path, change: Callable[[bytes], bytes]
    ) -> None:
        path = tmp_path / "a"
        write_sealed_json(path, self.FIELDS)
        path.write_bytes(change(path.read_bytes()))
        with pytest.raises(StorageError, match="seal"):
            read_sealed_json(path)

    def test_no_cut_passes(self, tmp_path: Path) -> None:
        path = tmp_path / "a"
        write_sealed_json(path, self.FIELDS)
        whole = path.read_bytes()
        for length in range(len(whole)):
            path.write_bytes(whole[:length])
            with pytest.raises(StorageError):
                read_sealed_json(path)

    @pytest.mark.parametrize(
        ("content", "reason"),
        [
            (b"", "not JSON"),
            (b"\x80\x04", "not JSON"),
            (b"[" * 100_000, "not JSON"),
            (b"[]", "seal"),
            (b"{}", "seal"),
            (b'{"a": NaN, "seal": ""}', "not JSON"),
            (b" " * (durable.MAX_JSON_BYTES + 1), "larger than"),
        ],
    )
    def test_what_is_no_sealed_json_is_refused_with_the_reason(
        self, tmp_path: Path, content: bytes, reason: str
    ) -> None:
        (tmp_path / "a").write_bytes(content)
        with pytest.raises(StorageError, match=reason):
            read_sealed_json(tmp_path / "a")

    def test_what_nobody_could_read_is_not_written(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(durable, "MAX_JSON_BYTES", 1000)
        write_sealed_json(tmp_path / "a", {"a": "x" * 900})
        with pytest.raises(
            StorageError, match=r"would have 1,0\d\d bytes, and no more than 1,000 are read"
        ):
            write_sealed_json(tmp_path / "a", {"a": "x" * 1000}, replace=True)
        assert read_sealed_json(tmp_path / "a") == {"a": "x" * 900}

    @pytest.mark.parametrize(
        "keys", ["", "a", "z", "az", ["sea", "seal_"], ["fingerprint", "schema", "size"]]
    )
    def test_it_is_canonical_json_wherever_the_seal_comes(
        self, tmp_path: Path, keys: Sequence[str]
    ) -> None:
        fields = {key: f'"seal":"{key}"' for key in keys}
        write_sealed_json(tmp_path / "a", fields)
        seal = hashlib.sha256(canonical_json(fields)).hexdigest()
        assert (tmp_path / "a").read_bytes() == canonical_json({**fields, "seal": seal})
        assert read_sealed_json(tmp_path / "a") == fields

    def test_a_missing_file_is_a_storage_error(self, tmp_path: Path) -> None:
        with pytest.raises(StorageError, match="missing"):
            read_sealed_json(tmp_path / "a")

    def test_json_is_canonical(self, tmp_path: Path) -> None:
        write_json(tmp_path / "a", {"b": [1, "é"], "a": None})
        assert (tmp_path / "a").read_bytes() == b'{"a":null,"b":[1,"\\u00e9"]}\n'
        with pytest.raises(ValueError, match="JSON compliant"):
            canonical_json(float("nan"))


class TestMarker:
    def test_it_stands_beside_its_file_and_comes_back(self, tmp_path: Path) -> None:
        path = tmp_path / "batch_00000.pt"
        digest = write_file(path, b"rows")
        write_marker(path, digest, rows=1, fingerprint="ab")
        assert marker_path(path) == tmp_path / "batch_00000.pt.done"
        assert read_marker(path) == {
            "schema": 2,
            "size_bytes": 4,
            "sha256": hashlib.sha256(b"rows").hexdigest(),
            "rows": 1,
            "fingerprint": "ab",
        }

    def test_numbers_are_packed_and_no_flipped_bit_of_them_passes(self, tmp_path: Path) -> None:
        path = tmp_path / "a"
        write_marker(path, write_file(path, b"rows"), ordinals=[70_000, 0, 3])
        assert read_marker(path)["ordinals"] == [70_000, 0, 3]
        whole = marker_path(path).read_bytes()
        assert b"70000" not in whole
        for position in range(len(whole) * 8):
            flipped = bytearray(whole)
            flipped[position // 8] ^= 1 << position % 8
            marker_path(path).write_bytes(flipped)
            with pytest.raises(StorageError):
                read_marker(path)

    def test_one_of_version_1_0_is_read(self, tmp_path: Path) -> None:
        fields = {"schema": 1, "size_bytes": 4, "sha256": "ab", "rows": 2, "ordinals": [5, 3]}
        write_sealed_json(tmp_path / "a.done", fields)
        assert read_marker(tmp_path / "a") == fields

    def test_packed_numbers_that_nobody_packed_are_damage(self, tmp_path: Path) -> None:
        write_sealed_json(
            tmp_path / "a.done", {"schema": 2, "ordinals": {"dtype": "u4", "base64": "AAAA"}}
        )
        with pytest.raises(StorageError, match="is damaged"):
            read_marker(tmp_path / "a")

    def test_one_of_another_version_is_refused(self, tmp_path: Path) -> None:
        write_sealed_json(tmp_path / "a.done", {"schema": 3})
        with pytest.raises(StorageError, match=r"has schema 3; this version reads 1 and 2"):
            read_marker(tmp_path / "a")


class TestDirectories:
    def test_what_is_missing_is_made_and_every_parent_synced(
        self, tmp_path: Path, use_ops: Any
    ) -> None:
        ops = use_ops(RecordingOps())
        make_directory(tmp_path / "a" / "b")
        assert (tmp_path / "a" / "b").is_dir()
        assert ops.calls == ["mkdir", "fsync_directory", "mkdir", "fsync_directory"]

    def test_one_that_is_there_is_synced_too(self, tmp_path: Path, use_ops: Any) -> None:
        """Whoever made it may have been killed before."""
        (tmp_path / "a").mkdir()
        ops = use_ops(RecordingOps())
        make_directory(tmp_path / "a")
        assert ops.calls == ["mkdir", "fsync_directory"]

    @pytest.mark.parametrize("is_there", [True, False])
    def test_a_parent_that_may_be_passed_but_not_opened_is_accepted(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_there: bool
    ) -> None:
        """As /scratch of mode 0711 is. The tests may run as root, who may open anything."""
        if is_there:
            (tmp_path / "mine").mkdir()

        class Refusing(DurableOps):
            def fsync_directory(self, path: Path) -> None:
                raise PermissionError(errno.EACCES, "Permission denied", str(path))

        monkeypatch.setattr(durable, "ops", Refusing())
        make_directory(tmp_path / "mine")
        assert (tmp_path / "mine").is_dir()

    def test_a_file_in_the_way_is_said(self, tmp_path: Path) -> None:
        (tmp_path / "a").touch()
        with pytest.raises(NotADirectoryError):
            make_directory(tmp_path / "a")

    @pytest.mark.parametrize("code", [errno.EINVAL, errno.ENOTSUP])
    def test_a_file_system_that_cannot_sync_directories_is_accepted(
        self, tmp_path: Path, use_ops: Any, code: int
    ) -> None:
        use_ops(RecordingOps(0, code))
        fsync_directory(tmp_path)

    def test_too_little_space_is_said_with_both_figures(self, tmp_path: Path) -> None:
        require_free_space(tmp_path, 1)
        with pytest.raises(
            StorageError, match=r"bytes free and 1,000,000,000,000,000,000 are needed"
        ):
            require_free_space(tmp_path, 10**18)


class TestFileLock:
    HOLD = """
lock = FileLock(Path(sys.argv[1]), purpose="keep others out")
lock.acquire(timeout_s=10)
print("held", flush=True)
sys.stdin.readline()
lock.release()
print("released", flush=True)
sys.stdin.readline()
"""

    def test_another_process_is_named_while_it_holds_and_not_in_the_way_afterwards(
        self, tmp_path: Path
    ) -> None:
        path = tmp_path / "a.lock"
        lock = FileLock(path, purpose="look")
        with python(self.HOLD, path) as other:
            assert other.stdout is not None
            assert other.stdin is not None
            assert other.stdout.readline() == "held\n"
            with pytest.raises(LockTimeoutError) as caught:
                lock.acquire(timeout_s=0)
            for part in (
                str(path),
                socket.gethostname(),
                str(other.pid),
                "since 20",
                "keep others out",
            ):
                assert part in str(caught.value)
            holder = lock.holder()
            assert holder is not None
            assert (holder.host, holder.pid) == (socket.gethostname(), other.pid)
            other.stdin.write("\n")
            other.stdin.flush()
            assert other.stdout.readline() == "released\n"
            assert lock.holder() is None
            with lock.held(timeout_s=0):
                assert path.exists()
            assert path.exists()

    def test_a_dead_holders_lock_is_free_at_once(self, tmp_path: Path) -> None:
        with python(self.HOLD, tmp_path / "a.lock") as other:
            assert other.stdout is not None
            assert other.stdout.readline() == "held\n"
            other.kill()
            other.wait(timeout=10)
            with FileLock(tmp_path / "a.lock", purpose="go on").held(timeout_s=0):
                pass

    def test_a_child_that_outlives_its_holder_does_not_keep_it(self, tmp_path: Path) -> None:
        code = """
import subprocess
FileLock(Path(sys.argv[1]), purpose="start a child").acquire(timeout_s=0)
print(subprocess.Popen(["sleep", "60"], close_fds=False, stdout=subprocess.DEVNULL).pid, flush=True)
time.sleep(60)
"""
        with python(code, tmp_path / "a.lock") as holder:
            assert holder.stdout is not None
            child_pid = int(holder.stdout.readline())
            holder.kill()
            holder.wait(timeout=10)
            os.kill(child_pid, 0)
            try:
                with FileLock(tmp_path / "a.lock", purpose="go on").held(timeout_s=0):
                    pass
            finally:
                os.kill(child_pid, signal.SIGKILL)

    @pytest.mark.parametrize("is_shared", [True, False])
    def test_threads_exclude_each_other(self, tmp_path: Path, is_shared: bool) -> None:
        """Whether they share one lock object or have one each."""
        shared = FileLock(tmp_path / "a.lock", purpose="count")
        inside, most = 0, 0

        def count() -> None:
            nonlocal inside, most
            lock = shared if is_shared else FileLock(tmp_path / "a.lock", purpose="count")
            for _ in range(10):
                with lock.held(timeout_s=30):
                    inside += 1
                    most = max(most, inside)
                    time.sleep(0.001)
                    inside -= 1

        threads = [threading.Thread(target=count) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert most == 1

    def test_threads_that_share_a_lock_exclude_each_other_where_the_system_locks_by_process(
        self, tmp_path: Path, use_ops: Any
    ) -> None:
        """As over NFS, where flock is a lock of the whole process."""

        class LocksByProcess(DurableOps):
            def flock(self, fd: int, operation: int) -> None:
                pass

        use_ops(LocksByProcess())
        lock = FileLock(tmp_path / "a.lock", purpose="stay")
        with lock.held(timeout_s=0), ThreadPoolExecutor(1) as pool:
            refused = pool.submit(lock.acquire, 0.01).exception(timeout=30)
        assert isinstance(refused, LockTimeoutError)

    def test_processes_lose_no_update(self, tmp_path: Path) -> None:
        code = """
lock, counter = FileLock(Path(sys.argv[1]), purpose="count"), Path(sys.argv[2])
for _ in range(50):
    with lock.held(timeout_s=30):
        counter.write_text(str(int(counter.read_text()) + 1))
"""
        (tmp_path / "counter").write_text("0")
        processes = [python(code, tmp_path / "a.lock", tmp_path / "counter") for _ in range(4)]
        for process in processes:
            process.communicate(timeout=60)
        assert (tmp_path / "counter").read_text() == "200"

    def test_waiting_ends_at_the_time_limit(self, tmp_path: Path) -> None:
        now_s = 100.0

        def sleep(delay_s: float) -> None:
            nonlocal now_s
            now_s += delay_s

        with FileLock(tmp_path / "a.lock", purpose="stay").held(timeout_s=0):
            waiting = FileLock(
                tmp_path / "a.lock", purpose="come", clock=lambda: now_s, sleep=sleep
            )
            with pytest.raises(LockTimeoutError, match=r"to stay; waited 30 s"):
                waiting.acquire(timeout_s=30)
        assert now_s == pytest.approx(130, abs=0.1)

    def test_a_failed_acquire_leaves_the_lock_usable(self, tmp_path: Path) -> None:
        lock = FileLock(tmp_path / "a.lock", purpose="look")
        with (
            FileLock(tmp_path / "a.lock", purpose="stay").held(timeout_s=0),
            pytest.raises(LockTimeoutError),
        ):
            lock.acquire(timeout_s=0)
        with lock.held(timeout_s=0):
            pass
        with pytest.raises(RuntimeError, match="not held"):
            lock.release()

    def test_a_file_system_without_locks_is_said(self, tmp_path: Path, use_ops: Any) -> None:
        use_ops(RecordingOps(1, errno.ENOLCK))
        with pytest.raises(StorageError, match="choose a file system with locks"):
            FileLock(tmp_path / "a.lock", purpose="try").acquire(timeout_s=0)

    def test_a_link_in_the_place_of_the_lock_file_is_not_followed(self, tmp_path: Path) -> None:
        """Who holds a lock empties its file and writes a name there: nobody's own file may be meant."""
        (tmp_path / "precious").write_text("content")
        (tmp_path / "a.lock").symlink_to(tmp_path / "precious")
        with pytest.raises(OSError, match=os.strerror(errno.ELOOP)):
            FileLock(tmp_path / "a.lock", purpose="try").acquire(timeout_s=0)
        assert (tmp_path / "precious").read_text() == "content"

    @pytest.mark.parametrize(
        ("other", "is_presumed"),
        [
            ({}, True),
            ({"started_at": "1"}, False),
            ({"host": "a-pod-that-is-gone"}, False),
            ({"host": "elsewhere"}, True),
        ],
    )
    def test_who_is_gone_is_not_presumed_to_hold_it(
        self,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        other: dict[str, str],
        is_presumed: bool,
    ) -> None:
        """A process id that is another's by now; a machine of which only the lock can tell."""
        path = tmp_path / "a.lock"
        monkeypatch.setattr(
            locks, "locks_are_shared", lambda directory: other.get("host") != "elsewhere"
        )
        holder = FileLock(path, purpose="stay")
        with holder.held(timeout_s=0):
            named = json.loads(path.read_bytes()) | other
            assert FileLock(path, purpose="look").presumed_holder() is not None
            path.write_text(json.dumps(named))
        path.write_text(json.dumps(named))
        presumed = FileLock(path, purpose="look").presumed_holder()
        assert (presumed is not None) is is_presumed

    def test_a_holder_on_another_machine_is_told_by_the_lock_while_it_holds(
        self, tmp_path: Path
    ) -> None:
        path = tmp_path / "a.lock"
        with FileLock(path, purpose="stay").held(timeout_s=0):
            path.write_text(json.dumps(json.loads(path.read_bytes()) | {"host": "elsewhere"}))
            presumed = FileLock(path, purpose="look").presumed_holder()
        assert presumed is not None
        assert presumed.host == "elsewhere"

    @pytest.mark.parametrize("content", ["", "{", "[]", json.dumps({"host": "h"}), "\x00"])
    def test_a_lock_file_that_names_nobody_is_no_obstacle(
        self, tmp_path: Path, content: str
    ) -> None:
        (tmp_path / "a.lock").write_text(content)
        lock = FileLock(tmp_path / "a.lock", purpose="go on")
        assert lock.holder() is None
        with lock.held(timeout_s=0):
            assert lock.holder() is not None
