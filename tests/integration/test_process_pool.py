"""The commands of `deployments/process-pool.md`, run exactly as printed."""

from __future__ import annotations

import pytest

from tests.doc_pages import copy_of_the_repository, environment_of_a_reader, run_page
from tests.helpers import ROOT, free_port
from vnp_lib.dataset import open_dataset

pytestmark = [pytest.mark.soak, pytest.mark.timeout(900)]

GUIDE = ROOT / "deployments" / "process-pool.md"


@pytest.mark.skipif(
    not (ROOT / ".venv").is_dir(), reason="the guide starts with `make embed`, which makes .venv"
)
def test_the_guide_leads_to_a_finished_run(tmp_path):
    """Offline, with a separate Prefect home and port; server and worker have exited afterwards."""
    checkout = copy_of_the_repository(tmp_path)
    environment = environment_of_a_reader(
        tmp_path / "home", PREFECT_SERVER_API_PORT=str(free_port())
    )
    run_page(GUIDE, checkout, environment, timeout_s=840)
    assert len(open_dataset(checkout / "runs" / "deployed")) == 122
