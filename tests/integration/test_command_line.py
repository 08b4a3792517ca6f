"""`python flows/embed.py`: its output, and its exit under signals and invalid arguments."""

from __future__ import annotations

import gzip
import os
import shutil
import signal
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from flows.program import main
from tests.helpers import (
    SMALL_MODEL,
    assert_same_rows,
    computed_ordinals,
    embed_alone,
    finished_checkpoints,
    wait_until,
    workers_of,
    write_foreign_code,
)
from vnp_lib import embed, open_dataset
from vnp_lib.plan.paths import RunPaths
from vnp_lib.storage.durable import marker_path

pytestmark = pytest.mark.slow

SMALL_CHECKPOINTS = ("--shards", 2, "--token-budget", 128, "--runtime.checkpoint-seq-threshold", 5)
PROTEIN = ">a\nMKVLATTWQERS\n"


@pytest.fixture(scope="module")
def first_run(command_line, tmp_path_factory, short_fasta):
    """Embed the short input without any set-up; return the run directory and the process."""
    run_dir = tmp_path_factory.mktemp("first") / "run"
    ended = command_line.run("--fasta", short_fasta, "--output-dir", run_dir, *SMALL_MODEL)
    assert ended.returncode == 0, ended.stderr
    return run_dir, ended


def test_a_run_prints_how_to_read_its_dataset(first_run):
    run_dir, ended = first_run
    assert f"dataset: {run_dir}/embeddings" in ended.stdout
    assert "69 sequences embedded" in ended.stdout
    assert ended.stderr.count("vectors mean nothing") == 1
    assert "prefect" not in (ended.stdout + ended.stderr).lower()
    snippet = ended.stdout.split("read it back:\n")[1].replace("\n    ", "\n").strip()
    exec(snippet, {})


def test_the_library_returns_the_rows_of_a_run(first_run, short_fasta):
    """Up to rounding, since the batches differ."""
    run_dir, _ = first_run
    dataset = open_dataset(run_dir)
    embeddings = embed(short_fasta, model="esm2_t6_8M_UR50D", weights="random", device="cpu")
    assert embeddings.ids == list(dataset.ids)
    for sequence_id, row in embeddings:
        np.testing.assert_allclose(row, dataset[sequence_id], atol=1e-5, err_msg=sequence_id)


def test_the_library_resumes_a_run(first_run, short_fasta, tmp_path):
    """Only the lost checkpoint of a shard is computed again."""
    run_dir = tmp_path / "run"
    shutil.copytree(first_run[0], run_dir)
    shutil.rmtree(RunPaths(run_dir).embeddings_dir)
    lost, *kept = finished_checkpoints(run_dir)
    marker_path(lost).unlink()
    lost.unlink()
    embeddings = embed(
        short_fasta,
        model="esm2_t6_8M_UR50D",
        weights="random",
        device="cpu",
        output_dir=run_dir,
        progress=False,
    )
    assert_same_rows(run_dir, first_run[0])
    assert embeddings.ids == list(open_dataset(first_run[0]).ids)
    assert {*kept} <= {*finished_checkpoints(run_dir)}
    assert set(Counter(computed_ordinals(run_dir)).values()) == {1}


def test_a_killed_run_resumes(
    command_line, served_command_line, tmp_path, short_fasta, uninterrupted
):
    """After SIGKILL to flow, server and worker processes; nothing is computed twice."""
    run_dir = tmp_path / "run"
    arguments = ("--fasta", short_fasta, "--output-dir", run_dir, *SMALL_MODEL, *SMALL_CHECKPOINTS)
    process = command_line.start(*arguments)
    wait_until(lambda: process.poll() is not None or len(finished_checkpoints(run_dir)) >= 9)
    for worker in workers_of(run_dir):
        os.kill(worker, signal.SIGKILL)
    os.killpg(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    process.communicate()
    before = finished_checkpoints(run_dir)
    assert not RunPaths(run_dir).success.exists()

    ended = served_command_line.run(*arguments)

    assert ended.returncode == 0, ended.stderr
    assert "1 Cached, 1 Completed" in ended.stdout
    after = finished_checkpoints(run_dir)
    assert {path: after[path] for path in before} == before
    assert set(Counter(computed_ordinals(run_dir)).values()) == {1}
    assert_same_rows(run_dir, uninterrupted)


@pytest.mark.parametrize(
    ("server", "signum", "code"),
    [("served_command_line", signal.SIGTERM, 143), ("command_line", signal.SIGINT, 130)],
)
def test_a_stopped_run_saves_and_ends_all_processes(
    request, tmp_path, short_fasta, uninterrupted, server, signum, code
):
    """SIGTERM to the process, or Ctrl-C to its group: the next run resumes."""
    run_dir = tmp_path / "run"
    arguments = ("--fasta", short_fasta, "--output-dir", run_dir, *SMALL_MODEL, *SMALL_CHECKPOINTS)
    process = request.getfixturevalue(server).start(*arguments)
    wait_until(lambda: process.poll() is not None or len(finished_checkpoints(run_dir)) >= 2)
    if signum == signal.SIGINT:
        os.killpg(process.pid, signum)
    else:
        process.send_signal(signum)
    _, err = process.communicate(timeout=60)
    assert process.returncode == code, err
    assert "Run the same command to resume." in err
    assert workers_of(run_dir) == []
    num_done = len(computed_ordinals(run_dir))
    assert 10 <= num_done < 66

    embed_alone(short_fasta, run_dir)

    assert set(Counter(computed_ordinals(run_dir)).values()) == {1}
    assert_same_rows(run_dir, uninterrupted)


def unusable(name: str, tmp_path: Path) -> tuple[tuple[object, ...], str]:
    """Return invalid arguments, and words that the error message must contain."""
    good = tmp_path / "good.fasta"
    good.write_text(PROTEIN)
    out = tmp_path / "out"
    match name:
        case "no arguments":
            return (), "--fasta is required"
        case "missing file":
            return (
                "--fasta",
                tmp_path / "none.fasta",
                "--output-dir",
                out,
            ), "there is no such file"
        case "empty file":
            (tmp_path / "empty.fasta").touch()
            return (
                "--fasta",
                tmp_path / "empty.fasta",
                "--output-dir",
                out,
            ), "there is no sequence in it"
        case "nucleotides":
            (tmp_path / "dna.fasta").write_text(">a\nACGTACGTNACGGTCA\n")
            return ("--fasta", tmp_path / "dna.fasta", "--output-dir", out), "nucleotides"
        case "unknown model":
            return ("--fasta", good, "--output-dir", out, "--model", "esm3"), "esm2_t36_3B_UR50D"
        case "wrong value":
            return (
                "--fasta",
                good,
                "--output-dir",
                out,
                "--token-budget",
                "none",
            ), "--token-budget"
        case "missing weights":
            return ("--fasta", good, "--output-dir", out, "--weights", tmp_path / "w.pt"), "w.pt"
        case "directory that is a file":
            return (
                "--fasta",
                good,
                "--output-dir",
                good / "out",
                "--weights",
                "random",
            ), "--output-dir"
        case "cut gz":
            (tmp_path / "cut.fasta.gz").write_bytes(gzip.compress(PROTEIN.encode() * 100)[:-20])
            return ("--fasta", tmp_path / "cut.fasta.gz", "--output-dir", out), "cut short"
    raise AssertionError(name)


@pytest.mark.parametrize(
    "name",
    [
        "no arguments",
        "missing file",
        "empty file",
        "nucleotides",
        "unknown model",
        "wrong value",
        "missing weights",
        "directory that is a file",
        "cut gz",
    ],
)
def test_invalid_arguments_are_reported_in_one_line(tmp_path, capsys, name):
    """On standard error, with exit code 2, and without a run directory."""
    arguments, words = unusable(name, tmp_path)
    assert main([*map(str, arguments)]) == 2
    said = capsys.readouterr()
    assert words in said.err
    assert said.out == ""
    assert not (tmp_path / "out").exists()


def test_a_run_imports_its_own_code(served_command_line, tmp_path, short_fasta, uninterrupted):
    """Even if the current directory has another `vnp_lib`, and files named like libraries."""
    elsewhere = replace(served_command_line, cwd=write_foreign_code(tmp_path))
    ended = elsewhere.run("--fasta", short_fasta, "--output-dir", "run", *SMALL_MODEL)
    assert ended.returncode == 0, ended.stderr
    assert_same_rows(tmp_path / "run", uninterrupted)


def test_a_late_duplicate_id_is_reported_in_one_line(served_command_line, tmp_path):
    """By the flow, which has started by then: no traceback, and no run directory."""
    (tmp_path / "in.fasta").write_text(PROTEIN + ">b\nMKV\n" + PROTEIN)
    ended = served_command_line.run(
        "--fasta", tmp_path / "in.fasta", "--output-dir", tmp_path / "out", *SMALL_MODEL
    )
    assert ended.returncode == 2, ended.stderr
    assert "'a'" in ended.stderr
    assert "Traceback" not in ended.stderr
    assert ended.stdout == ""
    assert not (tmp_path / "out").exists()
