"""Mutants of the modules directly below `vnp_lib/`."""

from __future__ import annotations

from tests.mutants.mutant import Mutant

_FAILURES = "tests/unit/test_failures.py"
_FILES = "tests/unit/storage/test_durable.py"
_SOFTWARE = "tests/unit/test_software.py"
_STREAMS = "tests/unit/test_streams.py"
_SUPERVISOR = "tests/integration/test_supervisor.py"

MUTANTS = (
    Mutant(
        name="reused-process-id-taken-for-the-writer",
        module="processes",
        before=" or started_at == self.started_at",
        after=" or True",
        caught_by=(
            "tests/unit/test_processes.py::test_a_later_process_with_the_same_id_is_another",
            f"{_FILES}::TestOrphanedTemporaries::test_a_writer_is_identified_by_more_than_its_pid",
        ),
    ),
    Mutant(
        name="broken-device-blamed-on-a-sequence",
        module="failures",
        before="    if cause in _SUSPICIOUS and is_probing:\n",
        after="    if False:\n",
        caught_by=("tests/unit/test_failures.py::test_a_crash_on_a_harmless_sequence_is_hardware",),
    ),
    Mutant(
        name="worker-of-any-code",
        module="software",
        before='starter.get("code_sha256") == ours.code_sha256',
        after='"code_sha256" in starter',
        caught_by=(f"{_SOFTWARE}::test_a_job_of_other_code_is_refused",),
    ),
    Mutant(
        name="any-signal-accuses",
        module="failures",
        before="_SIGNAL_CAUSES.get(signum, FailureCause.KILLED)",
        after="_SIGNAL_CAUSES.get(signum, FailureCause.SILENT_EXIT)",
        caught_by=(f"{_FAILURES}::test_only_crash_signals_accuse_a_protein",),
    ),
    Mutant(
        name="empty-entry-of-the-path-kept",
        module="environment",
        before='filter(None, inherited.pop("PYTHONPATH", "").split(os.pathsep))',
        after='inherited.pop("PYTHONPATH", "").split(os.pathsep)',
        caught_by=(f"{_SUPERVISOR}::test_a_worker_imports_nothing_from_the_current_directory",),
    ),
    Mutant(
        name="a-comma-always-divides",
        module="user_paths",
        before="range(most, 1, -1)",
        after="range(1, 1, -1)",
        caught_by=(
            "tests/unit/test_user_paths.py::"
            "TestSeveralPaths::test_a_name_with_a_comma_is_preferred",
        ),
    ),
    Mutant(
        name="characters-that-an-encoding-lacks-raise",
        module="streams",
        before='(stream.encoding or "utf-8")("backslashreplace")',
        after='(stream.encoding or "utf-8")("strict")',
        caught_by=(f"{_STREAMS}::test_characters_that_an_encoding_lacks_are_escaped",),
    ),
    Mutant(
        name="a-paused-reader-stalls-the-run",
        module="streams",
        before="self._patience_s * 1000 if self._was_writable else 0",
        after="None",
        caught_by=(f"{_STREAMS}::test_a_paused_reader_loses_text_and_costs_no_time",),
    ),
)
