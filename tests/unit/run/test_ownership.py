"""Tests of directories with foreign files: these are not moved, removed or mixed in."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.fake_runs import finish_run, start_run
from tests.helpers import small_config
from vnp_lib.dataset import open_dataset
from vnp_lib.errors import ConfigError
from vnp_lib.plan.paths import RunPaths
from vnp_lib.run.directory import open_run, validate_config


def open_briefly(fasta: Path, run_dir: Path, **settings: object) -> None:
    with open_run(small_config(fasta, run_dir, **settings)):
        pass


def write(directory: Path, *names: str) -> None:
    for name in names:
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_text(name)


def bytes_in(directory: Path) -> dict[Path, bytes]:
    return {
        path: path.read_bytes()
        for path in directory.rglob("*")
        if path.is_file() and path.name != "run.lock"
    }


@pytest.fixture
def project(tmp_path: Path, tiny_fasta: Path) -> Path:
    """A directory of somebody's work, with the input in it, and a run on top."""
    write(
        tmp_path,
        ".git/config",
        "thesis.tex",
        "figures/report.html",
        "plans/plan.json",
        "superseded_ideas.md",
    )
    (tmp_path / "input.fasta").write_bytes(tiny_fasta.read_bytes())
    open_briefly(tmp_path / "input.fasta", tmp_path)
    write(tmp_path, "results/" + "0" * 64 + "-00000-of-00001", "quarantine.jsonl", "report.html")
    return tmp_path


OF_A_RUN = {"plan", "checkpoints", "results", "quarantine.jsonl", "report.html"}


def test_a_forced_restart_moves_what_is_a_runs_and_nothing_else(project: Path) -> None:
    before = {path.name for path in project.iterdir()}
    open_briefly(project / "input.fasta", project, force_restart=True)
    assert {path.name for path in (project / "superseded_1").iterdir()} == OF_A_RUN
    assert {path.name for path in project.iterdir()} == (before - OF_A_RUN) | {
        "superseded_1",
        "plan",
        "checkpoints",
    }
    assert (project / ".git" / "config").read_text() == ".git/config"


def test_a_forced_restart_counts_from_the_highest(project: Path) -> None:
    """Also where one before it is gone."""
    for _ in range(2):
        open_briefly(project / "input.fasta", project, force_restart=True)
    (project / "superseded_1").rename(project.parent / f"{project.name}-elsewhere")
    write(project, "superseded_7/x")
    open_briefly(project / "input.fasta", project, force_restart=True)
    assert {path.name for path in project.glob("superseded_*")} == {
        "superseded_2",
        "superseded_7",
        "superseded_8",
        "superseded_ideas.md",
    }


def test_a_forced_restart_without_a_run_is_a_start(tmp_path: Path, tiny_fasta: Path) -> None:
    """A forced restart where there was no run is an ordinary start."""
    write(tmp_path, "thesis.tex", "data/x.csv")
    open_briefly(tiny_fasta, tmp_path, force_restart=True)
    assert not list(tmp_path.glob("superseded_*"))
    assert (tmp_path / "thesis.tex").exists()


def test_what_was_moved_aside_is_a_run_still(tmp_path: Path) -> None:
    run = finish_run(start_run(tmp_path, num_sequences=12))
    run.assemble()
    write(run.paths.embeddings_dir, "notes.txt")
    open_briefly(tmp_path / "x.fasta", run.paths.run_dir, force_restart=True)
    aside = RunPaths(run.paths.run_dir / "superseded_1")
    assert len(open_dataset(aside.run_dir)) == 12
    assert (aside.embeddings_dir / "notes.txt").read_text() == "notes.txt"


@pytest.mark.parametrize(
    "name",
    [
        "plan/plan.md",
        "checkpoints/epoch=3.ckpt",
        "embeddings/umap.npy",
        "results/table.csv",
        "report.html",
    ],
)
@pytest.mark.parametrize("force_restart", [False, True])
def test_a_new_run_keeps_out_of_what_is_somebody_elses(
    tmp_path: Path, tiny_fasta: Path, name: str, force_restart: bool
) -> None:
    """Up front, and with every byte left as it was."""
    run_dir = tmp_path / "project"
    write(run_dir, name, "thesis.tex")
    before = bytes_in(run_dir)
    config = small_config(tiny_fasta, run_dir, force_restart=force_restart)
    for start in (validate_config, lambda config: open_run(config).__enter__()):
        with pytest.raises(
            ConfigError,
            match=rf"{name.split('/')[0]} is not of a run.* choose another output directory",
        ):
            start(config)
    assert bytes_in(run_dir) == before


@pytest.mark.parametrize("name", ["part-00000-c000.snappy.parquet", "part-00000.parquet"])
def test_a_foreign_table_is_refused_before_computing(project: Path, name: str) -> None:
    """A table of somebody else among the parts is refused before anything is computed."""
    (project / "embeddings").mkdir()
    pq.write_table(pa.table({"id": ["theirs"]}), project / "embeddings" / name)
    with pytest.raises(ConfigError, match=f"{name} is not of this run"):
        validate_config(small_config(project / "input.fasta", project))
    with pytest.raises(ConfigError, match=f"{name} is not of this run"):
        open_briefly(project / "input.fasta", project)
    assert pq.read_table(project / "embeddings" / name).num_rows == 1


@pytest.mark.parametrize(
    "left", [["plan"], ["plan", "checkpoints"], ["plan", "checkpoints", "embeddings"]]
)
def test_a_run_that_was_half_removed_by_hand_is_still_a_runs(
    tmp_path: Path, left: list[str]
) -> None:
    """`rm -r plan checkpoints` is how people start over."""
    run = finish_run(start_run(tmp_path, num_sequences=12))
    run.assemble()
    write(run.paths.run_dir, "results/" + "a" * 64 + "-00000-of-00001")
    for name in left:
        (run.paths.run_dir / name).rename(tmp_path / name)
    open_briefly(tmp_path / "x.fasta", run.paths.run_dir)
