"""Text is UTF-8 in every locale, in code and in runs."""

from __future__ import annotations

import ast
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers import ROOT

CASES = ROOT / "tests" / "data" / "cases"
MODULES = sorted(
    path for package in ("vnp_lib", "flows") for path in (ROOT / package).glob("**/*.py")
)

# Functions that open files, with the place of the mode among the arguments; None: always text.
OPENERS = {"open": 1, "fdopen": 1, "NamedTemporaryFile": 0, "TemporaryFile": 0}
METHODS = {"open": 0}
ALWAYS_TEXT = {"read_text", "write_text", "TextIOWrapper"}
STARTERS = {"run", "Popen", "check_output", "check_call", "call", "getoutput"}


def opened_without_encoding(path: Path) -> list[int]:
    """Return the lines of a module that open text in the encoding of the locale."""
    return [
        node.lineno
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and _opens_text(node) and not _names_encoding(node)
    ]


def _opens_text(call: ast.Call) -> bool:
    is_method = isinstance(call.func, ast.Attribute)
    name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
    owner = (
        ast.unparse(call.func.value).rpartition(".")[2]
        if isinstance(call.func, ast.Attribute)
        else ""
    )
    if name in ALWAYS_TEXT:
        return True
    if owner == "subprocess" and name in STARTERS:
        return any(each.arg in ("text", "universal_newlines") for each in call.keywords)
    if name not in OPENERS or owner in ("os", "ops", "zipfile", "archive"):
        return name == "fdopen" and "b" not in _mode(call, 1)
    place = 0 if is_method and owner not in ("io", "gzip", "tempfile") else OPENERS[name]
    default = "w+b" if name.endswith("TemporaryFile") else "r"
    return "b" not in _mode(call, place, default)


def _mode(call: ast.Call, place: int, default: str = "r") -> str:
    given = next((each.value for each in call.keywords if each.arg == "mode"), None)
    given = given or (call.args[place] if len(call.args) > place else None)
    return (
        given.value if isinstance(given, ast.Constant) and isinstance(given.value, str) else default
    )


def _names_encoding(call: ast.Call) -> bool:
    return any(each.arg in ("encoding", None) for each in call.keywords)


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.stem)
def test_every_text_is_opened_with_its_encoding(path: Path) -> None:
    assert opened_without_encoding(path) == []


def test_text_opened_without_its_encoding_is_found(tmp_path: Path) -> None:
    """The test above can fail."""
    module = tmp_path / "module.py"
    lines = [
        "open(p)",
        "p.open('w')",
        "p.read_text()",
        "io.TextIOWrapper(f)",
        "subprocess.run(c, text=True)",
        "os.fdopen(3)",
    ]
    fine = [
        "open(p, 'rb')",
        "p.open('rb')",
        "open(p, encoding='utf-8')",
        "subprocess.run(c)",
        "p.read_bytes()",
    ]
    module.write_text("\n".join([*lines, *fine]), encoding="utf-8")
    assert opened_without_encoding(module) == [1, 2, 3, 4, 5, 6]


@pytest.fixture(scope="module")
def latin1(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Return the environment of a shell with ISO 8859-1, or ASCII without such a locale."""
    directory = tmp_path_factory.mktemp("locales")
    if shutil.which("localedef"):
        made = directory / "en_US.ISO-8859-1"
        subprocess.run(
            ["localedef", "-i", "en_US", "-f", "ISO-8859-1", made], capture_output=True, check=False
        )
        if made.is_dir():
            return {"LOCPATH": str(directory), "LC_ALL": made.name}
    return ASCII


ASCII = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
PLAN = """
import json, locale, sys
from pathlib import Path
from vnp_lib.inputs.policy import InputPolicy
from vnp_lib.plan.plan import ModelIdentity
from vnp_lib.plan.paths import RunPaths
from vnp_lib.plan.planner import make_plan
model = ModelIdentity(model="m", weights_digest="w", layer=6, dtype="float32")
files = [Path(name) for name in sys.argv[2:]]
plan = make_plan(RunPaths(Path(sys.argv[1])), files, model, num_shards=1, token_budget=500)
ids = plan.table.column("id").to_pylist()
print(json.dumps([locale.getpreferredencoding(False), plan.fingerprint, ids]))
"""


def planned(run_dir: Path, *files: Path, **variables: str) -> tuple[str, str, list[str]]:
    """Return the encoding of a shell, and the fingerprint and ids of a run planned in it."""
    names = ("LC_", "LANG", "PYTHONUTF8", "PYTHONIOENCODING", "PYTHONCOERCE")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(names)}
    command = [sys.executable, "-c", PLAN, str(run_dir), *map(str, files)]
    done = subprocess.run(
        command, cwd=ROOT, env=environment | variables, capture_output=True, check=True, timeout=60
    )
    encoding, fingerprint, ids = json.loads(done.stdout)
    return encoding.lower(), fingerprint, ids


def test_a_run_is_the_same_run_in_every_shell(tmp_path: Path, latin1: dict[str, str]) -> None:
    """FASTA and CSV with ids beyond ASCII, started in one locale and resumed in others."""
    table = tmp_path / "x.csv"
    table.write_bytes("id,sequence\nñandú ß,MKVL\n".encode())
    files = CASES / "utf8_ids.fasta", table
    ids = ["β-lact_é", "Ångström2", "ñandú"]
    run_dir = tmp_path / "run"
    utf8 = planned(run_dir, *files, LC_ALL="C.UTF-8")
    assert utf8[::2] == ("utf-8", ids)
    for shell in (ASCII, latin1):
        encoding, *plan = planned(run_dir, *files, **shell)
        assert encoding != "utf-8"
        assert plan == [*utf8[1:]]


def test_refusals_are_printed_in_every_shell(tmp_path: Path) -> None:
    """Ids with characters that the console's encoding lacks are escaped."""
    path = tmp_path / "x.fasta"
    path.write_bytes(">β1\nMK-V\n>é\nMK\n".encode())
    command = [
        sys.executable,
        "-m",
        "vnp_lib",
        "plan",
        "--fasta",
        str(path),
        "--model",
        "esm2_t6_8M_UR50D",
        "--devices",
        "cpu",
    ]
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | ASCII, capture_output=True, check=False, timeout=60
    )
    output = (done.stdout + done.stderr).decode()
    assert (done.returncode, "Traceback" in output) == (1, False)
    assert r"sequence '\u03b21' has '-' at position 3" in " ".join(output.split())


def test_a_file_named_after_an_id_has_one_name_in_any_shell(
    tmp_path: Path, latin1: dict[str, str]
) -> None:
    """Its name is UTF-8 on disk."""
    code = (
        "import sys; from pathlib import Path; from vnp_lib.storage.durable import path_below;"
        f"name = {'β-lact_é.pt'!a};"
        "path_below(Path(sys.argv[1]), name).write_bytes(b'')"
    )
    for shell in ({"LC_ALL": "C.UTF-8"}, ASCII, latin1):
        environment = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("LC_", "LANG"))
        }
        subprocess.run(
            [sys.executable, "-c", code, tmp_path],
            cwd=ROOT,
            env=environment | shell,
            check=True,
            timeout=60,
        )
        assert os.listdir(os.fsencode(tmp_path)) == ["β-lact_é.pt".encode()]
