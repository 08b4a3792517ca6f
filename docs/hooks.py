"""Hooks of mkdocs: pages from outside docs/, generated parts, links, no remote content.

Links in a page work in the repository; `links.py` rewrites them for the site. A comment
`<!-- generated: NAME -->` is replaced by the output of `from_code.GENERATED[NAME]`. A page that
would load an element from another host fails the build.
"""

from __future__ import annotations

import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

from docs.from_code import GENERATED
from docs.links import BORROWED, ROOT, fetched_from_elsewhere, link_as_in_site, place_in_site

_MARK = re.compile(r"^<!-- generated: (\w+) -->$", re.MULTILINE)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    for path in BORROWED:
        files.append(File.generated(config, place_in_site(path), abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    assert page.file.abs_src_path is not None
    made = _MARK.sub(lambda mark: GENERATED[mark[1]](), markdown)
    return link_as_in_site(made, Path(page.file.abs_src_path).relative_to(ROOT).as_posix())


def on_post_page(output: str, page: Page, config: MkDocsConfig) -> str:
    if element := fetched_from_elsewhere(output):
        raise PluginError(f"{page.file.src_uri} loads an element from another host: {element}")
    return output
