"""What several test modules share."""

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
from typing import IO, Any

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
    """A run of the smallest model with random weights, on two single-threaded children where it has two shards."""
    defaults = {"model": "esm2_t6_8M_UR50D", "weights": "random", "devices": "cpu,cpu", "shards": 2}
    quick = RuntimeConfig(**{"backoff_base_s": 0.01, **(runtime or {})})
    return EmbedConfig(
        fasta=(fasta,), output_dir=output_dir, runtime=quick, **{**defaults, **settings}
    )


def embed_alone(fasta: Path, run_dir: Path) -> Path:
    """Embed in this process what `small_config` embeds, with no server and no child that anything could befall.

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
    """`python flows/embed.py` with its own Prefect home, so that nothing of this machine's is touched."""

    prefect_home: Path
    api_url: str | None = None  # of a standing server; without one, each run starts its own
    cwd: Path = ROOT

    def start(
        self, *arguments: object, log: Path | None = None, **variables: str
    ) -> subprocess.Popen[str]:
        """Start it as the leader of a process group of its own, with these environment variables.

        What it says goes to the file `log`, or else to pipes.
        """
        return self._start(
            os.path.relpath(ROOT / "flows" / "embed.py", self.cwd), *arguments, log=log, **variables
        )

    def start_prefect(
        self, *arguments: object, log: Path | None = None, **variables: str
    ) -> subprocess.Popen[str]:
        """Start the command `prefect` in its place."""
        return self._start("-m", "prefect", *arguments, log=log, **variables)

    def _start(
        self, *arguments: object, log: Path | None, **variables: str
    ) -> subprocess.Popen[str]:
        with nullcontext(subprocess.PIPE) if log is None else log.open("a") as output:
            return self._start_saying(output, *arguments, **variables)

    def _start_saying(
        self, output: int | IO[str], *arguments: object, **variables: str
    ) -> subprocess.Popen[str]:
        environment = {
            k: v for k, v in os.environ.items() if not k.startswith(("PREFECT_", "VNP_"))
        }
        if self.api_url is not None:
            environment["PREFECT_API_URL"] = self.api_url
        return subprocess.Popen(
            [sys.executable, *map(str, arguments)],
            cwd=self.cwd,
            env=environment | {"PREFECT_HOME": str(self.prefect_home)} | variables,
            stdout=output,
            stderr=output,
            text=True,
            start_new_session=True,
            preexec_fn=_hear_sigint,
        )

    def run(self, *arguments: object, timeout_s: float = 180.0) -> subprocess.CompletedProcess[str]:
        """Run it to its end, whatever that is."""
        process = self.start(*arguments)
        try:
            out, err = process.communicate(timeout=timeout_s)
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)
            raise
        return subprocess.CompletedProcess(arguments, process.returncode, out, err)


def finished_checkpoints(run_dir: Path) -> dict[Path, bytes]:
    """Every checkpoint that has its marker, with the marker's bytes."""
    markers = RunPaths(run_dir).checkpoints_dir.glob("shard_*/batch_*.pt.done")
    return {path.with_name(path.name.removesuffix(".done")): path.read_bytes() for path in markers}


def computed_ordinals(run_dir: Path) -> list[int]:
    return [
        ordinal
        for path in finished_checkpoints(run_dir)
        for ordinal in read_marker(path)["ordinals"]
    ]


def flip_bit(path: Path, position: int | None = None) -> None:
    """Turn one bit of a file over: the one at `position`, counted from the lowest of its first byte, or one in its middle."""
    data = bytearray(path.read_bytes())
    position = len(data) // 2 * 8 if position is None else position
    data[position // 8] ^= 1 << position % 8
    path.write_bytes(data)


def workers_of(run_dir: Path) -> list[int]:
    """Process ids of the children that work in a run directory or below."""
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
    """Process ids of those that are alive in a process group."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            state, _, group = (process / "stat").read_text().rpartition(")")[2].split()[:3]
            if int(group) == leader and state != "Z":
                found.append(int(process.name))
    return found


def is_alive(pid: int) -> bool:
    """Whether a process runs; one that is dead and not yet waited for does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def _hear_sigint() -> None:
    """A shell that starts the tests in the background has made them, and all that they start, deaf to SIGINT."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def wait_until(condition: Callable[[], bool], *, timeout_s: float = 120.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"it did not happen within {timeout_s} s"
        time.sleep(0.02)


def free_port() -> int:
    """A port on which nobody listens."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port: int = server.getsockname()[1]
        return port


def scrape(port: int) -> dict[str, float]:
    """What a run serves on a port of this machine, as `read_page` gives it."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request("GET", "/metrics")
    page = connection.getresponse().read().decode()
    connection.close()
    return read_page(page)


def read_page(page: str) -> dict[str, float]:
    """The samples of a metrics page by name and labels, as Prometheus's parser reads them: `vnp_failures_total{kind=oom}`."""
    samples = [
        sample for family in text_string_to_metric_families(page) for sample in family.samples
    ]
    return {_name(sample.name, sample.labels): sample.value for sample in samples}


def _name(name: str, labels: dict[str, str]) -> str:
    told = ",".join(f"{label}={value}" for label, value in labels.items())
    return f"{name}{{{told}}}" if told else name


def assert_same_rows(run_dir: Path, oracle_dir: Path) -> None:
    """Compare two datasets row by row, each row by its id and by its place."""
    ours, oracle = open_dataset(run_dir), open_dataset(oracle_dir)
    assert list(ours.ids) == list(oracle.ids)
    for ordinal, sequence_id in enumerate(oracle.ids):
        np.testing.assert_allclose(
            ours[sequence_id], oracle[sequence_id], atol=1e-5, err_msg=sequence_id
        )
        np.testing.assert_array_equal(ours.row(ordinal), ours[sequence_id])


def descendants_of(pid: int) -> list[int]:
    """Process ids of all that a process has started, and they in turn."""
    parents: dict[int, list[int]] = {}
    for process in Path("/proc").iterdir():
        with suppress(OSError, ValueError):
            parent = int((process / "stat").read_text().rpartition(")")[2].split()[1])
            parents.setdefault(parent, []).append(int(process.name))
    found: list[int] = []
    queue = [pid]
    while queue:
        children = parents.get(queue.pop(), [])
        found += children
        queue += children
    return found


def write_foreign_code(directory: Path) -> Path:
    """Fill a directory with files that a worker process must not import: another `vnp_lib`, and names of the libraries.

    The other `vnp_lib` gives the first residue's representation in place of the mean of all.
    """
    shutil.copytree(
        ROOT / "vnp_lib", directory / "vnp_lib", ignore=shutil.ignore_patterns("__pycache__")
    )
    with (directory / "vnp_lib" / "pooling.py").open("a") as pooling:
        pooling.write(
            "\n\ndef mean_pool(hidden, cu_seqlens):\n    return hidden[cu_seqlens[:-1].long() + 1].float()\n"
        )
    for name in ("random", "json", "numpy", "torch", "pyarrow", "safetensors", "sitecustomize"):
        (directory / f"{name}.py").write_text(
            f"raise ImportError('{name}.py of the current directory is imported')\n"
        )
    return directory
