"""How long things take on this machine."""

from __future__ import annotations

import os


def slowness() -> float:
    """How many times longer a computation takes now than on idle processors; 1 where some are idle."""
    return max(1.0, os.getloadavg()[0] / len(os.sched_getaffinity(0)))
