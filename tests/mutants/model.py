"""Mutants of `vnp_lib/model/`."""

from __future__ import annotations

from tests.mutants.mutant import Mutant

_CONTRACT = "tests/unit/test_reference_contract.py"
_EXECUTOR = "tests/unit/inference/test_executor.py"
_WEIGHTS = "tests/unit/model/test_weights.py"

MUTANTS = (
    Mutant(
        name="layers-not-passed",
        module="model.foreign",
        before="    if takes_any or not _binds(signature, *arguments):",
        after="    if takes_any:",
        caught_by=(f"{_CONTRACT}::test_a_model_by_another_hand_is_served_packed_and_padded",),
    ),
    Mutant(
        name="windows-counted-once-for-each-residue",
        module="model.windows",
        before="            share = 1 / (num_windows * length)\n",
        after="            share = np.full(length, 1 / length)\n",
        caught_by=(
            "tests/unit/model/test_windows.py::test_windows_come_to_what_is_reckoned_by_hand",
        ),
    ),
    Mutant(
        name="weights-that-are-not-finite-loaded",
        module="model.weights",
        before="        tensors = _each_finite(tensors, weights.path, dtype)\n",
        after="        pass\n",
        caught_by=(f"{_WEIGHTS}::test_non_finite_weights_are_refused_with_the_parameter",),
    ),
    Mutant(
        name="last-piece-of-a-split-batch-lost",
        module="model.tokens",
        before="pairwise(boundaries)]",
        after="list(pairwise(boundaries))[:-1]]",
        caught_by=(
            f"{_EXECUTOR}::test_a_batch_that_does_not_fit_is_computed_in_pieces_row_for_row",
        ),
    ),
)
