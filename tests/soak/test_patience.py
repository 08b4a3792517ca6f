"""Slow, stopped and waiting processes lose nothing, and no sequence is accused."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.helpers import CommandLine, finished_checkpoints, group_of, wait_until, workers_of
from tests.poison import draw_protein
from vnp_lib.checkpoint.manifest import CheckpointManifest
from vnp_lib.dataset import open_dataset
from vnp_lib.plan.paths import RunPaths
from vnp_lib.storage.durable import make_directory
from vnp_lib.storage.locks import FileLock

pytestmark = [pytest.mark.soak, pytest.mark.timeout(1200)]

ONE_WORKER = ("--model", "esm2_t6_8M_UR50D", "--weights", "random", "--devices", "cpu")


def write_proteins(path: Path, lengths: list[int]) -> Path:
    draw = random.Random(3)
    path.write_text(
        "".join(f">p{n}\n{draw_protein(draw, length)}\n" for n, length in enumerate(lengths))
    )
    return path


def assert_whole_at_the_first_attempt(run_dir: Path, count: int) -> None:
    # All rows, so that none is in quarantine.
    assert len(open_dataset(run_dir)) == count
    shard = CheckpointManifest(RunPaths(run_dir).manifest).shards()[0]
    assert (shard.attempts, shard.failures) == (1, ())


def test_a_very_long_protein_takes_the_time_it_takes(
    served_command_line: CommandLine, tmp_path: Path
) -> None:
    """16,000 residues on a CPU against a limit of 8 s."""
    fasta = write_proteins(tmp_path / "in.fasta", [60] * 60 + [16_000])
    arguments = (
        "--fasta",
        fasta,
        "--output-dir",
        tmp_path / "run",
        *ONE_WORKER,
        "--runtime.silence-limit-s",
        8,
    )
    ended = served_command_line.run(*arguments, timeout_s=1000)
    assert ended.returncode == 0, ended.stderr
    assert_whole_at_the_first_attempt(tmp_path / "run", 61)


@pytest.mark.parametrize("who", ["both", "flow", "worker"])
def test_a_stopped_and_continued_process_is_not_silent(
    served_command_line: CommandLine, tmp_path: Path, who: str
) -> None:
    """Processes are stopped for 20 s, with a limit of 15 s; the worker continues last."""
    fasta = write_proteins(tmp_path / "in.fasta", [200] * 300)
    run_dir = tmp_path / "run"
    process = served_command_line.start(
        *("--fasta", fasta, "--output-dir", run_dir, *ONE_WORKER, "--token-budget", 128),
        *(
            "--runtime.checkpoint-seq-threshold",
            10,
            "--runtime.silence-limit-s",
            15,
            "--runtime.grace-s",
            5,
        ),
    )
    with reaped(process, run_dir):
        wait_until(lambda: process.poll() is not None or len(finished_checkpoints(run_dir)) >= 1)
        workers = workers_of(run_dir)
        stopped = {"both": [process.pid, *workers], "flow": [process.pid], "worker": workers}[who]
        for pid in stopped:
            os.kill(pid, signal.SIGSTOP)
        time.sleep(20)
        for pid in stopped:
            os.kill(pid, signal.SIGCONT)
        _, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert_whole_at_the_first_attempt(run_dir, 300)


def test_the_holder_of_a_shard_is_reported(
    served_command_line: CommandLine, tmp_path: Path
) -> None:
    fasta = write_proteins(tmp_path / "in.fasta", [60] * 20)
    paths = RunPaths(tmp_path / "run")
    make_directory(paths.shard_dir(0))
    lock = FileLock(paths.shard_lock(0), purpose="hang")
    with lock.held(timeout_s=0):
        process = served_command_line.start(
            "--fasta", fasta, "--output-dir", paths.run_dir, *ONE_WORKER
        )
        time.sleep(40)
        assert process.poll() is None
    with reaped(process, paths.run_dir):
        _, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert err.count("shard 0 waits for another process to release it") == 1
    assert f"held by process {os.getpid()}" in err
    assert_whole_at_the_first_attempt(paths.run_dir, 20)


@contextmanager
def reaped(process: subprocess.Popen[str], run_dir: Path) -> Iterator[None]:
    """Kill what is left of a process and its workers when a test has failed."""
    try:
        yield
    finally:
        for pid in (*group_of(process.pid), *workers_of(run_dir)):
            os.kill(pid, signal.SIGKILL)
