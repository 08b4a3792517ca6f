"""Links: in the repository from file to file, on the site from page to page, and none that a browser would follow by itself."""

from __future__ import annotations

import posixpath
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
BORROWED = (  # what the site has beside docs/
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
    r"<(?:script|img|iframe|source|link(?! rel=.canonical))\b[^>]*\b(?:src|href)=[\"']?(?:https?:)?//[^>]*>"
)


def place_in_site(path: str) -> str:
    """Where a file of the repository is on the site: the README is its first page, and what is in docs/ at the top."""
    return "index.md" if path == "README.md" else path.removeprefix("docs/")


def link_as_in_site(markdown: str, path: str) -> str:
    """Turn the links of a page, by its path in the repository, into links of the site."""
    directory = posixpath.dirname(path)
    directory_in_site = posixpath.dirname(place_in_site(path)) or "."

    def turned(link: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(directory, link[1]))
        return posixpath.relpath(place_in_site(target), directory_in_site)

    return _LINK.sub(turned, markdown)


def fetched_from_elsewhere(html: str) -> str | None:
    """The first element of a page that a browser would fetch from another host."""
    found = _FETCHED.search(html)
    return found[0] if found else None
