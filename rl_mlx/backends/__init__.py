"""Backends: what makes tokens (MLX, llama.cpp, a fake for tests)."""

from __future__ import annotations

from rl_mlx.backends.base import Backend
from rl_mlx.settings import ModelSettings
from rl_mlx.store import ModelFiles

__all__ = ["Backend", "open_backend"]


def open_backend(files: ModelFiles, settings: ModelSettings) -> Backend:
    """Load ``files`` on the backend that ``settings`` names, or that suits this machine.

    Raises ``BackendUnavailable``, ``UnsupportedModel``, ``FormatError`` or ``OutOfMemory``.
    """
    from rl_mlx.backends.mlx import MLXBackend  # noqa: PLC0415  (mlx loads only when it is used)

    return MLXBackend.open(files, settings)
