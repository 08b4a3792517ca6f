"""The mutants: the library with one thing that matters left out or done wrong, and the test that has to notice."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

_FILES = "tests/unit/storage/test_durable.py"
_FASTA = "tests/unit/inputs/test_fasta.py"
_CONTRACT = "tests/unit/test_reference_contract.py"
_CHECKPOINT = "tests/unit/test_checkpoint_writer.py"
_CHECKPOINT_FILE = "tests/unit/checkpoint/test_file.py"
_CHECKPOINT_SURVEY = "tests/unit/checkpoint/test_survey.py"
_MANIFEST = "tests/unit/test_checkpoint_manifest.py"
_PLAN = "tests/unit/plan/test_plan.py"
_ASSEMBLY_TESTS = "tests/unit/run/test_assembly.py"
_LAYOUTS = "tests/unit/run/test_layouts.py"
_RAGGED = "tests/unit/checkpoint/test_ragged.py"
_DATASET = "tests/unit/dataset/test_reader.py"
_QUARANTINE = "tests/unit/checkpoint/test_quarantine.py"
_VERIFY = "tests/unit/report/test_verify.py"
_INFERENCE = "tests/unit/inference/test_runner.py"
_EMBEDDER = "tests/unit/inference/test_executor.py"
_GPU_MEMORY = "tests/unit/inference/test_gpu_memory.py"
_JUDGEMENT = "tests/unit/worker/test_recovery.py"
_WORKER = "tests/unit/worker/test_attempt.py"
_RUN = "tests/unit/run/test_run.py"
_EXPORT = "tests/unit/dataset/test_export.py"
_RUNNER = "tests/integration/test_checkpoint_integration.py"
_WEIGHTS = "tests/unit/model/test_weights.py"
_FAILURES = "tests/unit/test_failures.py"
_SOFTWARE = "tests/unit/test_software.py"
_SUPERVISOR = "tests/integration/test_supervisor.py"
_STREAMS = "tests/unit/test_streams.py"


@dataclass(frozen=True, slots=True, kw_only=True)
class Mutant:
    """A change to one module, told apart by its name."""

    name: str
    module: str  # of vnp_lib
    before: str  # occurs exactly once
    after: str
    caught_by: tuple[str, ...]  # node ids of pytest

    @property
    def path(self) -> Path:
        """The module's file, below the root of the repository."""
        return Path("vnp_lib", f"{self.module.replace('.', '/')}.py")

    def occurrences(self, root: Path) -> int:
        """How often `before` is in the module; with anything but 1 this is no mutant any more."""
        return (root / self.path).read_text(encoding="utf-8").count(self.before)

    def apply(self, root: Path) -> None:
        path = root / self.path
        path.write_text(path.read_text(encoding="utf-8").replace(self.before, self.after), encoding="utf-8")


_DURABLE_FILES = (
    Mutant(
        name="file-not-synced",
        module="storage.durable",
        before="            ops.fsync(fd)\n",
        after="",
        caught_by=(f"{_FILES}::TestDurableFile::test_it_is_synced_before_it_is_published_and_its_directory_after",),
    ),
    Mutant(
        name="directory-not-synced",
        module="storage.durable",
        before="        ops.unlink(temporary)\n        fsync_directory(path.parent)\n",
        after="        ops.unlink(temporary)\n",
        caught_by=(f"{_FILES}::TestDurableFile::test_it_is_synced_before_it_is_published_and_its_directory_after",),
    ),
    Mutant(
        name="directory-not-synced-after-replace",
        module="storage.durable",
        before="        ops.replace(temporary, path)\n        fsync_directory(path.parent)\n",
        after="        ops.replace(temporary, path)\n",
        caught_by=(f"{_FILES}::TestDurableFile::test_it_is_synced_before_it_is_published_and_its_directory_after",),
    ),
    Mutant(
        name="new-directory-not-synced",
        module="storage.durable",
        before="    fsync_directory(path.parent)\n\n\ndef fsync_directory",
        after="\n\ndef fsync_directory",
        caught_by=(f"{_FILES}::TestDirectories::test_what_is_missing_is_made_and_every_parent_synced",),
    ),
    Mutant(
        name="fsync-retried-on-its-descriptor",
        module="storage.durable",
        before="            ops.fsync(fd)\n",
        after=(
            "            try:\n"
            "                ops.fsync(fd)\n"
            "            except OSError:\n"
            "                ops.fsync(fd)\n"
        ),
        caught_by=(f"{_FILES}::TestDurableFile::test_a_failed_fsync_is_not_tried_again",),
    ),
    Mutant(
        name="short-write-taken-for-whole",
        module="storage.durable",
        before="        while view:\n            written = ops.write",
        after="        if view:\n            written = ops.write",
        caught_by=(f"{_FILES}::TestDurableFile::test_short_writes_are_completed",),
    ),
    Mutant(
        name="digest-of-memory-instead-of-what-was-written",
        module="storage.durable",
        before="self._sha256.update(view[:written])",
        after="self._sha256.update(view)",
        caught_by=(f"{_FILES}::TestDurableFile::test_short_writes_are_completed",),
    ),
    Mutant(
        name="failed-write-forgotten",
        module="storage.durable",
        before="            if file.error is not None:\n                raise file.error\n            ops",
        after="            ops",
        caught_by=(f"{_FILES}::TestDurableFile::test_a_failed_write_comes_out_though_a_library_hides_it",),
    ),
    Mutant(
        name="temporary-left-after-an-error",
        module="storage.durable",
        before="        with suppress(OSError):\n            ops.unlink(temporary)\n        if file.error",
        after="        if file.error",
        caught_by=(f"{_FILES}::TestDurableFile::test_an_error_in_the_block_leaves_nothing",),
    ),
    Mutant(
        name="failed-publication-left-in-place",
        module="storage.durable",
        before="            with suppress(OSError):\n                ops.unlink(path)\n        raise",
        after="            pass\n        raise",
        caught_by=(f"{_FILES}::TestDurableFile::test_a_publication_that_fails_anywhere_leaves_no_file",),
    ),
    Mutant(
        name="rename-over-anothers-file",
        module="storage.durable",
        before="    if replace:\n        ops.replace",
        after="    if True:\n        ops.replace",
        caught_by=(f"{_FILES}::TestDurableFile::test_a_file_that_is_there_is_never_overwritten",),
    ),
    Mutant(
        name="shared-temporary-name",
        module="storage.durable",
        before="writer.started_at, uuid.uuid4().hex[:8])",
        after='writer.started_at, "00000000")',
        caught_by=(f"{_FILES}::TestDurableFile::test_two_writers_of_one_name_do_not_meet_before_they_publish",),
    ),
    Mutant(
        name="temporary-of-another-written-to",
        module="storage.durable",
        before="fd = ops.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY",
        after="fd = ops.open(temporary, os.O_CREAT | os.O_WRONLY",
        caught_by=(f"{_FILES}::TestDurableFile::test_a_temporary_name_that_is_taken_is_never_written_to",),
    ),
    Mutant(
        name="links-followed",
        module="storage.durable",
        before=" | os.O_NOFOLLOW",
        after="",
        caught_by=(f"{_FILES}::TestFileLock::test_a_link_in_the_place_of_the_lock_file_is_not_followed",),
    ),
    Mutant(
        name="temporaries-removed-blindly",
        module="storage.durable",
        before="        if is_orphaned:\n",
        after="        if True:\n",
        caught_by=(f"{_FILES}::TestOrphanedTemporaries::test_only_our_own_and_only_those_of_the_dead_go",),
    ),
    Mutant(
        name="reused-process-id-taken-for-the-writer",
        module="processes",
        before=" or started_at == self.started_at",
        after=" or True",
        caught_by=(
            "tests/unit/test_processes.py::test_a_later_process_with_the_same_id_is_another",
            f"{_FILES}::TestOrphanedTemporaries::test_a_writer_is_known_by_machine_boot_container_and_start",
        ),
    ),
    Mutant(
        name="file-system-without-links-used",
        module="storage.file_system",
        before='            (self.link, "has no hard links',
        after='            (None, "has no hard links',
        caught_by=("tests/unit/storage/test_file_system.py::test_a_run_is_refused_before_anything_is_made",),
    ),
    Mutant(
        name="change-written-twice-in-the-manifest",
        module="run.record",
        before="            if change.number > num_applied:\n",
        after="            if True:\n",
        caught_by=("tests/unit/run/test_record.py::test_a_change_that_was_written_and_then_called_failed_counts_once",),
    ),
    Mutant(
        name="what-nobody-can-read-written",
        module="storage.durable",
        before="    data = _sealed(fields)\n    if len(data) > MAX_JSON_BYTES:\n",
        after="    data = _sealed(fields)\n    if False:\n",
        caught_by=(f"{_FILES}::TestSealedJson::test_what_nobody_could_read_is_not_written",),
    ),
    Mutant(
        name="temporaries-of-the-living-removed",
        module="storage.durable",
        before="return not writer.is_alive() if writer.is_visible() else None",
        after="return True if writer.is_visible() else None",
        caught_by=(
            f"{_FILES}::TestDurableFile::test_a_killed_writer_leaves_a_temporary_file_that_is_removed_after_its_death",
        ),
    ),
    Mutant(
        name="seal-not-compared",
        module="storage.durable",
        before=" and hashlib.sha256(before + after).hexdigest() == seal",
        after="",
        caught_by=(f"{_FILES}::TestSealedJson::test_no_flipped_bit_passes",),
    ),
    Mutant(
        name="free-space-not-compared",
        module="storage.durable",
        before="    if free_bytes < size_bytes:\n",
        after="    if False:\n",
        caught_by=(f"{_PLAN}::test_a_disk_without_room_is_refused_with_both_figures",),
    ),
)

_LOCKS = (
    Mutant(
        name="lock-not-taken",
        module="storage.locks",
        before="return durable.ops.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)",
        after="return None",
        caught_by=(f"{_FILES}::TestFileLock::test_a_failed_acquire_leaves_the_lock_usable",),
    ),
    Mutant(
        name="lock-file-unlinked",
        module="storage.locks",
        before="            durable.ops.flock(fd, fcntl.LOCK_UN)\n",
        after="            ops.unlink(self.path)\n            durable.ops.flock(fd, fcntl.LOCK_UN)\n",
        caught_by=(f"{_MANIFEST}::test_the_lock_file_is_never_removed",),
    ),
    Mutant(
        name="lock-kept-after-release",
        module="storage.locks",
        before="            durable.ops.flock(fd, fcntl.LOCK_UN)\n        finally:\n            try:\n                durable.ops.close(fd)\n",
        after="            pass\n        finally:\n            try:\n                pass\n",
        caught_by=(f"{_FILES}::TestFileLock::test_a_failed_acquire_leaves_the_lock_usable",),
    ),
    Mutant(
        name="threads-not-kept-apart",
        module="storage.locks",
        before="self._between_threads = threading.Lock()",
        after="self._between_threads = threading.Semaphore(99)",
        caught_by=(
            f"{_FILES}::TestFileLock::test_threads_that_share_a_lock_exclude_each_other_where_the_system_locks_by_process",
        ),
    ),
    Mutant(
        name="lock-inherited-by-children",
        module="storage.locks",
        before="            fd = durable.ops.open(self.path, os.O_RDWR | os.O_CREAT)\n",
        after=(
            "            fd = durable.ops.open(self.path, os.O_RDWR | os.O_CREAT)\n            os.set_inheritable(fd, True)\n"
        ),
        caught_by=(f"{_FILES}::TestFileLock::test_a_child_that_outlives_its_holder_does_not_keep_it",),
    ),
    Mutant(
        name="lock-waited-for-without-limit",
        module="storage.locks",
        before="                if self._clock() >= deadline_s:\n",
        after="                if self._clock() >= deadline_s + 3600:\n",
        caught_by=(f"{_FILES}::TestFileLock::test_waiting_ends_at_the_time_limit",),
    ),
    Mutant(
        name="lock-without-a-holders-name",
        module="storage.locks",
        before="                self._sign(fd)\n",
        after="",
        caught_by=(
            f"{_FILES}::TestFileLock::test_another_process_is_named_while_it_holds_and_not_in_the_way_afterwards",
        ),
    ),
    Mutant(
        name="manifest-changed-without-its-lock",
        module="checkpoint.manifest",
        before="        with self._lock.held(timeout_s=LOCK_TIMEOUT_S):\n            state = self._read()\n",
        after="        if True:\n            state = self._read()\n",
        caught_by=(f"{_MANIFEST}::test_a_lock_that_is_not_given_up_names_its_holder",),
    ),
    Mutant(
        name="run-directory-not-locked",
        module="run.directory",
        before="        _take(lock)\n",
        after="        lock.release = lambda: None\n",
        caught_by=(f"{_RUN}::test_a_second_run_on_the_directory_is_refused_at_once_with_the_holder",),
    ),
    Mutant(
        name="shard-not-locked",
        module="worker.attempt",
        before="        self._wait_for_lock()\n",
        after="",
        caught_by=(f"{_WORKER}::test_an_attempt_waits_while_another_has_the_shard",),
    ),
)

_WRITER = (
    Mutant(
        name="marker-before-the-file",
        module="checkpoint.writer",
        before=(
            "        digest = self._persist(path, lambda: save_content(path, content))\n"
            "        self._persist(path, lambda: write_marker(path, digest, **content.marker_fields()))\n"
        ),
        after=(
            "        import io\n\n"
            "        from vnp_lib.checkpoint.file import _canonical, digest_stream\n\n"
            "        data = io.BytesIO()\n"
            "        torch.save(_canonical(content._asdict(), {}), data)\n"
            "        data.seek(0)\n"
            "        digest = digest_stream(data)\n"
            "        self._persist(path, lambda: write_marker(path, digest, **content.marker_fields()))\n"
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
        name="writer-error-not-told-at-the-next-checkpoint",
        module="checkpoint.writer",
        before="            self._raise_failures()\n            return self._executor.submit(self._write_pieces",
        after="            return self._executor.submit(self._write_pieces",
        caught_by=(f"{_CHECKPOINT}::test_an_error_surfaces_at_the_next_checkpoint_and_stays",),
    ),
    Mutant(
        name="writer-error-not-told-at-the-end",
        module="checkpoint.writer",
        before="        if not self._are_failures_told:\n            self._raise_failures()\n",
        after="",
        caught_by=(f"{_CHECKPOINT}::test_leaving_the_block_raises_an_error_that_nobody_has_heard_of",),
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
        before="return self._checkpoints < self._max_checkpoints and ",
        after="return ",
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
        before='        raise FileExistsError(errno.EEXIST, "a valid checkpoint is there", str(path))\n',
        after="        set_aside(path)\n",
        caught_by=(f"{_CHECKPOINT}::test_another_writers_checkpoint_is_never_overwritten",),
    ),
    Mutant(
        name="rows-that-are-not-finite-written",
        module="checkpoint.file",
        before="    if not _is_finite(content.embeddings):\n        raise NumericalInstabilityError",
        after="    if False:\n        raise NumericalInstabilityError",
        caught_by=(f"{_CHECKPOINT}::test_what_no_reader_would_take_is_refused_at_the_door",),
    ),
)

_READER = (
    Mutant(
        name="digest-not-compared",
        module="checkpoint.file",
        before='    if digest_stream(file).sha256 != marker["sha256"]:\n',
        after="    if False:\n",
        caught_by=(f"{_CHECKPOINT_SURVEY}::test_two_files_that_changed_places_are_not_believed",),
    ),
    Mutant(
        name="size-not-compared",
        module="checkpoint.file",
        before='    if size_bytes != marker["size_bytes"]:\n',
        after="    if False:\n",
        caught_by=(f"{_CHECKPOINT_SURVEY}::test_a_quick_survey_sees_a_file_of_another_size",),
    ),
    Mutant(
        name="content-read-before-its-digest",
        module="checkpoint.file",
        before=(
            "            _verify_digest(file, marker)\n        content = _parse(file, may_be_integers=marker is None)\n"
        ),
        after=(
            "            pass\n"
            "        content = _parse(file, may_be_integers=marker is None)\n"
            "        if marker is not None:\n"
            "            file.seek(0)\n"
            "            _verify_digest(file, marker)\n"
        ),
        caught_by=(f"{_CHECKPOINT_FILE}::test_a_file_that_does_not_fit_its_marker_never_reaches_torch",),
    ),
    Mutant(
        name="pickles-that-run-code-loaded",
        module="checkpoint.file",
        before="weights_only=True)\n",
        after="weights_only=False)\n",
        caught_by=(f"{_CHECKPOINT_FILE}::test_torch_by_itself_would_run_no_code_either",),
    ),
    Mutant(
        name="pickle-not-looked-at",
        module="checkpoint.archive",
        before="        return _check_pickle(archive.read",
        after="        return not len(archive.read",
        caught_by=(f"{_CHECKPOINT_FILE}::test_content_that_is_no_checkpoint_is_refused_with_the_reason",),
    ),
    Mutant(
        name="calls-of-numpy-not-looked-at",
        module="checkpoint.archive",
        before="        require_plain_arrays(data)\n",
        after="        pass\n",
        caught_by=(f"{_CONTRACT}::test_numpys_reconstructors_build_arrays_of_numbers_and_nothing_else",),
    ),
    Mutant(
        name="array-of-another-size-than-its-bytes",
        module="checkpoint.array_pickle",
        before="if _num_values(shape) * itemsize == size:",
        after="if _num_values(shape) * itemsize >= 0 <= size:",
        caught_by=(f"{_CONTRACT}::test_an_array_that_claims_more_values_than_its_bytes_hold_is_not_built",),
    ),
    Mutant(
        name="layers-not-passed",
        module="model.foreign",
        before="    if takes_any or not _binds(signature, *arguments):",
        after="    if takes_any:",
        caught_by=(f"{_CONTRACT}::test_a_model_by_another_hand_is_served_packed_and_padded",),
    ),
    Mutant(
        name="compressed-members-unpacked",
        module="checkpoint.archive",
        before="        if any(member.compress_type != zipfile.ZIP_STORED for member in members):\n",
        after="        if False:\n",
        caught_by=(f"{_CHECKPOINT_FILE}::test_an_archive_with_compressed_members_is_refused",),
    ),
    Mutant(
        name="strides-that-claim-more-than-the-file-believed",
        module="checkpoint.file",
        before="    if not embeddings.is_contiguous() or (max_bytes is not None and embeddings.nbytes > max_bytes):\n",
        after="    if False:\n",
        caught_by=(f"{_CHECKPOINT_FILE}::test_content_that_is_no_checkpoint_is_refused_with_the_reason",),
    ),
    Mutant(
        name="empty-marker-believed",
        module="checkpoint.file",
        before='    elif "fingerprint" in content.metadata:\n',
        after="    elif False:\n",
        caught_by=(f"{_CHECKPOINT_FILE}::test_a_marker_cut_to_nothing_does_not_pass_for_one_made_by_touch",),
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
        caught_by=(f"{_CHECKPOINT_FILE}::test_content_that_is_no_checkpoint_is_refused_with_the_reason",),
    ),
    Mutant(
        name="temporary-marker-trusted",
        module="storage.durable",
        before="    marker = marker_path(path)\n    fields = read_sealed_json(marker)\n",
        after=(
            "    marker = next(path.parent.glob(f'.tmp-{path.name}.done*'), marker_path(path))\n"
            "    fields = read_sealed_json(marker)\n"
        ),
        caught_by=(f"{_CHECKPOINT_SURVEY}::test_what_a_killed_writer_left_unpublished_is_not_read",),
    ),
    Mutant(
        name="temporary-manifest-trusted",
        module="checkpoint.manifest",
        before="        state = read_sealed_json(self.path)\n",
        after='        state = read_sealed_json(next(self.path.parent.glob(".tmp-*"), self.path))\n',
        caught_by=(f"{_MANIFEST}::test_a_writer_killed_at_any_operation_leaves_a_valid_manifest",),
    ),
)

_RESUME = (
    Mutant(
        name="fingerprint-of-a-checkpoint-not-compared",
        module="checkpoint.file",
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
        name="fingerprint-of-a-run-not-compared",
        module="plan.planner",
        before="    if differing:\n",
        after="    if False:\n",
        caught_by=(f"{_PLAN}::test_a_directory_of_another_model_is_refused_and_untouched",),
    ),
    Mutant(
        name="fingerprint-of-the-path",
        module="plan.scan",
        before="sequences_sha256=self._sha256.hexdigest()",
        after="sequences_sha256=hashlib.sha256(str(asked.sources).encode()).hexdigest()",
        caught_by=(
            f"{_PLAN}::test_the_fingerprint_depends_on_content_and_not_on_files",
            f"{_PLAN}::test_a_directory_of_other_sequences_is_refused_and_untouched",
        ),
    ),
    Mutant(
        name="survey-stops-at-the-first-damage",
        module="checkpoint.survey",
        before="            damaged.append(Damage.of(path, error))\n    return Survey(",
        after="            damaged.append(Damage.of(path, error))\n            break\n    return Survey(",
        caught_by=(f"{_CHECKPOINT_SURVEY}::test_a_damaged_checkpoint_in_the_middle_costs_that_one",),
    ),
    Mutant(
        name="changed-checkpoint-taken-for-what-it-was",
        module="checkpoint.survey",
        before="            if any(stamps.get(path) != stamp for path, stamp in self._stamps.items()):\n",
        after="            if False:\n",
        caught_by=(f"{_CHECKPOINT_SURVEY}::test_a_second_look_sees_what_a_first_one_would",),
    ),
    Mutant(
        name="unseen-checkpoint-taken-for-lost",
        module="checkpoint.survey",
        before="    wait_for_listed_files(checkpoints_dir, rank=rank, sleep=sleep)\n",
        after="",
        caught_by=(f"{_CHECKPOINT_SURVEY}::test_a_checkpoint_that_is_listed_and_not_found_yet_is_waited_for",),
    ),
    Mutant(
        name="shard-healed-without-reading-it",
        module="checkpoint.survey",
        before='f"shard_{rank}", rank, fingerprint, verify_digests=True)',
        after='f"shard_{rank}", rank, fingerprint, verify_digests=False)',
        caught_by=(f"{_CHECKPOINT_SURVEY}::test_healing_a_shard_frees_the_damaged_and_touches_no_other",),
    ),
    Mutant(
        name="names-that-nobody-synced-believed",
        module="checkpoint.survey",
        before="        _sync_names(shard_dir)\n",
        after="        pass\n",
        caught_by=(f"{_CHECKPOINT_SURVEY}::test_a_name_that_no_writer_synced_is_synced_before_it_is_believed",),
    ),
    Mutant(
        name="file-moved-before-its-marker",
        module="checkpoint.file",
        before="((marker_path(path), marker_path(target)), (path, target))",
        after="((path, target), (marker_path(path), marker_path(target)))",
        caught_by=(f"{_CHECKPOINT_FILE}::test_the_marker_goes_before_its_file_when_a_checkpoint_is_moved",),
    ),
    Mutant(
        name="move-not-synced",
        module="storage.durable",
        before="    fsync_directory(target.parent)\n    fsync_directory(source.parent)\n",
        after="    fsync_directory(target.parent)\n",
        caught_by=(f"{_CHECKPOINT_FILE}::test_the_marker_goes_before_its_file_when_a_checkpoint_is_moved",),
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
        name="unread-ids-counted-as-done",
        module="inference.runner",
        before="batch_idx=RESUMED\n                )\n        batches = without_done(numbered_batches(dataloader), resumed_ids)\n",
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
        name="resumed-rows-computed-again-by-the-worker",
        module="run.resume",
        before="batch[~is_done[batch]]",
        after="batch",
        caught_by=(f"{_WORKER}::test_what_any_shards_valid_checkpoints_hold_is_not_computed_again",),
    ),
    Mutant(
        name="resumed-by-the-number-of-checkpoints",
        module="run.resume",
        before="        batches=_left(plan.shard_batches(rank), is_done, suspects, deferred),\n",
        after="        batches=list(enumerate(plan.shard_batches(rank)))[next_checkpoint:],\n",
        caught_by=(f"{_WORKER}::test_what_any_shards_valid_checkpoints_hold_is_not_computed_again",),
    ),
    Mutant(
        name="another-runs-plan-followed",
        module="worker.attempt",
        before="        if plan.fingerprint != self._job.fingerprint:\n",
        after="        if False:\n",
        caught_by=(f"{_WORKER}::test_a_job_of_another_run_than_the_plan_is_refused",),
    ),
    Mutant(
        name="checkpoint-counted-twice-in-the-manifest",
        module="checkpoint.manifest",
        before='    shard["num_checkpoints"] += 1 - len(replaced)\n',
        after='    shard["num_checkpoints"] += 1\n',
        caught_by=(f"{_MANIFEST}::test_the_same_checkpoint_again_counts_once",),
    ),
    Mutant(
        name="manifest-grows-with-the-run",
        module="checkpoint.manifest",
        before="[*others, entry][-MAX_CHECKPOINTS_LISTED:]",
        after="[*others, entry]",
        caught_by=(f"{_MANIFEST}::test_an_update_costs_the_same_however_many_there_were",),
    ),
    Mutant(
        name="damaged-manifest-fatal",
        module="checkpoint.manifest",
        before=(
            '            logger.warning("%s; it is made anew from the checkpoints", error)\n            return None\n'
        ),
        after="            raise\n",
        caught_by=(f"{_MANIFEST}::test_a_damaged_manifest_is_made_anew_from_the_checkpoints",),
    ),
)

_LOOP = (
    Mutant(
        name="ids-through-a-set",
        module="inference.runner",
        before="            [sequence_id for batch in batches for sequence_id in batch.sequence_ids],\n",
        after="            list({sequence_id for batch in batches for sequence_id in batch.sequence_ids}),\n",
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
        caught_by=(f"{_RUNNER}::test_what_was_computed_before_a_failure_is_kept",),
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
        before="        written.add_done_callback(lambda future: self._announce(future, number, ordinals.size))\n",
        after=(
            "        if self._on_checkpoint is not None:\n            self._on_checkpoint(number, ordinals.size, 0.0)\n"
        ),
        caught_by=(f"{_INFERENCE}::test_a_checkpoint_is_announced_once_it_is_durable_and_never_if_it_failed",),
    ),
    Mutant(
        name="failed-checkpoint-announced",
        module="inference.runner",
        before="        if not written.cancelled() and written.exception() is None:\n",
        after="        if True:\n",
        caught_by=(f"{_INFERENCE}::test_a_checkpoint_is_announced_once_it_is_durable_and_never_if_it_failed",),
    ),
    Mutant(
        name="rows-that-are-not-finite-accepted",
        module="inference.callbacks",
        before="        raise NumericalInstabilityError(\n",
        after="        NumericalInstabilityError(\n",
        caught_by=(f"{_RUNNER}::test_a_row_that_is_not_finite_is_an_error_that_names_it",),
    ),
    Mutant(
        name="stop-ignored-by-the-loop",
        module="inference.runner",
        before="                if listener.should_stop():\n",
        after="                if False:\n",
        caught_by=(f"{_INFERENCE}::test_a_stop_is_heeded_after_the_batch_and_its_rows_are_kept",),
    ),
    Mutant(
        name="sigterm-ignored-by-the-worker",
        module="worker.attempt",
        before="            os._exit(ExitCode.STOPPED)\n        self._is_set = True\n",
        after="            os._exit(ExitCode.STOPPED)\n",
        caught_by=(f"{_WORKER}::test_sigterms_are_one_request_for_eight_seconds_and_then_they_hurry",),
    ),
    Mutant(
        name="late-sigterm-ignored-by-the-worker",
        module="worker.attempt",
        before="        if self._requests.hear() == Request.HURRY:\n",
        after="        if False:\n",
        caught_by=(f"{_WORKER}::test_sigterms_are_one_request_for_eight_seconds_and_then_they_hurry",),
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
        caught_by=("tests/unit/worker/test_liveness.py::test_a_clock_that_stood_still_is_not_silence",),
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
        before='            self._events.send("alive")\n',
        after="            pass\n",
        caught_by=(f"{_WORKER}::test_a_pass_gives_signs_of_life_at_its_layers_once_a_second_at_most",),
    ),
    Mutant(
        name="repeated-sigterm-taken-for-haste",
        module="worker.stop_signals",
        before="now_s - self._asked_at_s >= HURRY_AFTER_S",
        after="True",
        caught_by=(f"{_WORKER}::test_sigterms_are_one_request_for_eight_seconds_and_then_they_hurry",),
    ),
)

_ASSEMBLY = (
    Mutant(
        name="rows-placed-by-arrival",
        module="run.buckets",
        before="            for block in self._blocks(np.argsort(ascending)):\n",
        after="            for block in self._blocks(np.arange(ordinals.size)):\n",
        caught_by=(f"{_ASSEMBLY_TESTS}::test_every_row_is_that_of_its_own_sequence_in_input_order",),
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
        module="run.resume",
        before='    if not layout.is_fixed and checkpoint.metadata.get("offsets") != offsets.tolist():\n',
        after="    if False:\n",
        caught_by=(f"{_LAYOUTS}::test_rows_of_other_widths_than_the_sequences_are_damage",),
    ),
    Mutant(
        name="offsets-that-do-not-ascend-accepted",
        module="checkpoint.file",
        before="    ascends = all(start < stop for start, stop in pairwise(offsets))\n",
        after="    ascends = True\n",
        caught_by=(f"{_RAGGED}::test_offsets_that_do_not_fit_the_values_are_damage",),
    ),
    Mutant(
        name="windows-counted-once-for-each-residue",
        module="model.windows",
        before="            share = 1 / (_num_windows_over(spans, length) * length)\n",
        after="            share = np.full(length, 1 / length)\n",
        caught_by=("tests/unit/model/test_windows.py::test_windows_come_to_what_is_reckoned_by_hand",),
    ),
    Mutant(
        name="copies-not-fanned-out",
        module="run.assembly",
        before="ordinals, sources = copies.fan_out(record.ordinals[rows])",
        after="ordinals, sources = record.ordinals[rows], np.arange(rows.size)",
        caught_by=(f"{_ASSEMBLY_TESTS}::test_every_row_is_that_of_its_own_sequence_in_input_order",),
    ),
    Mutant(
        name="copies-given-anothers-row",
        module="run.buckets",
        before="return targets[ascending], sources[ascending]",
        after="return targets[ascending], sources",
        caught_by=(f"{_ASSEMBLY_TESTS}::test_every_row_is_that_of_its_own_sequence_in_input_order",),
    ),
    Mutant(
        name="ordinal-of-two-checkpoints-taken-twice",
        module="run.assembly",
        before="rows = np.flatnonzero(~is_placed[record.ordinals])",
        after="rows = np.arange(record.ordinals.size)",
        caught_by=(f"{_ASSEMBLY_TESTS}::test_of_two_checkpoints_of_one_ordinal_the_first_by_shard_and_number_counts",),
    ),
    Mutant(
        name="missing-ordinals-accepted",
        module="run.assembly",
        before="    is_covered = is_computed[plan.representatives]\n",
        after="    is_covered = is_computed[plan.representatives] | ~is_quarantined\n",
        caught_by=(f"{_ASSEMBLY_TESTS}::test_missing_sequences_are_counted_and_ten_are_named",),
    ),
    Mutant(
        name="ordinals-of-a-part-not-counted",
        module="run.assembly",
        before="    if not np.array_equal(ordinals, expected):\n",
        after="    if False:\n",
        caught_by=(
            f"{_ASSEMBLY_TESTS}::test_an_ordinal_that_comes_back_twice_in_the_place_of_another_makes_no_dataset",
        ),
    ),
    Mutant(
        name="ids-of-a-checkpoint-not-compared-with-the-plan",
        module="run.resume",
        before="    if checkpoint.sequence_ids != plan.ids(record.ordinals):\n",
        after="    if False:\n",
        caught_by=(f"{_ASSEMBLY_TESTS}::test_a_checkpoint_that_gives_rows_other_ids_makes_no_dataset",),
    ),
    Mutant(
        name="quarantined-and-computed-accepted",
        module="run.assembly",
        before='    _refuse_ordinals(plan, is_covered & is_quarantined, "are in quarantine and yet in a checkpoint")\n',
        after="",
        caught_by=(f"{_ASSEMBLY_TESTS}::test_a_sequence_both_computed_and_in_quarantine_is_refused",),
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
        after="                require_own_parts(paths)\n                shutil.rmtree(paths.embeddings_dir, ignore_errors=True)\n",
        caught_by=(f"{_ASSEMBLY_TESTS}::test_what_float16_cannot_hold_leaves_the_old_dataset_as_it_was",),
    ),
    Mutant(
        name="dataset-without-checkpoints-not-looked-at",
        module="run.run",
        before="        if self.checkpoints().valid:\n            return None\n        return whole",
        after="        return None\n        return whole",
        caught_by=("tests/unit/test_api.py::test_a_whole_dataset_is_enough_where_its_checkpoints_are_deleted",),
    ),
    Mutant(
        name="input-that-is-gone-missed",
        module="plan.planner",
        before="    if not is_input_gone(paths, fasta):\n        return None\n",
        after="    return None\n",
        caught_by=("tests/unit/run/test_run.py::test_a_run_goes_on_where_its_input_is_gone",),
    ),
    Mutant(
        name="plan-of-another-policy-taken-for-input-that-is-gone",
        module="plan.planner",
        before="    _require_same_identity(paths, stored, _identity_of(model, policy) | of_the_sequences)\n",
        after="",
        caught_by=(
            "tests/unit/run/test_run.py::test_input_that_is_gone_is_missed_where_the_plan_is_not_what_is_asked_for",
        ),
    ),
    Mutant(
        name="lengths-before-the-cut-not-told-apart",
        module="plan.planner",
        before=" or not is_cut_alike:",
        after=":",
        caught_by=(f"{_ASSEMBLY_TESTS}::test_the_same_cut_sequences_of_longer_ones_are_another_input",),
    ),
    Mutant(
        name="everything-moved-aside",
        module="run.ownership",
        before="    own = _own_entries(paths)\n",
        after="    own = sorted({*paths.run_dir.iterdir()} - {paths.run_lock})\n",
        caught_by=("tests/unit/run/test_ownership.py::test_a_forced_restart_moves_what_is_a_runs_and_nothing_else",),
    ),
    Mutant(
        name="superseded-numbered-by-count",
        module="run.ownership",
        before="{max(earlier, default=0) + 1}",
        after="{len(earlier) + 1}",
        caught_by=("tests/unit/run/test_ownership.py::test_a_forced_restart_counts_from_the_highest",),
    ),
    Mutant(
        name="parts-of-others-not-looked-for",
        module="run.assembly",
        before="                require_own_parts(paths)\n",
        after="",
        caught_by=(f"{_ASSEMBLY_TESTS}::test_a_parquet_file_of_somebody_else_is_never_removed_and_never_mixed_in",),
    ),
    Mutant(
        name="replaced-dataset-forgotten",
        module="run.assembly",
        before="            _give_back(paths)\n    shutil",
        after="            pass\n    shutil",
        caught_by=(f"{_ASSEMBLY_TESTS}::test_killed_at_any_operation_the_old_dataset_or_the_new_one_is_there_whole",),
    ),
    Mutant(
        name="bucket-not-compared-with-what-was-written",
        module="run.buckets",
        before=" or self._read(path, rows, ordinals, ascending) != self._crc32[part]:\n",
        after=" or not self._read(path, rows, ordinals, ascending):\n",
        caught_by=(f"{_ASSEMBLY_TESTS}::test_a_bucket_that_does_not_give_back_its_bytes_is_noticed",),
    ),
    Mutant(
        name="parts-not-compared-with-success",
        module="dataset.reader",
        before='digest.sha256 == part["sha256"]',
        after="digest.sha256",
        caught_by=(f"{_DATASET}::test_a_flipped_bit_is_found_by_verify_and_never_changes_a_row",),
    ),
)

_SET_ASIDE = (
    Mutant(
        name="dataset-of-a-dead-writer-not-synced",
        module="run.assembly",
        before="        _sync_names(paths)  # whoever",
        after="        # whoever",
        caught_by=(f"{_ASSEMBLY_TESTS}::test_a_dataset_that_is_there_is_made_durable_before_it_is_called_whole",),
    ),
    Mutant(
        name="set-aside-twice",
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
        name="set-aside-without-the-lock",
        module="checkpoint.quarantine",
        before="        with self._lock.held(timeout_s=LOCK_TIMEOUT_S):\n            held, others = self._read()\n            present",
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
        name="weights-that-are-not-finite-loaded",
        module="model.weights",
        before="        tensors = _each_finite(tensors, weights.path, dtype)\n",
        after="        pass\n",
        caught_by=(f"{_WEIGHTS}::test_weights_that_are_not_finite_are_refused_by_the_name_of_the_parameter",),
    ),
    Mutant(
        name="another-runs-quarantine-believed",
        module="checkpoint.quarantine",
        before="if sequence.fingerprint != self._fingerprint:\n                others",
        after="if False:\n                others",
        caught_by=(f"{_QUARANTINE}::test_what_another_run_has_set_aside_counts_for_nothing",),
    ),
    Mutant(
        name="rows-that-are-not-finite-set-aside-at-once",
        module="worker.attempt",
        before="                if result.sequence_ids:\n                    listener.set_aside()\n",
        after="                listener.set_aside()\n",
        caught_by=(
            f"{_WORKER}::test_a_device_that_gives_no_finite_row_any_more_ends_the_attempt_and_blames_no_protein",
        ),
    ),
    Mutant(
        name="missing-rows-not-told-apart",
        module="run.assembly",
        before='"missing_sha256": _ordinals_sha256(is_missing),',
        after='"missing_sha256": _ordinals_sha256(np.zeros_like(is_missing)),',
        caught_by=(f"{_ASSEMBLY_TESTS}::test_a_partial_dataset_is_left_as_it_is_until_other_rows_are_missing",),
    ),
    Mutant(
        name="partial-dataset-taken-for-complete",
        module="run.assembly",
        before="        is_same = content.items() <= read_success(paths.embeddings_dir).items()\n",
        after='        is_same = content["fingerprint"] == read_success(paths.embeddings_dir)["fingerprint"]\n',
        caught_by=(
            f"{_ASSEMBLY_TESTS}::test_after_a_partial_dataset_a_complete_run_makes_the_one_that_it_would_have_made",
        ),
    ),
    Mutant(
        name="complete-dataset-replaced-by-a-partial-one",
        module="run.assembly",
        before="if not _is_complete(plan, paths, is_quarantined):",
        after="if True:",
        caught_by=(f"{_ASSEMBLY_TESTS}::test_a_partial_dataset_never_takes_the_place_of_a_complete_one",),
    ),
    Mutant(
        name="quarantined-counted-as-to-compute",
        module="report.verify",
        before="(~is_done & ~is_set_aside)[ordinals]",
        after="(~is_done)[ordinals]",
        caught_by=(f"{_VERIFY}::test_sequences_in_quarantine_are_accounted_for_and_counted_with_their_copies",),
    ),
)

_CURES = (
    Mutant(
        name="last-piece-of-a-split-batch-lost",
        module="model.tokens",
        before="pairwise(boundaries)]",
        after="list(pairwise(boundaries))[:-1]]",
        caught_by=(f"{_EMBEDDER}::test_a_batch_that_does_not_fit_is_computed_in_pieces_row_for_row",),
    ),
    Mutant(
        name="budget-not-lowered-by-a-lack-of-memory",
        module="inference.token_budget",
        before="        self._set(max(1, num_tokens // 2))\n",
        after="        self._set(max(1, num_tokens - 1))\n",
        caught_by=(
            "tests/unit/plan/test_packing.py::test_a_budget_halves_what_did_not_fit_and_grows_back_to_its_limit",
        ),
    ),
    Mutant(
        name="too-large-sequences-passed-over-in-silence",
        module="inference.runner",
        before="        _refuse(too_large)\n",
        after="",
        caught_by=(f"{_INFERENCE}::test_a_sequence_that_does_not_fit_is_named_at_the_end_and_all_others_are_kept",),
    ),
    Mutant(
        name="masks-of-unlike-length-mixed-up",
        module="inference.executor",
        before="not_finite=_those(batch, _within(fits, ~is_finite)),",
        after="not_finite=_those(batch, ~_within(fits, is_finite)),",
        caught_by=(f"{_EMBEDDER}::test_rows_that_do_not_fit_and_rows_that_are_not_finite_in_one_batch",),
    ),
    Mutant(
        name="mended-row-in-another-place",
        module="inference.executor",
        before="            views[row].copy_(self._exactly(",
        after="            views[-1].copy_(self._exactly(",
        caught_by=(f"{_EMBEDDER}::test_the_row_of_a_more_exact_model_takes_its_place_and_no_others",),
    ),
    Mutant(
        name="mended-row-taken-to-be-finite",
        module="inference.executor",
        before="            is_finite[row] = torch.isfinite(views[row]).all()\n",
        after="            is_finite[row] = True\n",
        caught_by=(f"{_EMBEDDER}::test_a_row_that_stays_not_finite_is_told_apart",),
    ),
    Mutant(
        name="batches-by-the-memory-of-the-day",
        module="run.resolve",
        before="    if (kept := kept_token_budget(RunPaths(config.output_dir))) is not None:\n        return kept\n",
        after="",
        caught_by=(f"{_RUN}::test_a_run_on_a_gpu_keeps_its_batches_when_other_memory_is_free",),
    ),
    Mutant(
        name="activations-reckoned-too-small",
        module="inference.gpu_memory",
        before="_WIDTHS_OF_A_LAYER = 10\n",
        after="_WIDTHS_OF_A_LAYER = 9\n",
        caught_by=(f"{_GPU_MEMORY}::test_a_forward_pass_holds_what_is_reckoned",),
    ),
    Mutant(
        name="suspects-not-alone",
        module="run.resume",
        before="    is_suspect[[*suspects, *deferred]] = True\n",
        after="",
        caught_by=(f"{_WORKER}::test_suspects_come_first_and_alone_and_what_is_in_quarantine_not_at_all",),
    ),
    Mutant(
        name="quarantined-computed-again",
        module="run.resume",
        before="    is_done[list(Quarantine.of(plan, paths).ordinals())] = True\n",
        after="",
        caught_by=(f"{_WORKER}::test_suspects_come_first_and_alone_and_what_is_in_quarantine_not_at_all",),
    ),
    Mutant(
        name="strikes-counted-by-the-number-of-a-batch",
        module="worker.retry",
        before='return "batch", failure.batch_sha256 or failure.batch_idx',
        after='return "batch", failure.batch_idx',
        caught_by=(f"{_JUDGEMENT}::test_a_strike_counts_for_the_sequences_of_a_batch_and_not_for_its_number",),
    ),
    Mutant(
        name="strikes-at-several-sequences-added-up",
        module="worker.retry",
        before='        return "sequence", failure.ordinal, failure.is_silence\n',
        after='        return "sequence", 0\n',
        caught_by=(f"{_JUDGEMENT}::test_strikes_at_several_sequences_do_not_add_up",),
    ),
    Mutant(
        name="strikes-pushed-out-by-preemptions",
        module="checkpoint.manifest",
        before="strikes[-most:] + others[-most:]",
        after="(strikes + others)[-most:]",
        caught_by=(f"{_JUDGEMENT}::test_a_thousand_preemptions_push_no_strike_out",),
    ),
    Mutant(
        name="harmless-sequence-accused-in-the-devices-place",
        module="inference.executor",
        before='{error}") from error.__cause__\n',
        after='{error}") from error\n',
        caught_by=(f"{_EMBEDDER}::test_a_device_that_fails_at_a_harmless_sequence_is_what_is_broken",),
    ),
    Mutant(
        name="broken-device-blamed-on-a-sequence",
        module="failures",
        before="    if cause in _SUSPICIOUS and is_probing:\n",
        after="    if False:\n",
        caught_by=("tests/unit/test_failures.py::test_a_child_that_dies_of_a_harmless_sequence_has_a_broken_device",),
    ),
    Mutant(
        name="progress-forgets-nothing",
        module="worker.recovery",
        before=' and record.get("num_done", num_done) == num_done)',
        after=")",
        caught_by=(f"{_JUDGEMENT}::test_which_failures_still_count",),
    ),
)

_EXPORTS = (
    Mutant(
        name="exported-directory-not-synced",
        module="storage.durable",
        before="        _fsync_tree(temporary)\n",
        after="",
        caught_by=(f"{_FILES}::TestDurableDirectory::test_it_appears_with_all_that_is_in_it_once_that_is_synced",),
    ),
    Mutant(
        name="exported-directory-left-half-written",
        module="storage.durable",
        before="        shutil.rmtree(temporary, ignore_errors=True)\n        raise\n",
        after="        raise\n",
        caught_by=(f"{_FILES}::TestDurableDirectory::test_a_failure_anywhere_before_it_is_there_leaves_nothing",),
    ),
    Mutant(
        name="exported-ids-beside-the-matrix-of-another-export",
        module="dataset.formats.numpy_files",
        before="        if replace and path.exists():\n",
        after="        if False:\n",
        caught_by=(f"{_EXPORT}::test_a_matrix_never_stands_beside_the_ids_of_another",),
    ),
    Mutant(
        name="export-out-of-its-directory",
        module="storage.durable",
        before='if any(part in ("", ".", "..") for part in parts):',
        after='if any(part in ("", ".") for part in parts):',
        caught_by=(f"{_EXPORT}::test_a_header_that_is_no_file_name_below_the_directory_is_refused",),
    ),
    Mutant(
        name="infinite-float16-exported",
        module="dataset.formats.base",
        before="        if not is_finite.all():\n",
        after="        if False:\n",
        caught_by=(f"{_EXPORT}::test_what_float16_cannot_hold_is_an_error_that_names_the_sequence",),
    ),
    Mutant(
        name="infinite-float16-in-the-dataset",
        module="run.assembly",
        before="    bad = _not_finite(plan, layout, ordinals, values)\n",
        after="    bad = ordinals[:0]\n",
        caught_by=(f"{_ASSEMBLY_TESTS}::test_what_float16_cannot_hold_is_named_and_what_was_computed_is_there",),
    ),
    Mutant(
        name="dataset-of-another-precision-taken-for-the-one-that-is-wanted",
        module="run.assembly",
        before='        "store_dtype": plan.store_dtype,\n',
        after="",
        caught_by=(
            f"{_ASSEMBLY_TESTS}::test_a_dataset_in_float16_takes_the_place_of_one_in_float32_and_is_then_left_as_it_is",
        ),
    ),
    Mutant(
        name="virnucpro-file-missing",
        module="dataset.formats.torch_files",
        before="            if not target.exists():\n",
        after="            if False:\n",
        caught_by=(f"{_EXPORT}::test_virnucpro_gets_a_file_too_where_all_that_belongs_into_it_is_in_quarantine",),
    ),
    Mutant(
        name="full-disk-not-noticed-by-hdf5",
        module="dataset.formats.hdf5",
        before="            file.require_sound()\n\n\ndef write_hdf5(",
        after="            pass\n\n\ndef write_hdf5(",
        caught_by=("tests/unit/dataset/test_hdf5.py::test_what_failed_is_raised_as_the_file_is_closed_at_the_latest",),
    ),
    Mutant(
        name="force-removes-anything",
        module="dataset.export",
        before="    if taken and not chosen.suffixes and not _is_export(path):\n",
        after="    if False:\n",
        caught_by=(f"{_EXPORT}::test_force_removes_nothing_that_is_no_export",),
    ),
)

_INPUT = (
    Mutant(
        name="punctuation-read-as-residues",
        module="inputs.characters",
        before="    return class_of(character).map == Treatment.UNKNOWN\n",
        after="    return class_of(character).error == Treatment.REFUSED\n",
        caught_by=("tests/unit/inputs/test_characters.py::test_a_file_is_treated_as_the_table_says",),
    ),
    Mutant(
        name="records-after-compressed-data-dropped",
        module="inputs.decompression",
        before="            _require_nothing_of_worth(data, file, kind)\n",
        after="",
        caught_by=("tests/unit/inputs/test_files.py::TestCompression::test_records_that_follow_are_never_dropped",),
    ),
    Mutant(
        name="line-cut-where-a-block-ends",
        module="inputs.fasta",
        before="        pieces = [block[stop:]]\n",
        after="        pieces = []\n",
        caught_by=(
            "tests/unit/inputs/test_files.py::TestEncodings::test_line_ends_are_seen_where_blocks_of_the_file_end",
        ),
    ),
    Mutant(
        name="byte-order-mark-taken-for-an-id",
        module="inputs.records",
        before="    if not joined.isascii() or _INVISIBLE.decode() in joined:\n",
        after="    if False:\n",
        caught_by=("tests/unit/inputs/test_characters.py::test_the_id_is_the_first_word_of_a_header",),
    ),
    Mutant(
        name="records-at-fault-left-out-unasked",
        module="inputs.reader",
        before="        if chunk.refused:\n",
        after="        if False:\n",
        caught_by=(f"{_FASTA}::test_a_bad_record_is_refused_by_file_line_and_id",),
    ),
    Mutant(
        name="changed-file-not-noticed",
        module="inputs.files",
        before="    if (after.st_size, after.st_mtime_ns) != (before.st_size, before.st_mtime_ns):\n",
        after="    if False:\n",
        caught_by=(f"{_FASTA}::test_a_file_that_is_being_written_is_refused_at_its_end",),
    ),
    Mutant(
        name="other-standard-input-taken-for-the-same",
        module="inputs.standard_input",
        before="                if block != kept.read(len(block)):\n",
        after="                if not kept.read(len(block)):\n",
        caught_by=(
            "tests/unit/inputs/test_reader.py::TestStandardInput::"
            "test_other_input_in_the_same_run_is_refused_and_what_is_kept_stays",
        ),
    ),
    Mutant(
        name="renamed-to-an-id-of-the-input",
        module="inputs.duplicates",
        before="            if place == self._taken.size or self._taken[place] != half:\n",
        after="            if True:\n",
        caught_by=("tests/unit/inputs/test_duplicates.py::test_no_two_ids_are_equal_and_those_that_occur_once_stay",),
    ),
    Mutant(
        name="column-names-for-proteins",
        module="inputs.in_memory",
        before="    if names is not None:\n        return _with_ids",
        after="    if False:\n        return _with_ids",
        caught_by=("tests/unit/inputs/test_in_memory.py::test_each_row_is_that_of_the_sequence_with_its_id",),
    ),
    Mutant(
        name="series-without-its-index",
        module="inputs.in_memory",
        before="zip(_listed(given.index), values, strict=True)",
        after="enumerate(values)",
        caught_by=("tests/unit/inputs/test_in_memory.py::test_a_filtered_series_keeps_the_ids_of_its_index",),
    ),
    Mutant(
        name="overlaps-of-chunks-rounded-down",
        module="inputs.translation",
        before=" - min(index, num_longer)",
        after="",
        caught_by=("tests/unit/inputs/test_translation.py::test_chunks_overlap_evenly",),
    ),
)

_CODE = (
    Mutant(
        name="worker-of-any-code",
        module="software",
        before='starter.get("code_sha256") == ours.code_sha256',
        after='"code_sha256" in starter',
        caught_by=(f"{_SOFTWARE}::test_a_job_of_other_code_is_refused",),
    ),
    Mutant(
        name="worker-by-its-name",
        module="worker.supervisor",
        before='"-P", str(Path(__file__).with_name("__main__.py").absolute())',
        after='"-m", "vnp_lib.worker"',
        caught_by=(f"{_SUPERVISOR}::test_a_child_imports_nothing_from_the_current_directory",),
    ),
    Mutant(
        name="numbers-of-two-versions-mixed",
        module="run.resolve",
        before="numerics=None if NUMERICS_VERSION == 1 else NUMERICS_VERSION,",
        after="numerics=None,",
        caught_by=(f"{_RUN}::test_an_upgrade_in_the_middle_of_a_run_is_allowed_while_the_numbers_are_the_same",),
    ),
    Mutant(
        name="any-signal-accuses",
        module="failures",
        before="_SIGNAL_CAUSES.get(signum, FailureCause.KILLED)",
        after="_SIGNAL_CAUSES.get(signum, FailureCause.SILENT_EXIT)",
        caught_by=(f"{_FAILURES}::test_of_all_signals_only_those_of_a_crash_accuse_a_protein",),
    ),
    Mutant(
        name="empty-entry-of-the-path-kept",
        module="environment",
        before='filter(None, inherited.pop("PYTHONPATH", "").split(os.pathsep))',
        after='inherited.pop("PYTHONPATH", "").split(os.pathsep)',
        caught_by=(f"{_SUPERVISOR}::test_a_child_imports_nothing_from_the_current_directory",),
    ),
)

_PATHS = (
    Mutant(
        name="a-comma-always-divides",
        module="user_paths",
        before="range(most, 1, -1)",
        after="range(1, 1, -1)",
        caught_by=("tests/unit/test_user_paths.py::TestSeveralPaths::test_a_name_that_has_a_comma_in_it_is_that_file",),
    ),
    Mutant(
        name="a-file-given-twice-is-read-twice",
        module="inputs.sources",
        before="        if before is source:\n",
        after="        if True:\n",
        caught_by=("tests/unit/inputs/test_sources.py::TestTwice::test_another_name_of_the_same_file_is_refused",),
    ),
    Mutant(
        name="nothing-is-said-of-what-is-left-out",
        module="run.directory",
        before="    for told in describe_left_out(config.fasta):\n",
        after="    for told in []:\n",
        caught_by=("tests/unit/inputs/test_sources.py::TestTold::test_a_run_says_it_before_anything_is_made",),
    ),
    Mutant(
        name="weights-are-not-looked-at-before-a-run",
        module="run.directory",
        before="        require_own_parts(paths)\n    look_at_model(config)\n",
        after="        require_own_parts(paths)\n",
        caught_by=(
            "tests/unit/model/test_weights_look.py::test_what_are_no_weights_is_refused_by_all_in_the_same_sentence",
        ),
    ),
)

_SHOWN = (
    Mutant(
        name="letters-that-an-encoding-lacks-raise",
        module="streams",
        before='(stream.encoding or "utf-8")("backslashreplace")',
        after='(stream.encoding or "utf-8")("strict")',
        caught_by=(f"{_STREAMS}::test_letters_that_an_encoding_lacks_are_written_in_its_own",),
    ),
    Mutant(
        name="a-paused-reader-stalls-the-run",
        module="streams",
        before="self._patience_s * 1000 if self._was_writable else 0",
        after="None",
        caught_by=(f"{_STREAMS}::test_a_reader_that_takes_nothing_costs_the_text_and_not_the_time",),
    ),
)

MUTANTS = (
    *_INPUT,
    *_PATHS,
    *_DURABLE_FILES,
    *_LOCKS,
    *_WRITER,
    *_READER,
    *_RESUME,
    *_LOOP,
    *_ASSEMBLY,
    *_SET_ASIDE,
    *_CURES,
    *_EXPORTS,
    *_CODE,
    *_SHOWN,
)
