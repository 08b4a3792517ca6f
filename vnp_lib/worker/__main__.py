"""The program of a worker process: `python -P vnp_lib/worker/__main__.py job.json`.

It is started by the path of this file and runs the `vnp_lib` that this file is part of, which is
that of its parent. With `python -m vnp_lib.worker`, Python would take any `vnp_lib`, or
`random.py`, in the current directory.
"""

from __future__ import annotations

import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

_PACKAGE = "vnp_lib"


def import_own_package() -> None:
    """Import `vnp_lib` from the directory of this file.

    If another one has been imported already, the attempt will refuse it.
    """
    if _PACKAGE in sys.modules:
        return
    directory = Path(__file__).parents[1]
    spec = spec_from_file_location(
        _PACKAGE, directory / "__init__.py", submodule_search_locations=[str(directory)]
    )
    assert spec is not None
    assert spec.loader is not None
    package = module_from_spec(spec)
    sys.modules[_PACKAGE] = package
    spec.loader.exec_module(package)


if __name__ == "__main__":
    import_own_package()
    from vnp_lib.worker.attempt import main

    sys.exit(main(sys.argv[1:]))
