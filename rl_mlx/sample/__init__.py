"""Choosing the next token from logits: in MLX for a batch, in NumPy (``host``) for one row."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rl_mlx.sample.sampler import Sampled, Sampler

__all__ = ["Sampled", "Sampler"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        from rl_mlx.sample import sampler  # noqa: PLC0415  (hosts without mlx use the rest)

        return getattr(sampler, name)
    raise AttributeError(f"module 'rl_mlx.sample' has no attribute {name!r}")
