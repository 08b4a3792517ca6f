"""Measure the layout of the source: rooms, imports, functions, comments and line lengths.

Usage: python -m benchmarks.house [--json] [--list] [root]

The figures come from the text of a checkout (default: this one) by `ast` and `tokenize`. Nothing of
the measured code is imported, so that an old checkout is measured in the same way. Definitions:

Files and rooms. Python files of `vnp_lib` and `flows`. A room is a subpackage at any depth that
contains a Python file. The two packages themselves are not rooms.

Units and arrows. A unit is a room directly under `vnp_lib` (with all its subpackages) or a module
directly under it; all of `flows` is one unit. An arrow between units A -> B exists if any file of
A imports anything of B; an arrow between files exists if one file imports the other or a name of
it. Each arrow counts once. Imports inside functions and under `TYPE_CHECKING` count. The names
that a lazy face passes as strings count through their repetition under `TYPE_CHECKING`. Plain
`import vnp_lib` or `from vnp_lib import name` leads to `vnp_lib/__init__.py`, unless `name` is a
module or a room. Imports by `vnp_lib/__init__.py` count as well.

Functions used once. A function is a `def` or `async def` at module or class level or inside
another function. It is a private helper if its name begins with one underscore. A helper is used
once if `vnp_lib` and `flows` reference its name at exactly one place outside its own body: a name
or an attribute in its own file, a name in a file that imports it, an attribute in a file that
imports its module, or, for a method, an attribute in any file. Imports and definitions are not
references. If several classes define a method of one name, references count for each of them,
because attributes carry no types. The share is used-once helpers by all functions.

Small helpers. Used-once helpers of at most four code lines, the signature included, docstring and
decorators not. So counted, commit 018717b has 72 of 287 (the notes of the review: 72 of 288).

Length of a function. Lines from `def` to the end, without decorators, once with the docstring and
once without its lines. Nested functions count on their own and in the enclosing one.

Comments. Own-line comments by 100 code lines. A code line has a token that is neither a comment
nor part of a docstring.

Long lines. Lines of more than 100 characters in tracked files of a folder, by `git ls-files`, or
all files if the root is no git checkout.
"""

from __future__ import annotations

import argparse
import ast
import json
import statistics
import subprocess
import tokenize
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from io import StringIO
from pathlib import Path
from typing import Any

PACKAGES = ("vnp_lib", "flows")
LINE_LENGTH = 100
SMALL_HELPER = 4

_SKIPPED_TOKENS = {
    tokenize.COMMENT,
    tokenize.NL,
    tokenize.NEWLINE,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.ENDMARKER,
    tokenize.ENCODING,
}

FunctionNode = ast.FunctionDef | ast.AsyncFunctionDef
ScopeNode = ast.Module | ast.ClassDef | FunctionNode


@dataclass(frozen=True, slots=True, kw_only=True)
class Function:
    """One function definition."""

    path: str
    line: int
    name: str
    is_method: bool
    length: int  # lines, docstring included
    length_without_docstring: int
    code_lines: int  # from `def` on, without the docstring
    node: FunctionNode = field(repr=False, compare=False)

    @property
    def is_private_helper(self) -> bool:
        return self.name.startswith("_") and not self.name.startswith("__") and self.name != "_"


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceFile:
    """A parsed file of a package."""

    path: str  # relative to the root
    module: str  # dotted, without `.__init__`
    is_package: bool
    tree: ast.Module
    code_lines: frozenset[int]
    own_line_comments: int
    functions: tuple[Function, ...]

    @property
    def unit(self) -> str:
        """The room or the top-level module that the file belongs to."""
        parts = self.module.split(".")
        if parts[0] != "vnp_lib":
            return parts[0]
        return ".".join(parts[:2])


def measure(root: Path) -> dict[str, Any]:
    """Return all figures of a checkout as JSON values."""
    files = [
        read_file(root, path) for name in PACKAGES for path in sorted((root / name).rglob("*.py"))
    ]
    functions = [function for file in files for function in file.functions]
    once = used_once(files)
    small = [function for function in once if function.code_lines <= SMALL_HELPER]
    code_lines = sum(len(file.code_lines) for file in files)
    comments = sum(file.own_line_comments for file in files)
    file_arrows, unit_arrows = arrows(files)
    rooms = [file.module for file in files if file.is_package and "." in file.module]
    units = {file.unit for file in files}
    readme = root / "README.md"
    return {
        "files": {
            name: sum(file.path.startswith(f"{name}/") for file in files) for name in PACKAGES
        },
        "rooms": sorted(rooms),
        "units": len(units),
        "arrows_between_units": len(unit_arrows),
        "arrows_between_files": len(file_arrows),
        "functions": len(functions),
        "private_helpers": sum(function.is_private_helper for function in functions),
        "used_once": len(once),
        "used_once_percent": round(100 * len(once) / max(1, len(functions)), 1),
        "used_once_small": len(small),
        "function_lines": quantiles([function.length for function in functions]),
        "function_lines_without_docstring": quantiles(
            [function.length_without_docstring for function in functions]
        ),
        "code_lines": code_lines,
        "own_line_comments": comments,
        "comments_per_100_code_lines": round(100 * comments / max(1, code_lines), 2),
        "long_lines": long_lines(root),
        "readme_lines": len(readme.read_text().splitlines()) if readme.exists() else 0,
        "used_once_list": [
            f"{function.path}:{function.line} {function.name} {function.code_lines}"
            for function in once
        ],
    }


def read_file(root: Path, path: Path) -> SourceFile:
    """Parse one file."""
    text = path.read_text(encoding="utf-8")
    tree = ast.parse(text, filename=str(path))
    parts = list(path.relative_to(root).with_suffix("").parts)
    is_package = parts[-1] == "__init__"
    if is_package:
        parts.pop()
    docstrings = {line for node in ast.walk(tree) for line in docstring_lines(node)}
    code: set[int] = set()
    comments = 0
    for token in tokenize.generate_tokens(StringIO(text).readline):
        if token.type == tokenize.COMMENT and not token.line[: token.start[1]].strip():
            comments += 1
        elif token.type not in _SKIPPED_TOKENS:
            code.update(range(token.start[0], token.end[0] + 1))
    code -= docstrings
    relative = path.relative_to(root).as_posix()
    return SourceFile(
        path=relative,
        module=".".join(parts),
        is_package=is_package,
        tree=tree,
        code_lines=frozenset(code),
        own_line_comments=comments,
        functions=tuple(functions_of(tree, relative, code)),
    )


def docstring_lines(node: ast.AST) -> range:
    """Return the line numbers of a node's docstring."""
    if isinstance(node, ScopeNode) and ast.get_docstring(node, clean=False) is not None:
        first = node.body[0]
        return range(first.lineno, (first.end_lineno or first.lineno) + 1)
    return range(0)


def functions_of(tree: ast.Module, path: str, code: set[int]) -> Iterator[Function]:
    """Yield the functions of a file, nested ones included."""
    methods = {
        statement
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef)
        for statement in node.body
    }
    for node in ast.walk(tree):
        if not isinstance(node, FunctionNode):
            continue
        end = node.end_lineno or node.lineno
        length = end - node.lineno + 1
        docstring = docstring_lines(node)
        yield Function(
            path=path,
            line=node.lineno,
            name=node.name,
            is_method=node in methods,
            length=length,
            length_without_docstring=length - len(docstring),
            code_lines=sum(line in code for line in range(node.lineno, end + 1)),
            node=node,
        )


def used_once(files: list[SourceFile]) -> list[Function]:
    """Return the private helpers that are referenced at exactly one place."""
    references: dict[str, list[tuple[SourceFile, ast.Name | ast.Attribute]]] = {}
    for file in files:
        for node in ast.walk(file.tree):
            if isinstance(node, ast.Name | ast.Attribute) and isinstance(node.ctx, ast.Load):
                name = node.id if isinstance(node, ast.Name) else node.attr
                references.setdefault(name, []).append((file, node))
    # What each file imports: modules, and names by their absolute path.
    imported = {
        file.module: {
            module if name is None else f"{module}.{name}" for module, name in imported_names(file)
        }
        for file in files
    }
    found = []
    for file in files:
        for function in file.functions:
            if not function.is_private_helper:
                continue
            own = {id(node) for node in ast.walk(function.node)}
            places = 0
            for user, node in references.get(function.name, []):
                if id(node) in own:
                    continue
                if isinstance(node, ast.Name):
                    reaches = user is file or (
                        f"{file.module}.{function.name}" in imported[user.module]
                    )
                else:
                    reaches = (
                        user is file or function.is_method or file.module in imported[user.module]
                    )
                places += reaches
            if places == 1:
                found.append(function)
    return sorted(found, key=lambda function: (function.path, function.line))


def imported_names(file: SourceFile) -> Iterator[tuple[str, str | None]]:
    """Yield the module of each import, absolute, and the name taken from it if there is one."""
    for node in ast.walk(file.tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, None
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            if node.level:
                parts = file.module.split(".")
                drop = node.level - file.is_package
                base = parts[: len(parts) - drop] if drop else parts
                module = ".".join([*base, *([module] if module else [])])
            for alias in node.names:
                yield module, alias.name


def arrows(files: list[SourceFile]) -> tuple[set[tuple[str, str]], set[tuple[str, str]]]:
    """Return the import arrows between files and those between units."""
    by_module = {file.module: file for file in files}
    between_files = set()
    for file in files:
        for module, name in imported_names(file):
            target = by_module.get(f"{module}.{name}") or by_module.get(module)
            if target is not None and target is not file:
                between_files.add((file.module, target.module))
    between_units = {
        (by_module[source].unit, by_module[target].unit)
        for source, target in between_files
        if by_module[source].unit != by_module[target].unit
    }
    return between_files, between_units


def quantiles(lengths: list[int]) -> dict[str, float]:
    """Return the median, the 90th percentile (nearest rank) and the maximum."""
    if not lengths:
        return {"median": 0, "p90": 0, "max": 0}
    ordered = sorted(lengths)
    p90 = ordered[-(-len(ordered) * 9 // 10) - 1]
    return {"median": statistics.median(ordered), "p90": p90, "max": ordered[-1]}


def long_lines(root: Path) -> dict[str, int]:
    """Count the lines of more than 100 characters in each folder."""
    counts: Counter[str] = Counter()
    for folder in ("vnp_lib", "flows", "tests", "benchmarks", "docs"):
        counts[folder] = 0
        for path in tracked_files(root, folder):
            lines = path.read_text(encoding="utf-8").splitlines()
            counts[folder] += sum(len(line) > LINE_LENGTH for line in lines)
    return dict(counts)


def tracked_files(root: Path, folder: str) -> list[Path]:
    """Return the tracked Python files below a folder."""
    listed = subprocess.run(
        ["git", "-C", str(root), "ls-files", "-z", "--", f"{folder}/*.py"],
        capture_output=True,
        text=True,
        check=False,
    )
    if listed.returncode:
        return sorted((root / folder).rglob("*.py"))
    # A file that was moved and not yet committed is still listed under its old name.
    return [path for name in listed.stdout.split("\0") if name and (path := root / name).exists()]


def as_text(figures: dict[str, Any], *, with_list: bool) -> str:
    """Return the figures as a table for people."""
    lengths = figures["function_lines"]
    without = figures["function_lines_without_docstring"]
    rooms = figures["rooms"]
    rows = [
        ("files", ", ".join(f"{name} {count}" for name, count in figures["files"].items())),
        ("rooms", f"{len(rooms)}" + (f" ({', '.join(rooms)})" if rooms else "")),
        ("units (rooms, top-level modules, flows)", figures["units"]),
        ("import arrows between units", figures["arrows_between_units"]),
        ("import arrows between files", figures["arrows_between_files"]),
        ("functions", figures["functions"]),
        ("private helpers", figures["private_helpers"]),
        (
            "private helpers used once",
            f"{figures['used_once']} ({figures['used_once_percent']} % of all functions)",
        ),
        (f"  of up to {SMALL_HELPER} code lines", figures["used_once_small"]),
        (
            "function lines, docstring included",
            f"median {lengths['median']:g}, p90 {lengths['p90']}, max {lengths['max']}",
        ),
        (
            "function lines, docstring excluded",
            f"median {without['median']:g}, p90 {without['p90']}, max {without['max']}",
        ),
        ("code lines", figures["code_lines"]),
        (
            "own-line comments",
            f"{figures['own_line_comments']} "
            f"({figures['comments_per_100_code_lines']} per 100 code lines)",
        ),
        (
            f"lines over {LINE_LENGTH} characters",
            ", ".join(f"{folder} {count}" for folder, count in figures["long_lines"].items()),
        ),
        ("README lines", figures["readme_lines"]),
    ]
    lines = [f"{name:42}{value}" for name, value in rows]
    if with_list:
        lines += ["", "Private helpers used once (file:line, name, code lines):"]
        lines += figures["used_once_list"]
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    """Print the figures of a checkout."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.house", description="Measure the layout of the source."
    )
    parser.add_argument("root", nargs="?", type=Path, default=Path(__file__).parents[1])
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--list", action="store_true", help="list the helpers used once")
    options = parser.parse_args(arguments)
    figures = measure(options.root.resolve())
    if options.json:
        if not options.list:
            del figures["used_once_list"]
        print(json.dumps(figures, indent=2))
    else:
        print(as_text(figures, with_list=options.list))


if __name__ == "__main__":
    main()
