"""Families of models, a file for those that are alike: what the formats know of each."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from rl_mlx.convert.families import deepseek, mixtures, qwen_moe
from rl_mlx.convert.family import Family

FAMILIES: Mapping[str, Family] = MappingProxyType(
    {**qwen_moe.FAMILIES, **deepseek.FAMILIES, **mixtures.FAMILIES}
)
"""By ``model_type``."""
