"""The consequences of a failed attempt: manifest, job of the next attempt, quarantine."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.helpers import small_config
from vnp_lib.checkpoint.manifest import MAX_FAILURES_KEPT
from vnp_lib.checkpoint.quarantine import QuarantineLimit
from vnp_lib.failures import Failure, FailureCause
from vnp_lib.run.directory import open_run
from vnp_lib.run.run import Run
from vnp_lib.storage.locks import FileLock
from vnp_lib.worker.recovery import counted_failures, handle_failure
from vnp_lib.worker.retry import RetryDecision


@pytest.fixture
def run(tmp_path: Path, tiny_fasta: Path) -> Iterator[Run]:
    with open_run(small_config(tiny_fasta, tmp_path / "run", token_budget=200)) as run:
        run.manifest.start_attempt(0, device="cpu")
        yield run


def crash(batch_idx: int | None = None, ordinal: int | None = None, **fields: Any) -> Failure:
    cause = fields.pop("cause", FailureCause.NATIVE_CRASH)
    return Failure(cause=cause, message="SIGSEGV", batch_idx=batch_idx, ordinal=ordinal, **fields)


def fail_twice(run: Run, failure: Failure) -> RetryDecision:
    assert handle_failure(run, 0, failure, session="s").retry
    return handle_failure(run, 0, failure, session="s")


def test_after_one_strike_batches_run_one_at_a_time(run: Run) -> None:
    assert not run.shard_job(0, "cpu").is_careful
    handle_failure(run, 0, crash(batch_idx=1), session="s")
    assert run.shard_job(0, "cpu").is_careful
    assert run.shard_job(0, "cpu").suspects == ()


def test_a_batch_with_two_strikes_is_split(run: Run) -> None:
    decision = fail_twice(run, crash(batch_idx=1))
    assert decision.retry
    assert "batch 1 failed 2 times" in decision.reason
    assert "one by one" in decision.reason
    assert run.shard_job(0, "cpu").suspects == tuple(run.plan.shard_batches(0)[1].tolist())
    assert run.quarantine.read() == []


def test_a_sequence_with_two_strikes_is_quarantined(run: Run) -> None:
    """After one strike it is computed first."""
    fail_twice(run, crash(batch_idx=1))
    batch = run.plan.shard_batches(0)[1].tolist()
    culprit = batch[2]
    handle_failure(run, 0, crash(batch_idx=1, ordinal=culprit), session="s")
    assert run.shard_job(0, "cpu").suspects == (
        culprit,
        *(each for each in batch if each != culprit),
    )
    decision = handle_failure(run, 0, crash(batch_idx=1, ordinal=culprit), session="s")
    (held,) = run.quarantine.read()
    assert decision.retry
    assert (held.ordinal, held.id, held.cause) == (
        culprit,
        run.plan.ids([culprit])[0],
        "native_crash",
    )
    assert held.length == run.plan.lengths[culprit]
    assert repr(held.id) in decision.reason


@pytest.mark.parametrize("on_poison", ["quarantine", "fail"])
def test_silence_alone_never_quarantines_a_sequence(
    tmp_path: Path, tiny_fasta: Path, on_poison: Any
) -> None:
    """It is computed last, with a longer limit; then its shard fails, and the reason names it."""
    with open_run(small_config(tiny_fasta, tmp_path / "run", on_poison=on_poison)) as run:
        run.manifest.start_attempt(0, device="cpu")
        ordinal = int(run.plan.shard_batches(0)[0][0])
        silence = crash(batch_idx=0, ordinal=ordinal, cause=FailureCause.HANG)
        assert handle_failure(run, 0, silence, session="s").retry
        job = run.shard_job(0, "cpu")
        assert (job.deferred, job.suspects) == ((ordinal,), ())
        decision = handle_failure(run, 0, silence, session="s")
        assert not decision.retry
        assert run.quarantine.read() == []
        for part in (
            repr(run.plan.ids([ordinal])[0]),
            "residues",
            "--runtime.silence-limit-s",
            "--allow-partial",
        ):
            assert part in decision.reason
        assert run.manifest.get_shard_status(0)["error"] == decision.reason


def test_an_unwritable_manifest_changes_no_decision(
    run: Run, caplog: pytest.LogCaptureFixture
) -> None:
    """The policy decides from memory: a lock that is never released ends nothing."""
    with FileLock(run.paths.manifest.with_suffix(".lock"), purpose="hang").held(timeout_s=0):
        decision = fail_twice(run, crash(batch_idx=1))
        assert "batch 1 failed 2 times" in decision.reason
        assert run.shard_job(0, "cpu").suspects == tuple(run.plan.shard_batches(0)[1].tolist())


def test_strikes_at_several_sequences_do_not_add_up(run: Run) -> None:
    for ordinal in run.plan.shard_batches(0)[1].tolist():
        assert handle_failure(run, 0, crash(batch_idx=1, ordinal=ordinal), session="s").retry
    assert run.quarantine.read() == []


def test_a_strike_counts_for_the_content_of_a_batch(tmp_path: Path, tiny_fasta: Path) -> None:
    """With another token budget, batch 1 holds other sequences."""
    reasons = []
    for token_budget in (200, 90, 200):
        with open_run(small_config(tiny_fasta, tmp_path / "run", token_budget=token_budget)) as run:
            reasons.append(handle_failure(run, 0, crash(batch_idx=1), session="s").reason)
    assert [reason.split(" (")[0] for reason in reasons] == [
        "batch 1 failed 1 of 2 times",
        "batch 1 failed 1 of 2 times",
        "circuit breaker: batch 1 failed 2 times",
    ]


def test_with_on_poison_fail_nothing_is_quarantined(tmp_path: Path, tiny_fasta: Path) -> None:
    with open_run(small_config(tiny_fasta, tmp_path / "run", on_poison="fail")) as run:
        decision = fail_twice(run, crash(batch_idx=0))
        assert not decision.retry
        assert run.shard_job(0, "cpu").suspects == ()
        assert not run.shard_job(0, "cpu").quarantines
        assert "circuit breaker" in run.manifest.get_shard_status(0)["error"]


def test_a_full_quarantine_ends_the_shard(tmp_path: Path) -> None:
    count = QuarantineLimit.of(20).total + 1
    fasta = tmp_path / "many.fasta"
    fasta.write_text("".join(f">p{i}\nMKV{'A' * i}\n" for i in range(20)))
    with open_run(small_config(fasta, tmp_path / "run", shards=1)) as run:
        decisions = [
            fail_twice(run, crash(batch_idx=0, ordinal=ordinal)) for ordinal in range(count)
        ]
    assert [decision.retry for decision in decisions] == [True] * (count - 1) + [False]
    assert "broken set-up" in decisions[-1].reason


def test_preemptions_push_no_strike_out(run: Run) -> None:
    handle_failure(run, 0, crash(batch_idx=1), session="s")
    for _ in range(MAX_FAILURES_KEPT + 5):
        run.manifest.record_failure(
            0, crash(cause=FailureCause.PREEMPTED).to_json() | {"session": "s"}
        )
    assert len(run.manifest.failures(0)) == MAX_FAILURES_KEPT + 1
    assert (
        "batch 1 failed 2 times"
        in handle_failure(run, 0, crash(batch_idx=1), session="another").reason
    )


def test_a_host_out_of_memory_halves_the_next_budget(run: Run) -> None:
    for expected in (100, 50):
        handle_failure(run, 0, crash(cause=FailureCause.HOST_OOM), session="s")
        assert run.shard_job(0, "cpu").token_budget == expected
    # The budget belongs to the device, not to the shard.
    assert run.shard_job(1, "cpu").token_budget == 50


@pytest.mark.parametrize(
    ("cause", "record", "counts"),
    [
        (FailureCause.KILLED, {"session": "s", "num_done": 7}, True),
        # There has been a checkpoint since.
        (FailureCause.KILLED, {"session": "s", "num_done": 6}, False),
        (FailureCause.KILLED, {"session": "earlier", "num_done": 7}, False),
        (FailureCause.HOST_OOM, {"session": "earlier", "num_done": 7}, False),
        (FailureCause.PREEMPTED, {"session": "earlier", "num_done": 6}, True),
        (FailureCause.NATIVE_CRASH, {"session": "earlier", "num_done": 6}, True),
    ],
)
def test_which_failures_still_count(
    cause: FailureCause, record: dict[str, Any], counts: bool
) -> None:
    failure = crash(batch_idx=1, cause=cause)
    expected = [failure] if counts else []
    assert counted_failures([failure.to_json() | record], "s", num_done=7) == expected


def test_an_unwritable_quarantine_is_tried_again(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """The strike counts, so that the sequence is quarantined once the disk has room."""
    accused = crash(batch_idx=1, ordinal=int(run.plan.shard_batches(0)[1][0]))
    assert handle_failure(run, 0, accused, session="s").retry
    with monkeypatch.context() as patch:
        patch.setattr(run.quarantine, "_write", refuse)
        full = handle_failure(run, 0, accused, session="s")
    assert full.retry
    assert "No space left on device" in full.reason
    assert run.quarantine.read() == []
    assert handle_failure(run, 0, accused, session="s").retry
    assert [each.ordinal for each in run.quarantine.read()] == [accused.ordinal]


def refuse(*_: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
