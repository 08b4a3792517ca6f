"""Mutants of `vnp_lib/worker/`."""

from __future__ import annotations

from tests.mutants.mutant import Mutant

_RECOVERY = "tests/unit/worker/test_recovery.py"
_SUPERVISOR = "tests/integration/test_supervisor.py"
_ATTEMPT = "tests/unit/worker/test_attempt.py"

MUTANTS = (
    Mutant(
        name="shard-not-locked",
        module="worker.attempt",
        before="        self._wait_for_lock()\n",
        after="",
        caught_by=(f"{_ATTEMPT}::test_an_attempt_waits_for_the_lock_of_its_shard",),
    ),
    Mutant(
        name="plan-of-another-run-accepted",
        module="worker.attempt",
        before="        if plan.fingerprint != self._job.fingerprint:\n",
        after="        if False:\n",
        caught_by=(f"{_ATTEMPT}::test_a_job_of_another_run_is_refused",),
    ),
    Mutant(
        name="sigterm-ignored-by-the-worker",
        module="worker.attempt",
        before="            os._exit(ExitCode.STOPPED)\n        self._is_set = True\n",
        after="            os._exit(ExitCode.STOPPED)\n",
        caught_by=(f"{_ATTEMPT}::test_a_sigterm_after_eight_seconds_exits_at_once",),
    ),
    Mutant(
        name="late-sigterm-ignored-by-the-worker",
        module="worker.attempt",
        before="        if self._requests.on_signal() == Request.EXIT_NOW:\n",
        after="        if False:\n",
        caught_by=(f"{_ATTEMPT}::test_a_sigterm_after_eight_seconds_exits_at_once",),
    ),
    Mutant(
        name="sigterm-of-the-parent-counted-as-second",
        module="worker.attempt",
        before="        if _has_stop_request():\n",
        after="        if False:\n",
        caught_by=(f"{_ATTEMPT}::test_a_late_sigterm_of_the_parent_is_not_urgent",),
    ),
    Mutant(
        name="suspended-clock-counted-as-silence",
        module="worker.liveness",
        before="self._poll_s if self.was_late else step_s",
        after="step_s",
        caught_by=("tests/unit/worker/test_liveness.py::test_a_suspended_clock_is_not_silence",),
    ),
    Mutant(
        name="silence-quarantines",
        module="worker.recovery",
        before="decision.is_circuit_open and failure.is_silence and",
        after="False and",
        caught_by=(f"{_RECOVERY}::test_silence_alone_never_quarantines_a_sequence",),
    ),
    Mutant(
        name="layers-are-no-sign-of-life",
        module="worker.attempt",
        before="            self._events.send(LayerStarted())\n",
        after="            pass\n",
        caught_by=(f"{_ATTEMPT}::test_layers_are_signs_of_life_once_per_second",),
    ),
    Mutant(
        name="repeated-sigterm-exits-at-once",
        module="worker.stop_signals",
        before="now_s - self._requested_at_s >= EXIT_NOW_AFTER_S",
        after="True",
        caught_by=(f"{_ATTEMPT}::test_a_sigterm_after_eight_seconds_exits_at_once",),
    ),
    Mutant(
        name="non-finite-rows-quarantined-at-once",
        module="worker.attempt",
        before="if result.sequence_ids:\n callbacks.quarantine_non_finite()\n",
        after="callbacks.quarantine_non_finite()\n",
        caught_by=(f"{_ATTEMPT}::test_nothing_but_nan_from_a_device_ends_the_attempt",),
    ),
    Mutant(
        name="strikes-counted-by-batch-number",
        module="worker.retry",
        before='return "batch", failure.batch_sha256 or failure.batch_idx',
        after='return "batch", failure.batch_idx',
        caught_by=(f"{_RECOVERY}::test_a_strike_counts_for_the_content_of_a_batch",),
    ),
    Mutant(
        name="strikes-at-several-sequences-added-up",
        module="worker.retry",
        before='        return "sequence", failure.ordinal, failure.is_silence\n',
        after='        return "sequence", 0\n',
        caught_by=(f"{_RECOVERY}::test_strikes_at_several_sequences_do_not_add_up",),
    ),
    Mutant(
        name="failures-count-after-progress",
        module="worker.recovery",
        before=' and record.get("num_done", num_done) == num_done)',
        after=")",
        caught_by=(f"{_RECOVERY}::test_which_failures_still_count",),
    ),
    Mutant(
        name="worker-started-by-module-name",
        module="worker.supervisor",
        before='"-P", str(main)',
        after='"-m", "vnp_lib.worker"',
        caught_by=(f"{_SUPERVISOR}::test_a_worker_imports_nothing_from_the_current_directory",),
    ),
)
