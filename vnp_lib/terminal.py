"""Consoles, and tables that fit them."""

from __future__ import annotations

import shutil
import sys

from rich.console import Console, ConsoleOptions
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from vnp_lib.formatting import printable
from vnp_lib.streams import best_effort

_WIDTH_OF_A_FILE = 140  # columns, where there is no terminal to ask
_WIDER_THAN_ANY = 10_000
_USUAL_WIDTH = 80  # columns
_PATIENCE_S = 1.0  # with a reader of standard error that takes nothing


def console() -> Console:
    """Standard output, for tables: nothing in what is printed is taken for markup."""
    width = None if sys.stdout.isatty() else shutil.get_terminal_size((_WIDTH_OF_A_FILE, 0)).columns
    return with_some_width(Console(width=width, markup=False, highlight=False, emoji=False))


def natural_width(table: Table, console: Console, options: ConsoleOptions) -> int:
    """Columns that a table takes if nothing in it is cut or wrapped."""
    return Measurement.get(console, options.update(max_width=_WIDER_THAN_ANY), table).maximum


def error_console(*, quiet: bool = False) -> Console:
    """Standard error, for what is only shown: a full disk, a reader that has left or is paused do not matter."""
    return with_some_width(
        Console(file=best_effort(sys.stderr, patience_s=_PATIENCE_S), quiet=quiet)
    )


def with_some_width(console: Console) -> Console:
    """Give a console the usual width where COLUMNS or the terminal says 0, on which nothing can be drawn."""
    if console.width < 1:
        console.width = _USUAL_WIDTH
    return console


def bar(share: float, options: ConsoleOptions, *, width: int) -> str:
    """Draw a share of 1 as a bar of up to `width` letters that the output's encoding has; more than nothing is seen."""
    return ("#" if options.ascii_only else "█") * max(1 if share > 0 else 0, round(width * share))


def plain(text: str, style: str = "") -> Text:
    """Text that somebody else wrote, as of an id or a message: control letters are replaced."""
    return Text(printable(text), style=style)
