"""Create consoles, and measure tables to fit them."""

from __future__ import annotations

import shutil
import sys

from rich.console import Console, ConsoleOptions
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from vnp_lib.formatting import printable
from vnp_lib.streams import best_effort

_FILE_WIDTH = 140  # columns, if the output is not a terminal
_DEFAULT_WIDTH = 80  # columns
_UNLIMITED_WIDTH = 10_000  # columns
_STDERR_PATIENCE_S = 1.0


def console() -> Console:
    """Return a console on standard output for tables, without markup."""
    width = None if sys.stdout.isatty() else shutil.get_terminal_size((_FILE_WIDTH, 0)).columns
    return _with_positive_width(Console(width=width, markup=False, highlight=False, emoji=False))


def natural_width(table: Table, console: Console, options: ConsoleOptions) -> int:
    """Return the columns that a table takes if nothing in it is cut or wrapped."""
    return Measurement.get(console, options.update(max_width=_UNLIMITED_WIDTH), table).maximum


def error_console(*, quiet: bool = False) -> Console:
    """Return a console on standard error whose writes never fail or block for long."""
    stream = best_effort(sys.stderr, patience_s=_STDERR_PATIENCE_S)
    return _with_positive_width(Console(file=stream, quiet=quiet))


def _with_positive_width(console: Console) -> Console:
    """Set the default width if COLUMNS or the terminal says 0, on which nothing can be drawn."""
    if console.width < 1:
        console.width = _DEFAULT_WIDTH
    return console


def bar(share: float, options: ConsoleOptions, *, width: int) -> str:
    """Draw a share of 1 as a bar of up to `width` characters that the output's encoding has.

    A positive share has at least one character.
    """
    return ("#" if options.ascii_only else "█") * max(1 if share > 0 else 0, round(width * share))


def plain(text: str, style: str = "") -> Text:
    """Return untrusted text, such as an id or a message, without control characters."""
    return Text(printable(text), style=style)
