"""A Prefect server, a work pool and single-GPU machines, as processes that can be switched off."""

from __future__ import annotations

import os
import signal
import subprocess
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import httpx
from prefect.client.orchestration import SyncPrefectClient

from tests.helpers import CommandLine, descendants_of, is_alive, wait_until

POOL = "vnp-local"
# Other programs use this machine too.
PATIENCE_S = 240.0


@dataclass(slots=True, kw_only=True)
class Cluster:
    """The processes of a run in a work pool. A server that is switched off keeps its database."""

    directory: Path
    port: int
    server: subprocess.Popen[str] = field(init=False)
    started: list[subprocess.Popen[str]] = field(default_factory=list)

    @property
    def command_line(self) -> CommandLine:
        return CommandLine(prefect_home=self.directory / "client", api_url=self._api_url)

    def client(self) -> SyncPrefectClient:
        return SyncPrefectClient(api=self._api_url)

    def start_server(self) -> None:
        """Start the server, on the database of the last one."""
        self.server = self._start(
            "server", "server", "start", "--host", "127.0.0.1", "--port", str(self.port)
        )
        wait_until(
            lambda: self.server.poll() is not None or self._is_served(), timeout_s=PATIENCE_S
        )
        assert self.server.poll() is None, (self.directory / "server.log").read_text()

    def deploy(self) -> None:
        """Create the process pool and the deployments of `prefect.yaml` for it."""
        for arguments in (
            ("work-pool", "create", POOL, "--type", "process"),
            ("--no-prompt", "deploy", "--name", "local"),
        ):
            process = self.command_line.start_prefect(*arguments)
            out, err = process.communicate(timeout=PATIENCE_S)
            assert process.returncode == 0, out + err

    def start_machine(self, name: str) -> subprocess.Popen[str]:
        """Start a Prefect worker for one shard at a time; `GPU` names the GPU of its processes."""
        arguments = ("worker", "start", "--pool", POOL, "--name", name, "--limit", "1")
        return self._start(
            name, *arguments, GPU=name, OMP_NUM_THREADS="1", PREFECT_WORKER_QUERY_SECONDS="1"
        )

    def used_slots(self) -> int:
        """Return how many flow runs of shards count towards the concurrency limit."""
        with self.client() as client:
            deployment = client.read_deployment_by_name("vnp-embed-shard/local")
            assert deployment.global_concurrency_limit is not None
            return deployment.global_concurrency_limit.active_slots

    def switch_everything_off(self) -> None:
        switch_off(*self.started)
        self.started.clear()

    @property
    def _api_url(self) -> str:
        return f"http://127.0.0.1:{self.port}/api"

    def _is_served(self) -> bool:
        with suppress(httpx.HTTPError):
            return httpx.get(f"{self._api_url}/health").is_success
        return False

    def _start(self, name: str, *arguments: str, **variables: str) -> subprocess.Popen[str]:
        command_line = CommandLine(prefect_home=self.directory / name, api_url=self._api_url)
        process = command_line.start_prefect(
            *arguments, log=self.directory / f"{name}.log", **variables
        )
        self.started.append(process)
        return process


def switch_off(*processes: subprocess.Popen[str]) -> None:
    """Kill processes and all their descendants at once, like a power failure.

    They are stopped first, so that none observes the end of another.
    """
    frozen: set[int] = set()
    while running := [pid for pid in _all_of(processes) if pid not in frozen]:
        for pid in running:
            _send(pid, signal.SIGSTOP)
        frozen.update(running)
    for pid in frozen:
        _send(pid, signal.SIGKILL)
    for process in processes:
        process.wait()
    wait_until(lambda: not any(map(is_alive, frozen)))


def _all_of(processes: tuple[subprocess.Popen[str], ...]) -> list[int]:
    alive = [process.pid for process in processes if process.poll() is None]
    return alive + [pid for leader in alive for pid in descendants_of(leader)]


def _send(pid: int, signum: signal.Signals) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, signum)
