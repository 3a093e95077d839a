"""The KV cache: one arena of left-aligned rows."""

from __future__ import annotations

from rl_mlx.cache.arena import Arena

__all__ = ["Arena"]
