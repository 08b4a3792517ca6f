"""The examples in docstrings give the output that they show."""

import doctest
from pathlib import Path
from types import ModuleType

import pytest

import vnp_lib.dataset.reader
import vnp_lib.user_paths
from tests.fake_runs import Records, finish_run, start_run_of

MODULES: tuple[ModuleType, ...] = (vnp_lib.dataset.reader, vnp_lib.user_paths)
EXAMPLES = [
    test for module in MODULES for test in doctest.DocTestFinder().find(module) if test.examples
]


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: example.name)
def test_an_example_gives_the_output_below_it(
    example: doctest.DocTest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Run it in a directory in which `runs/mine` is a run of three sequences."""
    (tmp_path / "runs").mkdir()
    records = Records(["P12345", "P67890", "Q24680"], ["", "", ""], ["MKV", "MKVA", "MKVL"])
    run = finish_run(start_run_of(tmp_path, records))
    run.assemble()
    run.paths.run_dir.rename(tmp_path / "runs" / "mine")
    monkeypatch.chdir(tmp_path)
    output: list[str] = []
    assert doctest.DocTestRunner().run(example, out=output.append).failed == 0, "".join(output)


def test_there_are_examples() -> None:
    assert len(EXAMPLES) >= 4
