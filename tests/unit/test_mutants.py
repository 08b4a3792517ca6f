"""The catalogue of mutants matches the library and the tests; `make mutants` runs it."""

from __future__ import annotations

import ast
from functools import cache

import pytest

from tests.helpers import ROOT
from tests.mutants.catalogue import MUTANTS, Mutant


def test_no_two_mutants_have_one_name() -> None:
    assert len({mutant.name for mutant in MUTANTS}) == len(MUTANTS)


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_a_mutant_changes_one_place_and_the_test_that_catches_it_is_there(mutant: Mutant) -> None:
    assert mutant.occurrences(ROOT) == 1
    assert mutant.before != mutant.after
    assert mutant.caught_by
    for test in mutant.caught_by:
        file, *names = test.split("[")[0].split("::")
        assert "::".join(names) in functions_in(file)


@cache
def functions_in(file: str) -> set[str]:
    """Names of the functions in a file, those of classes with the class's name before them."""
    found = set()
    for node in ast.parse((ROOT / file).read_text(encoding="utf-8")).body:
        methods = (
            [(f"{node.name}::", each) for each in node.body]
            if isinstance(node, ast.ClassDef)
            else [("", node)]
        )
        found |= {
            prefix + each.name for prefix, each in methods if isinstance(each, ast.FunctionDef)
        }
    return found
