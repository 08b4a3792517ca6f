"""The house stands: imports go down only, and the library knows nothing of Prefect."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LAYERS = (
    {
        "failures",
        "processes",
        "mounts",
        "packed_integers",
        "liveness",
        "stop_signals",
        "worker_events",
        "characters",
        "file_kinds",
        "decompression",
    },
    {"files", "software", "machine", "outputs", "windows", "user_paths", "streams"},
    {
        "config",
        "weight_files",
        "records",
        "source",
        "spool",
        "file_system",
        "duplicates",
        "packing",
        "progress",
        "heartbeat",
        "linear",
        "cpu_attention",
        "read_ahead",
        "metrics",
        "hdf5",
        "torch_rows",
        "array_pickle",
    },
    {"fasta", "tables", "translation", "input_files"},
    {"inputs"},
    {"plan", "proteins", "retry", "tokens", "attention", "terminal", "columns", "extract_files", "checkpoint_file"},
    {
        "manifest",
        "quarantine",
        "esm2",
        "listener",
        "precision",
        "dataset",
        "embeddings",
        "pooling",
        "long_sequences",
        "checkpoint_survey",
    },
    {"weights", "fair_esm"},
    {"heads", "foreign_model"},
    {"checkpoint", "formats", "supervisor", "embedder", "gpu_memory", "history", "metrics_page"},
    {"inference", "assembly", "run_record", "export", "pictures", "esm_extract"},
    {"worker", "verify", "status", "run_directory"},
    {"run_worker", "run", "report"},
    {"judgement", "forecast", "verify_model", "api"},
    {"cli"},
    {"__main__"},
)
LAYER_OF = {module: layer for layer, modules in enumerate(LAYERS) for module in modules}
MODULES = sorted(path.stem for path in (ROOT / "vnp_lib").glob("*.py") if path.stem != "__init__")


def imported_modules(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
    return names


@pytest.mark.parametrize("module", MODULES)
def test_imports_only_go_down(module):
    """A module imports from the layers below its own, and every module has its layer."""
    assert module in LAYER_OF, f"give {module} a layer"
    imported = imported_modules(ROOT / "vnp_lib" / f"{module}.py")
    ours = {name.removeprefix("vnp_lib.") for name in imported if name.startswith("vnp_lib.")}
    assert {other for other in ours if LAYER_OF[other] >= LAYER_OF[module]} == set()


@pytest.mark.parametrize("module", ["failures", "files"])
def test_the_lowest_layers_need_the_standard_library_only(module):
    imported = imported_modules(ROOT / "vnp_lib" / f"{module}.py")
    outside = {name.split(".")[0] for name in imported} - set(sys.stdlib_module_names) - {"vnp_lib", "_typeshed"}
    assert outside == set()


def test_vnp_lib_imports_without_prefect():
    """The library works where Prefect is not installed."""
    code = "import sys; sys.modules['prefect'] = None\n" + "\n".join(f"import vnp_lib.{module}" for module in MODULES)
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_importing_the_package_loads_no_torch():
    code = "import sys, vnp_lib; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
