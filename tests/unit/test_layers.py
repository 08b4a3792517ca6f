"""Each room imports only rooms below it, and only names of their faces."""

from __future__ import annotations

import ast
import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "vnp_lib"

MAY_IMPORT = {
    "storage": set(),
    "inputs": {"storage"},
    "plan": {"storage", "inputs"},
    "model": {"storage", "plan"},
    "checkpoint": {"storage", "plan"},
    "dataset": {"storage", "plan"},
    "inference": {"storage", "model", "checkpoint", "plan"},
    "run": {"storage", "inference", "dataset", "checkpoint", "model", "plan", "inputs"},
    "worker": {"storage", "run", "inference", "checkpoint", "model", "plan", "inputs"},
    "report": {"storage", "run", "inference", "dataset", "checkpoint", "model", "plan", "inputs"},
}
"""The rooms that each room imports, besides the ground floor."""

GROUND = (
    {"errors", "processes", "prefetch", "streams", "lazy"},
    {"failures", "software", "user_paths", "formatting", "environment"},
    {"config", "terminal"},
    {"options", "devices"},
)
"""Modules directly under `vnp_lib` that every room may import; each imports only earlier sets."""

FRONT_DOORS = {"api", "cli", "esm_extract", "embeddings", "manifest", "__main__", "__init__"}
"""Modules that no room imports."""

ROOMS = sorted(path.parent.name for path in PACKAGE.glob("*/__init__.py"))
FLOOR_OF = {module: floor for floor, modules in enumerate(GROUND) for module in modules}
FILES = sorted(path.relative_to(PACKAGE) for path in PACKAGE.rglob("*.py"))
FLOWS = sorted(Path("..", path.relative_to(ROOT)) for path in (ROOT / "flows").glob("*.py"))


def imported_modules(path: Path) -> set[str]:
    """Return the modules that a file imports at its top, under TYPE_CHECKING or in a function."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            if node.module in ("vnp_lib", "flows"):
                names |= {f"{node.module}.{alias.name}" for alias in node.names}
            else:
                names.add(node.module)
    return names


def our_imports(file: Path) -> set[str]:
    """Return the modules of the package that a file imports, without the package's name."""
    imported = imported_modules(PACKAGE / file)
    return {name.removeprefix("vnp_lib.") for name in imported if name.startswith("vnp_lib.")}


@pytest.mark.parametrize("file", [file for file in FILES if len(file.parts) > 1], ids=str)
def test_a_room_imports_rooms_below_it(file: Path) -> None:
    """It also imports modules of the ground floor, but no front door."""
    room = file.parts[0]
    units = {name.split(".")[0] for name in our_imports(file)} - {room, "__version__"}
    assert units & set(ROOMS) <= MAY_IMPORT[room]
    assert not units & FRONT_DOORS


@pytest.mark.parametrize(
    "file", [file for file in [*FILES, *FLOWS] if file.name != "__init__.py"], ids=str
)
def test_only_a_face_is_imported_from_another_room(file: Path) -> None:
    """Only as `from vnp_lib.room import name`, never from a file of that room."""
    room = file.parts[0] if len(file.parts) > 1 else None
    inner = {
        name
        for name in our_imports(file)
        if name.split(".")[0] in ROOMS and name.split(".")[0] != room and "." in name
    }
    submodules = {
        f"{node.module}.{alias.name}"
        for node in ast.walk(ast.parse((PACKAGE / file).read_text()))
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("vnp_lib.")
        for alias in node.names
        if node.module.split(".")[1] in set(ROOMS) - {room}
        and (ROOT / node.module.replace(".", "/") / f"{alias.name}.py").exists()
    }
    assert inner | submodules == set()


@pytest.mark.parametrize("room", ROOMS)
def test_a_face_only_re_exports(room: str) -> None:
    """It has a docstring of one sentence, imports and `__all__`; if lazy, also `lazy_face`."""
    face = ast.parse((PACKAGE / room / "__init__.py").read_text())
    docstring = ast.get_docstring(face)
    assert docstring is not None
    assert re.fullmatch(r"[^.]+(\.\w[^.]*)*\.", docstring)
    statements = [node for node in face.body[1:] if not isinstance(node, ast.ImportFrom)]
    kinds = [ast.unparse(node).split("=")[0].split(":")[0].strip() for node in statements]
    assert kinds in (["__all__"], ["if TYPE_CHECKING", "__all__", "__getattr__, __dir__"])
    module = importlib.import_module(f"vnp_lib.{room}")
    assert list(module.__all__) == sorted(set(module.__all__), key=module.__all__.index)
    assert all(hasattr(module, name) for name in module.__all__)
    assert set(module.__all__) <= set(dir(module))


def test_every_module_is_in_the_table() -> None:
    assert {"__init__.py", *(f"{name}.py" for name in {*FLOOR_OF, *FRONT_DOORS})} == {
        file.name for file in FILES if len(file.parts) == 1
    }
    assert set(MAY_IMPORT) == set(ROOMS)


@pytest.mark.parametrize("module", sorted(FLOOR_OF))
def test_the_ground_floor_imports_no_room(module: str) -> None:
    units = {name.split(".")[0] for name in our_imports(Path(f"{module}.py"))} - {"__version__"}
    assert {unit for unit in units if FLOOR_OF.get(unit, 99) >= FLOOR_OF[module]} == set()


@pytest.mark.parametrize("module", ["errors", "failures", "processes"])
def test_the_ground_needs_the_standard_library_only(module: str) -> None:
    imported = imported_modules(PACKAGE / f"{module}.py")
    outside = {name.split(".")[0] for name in imported} - set(sys.stdlib_module_names)
    assert outside <= {"vnp_lib", "_typeshed"}


def test_vnp_lib_imports_without_prefect() -> None:
    """The library works even if Prefect is not installed."""
    modules = [
        ".".join(("vnp_lib", *file.with_suffix("").parts))
        for file in FILES
        if file.stem not in ("__init__", "__main__")
    ]
    code = "import sys; sys.modules['prefect'] = None\n" + "\n".join(
        f"import {module}" for module in modules
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_one_module_reads_the_environment() -> None:
    """`options` reads it as well, through pydantic-settings."""
    readers = {
        str(file)
        for file in FILES
        if re.search(r"\bos\.(environ|getenv)\b", (PACKAGE / file).read_text())
    }
    assert readers == {"environment.py"}


def test_the_architecture_page_shows_these_rules() -> None:
    """Its table of rooms is `MAY_IMPORT`."""
    page = (ROOT / "docs/explanation/architecture.md").read_text()
    rows = re.findall(r"^\| `(\w+)` \| [^|]+ \|([^|]*)\|$", page, re.MULTILINE)
    assert {room: set(re.findall(r"\w+", allowed)) for room, allowed in rows} == MAY_IMPORT
