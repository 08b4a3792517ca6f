"""Durable files are complete or missing, whatever fails; sealed JSON and markers detect damage."""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import os
import signal
import socket
import subprocess
import time
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.storage import RecordingOps, start_python
from vnp_lib.errors import StorageError
from vnp_lib.processes import ProcessIdentity
from vnp_lib.storage import durable
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
    write_marker,
    write_sealed_json,
)

PUBLISH_STEPS = ["open", "write", "fsync", "close", "link", "unlink", "fsync_directory"]
REPLACE_STEPS = ["open", "write", "fsync", "close", "replace", "fsync_directory"]


def pid_of_a_dead_process() -> int:
    process = subprocess.Popen(["true"])
    process.wait()
    return process.pid


class TestDurableFile:
    def test_the_file_and_its_digest_are_what_was_written(self, tmp_path: Path) -> None:
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

    def test_nothing_is_visible_until_it_is_complete(self, tmp_path: Path) -> None:
        with durable_file(tmp_path / "a") as file:
            file.write(b"half")
            assert not (tmp_path / "a").exists()

    def test_an_existing_file_is_never_overwritten(self, tmp_path: Path) -> None:
        write_file(tmp_path / "a", b"first")
        with pytest.raises(FileExistsError):
            write_file(tmp_path / "a", b"second")
        assert (tmp_path / "a").read_bytes() == b"first"
        assert os.listdir(tmp_path) == ["a"]

    def test_replace_overwrites_an_existing_file(self, tmp_path: Path) -> None:
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
    def test_file_and_directory_are_synced_in_order(
        self, tmp_path: Path, use_ops: Any, replace: bool, steps: list[str]
    ) -> None:
        ops = use_ops(RecordingOps())
        write_file(tmp_path / "a", b"x", replace=replace)
        assert ops.calls == steps

    @pytest.mark.parametrize("fail_at", range(len(PUBLISH_STEPS)), ids=PUBLISH_STEPS)
    @pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC, errno.EDQUOT, errno.EROFS])
    def test_a_failed_publication_leaves_no_file(
        self, tmp_path: Path, use_ops: Any, fail_at: int, code: int
    ) -> None:
        """Nor a temporary one, and the error of the system is raised."""
        use_ops(RecordingOps(fail_at, code))
        with pytest.raises(OSError, match=os.strerror(code)) as caught:
            write_file(tmp_path / "a", b"x")
        assert caught.value.errno == code
        assert os.listdir(tmp_path) == []

    @pytest.mark.parametrize("fail_at", range(len(REPLACE_STEPS)), ids=REPLACE_STEPS)
    def test_a_failed_replacement_leaves_one_intact_file(
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

    def test_a_failed_fsync_is_not_retried(self, tmp_path: Path, use_ops: Any) -> None:
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

    def test_a_write_of_no_bytes_is_an_error(self, tmp_path: Path, use_ops: Any) -> None:
        class NoWrites(DurableOps):
            def write(self, fd: int, data: memoryview) -> int:
                return 0

        use_ops(NoWrites())
        with pytest.raises(OSError, match="accepted none"):
            write_file(tmp_path / "a", b"x")

    @pytest.mark.parametrize("wrapped", [None, RuntimeError("the library's own")])
    def test_a_failed_write_is_raised_even_if_a_library_hides_it(
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

    def test_a_link_that_is_reported_as_failed_counts(self, tmp_path: Path, use_ops: Any) -> None:
        """Over NFS, if the reply is lost, the repeated request fails because of the first one."""

        class LostReply(DurableOps):
            def link(self, source: Path, target: Path) -> None:
                super().link(source, target)
                super().link(source, target)

        use_ops(LostReply())
        write_file(tmp_path / "a", b"x")
        assert os.listdir(tmp_path) == ["a"]

    def test_of_racing_writers_exactly_one_wins(self, tmp_path: Path) -> None:
        code = """
sys.stdin.readline()
try:
    write_file(Path(sys.argv[1]), sys.argv[2].encode() * 100_000)
    print("won")
except FileExistsError:
    print("lost")
"""
        writers = {letter: start_python(code, tmp_path / "a", letter) for letter in "abcd"}
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

    def test_two_writers_have_different_temporary_files(self, tmp_path: Path) -> None:
        """Even in one process."""
        with durable_file(tmp_path / "a", replace=True) as later:
            later.write(b"of the ")
            write_file(tmp_path / "a", b"of the earlier")
            later.write(b"later")
        assert (tmp_path / "a").read_bytes() == b"of the later"
        assert os.listdir(tmp_path) == ["a"]

    def test_an_existing_temporary_file_is_never_written_to(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """If two writers ever choose the same name, the second fails and the first succeeds."""
        monkeypatch.setattr(durable.uuid, "uuid4", lambda: uuid.UUID(int=7))
        with durable_file(tmp_path / "a") as first:
            first.write(b"fir")
            with pytest.raises(FileExistsError):
                write_file(tmp_path / "a", b"second")
            first.write(b"st")
        assert (tmp_path / "a").read_bytes() == b"first"

    def test_the_temporary_file_of_a_killed_writer_is_removed(self, tmp_path: Path) -> None:
        code = """
with durable_file(Path(sys.argv[1])) as file:
    file.write(b"half")
    print("writing", flush=True)
    time.sleep(60)
"""
        writer = start_python(code, tmp_path / "a")
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
    def test_a_file_written_by_a_library_appears_complete(
        self, tmp_path: Path, use_ops: Any
    ) -> None:
        ops = use_ops(RecordingOps())
        with durable_path(tmp_path / "a") as temporary:
            temporary.write_bytes(b"whole")
            assert not (tmp_path / "a").exists()
        assert (tmp_path / "a").read_bytes() == b"whole"
        assert os.listdir(tmp_path) == ["a"]
        assert ops.calls[-6:] == ["open", "fsync", "close", "link", "unlink", "fsync_directory"]

    def test_an_existing_file_is_replaced_only_on_request(self, tmp_path: Path) -> None:
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

    def test_it_appears_once_its_content_is_synced(self, tmp_path: Path, use_ops: Any) -> None:
        ops = use_ops(RecordingOps())
        self.write(tmp_path / "a", "x")
        assert (tmp_path / "a" / "below" / "x").read_text() == "x"
        assert os.listdir(tmp_path) == ["a"]
        synced = ["fsync_directory", "open", "fsync", "close", "fsync_directory"]
        assert ops.calls == ["mkdir", *synced, "replace", "fsync_directory"]

    def test_an_existing_directory_is_replaced_only_on_request(self, tmp_path: Path) -> None:
        self.write(tmp_path / "a", "first")
        with pytest.raises(FileExistsError), durable_directory(tmp_path / "a"):
            pass
        assert os.listdir(tmp_path) == ["a"]
        assert os.listdir(tmp_path / "a" / "below") == ["first"]
        self.write(tmp_path / "a", "second", replace=True)
        assert os.listdir(tmp_path) == ["a"]
        assert os.listdir(tmp_path / "a" / "below") == ["second"]

    @pytest.mark.parametrize("step", range(8))
    def test_a_failure_before_it_appears_leaves_nothing(
        self, tmp_path: Path, use_ops: Any, step: int
    ) -> None:
        use_ops(RecordingOps(fail_at=step))
        with pytest.raises(OSError, match="Input/output error"):
            self.write(tmp_path / "a", "x")
        assert os.listdir(tmp_path) == (["a"] if step == 7 else [])


class TestOrphanedTemporaries:
    def test_a_directory_is_removed_with_its_content(self, tmp_path: Path) -> None:
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
    def test_only_files_of_ended_writers_are_removed(
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
            # Another process has the id now.
            ({"started_at": "1"}, True),
            ({"host": "X-" + socket.gethostname()}, False),
            # Another container with the host name of its machine.
            ({"pid_namespace": "1"}, False),
            # Another machine of the same name.
            ({"boot": "00000001"}, False),
        ],
    )
    def test_a_writer_is_identified_by_more_than_its_pid(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, other: dict[str, str], goes: bool
    ) -> None:
        writer = dataclasses.replace(ProcessIdentity.current(), **other)
        with monkeypatch.context() as patch:
            patch.setattr(ProcessIdentity, "current", classmethod(lambda cls: writer))
            path = durable.temporary_path(tmp_path / "a-b@c.pt")
        path.touch()
        assert remove_orphaned_temporaries(tmp_path) == ([path] if goes else [])

    def test_nothing_is_known_of_a_host_with_a_similar_name(self, tmp_path: Path) -> None:
        """In the names that version 1.0 gave."""
        host = f"node-{socket.gethostname()}"
        (tmp_path / f".tmp-batch_00000.pt-{host}-{pid_of_a_dead_process()}-0123abcd").touch()
        assert remove_orphaned_temporaries(tmp_path) == []

    def test_age_is_measured_by_the_file_systems_clock(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The clock of this machine may be hours ahead of a file server's."""
        (tmp_path / ".tmp-batch_00000.pt-elsewhere-7-0123abcd").touch()
        monkeypatch.setattr(time, "time", lambda: 10e9)
        assert remove_orphaned_temporaries(tmp_path) == []
        assert len(os.listdir(tmp_path)) == 1


class TestSealedJson:
    FIELDS = {"rows": 3, "ordinals": [0, 1, 2], "fingerprint": "ab", "share": 0.5, "error": None}

    def test_it_is_read_back(self, tmp_path: Path) -> None:
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
    def test_other_files_are_refused_with_the_reason(
        self, tmp_path: Path, content: bytes, reason: str
    ) -> None:
        (tmp_path / "a").write_bytes(content)
        with pytest.raises(StorageError, match=reason):
            read_sealed_json(tmp_path / "a")

    def test_an_object_too_large_to_be_read_is_not_written(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(durable, "MAX_JSON_BYTES", 1000)
        write_sealed_json(tmp_path / "a", {"a": "x" * 900})
        with pytest.raises(
            StorageError, match=r"would have 1,0\d\d bytes, but only 1,000 are read"
        ):
            write_sealed_json(tmp_path / "a", {"a": "x" * 1000}, replace=True)
        assert read_sealed_json(tmp_path / "a") == {"a": "x" * 900}

    @pytest.mark.parametrize(
        "keys", ["", "a", "z", "az", ["sea", "seal_"], ["fingerprint", "schema", "size"]]
    )
    def test_it_is_canonical_json_with_the_seal_in_any_position(
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

    def test_json_is_canonical(self) -> None:
        assert canonical_json({"b": [1, "é"], "a": None}) == b'{"a":null,"b":[1,"\\u00e9"]}\n'
        with pytest.raises(ValueError, match="JSON compliant"):
            canonical_json(float("nan"))


class TestMarker:
    def test_it_is_next_to_its_file_and_read_back(self, tmp_path: Path) -> None:
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

    def test_no_flipped_bit_of_packed_numbers_passes(self, tmp_path: Path) -> None:
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

    def test_invalid_packed_numbers_are_damage(self, tmp_path: Path) -> None:
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
    def test_missing_parents_are_created_and_synced(self, tmp_path: Path, use_ops: Any) -> None:
        ops = use_ops(RecordingOps())
        make_directory(tmp_path / "a" / "b")
        assert (tmp_path / "a" / "b").is_dir()
        assert ops.calls == ["mkdir", "fsync_directory", "mkdir", "fsync_directory"]

    def test_the_parent_of_an_existing_directory_is_synced(
        self, tmp_path: Path, use_ops: Any
    ) -> None:
        """The process that created it may have been killed before it synced the parent."""
        (tmp_path / "a").mkdir()
        ops = use_ops(RecordingOps())
        make_directory(tmp_path / "a")
        assert ops.calls == ["mkdir", "fsync_directory"]

    @pytest.mark.parametrize("is_there", [True, False])
    def test_a_parent_that_may_not_be_opened_is_accepted(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_there: bool
    ) -> None:
        """Such as /scratch of mode 0711. Tests may run as root, who may open everything."""
        if is_there:
            (tmp_path / "mine").mkdir()

        class Refusing(DurableOps):
            def fsync_directory(self, path: Path) -> None:
                raise PermissionError(errno.EACCES, "Permission denied", str(path))

        monkeypatch.setattr(durable, "ops", Refusing())
        make_directory(tmp_path / "mine")
        assert (tmp_path / "mine").is_dir()

    def test_a_file_in_the_way_is_reported(self, tmp_path: Path) -> None:
        (tmp_path / "a").touch()
        with pytest.raises(NotADirectoryError):
            make_directory(tmp_path / "a")

    @pytest.mark.parametrize("code", [errno.EINVAL, errno.ENOTSUP])
    def test_a_file_system_without_directory_sync_is_accepted(
        self, tmp_path: Path, use_ops: Any, code: int
    ) -> None:
        use_ops(RecordingOps(0, code))
        fsync_directory(tmp_path)

    def test_too_little_space_is_reported_with_both_figures(self, tmp_path: Path) -> None:
        require_free_space(tmp_path, 1)
        with pytest.raises(
            StorageError, match=r"bytes free and 1,000,000,000,000,000,000 are needed"
        ):
            require_free_space(tmp_path, 10**18)
