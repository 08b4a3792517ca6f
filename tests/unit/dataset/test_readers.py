"""Other libraries read the dataset, with the code of the documentation."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.doc_pages import blocks_of
from tests.fake_runs import Run, fake_records, finish_run, start_run_of
from tests.helpers import ROOT
from vnp_lib.dataset.formats.registry import FORMATS
from vnp_lib.plan.outputs import StoreDtype

README, GUIDE = "README.md", "docs/how-to/read-the-dataset.md"
KEEP = """
import numpy
numpy.savez("seen.npz", ids=[str(id_) for id_ in ids], embeddings=numpy.asarray(embeddings))
"""


@pytest.fixture(params=StoreDtype)
def run(tmp_path: Path, request: pytest.FixtureRequest) -> Run:
    """A run in `runs/mine`, with the sequence that the documentation reads."""
    (tmp_path / "runs").mkdir()
    records = fake_records()
    records.ids[7] = "P12345"
    run = finish_run(start_run_of(tmp_path, records, store_dtype=request.param))
    run.assemble()
    run.paths.run_dir.rename(tmp_path / "runs" / "mine")
    return run


def lines_with(library: str, page: str) -> str:
    """Return the code of a page that reads all ids and embeddings with a library."""
    programs = [
        block.code
        for block in blocks_of((ROOT / page).read_text())
        if "\nids, embeddings = " in block.code
    ]
    (lines,) = [
        code
        for code in programs
        if re.search(rf"^(import|from) {library}\b", code, flags=re.MULTILINE)
    ]
    return lines


@pytest.mark.parametrize(
    ("library", "page"),
    [
        ("vnp_lib.dataset", README),
        ("pandas", GUIDE),
        ("polars", GUIDE),
        ("duckdb", GUIDE),
        ("datasets", GUIDE),
    ],
)
def test_every_row_is_read_with_its_id(run: Run, library: str, page: str, tmp_path: Path) -> None:
    environment = os.environ | {
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(tmp_path / "huggingface"),
        "PYTHONPATH": str(ROOT),
    }
    code = lines_with(library, page) + KEEP
    subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, check=True, timeout=120
    )
    with np.load(tmp_path / "seen.npz") as seen:
        assert seen["ids"].tolist() == run.ids
        # The others convert to float32.
        keeps_float16 = library in ("pandas", "polars")
        is_float16 = run.plan.store_dtype == "float16" and keeps_float16
        assert seen["embeddings"].dtype == (np.float16 if is_float16 else np.float32)
        assert np.array_equal(seen["embeddings"], run.expected_rows().astype(run.plan.store_dtype))


def test_the_guide_lists_every_format_of_export() -> None:
    rows = re.findall(r"^\| `--to ([\w-]+)` \|", (ROOT / GUIDE).read_text(), flags=re.MULTILINE)
    assert rows == list(FORMATS)
