"""What is imported at start-up, for which users and each worker process wait."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from importlib import resources

import pytest

import vnp_lib
from tests.helpers import ROOT

NEED_TORCH = {
    "checkpoint": {"archive", "array_pickle", "file", "resume", "writer"},
    "dataset": {"torch_dataset"},
    "inference": {"executor", "gpu_memory", "runner"},
    "model": {
        *("attention", "cpu_attention", "esm2", "foreign", "heads", "linear", "pooling"),
        *("reference", "tokens", "weight_files", "weights", "windows"),
    },
    "report": {"verify_model"},
}
"""The modules of each room that cannot be imported without torch, besides `esm_extract`."""

_LOADED = "; import sys; print(*sorted(sys.modules))"
_HELP = """
import runpy, sys; sys.argv = {arguments}
try: runpy.{run}
except SystemExit: pass
print(); print(*sorted(sys.modules))
"""


def modules_after(code: str) -> set[str]:
    ended = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return set(ended.stdout.splitlines()[-1].split())


def test_the_package_itself_imports_nothing_large() -> None:
    assert not modules_after("import vnp_lib" + _LOADED) & {
        "torch",
        "prefect",
        "numpy",
        "pyarrow",
        "pydantic",
    }


def test_which_modules_need_torch() -> None:
    """Torch takes seconds to import: a name of any other module may be imported at the top."""
    modules = [
        ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for path in sorted((ROOT / "vnp_lib").rglob("*.py"))
        if path.stem not in ("__init__", "__main__")
    ]
    code = f"""
import importlib, sys
sys.modules["torch"] = None
need_torch = []
for module in {modules}:
    try:
        importlib.import_module(module)
    except ImportError:
        need_torch.append(module)
print(*need_torch)
"""
    ended = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    expected = {f"vnp_lib.{room}.{name}" for room, names in NEED_TORCH.items() for name in names}
    assert set(ended.stdout.split()) == expected | {"vnp_lib.esm_extract"}


def test_the_package_is_typed() -> None:
    """The marker file is part of the installed package as well."""
    assert (resources.files("vnp_lib") / "py.typed").is_file()
    shipped = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"][
        "package-data"
    ]
    assert "py.typed" in shipped["vnp_lib"]


def test_public_names_are_imported_on_first_use() -> None:
    code = "import vnp_lib; [getattr(vnp_lib, name) for name in vnp_lib.__all__]"
    assert not modules_after(code + _LOADED) & {"torch", "prefect", "esm", "matplotlib"}
    assert {name: getattr(vnp_lib, name).__module__ for name in vnp_lib.__all__} == {
        "EmbedConfig": "vnp_lib.config",
        "EmbeddingDataset": "vnp_lib.dataset.reader",
        "Embeddings": "vnp_lib.embeddings",
        "Outputs": "vnp_lib.embeddings",
        "VnpError": "vnp_lib.errors",
        "embed": "vnp_lib.api",
        "open_dataset": "vnp_lib.dataset.reader",
    }
    assert set(vnp_lib.__all__) <= set(dir(vnp_lib))
    with pytest.raises(AttributeError, match="module 'vnp_lib' has no attribute 'embedd'"):
        vnp_lib.embedd  # noqa: B018


@pytest.mark.parametrize(
    "code",
    [
        pytest.param("import vnp_lib.cli" + _LOADED, id="import vnp_lib.cli"),
        pytest.param(
            _HELP.format(
                arguments=["vnp", "--help"], run='run_module("vnp_lib", run_name="__main__")'
            ),
            id="vnp --help",
        ),
        pytest.param(
            _HELP.format(
                arguments=["flows/embed.py", "--help"],
                run='run_path("flows/embed.py", run_name="__main__")',
            ),
            id="python flows/embed.py --help",
        ),
    ],
)
def test_help_loads_neither_torch_nor_prefects_server(code: str) -> None:
    assert not modules_after(code) & {
        "torch",
        "esm",
        "matplotlib",
        "prefect.server.api.server",
        "uvicorn",
    }


def test_a_worker_imports_neither_prefect_nor_plots() -> None:
    loaded = modules_after(
        "import vnp_lib.worker.attempt, vnp_lib.inference.runner, vnp_lib.checkpoint.writer"
        + _LOADED
    )
    assert not loaded & {
        "prefect",
        "matplotlib",
        "jinja2",
        "rich",
        "esm",
        "torch._dynamo",
        "torch._inductor",
        "pydantic_settings",
    }
