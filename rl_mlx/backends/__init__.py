"""Backends: what makes tokens (MLX, llama.cpp, a server at a URL, a fake for tests)."""

from __future__ import annotations

from rl_mlx.backends.base import Backend
from rl_mlx.backends.choice import open_chosen
from rl_mlx.settings import ModelSettings
from rl_mlx.store import ModelFiles

__all__ = ["Backend", "open_backend"]


def open_backend(files: ModelFiles, settings: ModelSettings) -> Backend:
    """Load ``files`` on the backend that ``settings`` names, or that suits this machine.

    Raises ``BackendUnavailable``, ``UnsupportedModel``, ``FormatError`` or ``OutOfMemory``.
    """
    return open_chosen(files, settings)
