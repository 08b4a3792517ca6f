"""Apply each mutant to a copy of the library, and check that the tests named for it fail.

`python -m tests.mutants [name ...]` runs all mutants, or the named ones, and for these shows
pytest's output too.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

from tests.mutants.catalogue import MUTANTS, Mutant

ROOT = Path(__file__).parents[2]

_COPIED = ("vnp_lib", "flows", "tests", "examples", "pyproject.toml")
_NUM_PARALLEL = 2
_TEST_LIMIT_S = 60
_LIMIT_S = 600
# Pytest's other exit codes mean that tests could not be run.
_PASSED, _FAILED = 0, 1


class CatalogueError(Exception):
    """The catalogue no longer matches the library or the tests."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PytestRun:
    """The result of a run of pytest."""

    exit_code: int
    output: str
    elapsed_s: float


def main(names: Sequence[str]) -> int:
    """Run the mutants of these names, or all, and return the exit code: 0 if all were caught."""
    try:
        mutants = choose(names)
        with TemporaryDirectory(prefix="vnp-mutants-") as scratch:
            validate_catalogue(mutants, Path(scratch))
            num_caught = run_mutants(mutants, Path(scratch), is_verbose=bool(names))
    except CatalogueError as error:
        print(error, file=sys.stderr)
        return 1
    print(f"{len(mutants)} mutants, {num_caught} caught")
    return int(num_caught < len(mutants))


def choose(names: Sequence[str]) -> list[Mutant]:
    if unknown := set(names) - {mutant.name for mutant in MUTANTS}:
        raise CatalogueError(f"there are no mutants {', '.join(sorted(unknown))}")
    return [mutant for mutant in MUTANTS if mutant.name in names or not names]


def validate_catalogue(mutants: Sequence[Mutant], scratch: Path) -> None:
    """Check that each mutant applies once, that copies import themselves, and all tests pass."""
    if stale := [mutant.name for mutant in mutants if mutant.occurrences(ROOT) != 1]:
        raise CatalogueError(
            f"stale: {', '.join(stale)}: the code to replace is not in the library exactly once"
        )
    tree = copy_of_the_tree(scratch / "original")
    require_own_library(tree)
    passed = run_tests(
        tree, list(dict.fromkeys(test for mutant in mutants for test in mutant.caught_by))
    )
    if passed.exit_code != _PASSED:
        raise CatalogueError(f"{passed.output}\nthe tests do not pass on the unchanged library")


def run_mutants(mutants: Sequence[Mutant], scratch: Path, *, is_verbose: bool) -> int:
    """Run the mutants, print one row each, in order, and return how many were caught."""
    name_width = max(len(mutant.name) for mutant in mutants)
    test_width = max(len(shown(mutant.caught_by[0])) for mutant in mutants)
    print(f"{'mutant':{name_width}}  {'caught by':{test_width}}  seconds")
    num_caught = 0
    with ThreadPoolExecutor(_NUM_PARALLEL) as pool:
        for mutant, run in zip(
            mutants, pool.map(partial(run_mutant, scratch=scratch), mutants), strict=True
        ):
            is_caught = run.exit_code == _FAILED
            verdict = shown(mutant.caught_by[0]) if is_caught else why_not(run.exit_code)
            print(
                f"{mutant.name:{name_width}}  {verdict:{test_width}}  {run.elapsed_s:7.1f}",
                flush=True,
            )
            if is_verbose or run.exit_code not in (_PASSED, _FAILED):
                print(run.output)
            num_caught += is_caught
    return num_caught


def run_mutant(mutant: Mutant, *, scratch: Path) -> PytestRun:
    tree = copy_of_the_tree(scratch / mutant.name)
    mutant.apply(tree)
    run = run_tests(tree, mutant.caught_by)
    shutil.rmtree(tree)
    return run


def copy_of_the_tree(target: Path) -> Path:
    target.mkdir()
    for name in _COPIED:
        copy = partial(shutil.copytree, ignore=shutil.ignore_patterns("__pycache__"))
        (copy if (ROOT / name).is_dir() else shutil.copy2)(ROOT / name, target / name)
    return target


def require_own_library(tree: Path) -> None:
    """Check that the copy is imported, and not the library that the environment has installed."""
    code = "import flows, vnp_lib; print(flows.__file__, vnp_lib.__file__)"
    found = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tree,
        env=environment(tree),
        capture_output=True,
        text=True,
    )
    if found.stdout.split() != [str(tree / "flows/__init__.py"), str(tree / "vnp_lib/__init__.py")]:
        raise CatalogueError(f"the copy does not import itself: {found.stdout}{found.stderr}")


def run_tests(tree: Path, tests: Sequence[str]) -> PytestRun:
    options = [
        "-x",
        "-q",
        "-p",
        "no:cacheprovider",
        f"--timeout={_TEST_LIMIT_S}",
        f"--basetemp={tree / 'tmp'}",
    ]
    started_s = time.monotonic()
    try:
        finished = subprocess.run(
            [sys.executable, "-m", "pytest", *options, *tests],
            cwd=tree,
            env=environment(tree),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=_LIMIT_S,
        )
    except subprocess.TimeoutExpired:
        raise CatalogueError(
            f"pytest did not finish within {_LIMIT_S} s in {tree.name}: {' '.join(tests)}"
        ) from None
    return PytestRun(
        exit_code=finished.returncode,
        output=finished.stdout,
        elapsed_s=time.monotonic() - started_s,
    )


def environment(tree: Path) -> dict[str, str]:
    """Return the environment, with a fixed order of sets so that results are reproducible."""
    settings = {
        "PYTHONPATH": str(tree),
        "PYTHONHASHSEED": "1",
        "PYTHONDONTWRITEBYTECODE": "1",
        "OMP_NUM_THREADS": "1",
    }
    return os.environ | settings


def why_not(exit_code: int) -> str:
    return "NOT CAUGHT" if exit_code == _PASSED else f"ERROR: pytest exited with {exit_code}"


def shown(test: str) -> str:
    return test.removeprefix("tests/")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
