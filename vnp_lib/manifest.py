"""Alias of the manifest under the path that users' programs import it from."""

from __future__ import annotations

from vnp_lib.checkpoint import CheckpointManifest

__all__ = ["CheckpointManifest"]
