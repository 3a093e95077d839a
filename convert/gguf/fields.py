"""A Hugging Face style config as GGUF metadata, for the families that are exported.

The inverse of ``config``; keys are those of ``docs/gguf.md`` and llama.cpp's ``llama-arch.cpp``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt

from rl_mlx.convert.families import FAMILIES
from rl_mlx.convert.families.words import write_windows
from rl_mlx.convert.family import RMS_NORM
from rl_mlx.convert.gguf.rope import FREQS, LONGROPE
from rl_mlx.convert.gguf.writer import Fields
from rl_mlx.convert.layout import feed_forward_width
from rl_mlx.errors import UnsupportedModel

Config = Mapping[str, Any]

ARCHITECTURES: Mapping[str, str] = MappingProxyType(
    {
        "llama": "llama",
        "mistral": "llama",
        "mixtral": "llama",
        "ministral3": "mistral3",
        "qwen2": "qwen2",
        "qwen3": "qwen3",
        "qwen3_moe": "qwen3moe",
        "gemma2": "gemma2",
        "gemma3_text": "gemma3",
        "phi3": "phi3",
        "gpt_oss": "gpt-oss",
        "lfm2": "lfm2",
    }
)
"""``model_type`` -> ``general.architecture``."""

INTERLEAVED = frozenset({"llama", "mistral", "mixtral", "ministral3"})
"""Families whose Q and K lie interleaved in GGUF."""


def fields(config: Config) -> Fields:
    """Metadata of the architecture, without its prefix. Raises ``UnsupportedModel``."""
    family = config["model_type"]
    if family not in ARCHITECTURES and family not in FAMILIES:
        raise UnsupportedModel(
            f"models of type {family!r} cannot be exported to GGUF yet; known are "
            f"{', '.join([*ARCHITECTURES, *FAMILIES])}"
        )
    head_dim = _head_dim(config)
    found: Fields = {
        "vocab_size": config["vocab_size"],
        "context_length": config["max_position_embeddings"],
        "embedding_length": config["hidden_size"],
        "block_count": config["num_hidden_layers"],
        "feed_forward_length": config["intermediate_size"],
        "attention.head_count": config["num_attention_heads"],
        "attention.head_count_kv": _kv_heads(config),
        "attention.key_length": head_dim,
        "attention.value_length": head_dim,
        **_epsilon(config),
        "rope.dimension_count": int(head_dim * config.get("partial_rotary_factor", 1.0)),
        "rope.freq_base": float(_rope(config)["rope_theta"]),
    }
    own = FAMILIES[family].write if family in FAMILIES else _FAMILIES.get(family)
    return found | _scaling(config) | (own(config) if own else {})


def rope_tensors(config: Config) -> dict[str, npt.NDArray[np.float32]]:
    """Tensors that say how rotary frequencies are scaled, float32 ``[head_dim / 2]`` each.

    Llama 3's divide them: one that turns ``t`` times in the original context by
    ``1 / ((1 - s) / factor + s)`` with ``s = (t - low) / (high - low)``, clipped to 0..1. LongRoPE
    has a list for long contexts and one for short ones.
    """
    rope = _rope(config)
    if rope["rope_type"] == "longrope":
        long, short = LONGROPE
        factors = {long: rope["long_factor"], short: rope["short_factor"]}
        return {name: np.asarray(values, np.float32) for name, values in factors.items()}
    if rope["rope_type"] != "llama3":
        return {}
    dims = _head_dim(config)
    exponents = np.arange(0, dims, 2, dtype=np.float64) / dims
    turns = rope["original_max_position_embeddings"] * rope["rope_theta"] ** -exponents / math.tau
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    smooth = np.clip((turns - low) / (high - low), 0, 1)
    divisors: npt.NDArray[np.float64] = 1 / ((1 - smooth) / rope["factor"] + smooth)
    return {FREQS: divisors.astype(np.float32)}


def _head_dim(config: Config) -> int:
    found: int = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    return found


def _kv_heads(config: Config) -> int:
    found: int = config.get("num_key_value_heads") or config["num_attention_heads"]
    return found


def _epsilon(config: Config) -> Fields:
    family = FAMILIES.get(config["model_type"])
    named, key = family.epsilon if family else ("rms_norm_eps", RMS_NORM)
    for name in (named, "norm_eps"):
        if config.get(name) is not None:
            return {key: float(config[name])}
    return {key: 1e-6}  # what transformers takes where a config is silent


def _rope(config: Config) -> dict[str, Any]:
    """The settings of full attention, with ``rope_type`` and ``rope_theta``."""
    found = config.get("rope_parameters") or config.get("rope_scaling") or {}
    rope: dict[str, Any] = dict(found.get("full_attention") or found)
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
    if kind == "yarn":
        return _yarn(config, rope)
    if kind == "longrope":
        return _longrope(config, rope)
    raise UnsupportedModel(f"rope scaling of type {kind!r} cannot be exported to GGUF yet")


def _original(config: Config, rope: Mapping[str, Any]) -> int:
    key = "original_max_position_embeddings"
    return int(rope.get(key) or config.get(key) or config["max_position_embeddings"])


def _yarn(config: Config, rope: Mapping[str, Any]) -> Fields:
    """llama.cpp multiplies by its own magnitude, ``0.1 ln(factor) + 1``: a given one is divided."""
    factor = float(rope["factor"])
    found: Fields = {
        "rope.scaling.type": "yarn",
        "rope.scaling.factor": factor,
        "rope.scaling.original_context_length": _original(config, rope),
        "rope.scaling.yarn_beta_fast": float(rope.get("beta_fast") or 32.0),
        "rope.scaling.yarn_beta_slow": float(rope.get("beta_slow") or 1.0),
    }
    attention = rope.get("attention_factor")
    magnitude = _magnitude(factor, 1.0)
    weight, of_all = rope.get("mscale"), rope.get("mscale_all_dim")
    if attention is None and weight and of_all and config["model_type"] not in FAMILIES:
        attention = _magnitude(factor, weight) / _magnitude(factor, of_all)
    if attention is not None and not math.isclose(attention, magnitude, rel_tol=1e-6):
        found["rope.scaling.attn_factor"] = float(attention) / magnitude
    return found


def _magnitude(factor: float, weight: float) -> float:
    return 0.1 * weight * math.log(factor) + 1 if factor > 1 else 1.0


def _longrope(config: Config, rope: Mapping[str, Any]) -> Fields:
    """The factor on queries and keys is that of the paper where none is given (Ding 2024)."""
    original = _original(config, rope)
    scale = config["max_position_embeddings"] / original
    factor = math.sqrt(1 + math.log(scale) / math.log(original)) if scale > 1 else 1.0
    given = rope.get("attention_factor")
    return {
        "rope.scaling.original_context_length": original,
        "rope.scaling.attn_factor": float(factor if given is None else given),
    }


def _used(config: Config) -> Fields:
    experts = config.get("num_local_experts") or config["num_experts"]
    return {"expert_count": experts, "expert_used_count": config["num_experts_per_tok"]}


def _qwen3_moe(config: Config) -> Fields:
    if not config.get("norm_topk_prob") or config.get("mlp_only_layers"):
        raise UnsupportedModel(
            "llama.cpp runs Qwen3 MoE only with norm_topk_prob and experts in every layer"
        )
    return {**_used(config), "expert_feed_forward_length": config["moe_intermediate_size"]}


def _ministral3(config: Config) -> Fields:
    rope = _rope(config)
    beta = rope.get("llama_4_scaling_beta")
    return {} if beta is None else {"attention.temperature_scale": float(beta)}


def _gemma2(config: Config) -> Fields:
    caps = {
        "attn_logit_softcapping": config.get("attn_logit_softcapping"),
        "final_logit_softcapping": config.get("final_logit_softcapping"),
    }
    given: Fields = {key: float(cap) for key, cap in caps.items() if cap}
    _check_scale(config, 46)
    return given | write_windows(config, 2)


def _gemma3(config: Config) -> Fields:
    _check_scale(config, 62)
    cap = config.get("final_logit_softcapping")
    rope = config.get("rope_parameters") or {}
    local = rope.get("sliding_attention", {}).get("rope_theta")
    base = local or config.get("rope_local_base_freq") or 10000.0
    capped: Fields = {"final_logit_softcapping": float(cap)} if cap else {}
    return capped | {"rope.freq_base_swa": float(base)} | write_windows(config, 6)


def _check_scale(config: Config, largest: int) -> None:
    """No key says what llama.cpp divides scores by: the head's width, another in the largest model.

    Source: ``gemma2.cpp`` and ``gemma3.cpp`` of llama.cpp.
    """
    heads, head_dim = config["num_attention_heads"], _head_dim(config)
    own = config["hidden_size"] // heads if config["num_hidden_layers"] == largest else head_dim
    scalar = config.get("query_pre_attn_scalar", own)
    if scalar != own:
        raise UnsupportedModel(
            f"a Gemma with query_pre_attn_scalar {scalar} cannot be exported: "
            f"llama.cpp takes {own} there"
        )


def _phi3(config: Config) -> Fields:
    return {
        "rope.scaling.original_context_length": _original(config, _rope(config)),
        "attention.sliding_window": config.get("sliding_window") or 0,
    }


def _gpt_oss(config: Config) -> Fields:
    inner = config["intermediate_size"]
    return {**_used(config), "expert_feed_forward_length": inner, **write_windows(config, 2)}


def _lfm2(config: Config) -> Fields:
    kinds, kv_heads = config["layer_types"], _kv_heads(config)
    return {
        "feed_forward_length": feed_forward_width(config),
        "attention.head_count_kv": np.array(
            [kv_heads if kind == "full_attention" else 0 for kind in kinds], np.int32
        ),
        "shortconv.l_cache": config["conv_L_cache"],
    }


_FAMILIES: Mapping[str, Callable[[Config], Fields]] = MappingProxyType(
    {
        "mixtral": _used,
        "ministral3": _ministral3,
        "qwen3_moe": _qwen3_moe,
        "gemma2": _gemma2,
        "gemma3_text": _gemma3,
        "phi3": _phi3,
        "gpt_oss": _gpt_oss,
        "lfm2": _lfm2,
    }
)
