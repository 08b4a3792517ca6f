"""Mutants of `vnp_lib/storage/`."""

from __future__ import annotations

from tests.mutants.mutant import Mutant

_CHECKPOINT_FILE = "tests/unit/checkpoint/test_file.py"
_CHECKPOINT_SURVEY = "tests/unit/checkpoint/test_survey.py"
_EXPORT = "tests/unit/dataset/test_export.py"
_FILES = "tests/unit/storage/test_durable.py"
_LOCKS = "tests/unit/storage/test_locks.py"
_MANIFEST = "tests/unit/test_checkpoint_manifest.py"
_PLAN = "tests/unit/plan/test_plan.py"

MUTANTS = (
    Mutant(
        name="file-not-synced",
        module="storage.durable",
        before="            ops.fsync(fd)\n            written = os.fstat(fd)\n",
        after="            written = os.fstat(fd)\n",
        caught_by=(f"{_FILES}::TestDurableFile::test_file_and_directory_are_synced_in_order",),
    ),
    Mutant(
        name="directory-not-synced",
        module="storage.durable",
        before="        ops.unlink(temporary)\n        fsync_directory(path.parent)\n",
        after="        ops.unlink(temporary)\n",
        caught_by=(f"{_FILES}::TestDurableFile::test_file_and_directory_are_synced_in_order",),
    ),
    Mutant(
        name="directory-not-synced-after-replace",
        module="storage.durable",
        before="        ops.replace(temporary, path)\n        fsync_directory(path.parent)\n",
        after="        ops.replace(temporary, path)\n",
        caught_by=(f"{_FILES}::TestDurableFile::test_file_and_directory_are_synced_in_order",),
    ),
    Mutant(
        name="new-directory-not-synced",
        module="storage.durable",
        before="        fsync_directory(path.parent)\n\n\ndef fsync_directory",
        after="        pass\n\n\ndef fsync_directory",
        caught_by=(f"{_FILES}::TestDirectories::test_missing_parents_are_created_and_synced",),
    ),
    Mutant(
        name="fsync-retried-on-its-descriptor",
        module="storage.durable",
        before="            ops.fsync(fd)\n            written = os.fstat(fd)\n",
        after=(
            "            try:\n"
            "                ops.fsync(fd)\n"
            "            except OSError:\n"
            "                ops.fsync(fd)\n"
            "            written = os.fstat(fd)\n"
        ),
        caught_by=(f"{_FILES}::TestDurableFile::test_a_failed_fsync_is_not_retried",),
    ),
    Mutant(
        name="short-write-taken-for-whole",
        module="storage.durable",
        before="            while view:\n                written = ops.write",
        after="            if view:\n                written = ops.write",
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
        before=(
            "            if file.error is not None:\n"
            "                raise file.error\n"
            "            ops"
        ),
        after="            ops",
        caught_by=(
            f"{_FILES}::TestDurableFile::test_a_failed_write_is_raised_even_if_a_library_hides_it",
        ),
    ),
    Mutant(
        name="temporary-left-after-an-error",
        module="storage.durable",
        before=(
            "        with suppress(OSError):\n"
            "            ops.unlink(temporary)\n"
            "        if file.error"
        ),
        after="        if file.error",
        caught_by=(f"{_FILES}::TestDurableFile::test_an_error_in_the_block_leaves_nothing",),
    ),
    Mutant(
        name="failed-publication-left-in-place",
        module="storage.durable",
        before=(
            "            with suppress(OSError):\n                ops.unlink(path)\n        raise"
        ),
        after="            pass\n        raise",
        caught_by=(f"{_FILES}::TestDurableFile::test_a_failed_publication_leaves_no_file",),
    ),
    Mutant(
        name="rename-over-anothers-file",
        module="storage.durable",
        before="    if replace:\n        ops.replace",
        after="    if True:\n        ops.replace",
        caught_by=(f"{_FILES}::TestDurableFile::test_an_existing_file_is_never_overwritten",),
    ),
    Mutant(
        name="shared-temporary-name",
        module="storage.durable",
        before="writer.started_at, uuid.uuid4().hex[:8])",
        after='writer.started_at, "00000000")',
        caught_by=(f"{_FILES}::TestDurableFile::test_two_writers_have_different_temporary_files",),
    ),
    Mutant(
        name="temporary-of-another-written-to",
        module="storage.durable",
        before="fd = ops.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY",
        after="fd = ops.open(temporary, os.O_CREAT | os.O_WRONLY",
        caught_by=(
            f"{_FILES}::TestDurableFile::test_an_existing_temporary_file_is_never_written_to",
        ),
    ),
    Mutant(
        name="links-followed",
        module="storage.durable",
        before=" | os.O_NOFOLLOW",
        after="",
        caught_by=(f"{_LOCKS}::test_a_link_instead_of_the_lock_file_is_not_followed",),
    ),
    Mutant(
        name="temporaries-removed-blindly",
        module="storage.durable",
        before="        if is_orphaned:\n",
        after="        if True:\n",
        caught_by=(
            f"{_FILES}::TestOrphanedTemporaries::test_only_files_of_ended_writers_are_removed",
        ),
    ),
    Mutant(
        name="file-system-without-links-used",
        module="storage.file_system",
        before='            (self.link, "has no hard links',
        after='            (None, "has no hard links',
        caught_by=(
            "tests/unit/storage/test_file_system.py::"
            "test_a_run_is_refused_before_anything_is_created",
        ),
    ),
    Mutant(
        name="what-nobody-can-read-written",
        module="storage.durable",
        before="after])\n    if len(data) > MAX_JSON_BYTES:\n",
        after="after])\n    if False:\n",
        caught_by=(
            f"{_FILES}::TestSealedJson::test_an_object_too_large_to_be_read_is_not_written",
        ),
    ),
    Mutant(
        name="temporaries-of-the-living-removed",
        module="storage.durable",
        before="return not writer.is_alive() if writer.is_visible() else None",
        after="return True if writer.is_visible() else None",
        caught_by=(
            f"{_FILES}::TestDurableFile::test_the_temporary_file_of_a_killed_writer_is_removed",
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
    Mutant(
        name="lock-not-taken",
        module="storage.locks",
        before="return durable.ops.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)",
        after="return None",
        caught_by=(f"{_LOCKS}::test_a_failed_acquire_leaves_the_lock_usable",),
    ),
    Mutant(
        name="lock-file-unlinked",
        module="storage.locks",
        before="            durable.ops.flock(fd, fcntl.LOCK_UN)\n",
        after=(
            "            durable.ops.unlink(self.path)\n"
            "            durable.ops.flock(fd, fcntl.LOCK_UN)\n"
        ),
        caught_by=(f"{_MANIFEST}::test_the_lock_file_is_never_removed",),
    ),
    Mutant(
        name="lock-kept-after-release",
        module="storage.locks",
        before=(
            "            durable.ops.flock(fd, fcntl.LOCK_UN)\n"
            "        finally:\n"
            "            try:\n"
            "                durable.ops.close(fd)\n"
        ),
        after="            pass\n        finally:\n            try:\n                pass\n",
        caught_by=(f"{_LOCKS}::test_a_failed_acquire_leaves_the_lock_usable",),
    ),
    Mutant(
        name="threads-not-kept-apart",
        module="storage.locks",
        before="self._between_threads = threading.Lock()",
        after="self._between_threads = threading.Semaphore(99)",
        caught_by=(f"{_LOCKS}::test_threads_exclude_each_other_if_flock_is_per_process",),
    ),
    Mutant(
        name="lock-inherited-by-processes",
        module="storage.locks",
        before="            fd = durable.ops.open(self.path, os.O_RDWR | os.O_CREAT)\n",
        after=(
            "            fd = durable.ops.open(self.path, os.O_RDWR | os.O_CREAT)\n"
            "            os.set_inheritable(fd, True)\n"
        ),
        caught_by=(f"{_LOCKS}::test_a_subprocess_of_the_holder_does_not_inherit_it",),
    ),
    Mutant(
        name="lock-waited-for-without-limit",
        module="storage.locks",
        before="                if self._clock() >= deadline_s:\n",
        after="                if self._clock() >= deadline_s + 3600:\n",
        caught_by=(f"{_LOCKS}::test_waiting_ends_at_the_time_limit",),
    ),
    Mutant(
        name="lock-without-a-holders-name",
        module="storage.locks",
        before="                self._sign(fd)\n",
        after="",
        caught_by=(f"{_LOCKS}::test_another_holder_is_named_until_it_releases",),
    ),
    Mutant(
        name="temporary-marker-trusted",
        module="storage.durable",
        before="    marker = marker_path(path)\n    fields = read_sealed_json(marker)\n",
        after=(
            "    marker = next(path.parent.glob(f'.tmp-{path.name}.done*'), marker_path(path))\n"
            "    fields = read_sealed_json(marker)\n"
        ),
        caught_by=(
            f"{_CHECKPOINT_SURVEY}::test_what_a_killed_writer_left_unpublished_is_not_read",
        ),
    ),
    Mutant(
        name="move-not-synced",
        module="storage.durable",
        before="    fsync_directory(target.parent)\n    fsync_directory(source.parent)\n",
        after="    fsync_directory(target.parent)\n",
        caught_by=(f"{_CHECKPOINT_FILE}::test_the_marker_is_moved_before_its_file",),
    ),
    Mutant(
        name="exported-directory-not-synced",
        module="storage.durable",
        before=(
            "        for parent, _, names in os.walk(temporary):\n"
            "            for name in names:\n"
            "                _fsync_file(Path(parent, name))\n"
            "            fsync_directory(Path(parent))\n"
        ),
        after="",
        caught_by=(f"{_FILES}::TestDurableDirectory::test_it_appears_once_its_content_is_synced",),
    ),
    Mutant(
        name="exported-directory-left-half-written",
        module="storage.durable",
        before="        shutil.rmtree(temporary, ignore_errors=True)\n        raise\n",
        after="        raise\n",
        caught_by=(
            f"{_FILES}::TestDurableDirectory::test_a_failure_before_it_appears_leaves_nothing",
        ),
    ),
    Mutant(
        name="export-out-of-its-directory",
        module="storage.durable",
        before='if any(part in ("", ".", "..") for part in parts):',
        after='if any(part in ("", ".") for part in parts):',
        caught_by=(f"{_EXPORT}::test_a_header_that_leads_out_of_the_directory_is_refused",),
    ),
)
