"""Mutants of `vnp_lib/inference/`."""

from __future__ import annotations

from tests.mutants.mutant import Mutant

_EXECUTOR = "tests/unit/inference/test_executor.py"
_GPU_MEMORY = "tests/unit/inference/test_gpu_memory.py"
_INFERENCE = "tests/unit/inference/test_runner.py"
_RUNNER = "tests/integration/test_checkpoint_integration.py"

MUTANTS = (
    Mutant(
        name="unread-ids-counted-as-done",
        module="inference.runner",
        before=(
            "batch_idx=RESUMED\n                )\n"
            "        batches = without_done(numbered_batches(dataloader), resumed_ids)\n"
        ),
        after=(
            "batch_idx=RESUMED\n                )\n"
            "            resumed_ids = resumed_ids + _\n"
            "        batches = without_done(numbered_batches(dataloader), resumed_ids)\n"
        ),
        caught_by=(f"{_RUNNER}::test_resume_skips_corrupted_checkpoint",),
    ),
    Mutant(
        name="resumed-rows-computed-again-by-the-runner",
        module="inference.runner",
        before="        batches = without_done(numbered_batches(dataloader), resumed_ids)\n",
        after="        batches = numbered_batches(dataloader)\n",
        caught_by=(f"{_RUNNER}::test_five_resumes_write_every_row_once",),
    ),
    Mutant(
        name="ids-through-a-set",
        module="inference.runner",
        before="[sequence_id for batch in batches for sequence_id in batch.sequence_ids],\n",
        after="list({sequence_id for batch in batches for sequence_id in batch.sequence_ids}),\n",
        caught_by=(f"{_RUNNER}::test_runner_final_checkpoint_captures_remaining",),
    ),
    Mutant(
        name="last-batches-in-no-checkpoint",
        module="inference.runner",
        before="                unsaved.write(reason)\n",
        after="                pass\n",
        caught_by=(f"{_RUNNER}::test_runner_final_checkpoint_captures_remaining",),
    ),
    Mutant(
        name="rows-before-a-failure-lost",
        module="inference.runner",
        before="                unsaved.write(reason)\n",
        after='                if reason == "final":\n                    unsaved.write(reason)\n',
        caught_by=(f"{_RUNNER}::test_rows_before_a_failure_are_kept",),
    ),
    Mutant(
        name="batch-split-over-two-checkpoints",
        module="inference.runner",
        before="                unsaved.add(batch, rows)\n",
        after=(
            "                is_first = np.arange(batch.num_sequences) < batch.num_sequences // 2\n"
            "                unsaved.add(batch.select(is_first), rows[is_first])\n"
            '                unsaved.write("")\n'
            "                unsaved.add(batch.select(~is_first), rows[~is_first])\n"
        ),
        caught_by=(f"{_RUNNER}::test_runner_checkpoint_at_batch_boundary_only",),
    ),
    Mutant(
        name="rows-of-one-checkpoint-in-the-next-again",
        module="inference.runner",
        before="        self._next_checkpoint, self._batches, self._rows = number + 1, [], []\n",
        after="        self._next_checkpoint = number + 1\n",
        caught_by=(f"{_RUNNER}::test_runner_checkpoint_at_batch_boundary_only",),
    ),
    Mutant(
        name="checkpoint-announced-before-it-is-durable",
        module="inference.runner",
        before=(
            "        written.add_done_callback("
            "lambda future: self._announce(future, number, ordinals.size))\n"
        ),
        after=(
            "        if self._on_checkpoint is not None:\n"
            "            self._on_checkpoint(number, ordinals.size, 0.0)\n"
        ),
        caught_by=(f"{_INFERENCE}::test_only_a_durable_checkpoint_is_announced",),
    ),
    Mutant(
        name="failed-checkpoint-announced",
        module="inference.runner",
        before=(
            "        if not written.cancelled() and written.exception() is None:\n"
            "            self._on_checkpoint(number, num_rows, written.result())\n"
        ),
        after="        self._on_checkpoint(number, num_rows, 1.0)\n",
        caught_by=(f"{_INFERENCE}::test_only_a_durable_checkpoint_is_announced",),
    ),
    Mutant(
        name="rows-that-are-not-finite-accepted",
        module="inference.callbacks",
        before="        raise NumericalInstabilityError(\n",
        after="        NumericalInstabilityError(\n",
        caught_by=(f"{_RUNNER}::test_a_row_that_is_not_finite_is_named",),
    ),
    Mutant(
        name="stop-ignored-by-the-loop",
        module="inference.runner",
        before="                if callbacks.should_stop():\n",
        after="                if False:\n",
        caught_by=(f"{_INFERENCE}::test_a_stop_is_heeded_after_the_batch_and_its_rows_are_kept",),
    ),
    Mutant(
        name="budget-not-lowered-by-a-lack-of-memory",
        module="inference.token_budget",
        before="        self._set(max(1, num_tokens // 2))\n",
        after="        self._set(max(1, num_tokens - 1))\n",
        caught_by=(
            "tests/unit/plan/test_packing.py::"
            "test_a_token_budget_halves_and_grows_back_to_its_limit",
        ),
    ),
    Mutant(
        name="too-large-sequences-passed-over-in-silence",
        module="inference.runner",
        before="        _require_none_too_large(too_large)\n",
        after="",
        caught_by=(f"{_INFERENCE}::test_a_too_large_sequence_is_named_and_all_others_are_kept",),
    ),
    Mutant(
        name="masks-of-unlike-length-mixed-up",
        module="inference.executor",
        before="not_finite=_select_or_none(batch, _nested_mask(fits, ~is_finite)),",
        after="not_finite=_select_or_none(batch, ~_nested_mask(fits, is_finite)),",
        caught_by=(f"{_EXECUTOR}::test_too_large_and_non_finite_rows_in_one_batch",),
    ),
    Mutant(
        name="recomputed-row-in-another-place",
        module="inference.executor",
        before="            views[row].copy_(self._recompute(",
        after="            views[-1].copy_(self._recompute(",
        caught_by=(
            f"{_EXECUTOR}::test_the_row_of_a_more_exact_model_takes_its_place_and_no_others",
        ),
    ),
    Mutant(
        name="recomputed-row-taken-to-be-finite",
        module="inference.executor",
        before="            is_finite[row] = torch.isfinite(views[row]).all()\n",
        after="            is_finite[row] = True\n",
        caught_by=(f"{_EXECUTOR}::test_a_row_that_stays_non_finite_is_reported_apart",),
    ),
    Mutant(
        name="activations-reckoned-too-small",
        module="inference.gpu_memory",
        before="_WIDTHS_OF_A_LAYER = 10\n",
        after="_WIDTHS_OF_A_LAYER = 9\n",
        caught_by=(f"{_GPU_MEMORY}::test_a_forward_pass_holds_what_is_reckoned",),
    ),
    Mutant(
        name="harmless-sequence-accused-in-the-devices-place",
        module="inference.executor",
        before='{error}") from error.__cause__\n',
        after='{error}") from error\n',
        caught_by=(
            f"{_EXECUTOR}::test_a_device_that_fails_at_a_harmless_sequence_is_what_is_broken",
        ),
    ),
)
