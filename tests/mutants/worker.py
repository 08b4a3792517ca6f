"""Mutants of `vnp_lib/worker/`."""

from __future__ import annotations

from tests.mutants.mutant import Mutant

_JUDGEMENT = "tests/unit/worker/test_recovery.py"
_SUPERVISOR = "tests/integration/test_supervisor.py"
_WORKER = "tests/unit/worker/test_attempt.py"

MUTANTS = (
    Mutant(
        name="shard-not-locked",
        module="worker.attempt",
        before="        self._wait_for_lock()\n",
        after="",
        caught_by=(f"{_WORKER}::test_an_attempt_waits_while_another_has_the_shard",),
    ),
    Mutant(
        name="another-runs-plan-followed",
        module="worker.attempt",
        before="        if plan.fingerprint != self._job.fingerprint:\n",
        after="        if False:\n",
        caught_by=(f"{_WORKER}::test_a_job_of_another_run_than_the_plan_is_refused",),
    ),
    Mutant(
        name="sigterm-ignored-by-the-worker",
        module="worker.attempt",
        before="            os._exit(ExitCode.STOPPED)\n        self._is_set = True\n",
        after="            os._exit(ExitCode.STOPPED)\n",
        caught_by=(
            f"{_WORKER}::test_sigterms_are_one_request_for_eight_seconds_and_then_they_hurry",
        ),
    ),
    Mutant(
        name="late-sigterm-ignored-by-the-worker",
        module="worker.attempt",
        before="        if self._requests.on_signal() == Request.HURRY:\n",
        after="        if False:\n",
        caught_by=(
            f"{_WORKER}::test_sigterms_are_one_request_for_eight_seconds_and_then_they_hurry",
        ),
    ),
    Mutant(
        name="sigterm-of-the-parent-taken-for-a-second-one",
        module="worker.attempt",
        before="        if _has_word_from_parent():  # which",
        after="        if False:  # which",
        caught_by=(f"{_WORKER}::test_a_late_sigterm_of_the_parent_does_not_hurry",),
    ),
    Mutant(
        name="clock-that-stood-still-taken-for-silence",
        module="worker.liveness",
        before="self._look_every_s if self.was_late else step_s",
        after="step_s",
        caught_by=(
            "tests/unit/worker/test_liveness.py::test_a_clock_that_stood_still_is_not_silence",
        ),
    ),
    Mutant(
        name="silence-sets-aside",
        module="worker.recovery",
        before="decision.is_circuit_open and failure.is_silence and",
        after="False and",
        caught_by=(f"{_JUDGEMENT}::test_silence_alone_never_sets_a_sequence_aside",),
    ),
    Mutant(
        name="no-sign-of-life-from-a-layer",
        module="worker.attempt",
        before="            self._events.send(LayerStarted())\n",
        after="            pass\n",
        caught_by=(
            f"{_WORKER}::test_a_pass_gives_signs_of_life_at_its_layers_once_a_second_at_most",
        ),
    ),
    Mutant(
        name="repeated-sigterm-taken-for-haste",
        module="worker.stop_signals",
        before="now_s - self._asked_at_s >= HURRY_AFTER_S",
        after="True",
        caught_by=(
            f"{_WORKER}::test_sigterms_are_one_request_for_eight_seconds_and_then_they_hurry",
        ),
    ),
    Mutant(
        name="rows-that-are-not-finite-set-aside-at-once",
        module="worker.attempt",
        before="                if result.sequence_ids:\n                    callbacks.set_aside()\n",
        after="                callbacks.set_aside()\n",
        caught_by=(
            f"{_WORKER}::test_a_device_that_gives_no_finite_row_any_more_ends_the_attempt_and_blames_no_protein",
        ),
    ),
    Mutant(
        name="strikes-counted-by-the-number-of-a-batch",
        module="worker.retry",
        before='return "batch", failure.batch_sha256 or failure.batch_idx',
        after='return "batch", failure.batch_idx',
        caught_by=(
            f"{_JUDGEMENT}::test_a_strike_counts_for_the_sequences_of_a_batch_and_not_for_its_number",
        ),
    ),
    Mutant(
        name="strikes-at-several-sequences-added-up",
        module="worker.retry",
        before='        return "sequence", failure.ordinal, failure.is_silence\n',
        after='        return "sequence", 0\n',
        caught_by=(f"{_JUDGEMENT}::test_strikes_at_several_sequences_do_not_add_up",),
    ),
    Mutant(
        name="progress-forgets-nothing",
        module="worker.recovery",
        before=' and record.get("num_done", num_done) == num_done)',
        after=")",
        caught_by=(f"{_JUDGEMENT}::test_which_failures_still_count",),
    ),
    Mutant(
        name="worker-by-its-name",
        module="worker.supervisor",
        before='"-P", str(Path(__file__).with_name("__main__.py").absolute())',
        after='"-m", "vnp_lib.worker"',
        caught_by=(f"{_SUPERVISOR}::test_a_child_imports_nothing_from_the_current_directory",),
    ),
)
