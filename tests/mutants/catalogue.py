"""The mutants of all rooms, and the tests that have to notice them."""

from __future__ import annotations

from tests.mutants import (
    checkpoint,
    dataset,
    ground,
    inference,
    inputs,
    model,
    plan,
    report,
    run,
    storage,
    worker,
)
from tests.mutants.mutant import Mutant

MUTANTS = (
    *checkpoint.MUTANTS,
    *dataset.MUTANTS,
    *ground.MUTANTS,
    *inference.MUTANTS,
    *inputs.MUTANTS,
    *model.MUTANTS,
    *plan.MUTANTS,
    *report.MUTANTS,
    *run.MUTANTS,
    *storage.MUTANTS,
    *worker.MUTANTS,
)

__all__ = ["MUTANTS", "Mutant"]
