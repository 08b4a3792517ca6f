"""What is shown to people on a terminal: text that cannot play tricks on it, bytes and times in their usual units."""

from __future__ import annotations

import shutil
import sys
from datetime import UTC, datetime

from rich.console import Console, ConsoleOptions
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from vnp_lib.streams import best_effort

_WIDTH_OF_A_FILE = 140  # columns, where there is no terminal to ask
_WIDER_THAN_ANY = 10_000
_UNITS = ("bytes", "kB", "MB", "GB", "TB")


def console() -> Console:
    """Standard output, for tables: nothing in what is printed is taken for markup."""
    width = None if sys.stdout.isatty() else shutil.get_terminal_size((_WIDTH_OF_A_FILE, 0)).columns
    return with_some_width(Console(width=width, markup=False, highlight=False, emoji=False))


def bar(share: float, options: ConsoleOptions, *, width: int) -> str:
    """Draw a share of 1 as a bar of up to `width` letters that the output's encoding has; more than nothing is seen."""
    return ("#" if options.ascii_only else "█") * max(1 if share > 0 else 0, round(width * share))


def natural_width(table: Table, console: Console, options: ConsoleOptions) -> int:
    """Columns that a table takes if nothing in it is cut or wrapped."""
    return Measurement.get(console, options.update(max_width=_WIDER_THAN_ANY), table).maximum


def plain(text: str, style: str = "") -> Text:
    """Text that somebody else wrote, as of an id or a message: control letters are replaced."""
    return Text(printable(text), style=style)


def printable(text: str) -> str:
    """Replace what moves a cursor, rings a bell or breaks a line."""
    return "".join(letter if letter.isprintable() else "\ufffd" for letter in text)


def format_bytes(size_bytes: float) -> str:
    """Write 3,725,000,000 bytes as `3.7 GB`."""
    if size_bytes < 999.5:
        return f"{size_bytes:.0f} bytes"
    exponent = next((place for place in (1, 2, 3) if size_bytes < 999.5 * 1000**place), 4)
    value = size_bytes / 1000**exponent
    return f"{value:.1f} {_UNITS[exponent]}" if value < 99.95 else f"{value:,.0f} {_UNITS[exponent]}"


def format_age(at: datetime, now: datetime) -> str:
    """Write how long ago something was: `0:12:03 ago`."""
    return f"{format_duration(max(0.0, (now - at).total_seconds()))} ago"


_PATIENCE_S = 1.0  # with a reader of standard error that takes nothing
_USUAL_WIDTH = 80  # columns


def error_console(*, quiet: bool = False) -> Console:
    """Standard error, for what is only shown: a full disk, a reader that has left or is paused do not matter."""
    return with_some_width(Console(file=best_effort(sys.stderr, patience_s=_PATIENCE_S), quiet=quiet))


def with_some_width(console: Console) -> Console:
    """Give a console the usual width where COLUMNS or the terminal says 0, on which nothing can be drawn."""
    if console.width < 1:
        console.width = _USUAL_WIDTH
    return console


def format_duration(seconds: float) -> str:
    """Write 3,725 seconds as `1:02:05`."""
    minutes, whole_seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{whole_seconds:02}"


def utc_now() -> datetime:
    return datetime.now(UTC)
