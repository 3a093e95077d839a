"""Model references: from what a user types to files on disk."""

from __future__ import annotations

from rl_mlx.store.resolve import ModelFiles, resolve

__all__ = ["ModelFiles", "resolve"]
