"""Mutants of `vnp_lib/checkpoint/`."""

from __future__ import annotations

from tests.mutants.mutant import Mutant

_CHECKPOINT = "tests/unit/test_checkpoint_writer.py"
_CHECKPOINT_FILE = "tests/unit/checkpoint/test_file.py"
_CHECKPOINT_SURVEY = "tests/unit/checkpoint/test_survey.py"
_CONTRACT = "tests/unit/test_reference_contract.py"
_JUDGEMENT = "tests/unit/worker/test_recovery.py"
_MANIFEST = "tests/unit/test_checkpoint_manifest.py"
_QUARANTINE = "tests/unit/checkpoint/test_quarantine.py"
_RAGGED = "tests/unit/checkpoint/test_ragged.py"

MUTANTS = (
    Mutant(
        name="manifest-changed-without-its-lock",
        module="checkpoint.manifest",
        before=(
            "        with self._lock.held(timeout_s=LOCK_TIMEOUT_S):\n"
            "            state = self._read()\n"
        ),
        after="        if True:\n            state = self._read()\n",
        caught_by=(f"{_MANIFEST}::test_a_lock_that_is_not_given_up_names_its_holder",),
    ),
    Mutant(
        name="marker-before-the-file",
        module="checkpoint.writer",
        before=(
            "        digest = self._persist(path, lambda: save_content(path, content))\n"
            "        self._persist(path, lambda: write_marker(path, digest, "
            "**content.marker_fields()))\n"
        ),
        after=(
            "        import io\n\n"
            "        from vnp_lib.checkpoint.file import _canonical\n"
            "        from vnp_lib.storage import digest_stream\n\n"
            "        data = io.BytesIO()\n"
            "        torch.save(_canonical(content._asdict(), {}), data)\n"
            "        data.seek(0)\n"
            "        digest = digest_stream(data)\n"
            "        self._persist(path, lambda: write_marker(path, digest, "
            "**content.marker_fields()))\n"
            "        self._persist(path, lambda: save_content(path, content))\n"
        ),
        caught_by=(f"{_CHECKPOINT}::test_the_marker_is_written_after_the_file_is_durable",),
    ),
    Mutant(
        name="marker-by-touch",
        module="checkpoint.writer",
        before="self._persist(path, lambda: write_marker(path, digest, **content.marker_fields()))",
        after="marker_path(path).touch()",
        caught_by=(f"{_CHECKPOINT}::test_writer_creates_pt_with_done_marker",),
    ),
    Mutant(
        name="manifest-before-the-checkpoint",
        module="checkpoint.writer",
        before="        digest = self._persist(path, lambda: save_content(path, content))\n",
        after=(
            "        self._record(path, rows=len(sequence_ids))\n"
            "        digest = self._persist(path, lambda: save_content(path, content))\n"
        ),
        caught_by=(f"{_CHECKPOINT}::test_the_marker_is_written_after_the_file_is_durable",),
    ),
    Mutant(
        name="writer-error-swallowed",
        module="checkpoint.writer",
        before="        digest = self._persist(path, lambda: save_content(path, content))\n",
        after=(
            "        try:\n"
            "            digest = self._persist(path, lambda: save_content(path, content))\n"
            "        except StorageError as error:\n"
            '            return logger.error("continuing without a checkpoint: %s", error)\n'
        ),
        caught_by=(f"{_CHECKPOINT}::test_writer_async_failure_propagates",),
    ),
    Mutant(
        name="writer-error-not-raised-at-the-next-checkpoint",
        module="checkpoint.writer",
        before=(
            "            self._raise_failures()\n"
            "            return self._executor.submit(self._write_pieces"
        ),
        after="            return self._executor.submit(self._write_pieces",
        caught_by=(f"{_CHECKPOINT}::test_an_error_surfaces_at_the_next_checkpoint_and_stays",),
    ),
    Mutant(
        name="writer-error-not-raised-at-the-end",
        module="checkpoint.writer",
        before="        if not self._are_failures_raised:\n            self._raise_failures()\n",
        after="",
        caught_by=(f"{_CHECKPOINT}::test_leaving_the_block_raises_an_unseen_error",),
    ),
    Mutant(
        name="full-disk-not-waited-for",
        module="checkpoint.writer",
        before="                    self._sleep(delay_s)\n",
        after="                    raise\n",
        caught_by=(f"{_CHECKPOINT}::test_a_full_disk_is_waited_for",),
    ),
    Mutant(
        name="queue-without-a-count",
        module="checkpoint.writer",
        before="self._checkpoints < self._max_checkpoints and ",
        after="",
        caught_by=(f"{_CHECKPOINT}::test_a_full_queue_holds_the_caller_back",),
    ),
    Mutant(
        name="queue-without-a-size",
        module="checkpoint.writer",
        before=" and self._bytes + size_bytes <= self._max_bytes",
        after="",
        caught_by=(f"{_CHECKPOINT}::test_a_full_queue_holds_the_caller_back",),
    ),
    Mutant(
        name="tensor-of-the-caller-not-copied",
        module="checkpoint.writer",
        before="return tensor_of(on_cpu.numpy())",
        after="return on_cpu.detach().contiguous()",
        caught_by=(f"{_CHECKPOINT}::test_writer_copies_numpy_data_safely[tensor]",),
    ),
    Mutant(
        name="array-of-the-caller-not-copied",
        module="checkpoint.file",
        before="np.array(array, dtype=",
        after="np.asarray(array, dtype=",
        caught_by=(f"{_CHECKPOINT}::test_writer_copies_numpy_data_safely[numpy]",),
    ),
    Mutant(
        name="bytes-depend-on-who-made-the-strings",
        module="checkpoint.file",
        before="torch.save(_canonical(content._asdict(), {}), ",
        after="torch.save(content._asdict(), ",
        caught_by=(f"{_CHECKPOINT}::test_the_same_content_gives_the_same_bytes",),
    ),
    Mutant(
        name="valid-checkpoint-moved-out-of-the-way",
        module="checkpoint.writer",
        before=(
            '        raise FileExistsError(errno.EEXIST, "a valid checkpoint is there", '
            "str(path))\n"
        ),
        after="        move_to_damaged(path)\n",
        caught_by=(f"{_CHECKPOINT}::test_another_writers_checkpoint_is_never_overwritten",),
    ),
    Mutant(
        name="rows-that-are-not-finite-written",
        module="checkpoint.file",
        before="    if _is_finite(content.embeddings):\n        return\n",
        after="    return\n",
        caught_by=(f"{_CHECKPOINT}::test_invalid_content_is_refused_up_front",),
    ),
    Mutant(
        name="digest-not-compared",
        module="checkpoint.markers",
        before='    if digest_stream(file).sha256 != marker["sha256"]:\n',
        after="    if False:\n",
        caught_by=(f"{_CHECKPOINT_SURVEY}::test_two_files_that_changed_places_are_not_believed",),
    ),
    Mutant(
        name="size-not-compared",
        module="checkpoint.markers",
        before='    if size_bytes != marker["size_bytes"]:\n',
        after="    if False:\n",
        caught_by=(f"{_CHECKPOINT_SURVEY}::test_a_quick_survey_sees_a_file_of_another_size",),
    ),
    Mutant(
        name="content-read-before-its-digest",
        module="checkpoint.file",
        before=(
            "            require_digest(file, marker)\n"
            "        content = _parse(file, may_be_integers=marker is None)\n"
        ),
        after=(
            "            pass\n"
            "        content = _parse(file, may_be_integers=marker is None)\n"
            "        if marker is not None:\n"
            "            file.seek(0)\n"
            "            require_digest(file, marker)\n"
        ),
        caught_by=(
            f"{_CHECKPOINT_FILE}::test_a_file_that_does_not_fit_its_marker_never_reaches_torch",
        ),
    ),
    Mutant(
        name="pickles-that-run-code-loaded",
        module="checkpoint.file",
        before='map_location="cpu", weights_only=True)\n',
        after='map_location="cpu", weights_only=False)\n',
        caught_by=(f"{_CHECKPOINT_FILE}::test_torch_by_itself_would_run_no_code_either",),
    ),
    Mutant(
        name="pickle-not-looked-at",
        module="checkpoint.archive",
        before="        return _check_pickle(archive.read",
        after="        return not len(archive.read",
        caught_by=(
            f"{_CHECKPOINT_FILE}::test_content_that_is_no_checkpoint_is_refused_with_the_reason",
        ),
    ),
    Mutant(
        name="calls-of-numpy-not-looked-at",
        module="checkpoint.archive",
        before="        require_plain_arrays(data)\n",
        after="        pass\n",
        caught_by=(f"{_CONTRACT}::test_reconstructors_build_arrays_of_numbers_only",),
    ),
    Mutant(
        name="array-of-another-size-than-its-bytes",
        module="checkpoint.array_pickle",
        before="if math.prod(shape) * itemsize == size:",
        after="if math.prod(shape) * itemsize >= 0 <= size:",
        caught_by=(f"{_CONTRACT}::test_an_array_larger_than_its_bytes_is_not_built",),
    ),
    Mutant(
        name="compressed-members-unpacked",
        module="checkpoint.archive",
        before=(
            "        if any(member.compress_type != zipfile.ZIP_STORED for member in members):\n"
        ),
        after="        if False:\n",
        caught_by=(f"{_CHECKPOINT_FILE}::test_an_archive_with_compressed_members_is_refused",),
    ),
    Mutant(
        name="strides-that-claim-more-than-the-file-believed",
        module="checkpoint.file",
        before=(
            "    if not embeddings.is_contiguous() or (max_bytes is not None and "
            "embeddings.nbytes > max_bytes):\n"
        ),
        after="    if False:\n",
        caught_by=(
            f"{_CHECKPOINT_FILE}::test_content_that_is_no_checkpoint_is_refused_with_the_reason",
        ),
    ),
    Mutant(
        name="empty-marker-believed",
        module="checkpoint.file",
        before='    elif "fingerprint" in content.metadata:\n',
        after="    elif False:\n",
        caught_by=(f"{_CHECKPOINT_FILE}::test_an_emptied_marker_is_not_a_bare_one",),
    ),
    Mutant(
        name="empty-marker-believed-in-the-flow",
        module="checkpoint.file",
        before="may_be_bare=False)",
        after="may_be_bare=True)",
        caught_by=(f"{_CHECKPOINT_FILE}::test_an_empty_marker_is_never_enough_for_the_flow",),
    ),
    Mutant(
        name="marker-and-content-not-compared",
        module="checkpoint.file",
        before="        _require_agreement(content, marker)\n",
        after="        pass\n",
        caught_by=(f"{_CHECKPOINT_FILE}::test_a_marker_that_says_otherwise_is_not_believed",),
    ),
    Mutant(
        name="rows-that-are-not-finite-read",
        module="checkpoint.file",
        before="    if not _is_finite(content.embeddings):\n        raise CheckpointError",
        after="    if False:\n        raise CheckpointError",
        caught_by=(
            f"{_CHECKPOINT_FILE}::test_content_that_is_no_checkpoint_is_refused_with_the_reason",
        ),
    ),
    Mutant(
        name="temporary-manifest-trusted",
        module="checkpoint.manifest",
        before="        state = read_sealed_json(self.path)\n",
        after=(
            '        state = read_sealed_json(next(self.path.parent.glob(".tmp-*"), self.path))\n'
        ),
        caught_by=(f"{_MANIFEST}::test_a_writer_killed_at_any_operation_leaves_a_valid_manifest",),
    ),
    Mutant(
        name="fingerprint-of-a-checkpoint-not-compared",
        module="checkpoint.markers",
        before='    if fingerprint is not None and marker.get("fingerprint") != fingerprint:\n',
        after="    if False:\n",
        caught_by=(f"{_CHECKPOINT_FILE}::test_a_checkpoint_of_another_run_is_not_believed",),
    ),
    Mutant(
        name="fingerprint-not-compared-on-resume",
        module="checkpoint.resume",
        before="    if fingerprint is not None and found != fingerprint:\n",
        after="    if False:\n",
        caught_by=(f"{_CHECKPOINT}::test_resuming_another_run_is_refused_and_touches_nothing",),
    ),
    Mutant(
        name="survey-stops-at-the-first-damage",
        module="checkpoint.survey",
        before="            damaged.append(Damage.of(path, error))\n    return Survey(",
        after=(
            "            damaged.append(Damage.of(path, error))\n"
            "            break\n"
            "    return Survey("
        ),
        caught_by=(
            f"{_CHECKPOINT_SURVEY}::test_a_damaged_checkpoint_in_the_middle_costs_that_one",
        ),
    ),
    Mutant(
        name="changed-checkpoint-taken-for-what-it-was",
        module="checkpoint.survey",
        before=(
            "            if any(stamps.get(path) != stamp for path, stamp in "
            "self._stamps.items()):\n"
        ),
        after="            if False:\n",
        caught_by=(f"{_CHECKPOINT_SURVEY}::test_a_second_look_sees_what_a_first_one_would",),
    ),
    Mutant(
        name="unseen-checkpoint-taken-for-lost",
        module="checkpoint.survey",
        before="    wait_for_listed_files(checkpoints_dir, rank=rank, sleep=sleep)\n",
        after="",
        caught_by=(f"{_CHECKPOINT_SURVEY}::test_a_listed_but_hidden_checkpoint_is_awaited",),
    ),
    Mutant(
        name="shard-healed-without-reading-it",
        module="checkpoint.survey",
        before='f"shard_{rank}", rank, fingerprint, verify_digests=True)',
        after='f"shard_{rank}", rank, fingerprint, verify_digests=False)',
        caught_by=(
            f"{_CHECKPOINT_SURVEY}::test_healing_a_shard_frees_the_damaged_and_touches_no_other",
        ),
    ),
    Mutant(
        name="names-that-nobody-synced-believed",
        module="checkpoint.survey",
        before="        _sync_names(shard_dir)\n",
        after="        pass\n",
        caught_by=(f"{_CHECKPOINT_SURVEY}::test_an_unsynced_name_is_synced_first",),
    ),
    Mutant(
        name="file-moved-before-its-marker",
        module="checkpoint.markers",
        before="((marker_path(path), marker_path(target)), (path, target))",
        after="((path, target), (marker_path(path), marker_path(target)))",
        caught_by=(f"{_CHECKPOINT_FILE}::test_the_marker_is_moved_before_its_file",),
    ),
    Mutant(
        name="failing-storage-worked-on",
        module="checkpoint.survey",
        before="    if len(lost) > 3 and len(lost) * 100 > total:\n",
        after="    if False:\n",
        caught_by=(f"{_CHECKPOINT_SURVEY}::test_much_damage_means_that_the_storage_is_failing",),
    ),
    Mutant(
        name="resumed-ids-through-a-set",
        module="checkpoint.resume",
        before="        ids=[id_ for _, content in usable for id_ in content.sequence_ids],\n",
        after="        ids=list({id_ for _, content in usable for id_ in content.sequence_ids}),\n",
        caught_by=(f"{_CHECKPOINT}::test_resume_loads_valid_pt_checkpoints_in_order",),
    ),
    Mutant(
        name="checkpoint-counted-twice-in-the-manifest",
        module="checkpoint.manifest",
        before="num_checkpoints=self.num_checkpoints + 1 - len(replaced),",
        after="num_checkpoints=self.num_checkpoints + 1,",
        caught_by=(f"{_MANIFEST}::test_the_same_checkpoint_again_counts_once",),
    ),
    Mutant(
        name="manifest-grows-with-the-run",
        module="checkpoint.manifest",
        before="[*others, checkpoint][-MAX_CHECKPOINTS_LISTED:]",
        after="[*others, checkpoint]",
        caught_by=(f"{_MANIFEST}::test_an_update_costs_the_same_however_many_there_were",),
    ),
    Mutant(
        name="damaged-manifest-fatal",
        module="checkpoint.manifest",
        before=(
            '            logger.warning("%s; it is rebuilt from the checkpoints", error)\n'
            "            return None\n"
        ),
        after="            raise\n",
        caught_by=(f"{_MANIFEST}::test_a_damaged_manifest_is_rebuilt",),
    ),
    Mutant(
        name="offsets-that-do-not-ascend-accepted",
        module="checkpoint.file",
        before="    ascends = all(start < stop for start, stop in pairwise(offsets))\n",
        after="    ascends = True\n",
        caught_by=(f"{_RAGGED}::test_offsets_that_do_not_fit_the_values_are_damage",),
    ),
    Mutant(
        name="quarantined-twice",
        module="checkpoint.quarantine",
        before="added = [sequence for sequence in sequences if sequence.ordinal not in present]",
        after="added = [sequence for sequence in sequences if sequence not in held]",
        caught_by=(f"{_QUARANTINE}::test_the_first_entry_of_an_ordinal_stays",),
    ),
    Mutant(
        name="quarantine-without-a-limit",
        module="checkpoint.quarantine",
        before="            self._require_room([*held, *added])\n",
        after="",
        caught_by=(f"{_QUARANTINE}::test_one_more_than_may_be_is_refused_and_nothing_is_written",),
    ),
    Mutant(
        name="quarantined-without-the-lock",
        module="checkpoint.quarantine",
        before=(
            "        with self._lock.held(timeout_s=LOCK_TIMEOUT_S):\n"
            "            held, others = self._read()\n"
            "            present"
        ),
        after="        if True:\n            held, others = self._read()\n            present",
        caught_by=(f"{_QUARANTINE}::test_nothing_changes_while_another_holds_the_lock",),
    ),
    Mutant(
        name="quarantine-seal-not-compared",
        module="checkpoint.quarantine",
        before="return sequence if _seal(fields) == line else None",
        after="return sequence",
        caught_by=(f"{_QUARANTINE}::test_no_flipped_bit_passes",),
    ),
    Mutant(
        name="another-runs-quarantine-believed",
        module="checkpoint.quarantine",
        before="if sequence.fingerprint != self._fingerprint:\n                others",
        after="if False:\n                others",
        caught_by=(f"{_QUARANTINE}::test_lines_of_another_run_are_ignored",),
    ),
    Mutant(
        name="strikes-pushed-out-by-preemptions",
        module="checkpoint.manifest",
        before="strikes[-most:] + others[-most:]",
        after="(strikes + others)[-most:]",
        caught_by=(f"{_JUDGEMENT}::test_preemptions_push_no_strike_out",),
    ),
)
