"""Examples in docstrings (`>>> ...`) as code on the page of the Python reference."""

from __future__ import annotations

import re
from typing import Any

import griffe

_EXAMPLE = re.compile(r"^>>> .*(?:\n.+)*", re.MULTILINE)  # to the next blank line


class FencedExamples(griffe.Extension):
    """Puts a fence around each example: Markdown takes `>>>` for a quotation."""

    def on_instance(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = _EXAMPLE.sub(r"```pycon\n\g<0>\n```", obj.docstring.value)
