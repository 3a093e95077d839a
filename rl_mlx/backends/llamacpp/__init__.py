"""The llama.cpp backend: every host that MLX does not serve, and every GGUF file that it cannot
run.
"""

from __future__ import annotations

from rl_mlx.backends.llamacpp.backend import LlamaCppBackend
from rl_mlx.backends.llamacpp.options import LlamaCppOptions

__all__ = ["LlamaCppBackend", "LlamaCppOptions"]
