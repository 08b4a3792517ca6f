"""Translate links between files into links between pages of the site, and find remote elements."""

from __future__ import annotations

import posixpath
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
# Pages of the site that are not in docs/.
BORROWED = (
    *("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md", "LICENSE", "prefect.yaml"),
    *("benchmarks/README.md", "examples/README.md"),
    *(
        f"deployments/{path.name}"
        for path in sorted((ROOT / "deployments").iterdir())
        if path.is_file()
    ),
)

_LINK = re.compile(r"(?<=\]\()(?![a-z]+:|#)([^)#\s]+)")
_FETCHED = re.compile(
    r"<(?:script|img|iframe|source|link(?! rel=.canonical))\b"
    r"[^>]*\b(?:src|href)=[\"']?(?:https?:)?//[^>]*>"
)


def place_in_site(path: str) -> str:
    """Return a file's path on the site: the README is the first page, docs/ is the top level."""
    return "index.md" if path == "README.md" else path.removeprefix("docs/")


def link_as_in_site(markdown: str, path: str) -> str:
    """Rewrite the links of a page, given by its path in the repository, as links of the site."""
    directory = posixpath.dirname(path)
    directory_in_site = posixpath.dirname(place_in_site(path)) or "."

    def turned(link: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(directory, link[1]))
        return posixpath.relpath(place_in_site(target), directory_in_site)

    return _LINK.sub(turned, markdown)


def fetched_from_elsewhere(html: str) -> str | None:
    """Return the first element of a page that a browser would fetch from another host."""
    found = _FETCHED.search(html)
    return found[0] if found else None
