"""A Hugging Face style config as GGUF metadata, for the families that are exported; the inverse of
``config``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt

from rl_mlx.errors import UnsupportedModel

Config = Mapping[str, Any]
Fields = dict[str, int | float | str]

ARCHITECTURES: Mapping[str, str] = MappingProxyType(
    {
        "llama": "llama",
        "mistral": "llama",
        "mixtral": "llama",
        "qwen2": "qwen2",
        "qwen3": "qwen3",
        "qwen3_moe": "qwen3moe",
    }
)
"""``model_type`` -> ``general.architecture``."""

INTERLEAVED = frozenset({"llama", "mistral", "mixtral"})
"""Families whose Q and K lie interleaved in GGUF."""


def fields(config: Config) -> Fields:
    """Metadata of the architecture, without its prefix. Raises ``UnsupportedModel``."""
    family = config["model_type"]
    if family not in ARCHITECTURES:
        raise UnsupportedModel(
            f"models of type {family!r} cannot be exported to GGUF yet; known are "
            f"{', '.join(ARCHITECTURES)}"
        )
    heads = config["num_attention_heads"]
    head_dim = config.get("head_dim") or config["hidden_size"] // heads
    found: Fields = {
        "vocab_size": config["vocab_size"],
        "context_length": config["max_position_embeddings"],
        "embedding_length": config["hidden_size"],
        "block_count": config["num_hidden_layers"],
        "feed_forward_length": config["intermediate_size"],
        "attention.head_count": heads,
        "attention.head_count_kv": config.get("num_key_value_heads") or heads,
        "attention.key_length": head_dim,
        "attention.value_length": head_dim,
        "attention.layer_norm_rms_epsilon": float(config["rms_norm_eps"]),
        "rope.dimension_count": head_dim,
        "rope.freq_base": float(_rope(config).get("rope_theta", 10000.0)),
    }
    return found | _experts(config) | _scaling(config)


def rope_divisors(config: Config) -> npt.NDArray[np.float32] | None:
    """``rope_freqs.weight`` of Llama 3's scaling, float32 ``[head_dim / 2]``; None for other kinds.

    A frequency that turns ``t`` times in the original context is divided by
    ``1 / ((1 - s) / factor + s)`` with ``s = (t - low) / (high - low)``, clipped to 0..1.
    """
    rope = _rope(config)
    if rope.get("rope_type") != "llama3":
        return None
    dims = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    exponents = np.arange(0, dims, 2, dtype=np.float64) / dims
    turns = rope["original_max_position_embeddings"] * rope["rope_theta"] ** -exponents / math.tau
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    smooth = np.clip((turns - low) / (high - low), 0, 1)
    divisors: npt.NDArray[np.float32] = 1 / ((1 - smooth) / rope["factor"] + smooth)
    return divisors.astype(np.float32)


def _rope(config: Config) -> dict[str, Any]:
    rope = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    rope.setdefault("rope_theta", config.get("rope_theta") or 10000.0)
    rope.setdefault("rope_type", rope.get("type") or "default")
    return rope


def _scaling(config: Config) -> Fields:
    rope = _rope(config)
    kind = rope["rope_type"]
    if kind in {"default", "llama3"}:
        return {}
    if kind == "linear":
        return {"rope.scaling.type": "linear", "rope.scaling.factor": float(rope["factor"])}
    if kind == "yarn" and not {"attention_factor", "mscale", "mscale_all_dim"} & rope.keys():
        return {
            "rope.scaling.type": "yarn",
            "rope.scaling.factor": float(rope["factor"]),
            "rope.scaling.original_context_length": int(
                rope.get("original_max_position_embeddings") or config["max_position_embeddings"]
            ),
        }
    raise UnsupportedModel(f"rope scaling of type {kind!r} cannot be exported to GGUF yet")


def _experts(config: Config) -> Fields:
    family = config["model_type"]
    if family == "mixtral":
        return {
            "expert_count": config["num_local_experts"],
            "expert_used_count": config["num_experts_per_tok"],
        }
    if family != "qwen3_moe":
        return {}
    if not config.get("norm_topk_prob") or config.get("mlp_only_layers"):
        raise UnsupportedModel(
            "llama.cpp runs Qwen3 MoE only with norm_topk_prob and experts in every layer"
        )
    return {
        "expert_count": config["num_experts"],
        "expert_used_count": config["num_experts_per_tok"],
        "expert_feed_forward_length": config["moe_intermediate_size"],
    }
