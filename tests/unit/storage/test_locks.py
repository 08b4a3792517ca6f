"""File locks exclude processes and threads, name their holder, and end with it."""

from __future__ import annotations

import errno
import json
import os
import signal
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.storage import RecordingOps, start_python
from vnp_lib.errors import LockTimeoutError, StorageError
from vnp_lib.storage import locks
from vnp_lib.storage.durable import DurableOps
from vnp_lib.storage.locks import FileLock

HOLD = """
lock = FileLock(Path(sys.argv[1]), purpose="keep others out")
lock.acquire(timeout_s=10)
print("held", flush=True)
sys.stdin.readline()
lock.release()
print("released", flush=True)
sys.stdin.readline()
"""


def test_another_holder_is_named_until_it_releases(
    tmp_path: Path,
) -> None:
    path = tmp_path / "a.lock"
    lock = FileLock(path, purpose="look")
    with start_python(HOLD, path) as other:
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


def test_the_lock_of_a_killed_process_is_free_at_once(tmp_path: Path) -> None:
    with start_python(HOLD, tmp_path / "a.lock") as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        other.kill()
        other.wait(timeout=10)
        with FileLock(tmp_path / "a.lock", purpose="continue").held(timeout_s=0):
            pass


def test_a_subprocess_of_the_holder_does_not_inherit_it(tmp_path: Path) -> None:
    code = """
import subprocess
FileLock(Path(sys.argv[1]), purpose="start a process").acquire(timeout_s=0)
print(subprocess.Popen(["sleep", "60"], close_fds=False, stdout=subprocess.DEVNULL).pid, flush=True)
time.sleep(60)
"""
    with start_python(code, tmp_path / "a.lock") as holder:
        assert holder.stdout is not None
        inner_pid = int(holder.stdout.readline())
        holder.kill()
        holder.wait(timeout=10)
        os.kill(inner_pid, 0)
        try:
            with FileLock(tmp_path / "a.lock", purpose="continue").held(timeout_s=0):
                pass
        finally:
            os.kill(inner_pid, signal.SIGKILL)


@pytest.mark.parametrize("is_shared", [True, False])
def test_threads_exclude_each_other(tmp_path: Path, is_shared: bool) -> None:
    """With one lock object for all, and with one each."""
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


def test_threads_exclude_each_other_if_flock_is_per_process(tmp_path: Path, use_ops: Any) -> None:
    """Over NFS, flock locks for the whole process."""

    class LocksByProcess(DurableOps):
        def flock(self, fd: int, operation: int) -> None:
            pass

    use_ops(LocksByProcess())
    lock = FileLock(tmp_path / "a.lock", purpose="stay")
    with lock.held(timeout_s=0), ThreadPoolExecutor(1) as pool:
        refused = pool.submit(lock.acquire, 0.01).exception(timeout=30)
    assert isinstance(refused, LockTimeoutError)


def test_processes_lose_no_update(tmp_path: Path) -> None:
    code = """
lock, counter = FileLock(Path(sys.argv[1]), purpose="count"), Path(sys.argv[2])
for _ in range(50):
    with lock.held(timeout_s=30):
        counter.write_text(str(int(counter.read_text()) + 1))
"""
    (tmp_path / "counter").write_text("0")
    processes = [start_python(code, tmp_path / "a.lock", tmp_path / "counter") for _ in range(4)]
    for process in processes:
        process.communicate(timeout=60)
    assert (tmp_path / "counter").read_text() == "200"


def test_waiting_ends_at_the_time_limit(tmp_path: Path) -> None:
    now_s = 100.0

    def sleep(delay_s: float) -> None:
        nonlocal now_s
        now_s += delay_s

    with FileLock(tmp_path / "a.lock", purpose="stay").held(timeout_s=0):
        waiting = FileLock(tmp_path / "a.lock", purpose="come", clock=lambda: now_s, sleep=sleep)
        with pytest.raises(LockTimeoutError, match=r"to stay; waited 30 s"):
            waiting.acquire(timeout_s=30)
    assert now_s == pytest.approx(130, abs=0.1)


def test_a_failed_acquire_leaves_the_lock_usable(tmp_path: Path) -> None:
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


def test_a_file_system_without_locks_is_reported(tmp_path: Path, use_ops: Any) -> None:
    use_ops(RecordingOps(1, errno.ENOLCK))
    with pytest.raises(StorageError, match="choose a file system with locks"):
        FileLock(tmp_path / "a.lock", purpose="try").acquire(timeout_s=0)


def test_a_link_instead_of_the_lock_file_is_not_followed(tmp_path: Path) -> None:
    """The holder overwrites the lock file, which must not be somebody's own file."""
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
def test_a_holder_that_is_gone_is_not_presumed(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    other: dict[str, str],
    is_presumed: bool,
) -> None:
    """Its process id is reused, or it is on another machine and the lock is free."""
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


def test_a_holder_on_another_machine_is_presumed_while_it_holds(tmp_path: Path) -> None:
    path = tmp_path / "a.lock"
    with FileLock(path, purpose="stay").held(timeout_s=0):
        path.write_text(json.dumps(json.loads(path.read_bytes()) | {"host": "elsewhere"}))
        presumed = FileLock(path, purpose="look").presumed_holder()
    assert presumed is not None
    assert presumed.host == "elsewhere"


@pytest.mark.parametrize("content", ["", "{", "[]", json.dumps({"host": "h"}), "\x00"])
def test_a_lock_file_without_a_name_is_no_obstacle(tmp_path: Path, content: str) -> None:
    (tmp_path / "a.lock").write_text(content)
    lock = FileLock(tmp_path / "a.lock", purpose="continue")
    assert lock.holder() is None
    with lock.held(timeout_s=0):
        assert lock.holder() is not None
