"""Tests of `vnp status`: the records of a run are shown, whatever the directory's state."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import torch
from rich.console import Console

from tests.helpers import flip_bit
from vnp_lib.checkpoint.manifest import CheckpointManifest
from vnp_lib.checkpoint.quarantine import Quarantine, QuarantinedSequence
from vnp_lib.checkpoint.survey import survey_checkpoints
from vnp_lib.checkpoint.writer import AsyncCheckpointWriter
from vnp_lib.cli import main
from vnp_lib.failures import Failure, FailureCause
from vnp_lib.formatting import format_bytes
from vnp_lib.inputs.policy import InputPolicy
from vnp_lib.plan.paths import RunPaths
from vnp_lib.plan.plan import ModelIdentity, RunPlan
from vnp_lib.plan.planner import make_plan
from vnp_lib.report import status
from vnp_lib.report.status import (
    LastFailure,
    RunStatus,
    ShardPhase,
    load_plan_of,
    read_status,
    render_status,
)
from vnp_lib.run.assembly import assemble
from vnp_lib.run.history import AttemptHistory
from vnp_lib.storage.locks import FileLock

MODEL = ModelIdentity(model="m", weights_digest="w", layer=6, dtype="float32")
NOON = datetime(2026, 11, 21, 12, tzinfo=UTC)


@pytest.fixture
def paths(tmp_path: Path) -> RunPaths:
    return RunPaths(tmp_path / "run")


@pytest.fixture
def plan(paths: RunPaths, tiny_fasta: Path) -> RunPlan:
    plan = make_plan(paths, [tiny_fasta], MODEL, num_shards=2, token_budget=200)
    CheckpointManifest(paths.manifest).initialize(2, plan.fingerprint, "w")
    for rank in range(2):
        paths.shard_dir(rank).mkdir(parents=True)
    return plan


def attempt_of(paths: RunPaths, rank: int, *, seconds_per_reading: float = 2.0) -> AttemptHistory:
    readings = iter(seconds_per_reading * number for number in range(100))
    CheckpointManifest(paths.manifest).start_attempt(rank, device="cpu")
    attempt = AttemptHistory(paths, rank, clock=lambda: NOON, monotonic=lambda: next(readings))
    attempt.started(device="cpu", pending=20)
    return attempt


def compute(
    plan: RunPlan, paths: RunPaths, rank: int, start: int, stop: int, *, attempt: AttemptHistory
) -> None:
    ordinals = plan.shard_ordinals(rank)[start:stop]
    with AsyncCheckpointWriter(manifest=CheckpointManifest(paths.manifest), rank=rank) as writer:
        path = paths.checkpoint(rank, start)
        metadata = {"ordinals": ordinals.tolist(), "fingerprint": plan.fingerprint}
        writer.write_checkpoint_async(
            path, torch.ones(ordinals.size, 4), plan.ids(ordinals), metadata
        )
    attempt.checkpoint(plan, start, ordinals.size)


def fail(paths: RunPaths, rank: int, message: str) -> None:
    about = {"at": NOON.isoformat(), "reason": "transient: attempt 1/3 (SIGKILL)", "session": "s"}
    failure = Failure(cause=FailureCause.KILLED, message=message).to_json() | about
    CheckpointManifest(paths.manifest).record_failure(rank, failure)


def status_of(plan: RunPlan, paths: RunPaths) -> RunStatus:
    return read_status(plan, paths, clock=lambda: NOON + timedelta(minutes=3))


def drawn(seen: RunStatus, width: int = 140) -> str:
    out = io.StringIO()
    Console(file=out, width=width, markup=False, highlight=False).print(render_status(seen))
    return out.getvalue()


def test_a_shard_that_is_running(plan: RunPlan, paths: RunPaths) -> None:
    """Speed is the newest checkpoint's; tokens are left as the longest sequences come first."""
    attempt = attempt_of(paths, 0)
    compute(plan, paths, 0, 0, 5, attempt=attempt)
    compute(plan, paths, 0, 5, 12, attempt=attempt)
    ordinals = plan.shard_ordinals(0)
    with (
        FileLock(paths.run_lock, purpose="run on this directory").held(timeout_s=0),
        FileLock(paths.shard_lock(0), purpose="embed shard 0").held(timeout_s=0),
    ):
        seen = status_of(plan, paths)
    rate = plan.num_tokens(ordinals[5:12]) / 2.0
    shard, other = seen.shards
    assert (shard.state, shard.attempts, shard.num_done, shard.num_sequences) == (
        ShardPhase.RUNNING,
        1,
        12,
        20,
    )
    assert (shard.percent, shard.tokens_per_s, shard.tokens_left) == (
        60.0,
        rate,
        plan.num_tokens(ordinals[12:]),
    )
    assert (other.state, other.num_done, other.tokens_per_s) == (ShardPhase.WAITING, 0, None)
    left = plan.num_tokens(ordinals[12:]) + plan.num_tokens(plan.shard_ordinals(1))
    assert (seen.num_done, seen.tokens_left, seen.tokens_per_s, seen.eta_s) == (
        12,
        left,
        rate,
        left / rate,
    )
    assert seen.running is not None
    assert seen.running.pid == os.getpid()
    assert seen.notes == ()


def test_the_time_left_is_not_less_than_the_slowest_shards(plan: RunPlan, paths: RunPaths) -> None:
    for rank, pace in ((0, 1.0), (1, 100.0)):
        attempt = attempt_of(paths, rank, seconds_per_reading=pace)
        compute(plan, paths, rank, 0, 5, attempt=attempt)
    with (
        FileLock(paths.run_lock, purpose="run").held(timeout_s=0),
        FileLock(paths.shard_lock(0), purpose="embed").held(timeout_s=0),
        FileLock(paths.shard_lock(1), purpose="embed").held(timeout_s=0),
    ):
        seen = status_of(plan, paths)
    slow = seen.shards[1]
    assert slow.tokens_per_s is not None
    assert seen.eta_s == slow.tokens_left / slow.tokens_per_s


def test_a_stopped_run_has_no_time_left(plan: RunPlan, paths: RunPaths) -> None:
    compute(plan, paths, 0, 0, 5, attempt=attempt_of(paths, 0))
    CheckpointManifest(paths.manifest).mark_shard_failed(1, "it is over")
    seen = status_of(plan, paths)
    assert [shard.state for shard in seen.shards] == [ShardPhase.STOPPED, ShardPhase.FAILED]
    assert (seen.running, seen.eta_s) == (None, None)
    assert "not running" in drawn(seen)


def test_a_run_that_is_complete(plan: RunPlan, paths: RunPaths) -> None:
    for rank in range(2):
        compute(plan, paths, rank, 0, 20, attempt=attempt_of(paths, rank))
        CheckpointManifest(paths.manifest).mark_shard_complete(rank)
    assert status_of(plan, paths).dataset == "not assembled yet"
    assemble(
        plan,
        paths,
        survey_checkpoints(paths.checkpoints_dir, plan.fingerprint, verify_digests=True).valid,
    )
    seen = status_of(plan, paths)
    assert [shard.state for shard in seen.shards] == [ShardPhase.COMPLETE] * 2
    assert seen.software == "unknown"
    assert "computed by: unknown" in drawn(seen)
    assert (seen.num_done, seen.percent, seen.tokens_left, seen.dataset) == (
        40,
        100.0,
        0,
        "complete: 40 sequences embedded",
    )
    (paths.embeddings_dir / "part-00000.parquet").unlink()
    assert status_of(plan, paths).dataset.startswith("damaged (")


def test_the_last_failure_and_the_quarantine_are_shown(plan: RunPlan, paths: RunPaths) -> None:
    fail(paths, 1, "an older one")
    fail(paths, 1, "worker process killed by SIGKILL")
    sequence = QuarantinedSequence(
        ordinal=3,
        id="p",
        length=9,
        kind="poison_input",
        cause="native_crash",
        message="m",
        attempts=2,
        at="2026",
        fingerprint=plan.fingerprint,
        sequence_sha256="",
    )
    Quarantine.of(plan, paths).add(sequence)
    seen = status_of(plan, paths)
    failure = seen.shards[1].failure
    assert failure is not None
    assert (failure.kind, failure.cause, failure.message, failure.at) == (
        "transient",
        "killed",
        "worker process killed by SIGKILL",
        NOON,
    )
    assert seen.num_quarantined == 1
    for rank in range(2):
        CheckpointManifest(paths.manifest).mark_shard_complete(rank)
    complete = status_of(plan, paths)
    assert (complete.num_done, complete.tokens_left, complete.num_quarantined) == (39, 0, 1)
    assert "transient, 0:03:00 ago: attempt 1/3 (SIGKILL)" in drawn(seen)
    assert "in quarantine: 1\n" in drawn(seen)


def test_changes_to_the_input_are_shown(paths: RunPaths, tmp_path: Path, capsys) -> None:
    fasta = tmp_path / "in.fasta"
    fasta.write_text(">a\nMKV\n>b\nMK1\n>c\nMKVJL\n>d\nMKV\n")
    policy = InputPolicy(invalid_residues="skip", long="truncate", max_length=4)
    plan = make_plan(paths, [fasta], MODEL, num_shards=1, token_budget=200, policy=policy)
    line = (
        "input: 1 record skipped, 1 sequence cut short, 1 residue read as unknown, "
        f"1 duplicate not computed again; skipped records are listed in {paths.skipped}\n"
    )
    assert line in drawn(status_of(plan, paths), width=300)
    assert main(["status", str(paths.run_dir), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["input"] == plan.counts.to_json()


def test_unchanged_input_has_no_line(plan: RunPlan, paths: RunPaths) -> None:
    assert "input:" not in drawn(status_of(plan, paths))


def test_other_shards_before_are_a_note(plan: RunPlan, paths: RunPaths) -> None:
    """Checkpoints count for the shard that wrote them; the total is still right."""
    manifest = CheckpointManifest(paths.manifest)
    manifest.update_shard_checkpoint(0, 0, 30, "batch_00000.pt")
    seen = status_of(plan, paths)
    assert (seen.num_done, seen.shards[0].num_done) == (30, 20)
    assert "divided into other shards before" in seen.notes[0]


@pytest.mark.parametrize("damage", ["missing", "torn"])
def test_a_manifest_that_cannot_be_read_is_a_note(
    plan: RunPlan, paths: RunPaths, damage: str
) -> None:
    paths.manifest.unlink() if damage == "missing" else paths.manifest.write_bytes(b"{")
    seen = status_of(plan, paths)
    assert (seen.num_done, len(seen.notes)) == (0, 1)
    assert "no checkpoints are known" in drawn(seen)


def test_a_damaged_quarantine_is_a_note(plan: RunPlan, paths: RunPaths) -> None:
    paths.quarantine.write_text("{}\n")
    seen = status_of(plan, paths)
    assert seen.num_quarantined is None
    assert "is damaged in line 1" in seen.notes[0]


def test_hostile_text_is_shown_as_text(plan: RunPlan, paths: RunPaths) -> None:
    """It neither moves the cursor nor styles the table."""
    manifest = CheckpointManifest(paths.manifest)
    hostile = "\x1b[2J\x07[bold]x[/bold]\nnext :smile:"
    record = Failure(cause=FailureCause.BUG, message=hostile).to_json()
    manifest.record_failure(0, record | {"at": NOON.isoformat(), "reason": hostile})
    text = drawn(status_of(plan, paths))
    assert "\x1b" not in text
    assert "\x07" not in text
    assert "[bold]x[/bold]\ufffdnext :smile:" in text


def test_the_most_interesting_shards_are_shown(paths: RunPaths, tmp_path: Path) -> None:
    fasta = tmp_path / "in.fasta"
    fasta.write_text("".join(f">p{number}\n{'MK' * (number + 1)}\n" for number in range(200)))
    plan = make_plan(paths, [fasta], MODEL, num_shards=200, token_budget=500)
    manifest = CheckpointManifest(paths.manifest)
    manifest.initialize(200, plan.fingerprint, "w")
    manifest.mark_shard_failed(150, "it is over")
    lines = drawn(status_of(plan, paths)).splitlines()
    assert len(lines) < 50
    assert sum(line.startswith("  150  failed") for line in lines) == 1
    assert sum("160 stopped" in line for line in lines) == 1


@pytest.mark.parametrize("width", [10_000, 140, 100, 80, 60, 40, 30, 20])
def test_numbers_are_never_cut(plan: RunPlan, paths: RunPaths, width: int) -> None:
    """There is a table if the terminal is wide enough, else a paragraph per shard."""
    shard = replace(
        status_of(plan, paths).shards[0],
        num_sequences=12_345_678,
        num_done=12_345_678,
        tokens_per_s=1_234_567.0,
        device="GPU-5ab2-1",
        failure=LastFailure(
            kind="oom",
            cause="device_memory",
            message="out of memory",
            reason="tried again",
            at=NOON,
        ),
    )
    seen = replace(
        status_of(plan, paths), shards=(shard, replace(shard, rank=1, num_done=0)), at=NOON
    )
    lines = drawn(seen, width).splitlines()
    words = " ".join(lines).split()
    assert max(map(len, lines)) <= width
    assert "\u2026" not in "".join(words)
    assert sum("12,345,678" in word for word in words) >= 3
    assert sum("1,234,567" in word for word in words) == 2
    assert any("100.0" in word for word in words)


def test_the_command_prints_text_or_json(plan: RunPlan, paths: RunPaths, capsys) -> None:
    fail(paths, 1, "worker process killed by SIGKILL")
    compute(plan, paths, 0, 0, 5, attempt=attempt_of(paths, 0))
    assert main(["status", str(paths.run_dir)]) == 0
    assert "5 of 40 distinct sequences (12.5 %)" in capsys.readouterr().out
    assert main(["status", str(paths.run_dir), "--json"]) == 0
    fields = json.loads(capsys.readouterr().out)
    first, second = fields["shards"]
    assert (fields["num_done"], first["num_done"], first["percent"]) == (5, 5, 25.0)
    assert second["failure"]["at"] == "2026-11-21T12:00:00+00:00"
    assert fields["eta_s"] is None


def test_watching_redraws_until_ctrl_c(plan: RunPlan, paths: RunPaths, capsys, monkeypatch) -> None:
    naps = []

    def sleep(seconds: float) -> None:
        naps.append(seconds)
        compute(plan, paths, 0, len(naps), len(naps) + 1, attempt=attempt_of(paths, 0))
        if len(naps) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(status.time, "sleep", sleep)
    assert main(["status", str(paths.run_dir), "--watch", "7"]) == 0
    assert naps == [7.0, 7.0, 7.0]
    assert "2 of 40 distinct sequences" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments", [("--watch", "--json"), ("--watch", "0"), ("--watch", "soon")]
)
def test_invalid_flags_are_refused(plan: RunPlan, paths: RunPaths, capsys, arguments) -> None:
    try:
        code = main(["status", str(paths.run_dir), *arguments])
    except SystemExit as error:
        # Argparse exits by itself.
        code = error.code
    assert code == 2
    assert "--watch" in capsys.readouterr().err


def test_a_path_without_a_run_is_refused_in_one_line(
    plan: RunPlan, paths: RunPaths, tmp_path, capsys
) -> None:
    assert main(["status", str(tmp_path)]) == 2
    assert capsys.readouterr().err == f"{tmp_path} is not a run directory: it has no plan/\n"
    paths.plan_json.write_text("{}")
    assert main(["status", str(paths.run_dir)]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


@pytest.mark.parametrize("damage", ["cut", "garbage"])
def test_a_damaged_plan_is_refused_in_one_line(
    plan: RunPlan, paths: RunPaths, capsys, damage: str
) -> None:
    size = paths.sequences.stat().st_size
    paths.sequences.write_bytes(bytes(size - 1 if damage == "cut" else size))
    assert main(["status", str(paths.run_dir)]) == 2
    assert "the plan in" in capsys.readouterr().err


def test_the_digests_of_the_plan_are_not_verified(plan: RunPlan, paths: RunPaths) -> None:
    """`vnp verify` finds a flipped bit in a sequence; nothing here depends on it."""
    sequence = plan.fetch(plan.order[:1])[1][0].encode()
    flip_bit(paths.sequences, 8 * paths.sequences.read_bytes().index(sequence))
    assert load_plan_of(paths.run_dir).num_sequences == 40


def test_it_needs_neither_torch_nor_prefect(plan: RunPlan, paths: RunPaths) -> None:
    code = (
        "import sys; from vnp_lib.cli import main; main(['status', sys.argv[1]]);"
        "sys.exit(bool({'torch', 'prefect'} & set(sys.modules)))"
    )
    subprocess.run(
        [sys.executable, "-c", code, str(paths.run_dir)],
        check=True,
        timeout=60,
        stdout=subprocess.DEVNULL,
    )


@pytest.mark.parametrize(
    ("size_bytes", "text"),
    [
        (0, "0 bytes"),
        (999, "999 bytes"),
        (1000, "1.0 kB"),
        (99_949, "99.9 kB"),
        (123_456, "123 kB"),
        (999_600, "1.0 MB"),
        (3_725_000_000, "3.7 GB"),
        (5e12, "5.0 TB"),
        (5e15, "5,000 TB"),
    ],
)
def test_bytes_have_their_usual_units(size_bytes: float, text: str) -> None:
    assert format_bytes(size_bytes) == text
