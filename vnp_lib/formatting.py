"""Format sizes, times and untrusted text for people."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime

_UNITS = ("bytes", "kB", "MB", "GB", "TB")


def printable(text: str) -> str:
    """Replace characters that move a cursor, ring a bell or break a line."""
    return "".join(char if char.isprintable() else "\ufffd" for char in text)


def listed(
    items: Sequence[str], limit: int, *, separator: str = ", ", total: int | None = None
) -> str:
    """Join the first `limit` items, and count the others: `a, b and 3 more`.

    Args:
        items: All items, or as many of them as are shown.
        limit: Items that are shown.
        separator: Text between two items.
        total: Number of all items, if `items` holds only those that are shown.
    """
    num_more = (len(items) if total is None else total) - limit
    more = f"{separator.rstrip(', ')} and {num_more:,} more" if num_more > 0 else ""
    return separator.join(items[:limit]) + more


def format_bytes(size_bytes: float) -> str:
    """Format 3,725,000,000 bytes as `3.7 GB`."""
    if size_bytes < 999.5:
        return f"{size_bytes:.0f} bytes"
    exponent = next((place for place in (1, 2, 3) if size_bytes < 999.5 * 1000**place), 4)
    value = size_bytes / 1000**exponent
    digits = f"{value:.1f}" if value < 99.95 else f"{value:,.0f}"
    return f"{digits} {_UNITS[exponent]}"


def format_age(at: datetime, now: datetime) -> str:
    """Format the time since `at` as `0:12:03 ago`."""
    return f"{format_duration(max(0.0, (now - at).total_seconds()))} ago"


def format_duration(seconds: float) -> str:
    """Format 3,725 seconds as `1:02:05`."""
    minutes, whole_seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{whole_seconds:02}"


def utc_now() -> datetime:
    """Return the current time, aware of its time zone."""
    return datetime.now(UTC)
