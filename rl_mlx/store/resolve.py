"""A model reference becomes files on disk."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from rl_mlx.errors import ModelNotFound


@dataclass(frozen=True)
class ModelFiles:
    """``path`` is a GGUF file (the first of a split one) or a folder; ``name`` is what to call it."""

    name: str
    path: Path


def resolve(reference: str) -> ModelFiles:
    """Files of ``reference``; raises ``ModelNotFound``."""
    path = Path(reference).expanduser()
    if path.exists():
        return ModelFiles(path.stem if path.is_file() else path.name, path)
    raise ModelNotFound(f"no model {reference!r}")
