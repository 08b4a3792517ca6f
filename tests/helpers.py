"""Helpers of several test modules."""

from __future__ import annotations

import http.client
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from prometheus_client.parser import text_string_to_metric_families

from vnp_lib.api import embed
from vnp_lib.config import EmbedConfig, RuntimeConfig
from vnp_lib.dataset import open_dataset
from vnp_lib.plan.paths import RunPaths
from vnp_lib.storage.durable import read_marker

ROOT = Path(__file__).parents[1]
EXAMPLE = ROOT / "examples" / "viral_proteins.fasta"
SMALL_MODEL = ("--model", "esm2_t6_8M_UR50D", "--weights", "random", "--devices", "cpu")


def small_config(
    fasta: Path, output_dir: Path, *, runtime: dict[str, Any] | None = None, **settings: Any
) -> EmbedConfig:
    """Return the settings of a run of the smallest model with random weights, in two shards.

    It has two single-threaded worker processes on the CPU.
    """
    defaults = {"model": "esm2_t6_8M_UR50D", "weights": "random", "devices": "cpu,cpu", "shards": 2}
    quick = RuntimeConfig(**{"backoff_base_s": 0.01, **(runtime or {})})
    return EmbedConfig(
        fasta=(fasta,), output_dir=output_dir, runtime=quick, **{**defaults, **settings}
    )


def embed_alone(fasta: Path, run_dir: Path) -> Path:
    """Embed in this process, without server and workers, what `small_config` embeds.

    Returns:
        The run directory.
    """
    embed(
        fasta,
        model="esm2_t6_8M_UR50D",
        weights="random",
        device="cpu",
        output_dir=run_dir,
        progress=False,
    )
    return run_dir


@dataclass(frozen=True, slots=True, kw_only=True)
class CommandLine:
    """`python flows/embed.py` with its own Prefect home, so that this machine's is not touched."""

    prefect_home: Path
    # Address of a permanent server; without one, each run starts its own.
    api_url: str | None = None
    cwd: Path = ROOT

    def start(
        self, *arguments: object, log: Path | None = None, **variables: str
    ) -> subprocess.Popen[str]:
        """Start it as the leader of its own process group, with these environment variables.

        Its output goes to the file `log`, or to pipes without one.
        """
        return self._start(
            os.path.relpath(ROOT / "flows" / "embed.py", self.cwd), *arguments, log=log, **variables
        )

    def start_prefect(
        self, *arguments: object, log: Path | None = None, **variables: str
    ) -> subprocess.Popen[str]:
        """Start the command `prefect` in the same way."""
        return self._start("-m", "prefect", *arguments, log=log, **variables)

    def _start(
        self, *arguments: object, log: Path | None, **variables: str
    ) -> subprocess.Popen[str]:
        environment = {
            k: v for k, v in os.environ.items() if not k.startswith(("PREFECT_", "VNP_"))
        }
        if self.api_url is not None:
            environment["PREFECT_API_URL"] = self.api_url
        with nullcontext(subprocess.PIPE) if log is None else log.open("a") as output:
            return subprocess.Popen(
                [sys.executable, *map(str, arguments)],
                cwd=self.cwd,
                env=environment | {"PREFECT_HOME": str(self.prefect_home)} | variables,
                stdout=output,
                stderr=output,
                text=True,
                start_new_session=True,
                preexec_fn=_restore_sigint,
            )

    def run(self, *arguments: object, timeout_s: float = 180.0) -> subprocess.CompletedProcess[str]:
        """Run it until it exits."""
        process = self.start(*arguments)
        try:
            out, err = process.communicate(timeout=timeout_s)
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)
            raise
        return subprocess.CompletedProcess(arguments, process.returncode, out, err)


def finished_checkpoints(run_dir: Path) -> dict[Path, bytes]:
    """Return every checkpoint that has a marker, with the marker's bytes."""
    markers = RunPaths(run_dir).checkpoints_dir.glob("shard_*/batch_*.pt.done")
    return {path.with_name(path.name.removesuffix(".done")): path.read_bytes() for path in markers}


def computed_ordinals(run_dir: Path) -> list[int]:
    return [
        ordinal
        for path in finished_checkpoints(run_dir)
        for ordinal in read_marker(path)["ordinals"]
    ]


def flip_bit(path: Path, position: int | None = None) -> None:
    """Flip one bit of a file.

    `position` counts bits from the lowest of the first byte; by default it is in the middle.
    """
    data = bytearray(path.read_bytes())
    position = len(data) // 2 * 8 if position is None else position
    data[position // 8] ^= 1 << position % 8
    path.write_bytes(data)


def workers_of(run_dir: Path) -> list[int]:
    """Return the ids of the worker processes on run directories at or below a path."""
    found = []
    for process in Path("/proc").iterdir():
        try:
            command = (process / "cmdline").read_bytes().decode().split("\0")
        except (OSError, ValueError):
            continue
        if any(part.endswith("vnp_lib/worker/__main__.py") for part in command) and any(
            part.startswith(str(run_dir)) for part in command
        ):
            found.append(int(process.name))
    return found


def group_of(leader: int) -> list[int]:
    """Return the ids of the living processes of a process group."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            state, _, group = (process / "stat").read_text().rpartition(")")[2].split()[:3]
            if int(group) == leader and state != "Z":
                found.append(int(process.name))
    return found


def is_alive(pid: int) -> bool:
    """Whether a process is running; a zombie is not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def _restore_sigint() -> None:
    """Restore SIGINT, which is ignored in all descendants of a shell's background job."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def wait_until(condition: Callable[[], bool], *, timeout_s: float = 120.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"it did not happen within {timeout_s} s"
        time.sleep(0.02)


def free_port() -> int:
    """Return a port that is not in use."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port: int = server.getsockname()[1]
        return port


def scrape(port: int) -> dict[str, float]:
    """Read the metrics that a run serves on a port of this machine."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request("GET", "/metrics")
    page = connection.getresponse().read().decode()
    connection.close()
    return read_page(page)


def read_page(page: str) -> dict[str, float]:
    """Parse a metrics page with Prometheus's parser.

    Returns:
        The samples by name and labels, such as `vnp_failures_total{kind=oom}`.
    """
    found = {}
    for family in text_string_to_metric_families(page):
        for sample in family.samples:
            labels = ",".join(f"{label}={value}" for label, value in sample.labels.items())
            found[f"{sample.name}{{{labels}}}" if labels else sample.name] = sample.value
    return found


def assert_same_rows(run_dir: Path, oracle_dir: Path) -> None:
    """Compare two datasets row by row, by id and by position."""
    ours, oracle = open_dataset(run_dir), open_dataset(oracle_dir)
    assert list(ours.ids) == list(oracle.ids)
    for ordinal, sequence_id in enumerate(oracle.ids):
        np.testing.assert_allclose(
            ours[sequence_id], oracle[sequence_id], atol=1e-5, err_msg=sequence_id
        )
        np.testing.assert_array_equal(ours.row(ordinal), ours[sequence_id])


def descendants_of(pid: int) -> list[int]:
    """Return the ids of all descendants of a process."""
    parents: dict[int, list[int]] = {}
    for process in Path("/proc").iterdir():
        with suppress(OSError, ValueError):
            parent = int((process / "stat").read_text().rpartition(")")[2].split()[1])
            parents.setdefault(parent, []).append(int(process.name))
    found: list[int] = []
    queue = [pid]
    while queue:
        started = parents.get(queue.pop(), [])
        found += started
        queue += started
    return found


def write_foreign_code(directory: Path) -> Path:
    """Fill a directory with modules that a worker process must not import.

    They have the names of libraries and of `vnp_lib`, whose mean is the first residue's
    representation.
    """
    shutil.copytree(
        ROOT / "vnp_lib", directory / "vnp_lib", ignore=shutil.ignore_patterns("__pycache__")
    )
    pooling = directory / "vnp_lib" / "model" / "pooling.py"
    pooling.write_text(
        pooling.read_text() + "\n\ndef mean_pool(hidden, cu_seqlens):\n"
        "    return hidden[cu_seqlens[:-1].long() + 1].float()\n"
    )
    for name in ("random", "json", "numpy", "torch", "pyarrow", "safetensors", "sitecustomize"):
        (directory / f"{name}.py").write_text(
            f"raise ImportError('{name}.py of the current directory is imported')\n"
        )
    return directory
