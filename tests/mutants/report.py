"""Mutants of `vnp_lib/report/`."""

from __future__ import annotations

from tests.mutants.mutant import Mutant

_VERIFY = "tests/unit/report/test_verify.py"

MUTANTS = (
    Mutant(
        name="quarantined-counted-as-to-compute",
        module="report.verify",
        before="[each for each in quarantined if not is_done[each]]",
        after="[]",
        caught_by=(f"{_VERIFY}::test_quarantined_sequences_are_counted_with_their_copies",),
    ),
)
