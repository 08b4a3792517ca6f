"""The documentation agrees with the code, and its commands are run or say why not."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

import pytest

from docs.from_code import (
    character_classes,
    help_of_vnp,
    model_sizes,
    names_of_vnp_commands,
    run_options,
    run_settings,
    runtime_settings,
)
from docs.links import fetched_from_elsewhere, link_as_in_site
from tests.doc_pages import LANGUAGES, blocks_of, pages, run_page, table_in
from tests.helpers import ROOT
from vnp_lib.errors import ExitCode
from vnp_lib.failures import Failure, FailureCause, FailureKind
from vnp_lib.inputs.characters import CLASSES

NOT_RUN = {
    ("docs/tutorial.md", ".ci/run runs it"),
    ("docs/how-to/offline-weights.md", "it downloads 2.6 GB"),
    ("docs/how-to/offline-weights.md", "it downloads 5.7 GB"),
    ("README.md", ".ci/run runs it"),
    ("README.md", "it downloads 2.6 GB"),
    ("README.md", "it installs packages"),
}
SHOWN = LANGUAGES | {"text", "yaml"}
OURS = [page for page in pages() if page.startswith("docs/")]


def run(page: str, directory: Path) -> None:
    path = directory / "page.md"
    path.write_text(page)
    run_page(
        path,
        directory,
        os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"},
        timeout_s=60,
    )


def test_a_page_is_run_in_order_and_python_goes_on_until_the_next_command(tmp_path):
    page = """
```bash
word=seen
echo $word > first
```
```python
word = open("first").read()
```

and, without an import again:

```python
print("it was", word)
```

```text
it was ...
```

<!-- not run: there is no such command -->
```bash
no-such-command
```
"""
    run(page, tmp_path)


@pytest.mark.parametrize(
    "page",
    [
        "```bash\nfalse\n```\n",
        "```bash\nfalse | true\n```\n",
        "```bash\necho $no_such_variable\n```\n",
        "```python\nraise SystemExit(1)\n```\n",
        "```bash\necho 2\n```\n\n```text\n1\n```\n",
        "```bash\ntrue\n```\n```bash\necho 2\n```\n```text\n1\n```\n",
        "```python\nprint(2)\n```\n```text\n1\n```\n```python\nprint(1)\n```\n",
    ],
)
def test_a_page_that_does_not_do_what_it_says_is_noticed(tmp_path, page):
    with pytest.raises(AssertionError, match=r"page.md:\d+"):
        run(page, tmp_path)


def test_what_is_not_run_says_why_and_is_listed_here():
    reasons = {
        (page, block.reason)
        for page in pages()
        for block in blocks_of((ROOT / page).read_text())
        if block.reason
    }
    assert reasons == NOT_RUN


@pytest.mark.parametrize("page", OURS)
def test_no_command_escapes_by_the_form_of_its_fence(page):
    """Each fence begins at the margin and is in a language that is run, or shows output."""
    text = (ROOT / page).read_text()
    blocks = blocks_of(text)
    assert len(re.findall(r"^[ >\t]*(?:```|~~~)", text, re.MULTILINE)) == 2 * len(blocks)
    assert {block.language for block in blocks} <= SHOWN


def test_the_causes_of_failures_are_those_of_the_code():
    told = {row[0]: row[1:4] for row in table_in("docs/reference/failures.md", "Causes")}
    failures = [Failure(cause=cause, message="", batch_idx=0) for cause in FailureCause]
    yes = {True: "yes", False: "no"}
    assert told == {
        str(failure.cause): [
            str(failure.kind),
            yes[not failure.is_permanent],
            yes[failure.accuses_batch and not failure.is_permanent],
        ]
        for failure in failures
    }


def test_every_kind_of_failure_and_every_exit_code_is_told():
    assert [row[0] for row in table_in("docs/reference/failures.md", "Kinds")] == list(FailureKind)
    codes = [int(row[0]) for row in table_in("docs/reference/failures.md", "Exit codes")]
    assert codes == sorted(ExitCode)


def test_every_variable_of_the_environment_that_is_read_is_told():
    """Only `environment.py` reads the environment (`test_layers.py`)."""
    read = set(
        re.findall(r"os\.environ\.get\(\s*\"(\w+)\"", (ROOT / "vnp_lib/environment.py").read_text())
    )
    told = {
        row[0]
        for row in table_in("docs/reference/settings.md", "Other variables")
        if row[1] == "us"
    }
    assert read == told


def test_every_setting_is_an_option_of_the_name_that_the_table_says():
    options = set(re.findall(r"`(--[a-z0-9.-]+)`<br>", run_settings() + runtime_settings()))
    taken = set(re.findall(r"^  (--[a-z0-9.-]+)", run_options(), re.MULTILINE))
    assert options == taken


def test_every_command_of_vnp_has_its_help_in_the_reference():
    listed = re.search(r"^  COMMAND\n(?P<commands>(?:    .*\n)+)", help_of_vnp(), re.MULTILINE)
    assert listed is not None
    assert set(names_of_vnp_commands()) == set(
        re.findall(r"^    (\S+)", listed["commands"], re.MULTILINE)
    )
    assert {"plan", "report", "status", "verify"} <= set(names_of_vnp_commands())


@pytest.mark.parametrize(
    "element",
    [
        '<script src="https://unpkg.com/mermaid/dist/mermaid.min.js">',
        '<link rel="stylesheet" href="//fonts.googleapis.com/css?family=Roboto">',
        '<img alt="" src="https://img.shields.io/badge/a-b-green">',
    ],
)
def test_what_a_page_would_load_from_elsewhere_is_found(element):
    assert fetched_from_elsewhere(f"<p>{element}</p>") == element


@pytest.mark.parametrize(
    "element",
    [
        '<a href="https://www.uniprot.org">',
        '<img src="images/report.png">',
        '<script src="assets/a.js">',
    ],
)
def test_a_link_to_elsewhere_and_what_is_our_own_are_not(element):
    assert fetched_from_elsewhere(f"<p>{element}</p>") is None


@pytest.mark.parametrize(
    ("page", "link", "in_site"),
    [
        ("docs/how-to/work-pool.md", "../../deployments/slurm.md", "../deployments/slurm.md"),
        ("docs/how-to/work-pool.md", "../tutorial.md#embed", "../tutorial.md#embed"),
        ("docs/tutorial.md", "images/tutorial.png", "images/tutorial.png"),
        ("deployments/README.md", "../README.md", "../index.md"),
        ("deployments/README.md", "slurm.md", "slurm.md"),
        ("README.md", "docs/images/report.png", "images/report.png"),
        ("README.md", "https://www.uniprot.org", "https://www.uniprot.org"),
        ("README.md", "#words", "#words"),
    ],
)
def test_a_link_between_files_of_the_repository_becomes_one_of_the_site(page, link, in_site):
    assert link_as_in_site(f"see [it]({link}), or not", page) == f"see [it]({in_site}), or not"


def test_every_class_of_characters_has_its_row() -> None:
    rows = character_classes().splitlines()[2:]
    assert [row.split(" | ")[0] for row in rows] == [f"| {each.name}" for each in CLASSES]
    assert "<!-- generated: character_classes -->" in (ROOT / "docs/how-to/input.md").read_text(
        encoding="utf-8"
    )


def test_the_readme_has_the_model_sizes_of_the_code() -> None:
    """The parameters, dimensions and memory of the README are those of the token budget."""
    expected = [row.strip("| ").split(" | ") for row in model_sizes().splitlines()]
    head, _, *rows = expected
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert "| " + " | ".join(head) + " |" in text
    assert table_in("README.md") == [[cell.strip("`") for cell in row] for row in rows]


def test_the_readme_is_short() -> None:
    """A reader finds installation, use and failures on one page; details are in `docs/`."""
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 130


@pytest.mark.parametrize("command", ["make embed", "make test"])
def test_the_readme_has_the_commands_of_the_demo(command: str) -> None:
    """The offline demo and the tests are started by these two commands."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert re.search(rf"^{command} +#", text, flags=re.MULTILINE)
