"""Run a page of documentation: its commands exactly as printed, in order, in a copy of the tree.

A fence marked `bash` is a command, one marked `python` a program. Python fences with no command
between them are one program. A `text` fence right after one of them is its output, in which `...`
stands for anything. A command that cannot be run here has a comment before it,
`<!-- not run: the reason -->`.
"""

from __future__ import annotations

import doctest
import os
import re
import shutil
import subprocess
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from tests.helpers import ROOT

LANGUAGES = frozenset({"bash", "python"})  # of the fences that are run

_FENCE = re.compile(
    r"^(?:<!-- not run: (?P<reason>.+?) -->\n)?```(?P<language>\w*)\n(?P<code>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)
_OUTPUT = re.compile(r"\n+```text\n(?P<output>.*?)^```$", re.MULTILINE | re.DOTALL)
_BLOCK_BEGINS = "\x1e"
_PYTHON_ENDS = "END_OF_THE_PYTHON_OF_A_PAGE"
_KILL_JOBS_AT_EXIT = "trap 'jobs -p | xargs --no-run-if-empty kill -KILL' EXIT"
_IS_LIKE = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """A fence of a page."""

    language: str
    code: str
    line: int  # in the page, from 1
    output: str | None  # expected
    reason: str | None  # for not running it


def blocks_of(page: str) -> list[Block]:
    """Return all fences of a page, in order."""
    return [
        Block(
            language=fence["language"],
            code=fence["code"],
            line=page.count("\n", 0, fence.start("language")) + 1,
            output=output["output"] if (output := _OUTPUT.match(page, fence.end())) else None,
            reason=fence["reason"],
        )
        for fence in _FENCE.finditer(page)
    ]


def runnable_pages() -> list[str]:
    """Return the paths of the pages with commands that a test can run."""
    return [page for page in pages() if any(map(is_command, blocks_of((ROOT / page).read_text())))]


def pages() -> list[str]:
    """Return the paths of all pages of the repository."""
    return [name for name in _files() if name.endswith(".md")]


def table_in(page: str, heading: str | None = None) -> list[list[str]]:
    """Return the rows of the first table of a page or below a heading.

    The header is omitted, and so are the backquotes around code.
    """
    text = (ROOT / page).read_text()
    if heading is not None:
        text = text.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    table = re.search(r"^\|.*\n(?:\|.*\n?)*", text, re.MULTILINE)
    assert table is not None
    rows = [line.strip("|").split("|") for line in table[0].splitlines()[2:]]
    return [[cell.strip().strip("`") for cell in row] for row in rows]


def is_command(block: Block) -> bool:
    """Whether a test runs it."""
    return block.language in LANGUAGES and block.reason is None


def script_of(blocks: Sequence[Block]) -> str:
    """Return a bash script that runs all blocks, and prints the line of each before its output."""
    lines = [_KILL_JOBS_AT_EXIT]
    for before, block in pairwise([None, *blocks]):
        assert block is not None
        if block.language == "bash":
            lines += [f"printf '{_BLOCK_BEGINS}%d\\n' {block.line}", block.code]
            continue
        if before is not None and before.language == "python":
            # Remove the end of the previous program, which this block continues.
            lines.pop()
        else:
            lines.append(f"python - <<'{_PYTHON_ENDS}'")
        lines += [f"print('{_BLOCK_BEGINS}{block.line}', flush=True)", block.code, _PYTHON_ENDS]
    return "\n".join(lines)


def run_page(
    page: Path,
    checkout: Path,
    environment: Mapping[str, str],
    *,
    timeout_s: float,
    languages: Collection[str] = LANGUAGES,
) -> None:
    """Run the commands of a page in a copy of the tree; they must succeed and print its outputs."""
    blocks = [
        block
        for block in blocks_of(page.read_text())
        if is_command(block) and block.language in languages
    ]
    out, err = checkout / "stdout.log", checkout / "stderr.log"
    with out.open("w") as stdout, err.open("w") as stderr:
        shell = subprocess.Popen(
            ["bash", "-euxo", "pipefail", "-c", script_of(blocks)],
            cwd=checkout,
            env=dict(environment),
            stdin=subprocess.DEVNULL,
            stdout=stdout,
            stderr=stderr,
        )
        try:
            code = shell.wait(timeout=timeout_s)
        finally:
            shell.terminate()
            shell.wait()
    # The output of each block, by its line.
    parts = out.read_text(errors="replace").split(_BLOCK_BEGINS)[1:]
    outputs = {int(line): text for line, _, text in (part.partition("\n") for part in parts)}
    assert code == 0, (
        f"{page}:{max(outputs, default=0)}\n{out.read_text(errors='replace')}\n"
        f"{err.read_text(errors='replace')}"
    )
    for block in blocks:
        if block.output is not None:
            got = outputs[block.line]
            assert doctest.OutputChecker().check_output(block.output, got, _IS_LIKE), (
                f"{page}:{block.line}\n{got}"
            )


def copy_of_the_repository(directory: Path) -> Path:
    """Copy the files of the working tree, with a link to its virtual environment."""
    for name in _files():
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, directory / name)
    (directory / ".venv").symlink_to(ROOT / ".venv")
    return directory


def environment_of_a_reader(prefect_home: Path, **variables: str) -> dict[str, str]:
    """Return the environment without variables of vnp and Prefect, with another Prefect home."""
    environment = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("PREFECT_", "VNP_"))
    }
    return environment | {"PREFECT_HOME": str(prefect_home)} | variables


def _files() -> list[str]:
    """List the files of the working tree that git tracks or would add."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, check=True, text=True).stdout
    return [name for name in listed.split("\0") if name and (ROOT / name).is_file()]
