"""How long the soak lasts, and with which seed. `make soak` runs it, and the poison matrix."""

from __future__ import annotations


def pytest_addoption(parser):
    group = parser.getgroup("soak")
    group.addoption(
        "--soak-minutes", type=float, default=10.0, help="How long to begin new rounds of the soak."
    )
    group.addoption(
        "--soak-seed",
        type=int,
        default=1,
        help="Of the first round; the next ones count on from it.",
    )
