"""Model references: from what a user types to files on disk."""

from __future__ import annotations

from rl_mlx.store.hubcache import remove
from rl_mlx.store.models import InstalledModel, ModelFiles
from rl_mlx.store.resolve import find, installed, resolve

__all__ = ["InstalledModel", "ModelFiles", "find", "installed", "remove", "resolve"]
