"""`deployments/process-pool.md`: its commands, exactly as printed, from nothing to a finished run."""

from __future__ import annotations

import os
import re
import shutil
import subprocess

import pytest

from tests.support import ROOT, free_port
from vnp_lib.dataset import open_dataset

pytestmark = [pytest.mark.soak, pytest.mark.timeout(900)]

GUIDE = ROOT / "deployments" / "process-pool.md"
LEAVE_NOTHING_RUNNING = "trap 'jobs -p | xargs --no-run-if-empty kill -KILL' EXIT"


def commands_of(guide: str) -> str:
    """The contents of its ```bash fences, in order."""
    return "\n".join(re.findall(r"^```bash\n(.*?)^```$", guide, flags=re.MULTILINE | re.DOTALL))


def copy_of_the_repository(directory):
    """The files of the working tree beside this environment: where the guide's commands leave what they make."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
        cwd=ROOT,
        capture_output=True,
        check=True,
        text=True,
    ).stdout
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_file():
            (directory / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, directory / name)
    (directory / ".venv").symlink_to(ROOT / ".venv")
    return directory


@pytest.mark.skipif(not (ROOT / ".venv").is_dir(), reason="the guide starts with `make embed`, which makes .venv")
def test_the_guide_leads_from_nothing_to_a_finished_run(tmp_path):
    """On a Prefect home and a port of its own, offline; the server and the worker are gone afterwards."""
    checkout = copy_of_the_repository(tmp_path)
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PREFECT_", "VNP_"))}
    environment |= {"PREFECT_HOME": str(tmp_path / "home"), "PREFECT_SERVER_API_PORT": str(free_port())}
    log = tmp_path / "guide.log"
    with log.open("w") as output:
        guide = subprocess.Popen(
            ["bash", "-euxo", "pipefail", "-c", f"{LEAVE_NOTHING_RUNNING}\n{commands_of(GUIDE.read_text())}"],
            cwd=checkout,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
        try:
            code = guide.wait(timeout=840)
        finally:
            guide.terminate()
            guide.wait()
    assert code == 0, log.read_text(errors="replace")
    assert len(open_dataset(checkout / "runs" / "deployed")) == 122
