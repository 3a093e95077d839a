"""Families of models, a file for those that are alike: what the formats know of each."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from rl_mlx.convert.families import (
    deepseek,
    gpt2,
    layer_norms,
    llama4,
    llama_like,
    mamba,
    mixtures,
    post_norms,
    qwen_moe,
    qwen_next,
    selective,
)
from rl_mlx.convert.family import Family

FAMILIES: Mapping[str, Family] = MappingProxyType({
    **llama_like.FAMILIES,
    **llama4.FAMILIES,
    **layer_norms.FAMILIES,
    **post_norms.FAMILIES,
    **gpt2.FAMILIES,
    **qwen_moe.FAMILIES,
    **qwen_next.FAMILIES,
    **deepseek.FAMILIES,
    **mixtures.FAMILIES,
    **mamba.FAMILIES,
    **selective.FAMILIES,
})  # fmt: skip
"""By ``model_type``."""
