"""Choosing the next token from logits."""

from __future__ import annotations

from rl_mlx.sample.sampler import Sampled, Sampler

__all__ = ["Sampled", "Sampler"]
