"""Fixtures for tests of durable files and locks."""

from __future__ import annotations

from typing import Any

import pytest

from vnp_lib.storage import durable
from vnp_lib.storage.durable import DurableOps


@pytest.fixture
def use_ops(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Replace the system calls of durable files and locks."""

    def use(ops: DurableOps) -> DurableOps:
        monkeypatch.setattr(durable, "ops", ops)
        return ops

    return use
