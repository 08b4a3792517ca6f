"""Options of the soak: duration and seed. `make soak` runs it, and the poison matrix."""

from __future__ import annotations


def pytest_addoption(parser):
    group = parser.getgroup("soak")
    group.addoption(
        "--soak-minutes", type=float, default=10.0, help="How long to start new rounds of the soak."
    )
    group.addoption(
        "--soak-seed",
        type=int,
        default=1,
        help="Seed of the first round; the next ones count on from it.",
    )
