"""The dataset in the hands of other libraries: the README's own lines, run as they stand there."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.made_up_runs import Run, finish_run, made_up_records, start_run_of
from tests.support import ROOT
from vnp_lib.formats import FORMATS
from vnp_lib.outputs import StoreDtype

README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
KEEP = "\nimport numpy\nnumpy.savez('seen.npz', ids=[str(id_) for id_ in ids], embeddings=numpy.asarray(embeddings))\n"


@pytest.fixture(params=StoreDtype)
def run(tmp_path: Path, request: pytest.FixtureRequest) -> Run:
    """Its directory is `runs/mine`, as in the README, and the sequence that the README asks for is in it."""
    (tmp_path / "runs").mkdir()
    records = made_up_records()
    records.ids[7] = "P12345"
    run = finish_run(start_run_of(tmp_path, records, store_dtype=request.param))
    run.assemble()
    run.paths.run_dir.rename(tmp_path / "runs" / "mine")
    return run


def lines_with(library: str) -> str:
    (block,) = [block for block in BLOCKS if re.search(rf"^(import|from) {library}\b", block, flags=re.MULTILINE)]
    return block


@pytest.mark.parametrize("library", ["vnp_lib.dataset", "pandas", "polars", "duckdb", "datasets"])
def test_every_row_is_read_with_its_id(run: Run, library: str, tmp_path: Path) -> None:
    environment = os.environ | {
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(tmp_path / "huggingface"),
        "PYTHONPATH": str(ROOT),
    }
    code = lines_with(library) + KEEP
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, check=True, timeout=120)
    with np.load(tmp_path / "seen.npz") as seen:
        assert seen["ids"].tolist() == run.ids
        is_float16 = run.plan.store_dtype == "float16" and library in ("pandas", "polars")  # the others give float32
        assert seen["embeddings"].dtype == (np.float16 if is_float16 else np.float32)
        assert np.array_equal(seen["embeddings"], run.expected_rows().astype(run.plan.store_dtype))


def test_the_readme_lists_every_format_of_export() -> None:
    rows = re.findall(r"^\| `--to ([\w-]+)` \|", README, flags=re.MULTILINE)
    assert rows == list(FORMATS)
