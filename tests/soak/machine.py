"""Measure the load of this machine."""

from __future__ import annotations

import os


def slowness() -> float:
    """Return how many times longer a computation takes than on idle cores; 1 if some are idle."""
    return max(1.0, os.getloadavg()[0] / len(os.sched_getaffinity(0)))
