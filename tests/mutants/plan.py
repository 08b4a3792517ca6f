"""Mutants of `vnp_lib/plan/`."""

from __future__ import annotations

from tests.mutants.mutant import Mutant

_ASSEMBLY_TESTS = "tests/unit/run/test_assembly.py"
_PLAN = "tests/unit/plan/test_plan.py"

MUTANTS = (
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
        name="input-that-is-gone-missed",
        module="plan.planner",
        before="    if not is_input_gone(paths, fasta):\n        return None\n",
        after="    return None\n",
        caught_by=("tests/unit/run/test_run.py::test_a_run_resumes_without_its_input",),
    ),
    Mutant(
        name="plan-of-another-policy-taken-for-input-that-is-gone",
        module="plan.planner",
        before="    _require_same_identity("
        "paths, stored, _settings_identity(model, policy) | input_fields)\n",
        after="",
        caught_by=("tests/unit/run/test_run.py::test_missing_input_is_an_error_for_another_plan",),
    ),
    Mutant(
        name="original-lengths-ignored",
        module="plan.planner",
        before=" or not is_cut_alike:",
        after=":",
        caught_by=(
            f"{_ASSEMBLY_TESTS}::test_the_same_cut_sequences_of_longer_ones_are_another_input",
        ),
    ),
)
