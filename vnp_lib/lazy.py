"""Import the names of a package's face on first use (PEP 562)."""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Mapping
from importlib import import_module


def lazy_face(
    package: str, names: Mapping[str, str], modules: Collection[str] = ()
) -> tuple[Callable[[str], object], Callable[[], list[str]]]:
    """Return the `__getattr__` and `__dir__` of a package whose names are imported on first use.

    Args:
        package: The package's `__name__`.
        names: The names of the face, each with the module that defines it.
        modules: Modules that are attributes of the package as well.
    """

    def get(name: str) -> object:
        if name in names:
            value = getattr(import_module(names[name]), name)
        elif name in modules:
            value = import_module(name)
        else:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        setattr(sys.modules[package], name, value)
        return value

    return get, lambda: sorted({*vars(sys.modules[package]), *names})
