"""A mutant: the library with one fault, and the tests that must fail because of it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

_TOKEN = re.compile(r"""[A-Za-z_]*"(?:\\.|[^"\\\n])*"|[A-Za-z_]*'(?:\\.|[^'\\\n])*'|\w+|[^\w\s]""")
_CLOSING = re.compile(r"[)\]}]")


@dataclass(frozen=True, slots=True, kw_only=True)
class Mutant:
    """A change to one module, identified by its name."""

    name: str
    module: str  # below vnp_lib, with dots
    before: str  # occurs exactly once, however it is broken into lines
    after: str
    caught_by: tuple[str, ...]  # node ids of pytest

    @property
    def path(self) -> Path:
        """The module's file, below the root of the repository."""
        return Path("vnp_lib", *self.module.split(".")).with_suffix(".py")

    def occurrences(self, root: Path) -> int:
        """Count how often `before` is in the module; with anything but 1 this is no mutant."""
        return len(self._pattern().findall((root / self.path).read_text(encoding="utf-8")))

    def apply(self, root: Path) -> None:
        """Write the change into the module below `root`."""
        path = root / self.path
        code = path.read_text(encoding="utf-8")
        path.write_text(self._pattern().sub(lambda _: self._inserted(), code), encoding="utf-8")

    def _pattern(self) -> re.Pattern[str]:
        """Match the tokens of `before` with any white space between them.

        A comma or parenthesis that the formatter adds where it breaks a line is matched too.
        """
        pattern = ""
        for token in _TOKEN.findall(self.before):
            if pattern:
                pattern += r",?\s*" if _CLOSING.fullmatch(token) else r"\s*"
            pattern += re.escape(token)
        first, last = self.before.strip()[0], self.before.strip()[-1]
        return re.compile(
            (r"(?<![\w.])" if first.isalnum() else "")
            + pattern
            + (r"(?!\w)" if last.isalnum() else "")
        )

    def _inserted(self) -> str:
        """Return `after` without the white space around it that `before` has too."""
        leading = len(self.before) - len(self.before.lstrip())
        trailing = len(self.before) - len(self.before.rstrip())
        after = self.after
        if after.startswith(self.before[:leading]):
            after = after[leading:]
        if trailing and after.endswith(self.before[-trailing:]):
            after = after[: len(after) - trailing]
        return after
