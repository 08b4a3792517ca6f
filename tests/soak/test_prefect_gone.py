"""A run whose Prefect server is killed or frozen, and a run from another directory."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.helpers import (
    ROOT,
    SMALL_MODEL,
    CommandLine,
    assert_same_rows,
    descendants_of,
    finished_checkpoints,
    group_of,
    is_alive,
    wait_until,
    workers_of,
)
from vnp_lib.plan.paths import RunPaths

pytestmark = [pytest.mark.soak, pytest.mark.timeout(600)]

SMALL_CHECKPOINTS = ("--shards", 4, "--token-budget", 128, "--runtime.checkpoint-seq-threshold", 5)


def server_of(pid: int) -> list[int]:
    """Return the process id of the Prefect server that a run has started."""
    return [
        each
        for each in descendants_of(pid)
        if b"server_process.py" in Path(f"/proc/{each}/cmdline").read_bytes()
    ]


@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGSTOP])
@pytest.mark.parametrize("when", ["start", "middle"])
def test_a_run_completes_without_its_server(
    command_line, tmp_path, short_fasta, uninterrupted, when, signum
):
    """Killed or frozen: all rows, exit code 0, no traceback, and not minutes longer."""
    run_dir = tmp_path / "run"
    process = command_line.start(
        "--fasta", short_fasta, "--output-dir", run_dir, *SMALL_MODEL, *SMALL_CHECKPOINTS
    )
    enough = {
        "start": lambda: RunPaths(run_dir).plan_dir.exists(),
        "middle": lambda: len(finished_checkpoints(run_dir)) > 1,
    }
    wait_until(lambda: process.poll() is not None or enough[when]())
    (server,) = server_of(process.pid)
    os.kill(server, signum)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert "69 sequences embedded" in out
    assert "Traceback" not in err
    assert len(err.splitlines()) <= 3
    wait_until(lambda: not is_alive(server), timeout_s=10)
    assert_same_rows(run_dir, uninterrupted)


def test_a_killed_run_takes_its_server_along(command_line, tmp_path, short_fasta):
    run_dir = tmp_path / "run"
    process = command_line.start("--fasta", short_fasta, "--output-dir", run_dir, *SMALL_MODEL)
    wait_until(lambda: RunPaths(run_dir).plan_dir.exists())
    (server,) = server_of(process.pid)
    process.kill()
    process.communicate()
    wait_until(lambda: not is_alive(server), timeout_s=15)


def test_sigterm_to_everything_is_reported_in_a_line(command_line, tmp_path, short_fasta):
    """Slurm and systemd send SIGTERM to flow, server and workers at once."""
    run_dir = tmp_path / "run"
    process = command_line.start(
        "--fasta", short_fasta, "--output-dir", run_dir, *SMALL_MODEL, *SMALL_CHECKPOINTS
    )
    wait_until(lambda: len(finished_checkpoints(run_dir)) > 1)
    started_at = time.monotonic()
    for pid in (process.pid, *server_of(process.pid), *workers_of(run_dir)):
        os.kill(pid, signal.SIGTERM)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 143
    assert len(err.splitlines()) <= 2, err
    assert time.monotonic() - started_at < 60
    assert group_of(process.pid) == []


def test_an_installed_wheel_runs_from_a_hostile_directory(tmp_path, short_fasta, uninterrupted):
    """Files named like modules, and settings for other flows, do not matter."""
    subprocess.run(
        [
            sys.executable,
            "-m",
            "pip",
            "wheel",
            "-q",
            "--no-deps",
            "--no-build-isolation",
            "-w",
            tmp_path / "wheel",
            ROOT,
        ],
        check=True,
        timeout=300,
    )
    (wheel,) = (tmp_path / "wheel").glob("vnp-*.whl")
    target = tmp_path / "installed"
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", target, wheel],
        check=True,
    )
    hostile = tmp_path / "hostile"
    hostile.mkdir()
    for name in ("random", "json", "prefect", "numpy", "logging", "vnp_lib", "flows", "uvicorn"):
        (hostile / f"{name}.py").write_text(
            "raise SystemExit('imported from the current directory')\n"
        )
    environment = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("PREFECT_", "VNP_"))
    } | {
        "PYTHONPATH": str(target),
        "PREFECT_HOME": str(tmp_path / "home"),
        "PREFECT_DEFAULT_RESULT_STORAGE_BLOCK": "s3-bucket/mine",
        "PREFECT_FLOWS_DEFAULT_RETRIES": "2",
        "PREFECT_RESULTS_PERSIST_BY_DEFAULT": "true",
        "http_proxy": "http://127.0.0.1:3999",
        "ALL_PROXY": "socks5://127.0.0.1:3998",
        "MPLBACKEND": "TkAgg",
    }
    arguments = ("--fasta", short_fasta, "--output-dir", tmp_path / "run", *SMALL_MODEL)
    ended = subprocess.run(
        [target / "bin" / "vnp-embed", *map(str, arguments)],
        cwd=hostile,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert ended.returncode == 0, ended.stderr
    assert_same_rows(tmp_path / "run", uninterrupted)


def test_standard_error_on_a_full_disk_does_not_end_a_run(
    command_line: CommandLine, tmp_path, short_fasta
):
    with open("/dev/full", "w") as full:
        process = subprocess.Popen(
            [
                sys.executable,
                "flows/embed.py",
                "--fasta",
                short_fasta,
                "--output-dir",
                tmp_path / "run",
                *map(str, SMALL_MODEL),
            ],
            cwd=ROOT,
            env=os.environ | {"PREFECT_HOME": str(command_line.prefect_home)},
            stdout=full,
            stderr=full,
        )
        assert process.wait(300) == 0
    assert RunPaths(tmp_path / "run").success.exists()
