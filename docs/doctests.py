"""Show examples in docstrings (`>>> ...`) as code on the page of the Python reference."""

from __future__ import annotations

import re
from typing import Any

import griffe

# An example ends at the next blank line.
_EXAMPLE = re.compile(r"^>>> .*(?:\n.+)*", re.MULTILINE)


class FencedExamples(griffe.Extension):
    """Put a fence around each example, since Markdown reads `>>>` as a quotation."""

    def on_instance(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = _EXAMPLE.sub(r"```pycon\n\g<0>\n```", obj.docstring.value)
