"""Start a worker process: `python -P vnp_lib/run_worker.py job.json`, by the path of this very file.

It runs the `vnp_lib` that this file is part of: that of the process that has started it. `python -m vnp_lib.worker` would run
whatever bears that name in the current directory, where a user may have another checkout, or a `random.py`.
"""

from __future__ import annotations

import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

_PACKAGE = "vnp_lib"


def import_own_package() -> None:
    """Import `vnp_lib` from the directory of this file, unless it has been imported: the worker compares the code anyway."""
    if _PACKAGE in sys.modules:
        return
    directory = Path(__file__).parent
    spec = spec_from_file_location(_PACKAGE, directory / "__init__.py", submodule_search_locations=[str(directory)])
    assert spec is not None
    assert spec.loader is not None
    package = module_from_spec(spec)
    sys.modules[_PACKAGE] = package
    spec.loader.exec_module(package)


if __name__ == "__main__":
    import_own_package()
    from vnp_lib.worker import main

    sys.exit(main(sys.argv[1:]))
