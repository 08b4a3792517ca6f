"""Mutants of `vnp_lib/run/`."""

from __future__ import annotations

from tests.mutants.mutant import Mutant

_ASSEMBLY_TESTS = "tests/unit/run/test_assembly.py"
_LAYOUTS = "tests/unit/run/test_layouts.py"
_RUN = "tests/unit/run/test_run.py"
_WORKER = "tests/unit/worker/test_attempt.py"

MUTANTS = (
    Mutant(
        name="change-written-twice-in-the-manifest",
        module="run.record",
        before="            if change.number > num_applied:\n",
        after="            if True:\n",
        caught_by=(
            "tests/unit/run/test_record.py::test_a_written_change_reported_as_failed_counts_once",
        ),
    ),
    Mutant(
        name="run-directory-not-locked",
        module="run.directory",
        before="        _take(lock)\n",
        after="        lock.release = lambda: None\n",
        caught_by=(f"{_RUN}::test_a_second_run_is_refused_with_the_holder",),
    ),
    Mutant(
        name="resumed-rows-computed-again-by-the-worker",
        module="run.resume",
        before="batch[~coverage.is_done[batch]]",
        after="batch",
        caught_by=(f"{_WORKER}::test_rows_in_checkpoints_of_any_shard_are_not_pending",),
    ),
    Mutant(
        name="resumed-by-the-number-of-checkpoints",
        module="run.resume",
        before="        batches=_ordered(left, plan.num_sequences, suspects, deferred),\n",
        after="        batches=list(enumerate(plan.shard_batches(rank)))[next_checkpoint:],\n",
        caught_by=(f"{_WORKER}::test_rows_in_checkpoints_of_any_shard_are_not_pending",),
    ),
    Mutant(
        name="rows-placed-by-arrival",
        module="run.buckets",
        before="            for block in self._blocks(np.argsort(ascending)):\n",
        after="            for block in self._blocks(np.arange(ordinals.size)):\n",
        caught_by=(
            f"{_ASSEMBLY_TESTS}::test_every_row_is_that_of_its_own_sequence_in_input_order",
        ),
    ),
    Mutant(
        name="rows-of-different-widths-placed-by-arrival",
        module="run.buckets",
        before="            for place in np.argsort(ascending).tolist():\n",
        after="            for place in range(ordinals.size):\n",
        caught_by=(f"{_LAYOUTS}::test_every_array_is_found_under_its_id_its_place_and_its_name",),
    ),
    Mutant(
        name="widths-of-rows-not-compared-with-the-plan",
        module="run.validation",
        before=(
            '    if not layout.is_fixed and checkpoint.metadata.get("offsets") != '
            "offsets.tolist():\n"
        ),
        after="    if False:\n",
        caught_by=(f"{_LAYOUTS}::test_rows_of_other_widths_than_the_sequences_are_damage",),
    ),
    Mutant(
        name="copies-not-fanned-out",
        module="run.assembly",
        before="ordinals, sources = copies.fan_out(record.ordinals[rows])",
        after="ordinals, sources = record.ordinals[rows], np.arange(rows.size)",
        caught_by=(
            f"{_ASSEMBLY_TESTS}::test_every_row_is_that_of_its_own_sequence_in_input_order",
        ),
    ),
    Mutant(
        name="copies-given-anothers-row",
        module="run.buckets",
        before="return targets[ascending], sources[ascending]",
        after="return targets[ascending], sources",
        caught_by=(
            f"{_ASSEMBLY_TESTS}::test_every_row_is_that_of_its_own_sequence_in_input_order",
        ),
    ),
    Mutant(
        name="ordinal-of-two-checkpoints-taken-twice",
        module="run.assembly",
        before="rows = np.flatnonzero(~is_placed[record.ordinals])",
        after="rows = np.arange(record.ordinals.size)",
        caught_by=(f"{_ASSEMBLY_TESTS}::test_the_first_checkpoint_of_an_ordinal_counts",),
    ),
    Mutant(
        name="missing-ordinals-accepted",
        module="run.assembly",
        before="    is_missing = coverage.is_missing\n",
        after="    is_missing = np.zeros_like(coverage.is_missing)\n",
        caught_by=(f"{_ASSEMBLY_TESTS}::test_missing_sequences_are_counted_and_ten_are_named",),
    ),
    Mutant(
        name="ordinals-of-a-part-not-counted",
        module="run.assembly",
        before="    if not np.array_equal(ordinals, expected):\n",
        after="    if False:\n",
        caught_by=(f"{_ASSEMBLY_TESTS}::test_an_ordinal_twice_instead_of_another_is_refused",),
    ),
    Mutant(
        name="ids-of-a-checkpoint-not-compared-with-the-plan",
        module="run.validation",
        before="    if checkpoint.sequence_ids != plan.ids(record.ordinals):\n",
        after="    if False:\n",
        caught_by=(
            f"{_ASSEMBLY_TESTS}::test_a_checkpoint_that_gives_rows_other_ids_makes_no_dataset",
        ),
    ),
    Mutant(
        name="quarantined-and-computed-accepted",
        module="run.assembly",
        before=(
            '    _refuse_ordinals(plan, is_in_both, "are in quarantine and yet in a checkpoint")\n'
        ),
        after="",
        caught_by=(
            f"{_ASSEMBLY_TESTS}::test_a_sequence_both_computed_and_in_quarantine_is_refused",
        ),
    ),
    Mutant(
        name="rows-that-are-not-finite-assembled",
        module="run.assembly",
        before="    _require_finite(plan, division.layout, ordinals, rows)\n",
        after="",
        caught_by=(f"{_ASSEMBLY_TESTS}::test_a_row_that_is_not_finite_is_named",),
    ),
    Mutant(
        name="dataset-removed-before-the-new-one-is-written",
        module="run.assembly",
        before="                require_own_parts(paths)\n",
        after=(
            "                require_own_parts(paths)\n"
            "                shutil.rmtree(paths.embeddings_dir, ignore_errors=True)\n"
        ),
        caught_by=(
            f"{_ASSEMBLY_TESTS}::test_what_float16_cannot_hold_leaves_the_old_dataset_as_it_was",
        ),
    ),
    Mutant(
        name="dataset-without-checkpoints-not-looked-at",
        module="run.run",
        before=(
            "        if self.checkpoints().valid:\n"
            "            return None\n"
            "        return find_complete_dataset("
        ),
        after="        return None\n        return find_complete_dataset(",
        caught_by=(
            "tests/unit/test_api.py::"
            "test_a_whole_dataset_is_enough_where_its_checkpoints_are_deleted",
        ),
    ),
    Mutant(
        name="everything-moved-aside",
        module="run.ownership",
        before="    own = _own_entries(paths)\n",
        after="    own = sorted({*paths.run_dir.iterdir()} - {paths.run_lock})\n",
        caught_by=(
            "tests/unit/run/test_ownership.py::"
            "test_a_forced_restart_moves_what_is_a_runs_and_nothing_else",
        ),
    ),
    Mutant(
        name="superseded-numbered-by-count",
        module="run.ownership",
        before="{max(earlier, default=0) + 1}",
        after="{len(earlier) + 1}",
        caught_by=(
            "tests/unit/run/test_ownership.py::test_a_forced_restart_counts_from_the_highest",
        ),
    ),
    Mutant(
        name="parts-of-others-not-looked-for",
        module="run.assembly",
        before="                require_own_parts(paths)\n",
        after="",
        caught_by=(f"{_ASSEMBLY_TESTS}::test_a_foreign_parquet_file_is_refused_and_kept",),
    ),
    Mutant(
        name="replaced-dataset-forgotten",
        module="run.assembly",
        before="            _remove_replaced(paths)\n    shutil",
        after="            pass\n    shutil",
        caught_by=(f"{_ASSEMBLY_TESTS}::test_a_kill_leaves_the_old_or_the_new_dataset_intact",),
    ),
    Mutant(
        name="bucket-not-compared-with-what-was-written",
        module="run.buckets",
        before=" or self._read(path, rows, ordinals, ascending) != self._crc32[part]",
        after=" or not self._read(path, rows, ordinals, ascending)",
        caught_by=(
            f"{_ASSEMBLY_TESTS}::test_a_bucket_that_does_not_give_back_its_bytes_is_noticed",
        ),
    ),
    Mutant(
        name="dataset-of-a-dead-writer-not-synced",
        module="run.assembly",
        before=(
            "        make_directory(paths.embeddings_dir)\n"
            "        fsync_directory(paths.embeddings_dir)\n"
            "    except OSError"
        ),
        after="        make_directory(paths.embeddings_dir)\n    except OSError",
        caught_by=(f"{_ASSEMBLY_TESTS}::test_an_existing_dataset_is_synced_before_it_is_accepted",),
    ),
    Mutant(
        name="missing-rows-not-distinguished",
        module="run.assembly",
        before='"missing_sha256": _ordinals_sha256(is_missing),',
        after='"missing_sha256": _ordinals_sha256(np.zeros_like(is_missing)),',
        caught_by=(
            f"{_ASSEMBLY_TESTS}::test_a_partial_dataset_stays_until_other_rows_are_missing",
        ),
    ),
    Mutant(
        name="partial-dataset-taken-for-complete",
        module="run.assembly",
        before="        is_same = content.items() <= read_success(paths.embeddings_dir).items()\n",
        after=(
            '        is_same = content["fingerprint"] == '
            'read_success(paths.embeddings_dir)["fingerprint"]\n'
        ),
        caught_by=(f"{_ASSEMBLY_TESTS}::test_a_complete_run_replaces_a_partial_dataset",),
    ),
    Mutant(
        name="complete-dataset-replaced-by-a-partial-one",
        module="run.assembly",
        before="if not _is_complete(plan, paths, is_quarantined):",
        after="if True:",
        caught_by=(
            f"{_ASSEMBLY_TESTS}::test_a_partial_dataset_never_takes_the_place_of_a_complete_one",
        ),
    ),
    Mutant(
        name="batches-by-the-memory-of-the-day",
        module="run.resolve",
        before=(
            "    if (kept := kept_token_budget(RunPaths(config.output_dir))) is not None:\n"
            "        return kept\n"
        ),
        after="",
        caught_by=(f"{_RUN}::test_a_gpu_run_keeps_its_batches",),
    ),
    Mutant(
        name="suspects-not-alone",
        module="run.resume",
        before="    is_suspect[[*suspects, *deferred]] = True\n",
        after="",
        caught_by=(f"{_WORKER}::test_suspects_come_first_and_alone",),
    ),
    Mutant(
        name="quarantined-computed-again",
        module="run.resume",
        before="committed.done_mask(), Quarantine.of(plan, paths).ordinals())",
        after="committed.done_mask(), ())",
        caught_by=(f"{_WORKER}::test_suspects_come_first_and_alone",),
    ),
    Mutant(
        name="infinite-float16-in-the-dataset",
        module="run.assembly",
        before="    bad = _not_finite(plan, layout, ordinals, values)\n",
        after="    bad = ordinals[:0]\n",
        caught_by=(f"{_ASSEMBLY_TESTS}::test_values_beyond_float16_are_named",),
    ),
    Mutant(
        name="dataset-of-another-precision-taken-for-the-one-that-is-wanted",
        module="run.assembly",
        before='        "store_dtype": plan.store_dtype,\n',
        after="",
        caught_by=(f"{_ASSEMBLY_TESTS}::test_a_float16_dataset_replaces_a_float32_one",),
    ),
    Mutant(
        name="numbers-of-two-versions-mixed",
        module="run.resolve",
        before="numerics=None if NUMERICS_VERSION == 1 else NUMERICS_VERSION,",
        after="numerics=None,",
        caught_by=(f"{_RUN}::test_an_upgrade_with_the_same_numerics_resumes",),
    ),
    Mutant(
        name="nothing-is-said-of-what-is-left-out",
        module="run.directory",
        before="    for description in left_out:\n",
        after="    for description in []:\n",
        caught_by=(
            "tests/unit/inputs/test_sources.py::"
            "TestReported::test_a_run_warns_before_anything_is_made",
        ),
    ),
    Mutant(
        name="weights-are-not-looked-at-before-a-run",
        module="run.directory",
        before="        require_own_parts(paths)\n    check_model(config)\n",
        after="        require_own_parts(paths)\n",
        caught_by=(
            "tests/unit/model/test_weights_look.py::"
            "test_what_are_no_weights_is_refused_by_all_in_the_same_sentence",
        ),
    ),
)
