"""The commands of the documentation, run exactly as printed."""

from __future__ import annotations

import gzip
import os
import random
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Collection
from pathlib import Path

import pytest

from benchmarks.networks import write_weights
from tests.doc_pages import (
    LANGUAGES,
    copy_of_the_repository,
    environment_of_a_reader,
    run_page,
    runnable_pages,
    table_in,
)
from tests.helpers import ROOT

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (ROOT / ".venv").is_dir(), reason="what a page says begins with .venv"),
]

QUICK = ("docs/explanation/precision.md",)
TUTORIAL = "docs/tutorial.md"
# Its Python code is run by test_readers.py.
README = "README.md"
# Run by test_process_pool.py.
GUIDE = "deployments/process-pool.md"
OTHERS = sorted(set(runnable_pages()) - {*QUICK, TUTORIAL, README, GUIDE})


@pytest.fixture(scope="module")
def variables(tmp_path_factory) -> dict[str, str]:
    """Write replacements of the commands that make them quick and offline."""
    return environment_of_a_reader(
        tmp_path_factory.mktemp("prefect"),
        PATH=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        VNP_MODEL="esm2_t6_8M_UR50D",
        VNP_WEIGHTS="random",
        HF_DATASETS_CACHE=str(tmp_path_factory.mktemp("datasets")),
        HF_HUB_OFFLINE="1",
        MPLBACKEND="Agg",
    )


@pytest.fixture(scope="module")
def begun(variables, tmp_path_factory, tiny_fasta) -> Path:
    """Copy the working tree, with what the pages assume: proteins such as P12345, and a run."""
    checkout = copy_of_the_repository(tmp_path_factory.mktemp("begun"))
    proteins = tiny_fasta.read_text().replace(">protein_7 ", ">P12345 ")
    (checkout / "proteins.fasta").write_text(proteins)
    (checkout / "proteins.fasta.gz").write_bytes(gzip.compress(proteins.encode()))
    contig = "".join(random.Random(7).choices(["ATG", "GCT", "GGC", "AAA", "CGT"], k=400))
    (checkout / "contigs.fna").write_text(f">contig_1\n{contig}\n")
    run = (
        "-m",
        "benchmarks.without_prefect",
        "esm2_t6_8M_UR50D",
        "random",
        "proteins.fasta",
        "runs/mine",
    )
    subprocess.run([sys.executable, *run], cwd=checkout, env=variables, check=True, timeout=180)
    (checkout / "weights").mkdir()
    write_weights(checkout / "weights", "esm2_t6_8M_UR50D")
    return checkout


@pytest.fixture
def read(begun, variables, tmp_path) -> Callable[..., Path]:
    """Run the commands of a page in a separate working copy, and return that."""

    def follow(page: str, languages: Collection[str] = LANGUAGES) -> Path:
        checkout = Path(shutil.copytree(begun, tmp_path / "checkout", symlinks=True))
        run_page(ROOT / page, checkout, variables, timeout_s=280, languages=languages)
        return checkout

    return follow


@pytest.mark.parametrize("page", QUICK)
def test_the_code_of_a_page_about_a_dataset_runs(read, page):
    read(page)


@pytest.mark.soak
def test_the_tutorial_draws_its_picture(read):
    from matplotlib.testing.compare import compare_images

    checkout = read(TUTORIAL)
    assert (
        compare_images(
            str(ROOT / "docs/images/tutorial.png"), str(checkout / "tutorial.png"), tol=5
        )
        is None
    )
    assert files_without_a_word(checkout / "runs/tutorial") == []


def files_without_a_word(run_dir: Path) -> list[str]:
    """Return files of a run directory that are missing in the reference of files."""
    documented = [
        path for row in table_in("docs/reference/files.md") for path in row[0].split("`, `")
    ]
    pattern = re.compile(
        "|".join(
            re.escape(path).replace("N", r"\d+") + (".+" if path.endswith("/") else "")
            for path in documented
        )
    )
    files = [path.relative_to(run_dir).as_posix() for path in run_dir.rglob("*") if path.is_file()]
    return [file for file in files if not pattern.fullmatch(file)]


@pytest.mark.soak
@pytest.mark.parametrize("page", OTHERS)
def test_the_commands_of_a_page_run(read, page):
    read(page)


@pytest.mark.soak
def test_the_commands_of_the_readme_run(read):
    read(README, languages={"bash"})
