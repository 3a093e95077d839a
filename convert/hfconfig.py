"""Hugging Face configs in one dialect: transformers 4 and 5 name the same things differently.

What is said in one way is said in the other too, so that a reader of either finds it; nothing is
taken away.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from rl_mlx.convert.families import FAMILIES
from rl_mlx.convert.families.words import LAYER_TYPES, layer_types
from rl_mlx.convert.layout import knows

_ROPE_ONLY = ("rope_theta", "partial_rotary_factor")
_ORIGINAL = "original_max_position_embeddings"


def bilingual(config: Mapping[str, Any]) -> dict[str, Any]:
    """``config`` with rope, experts and layers in the words of both versions.

    Defaults of transformers that readers do not share are spelled out.
    """
    both = {key: _number(value) for key, value in _text(config).items()}
    _rope(both)
    if knows(both):
        _sizes(both)
        _layers(both)
    return both


_WITH_TEXT: Mapping[str, str] = MappingProxyType(
    {
        "qwen3_5": "qwen3_5_text",
        "qwen3_5_moe": "qwen3_5_moe_text",
        "llama4": "llama4_text",
    }
)
"""Models that see or hear, and the family of the decoder in them."""


def _text(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config of the decoder: whole, or a part of one that sees too."""
    family = _WITH_TEXT.get(str(config.get("model_type")))
    if family is None:
        return dict(config)
    whole = {k: v for k, v in config.items() if not k.endswith("_config") or "quant" in k}
    text = config.get("text_config")
    return {**whole, **(text if isinstance(text, Mapping) else {}), "model_type": family}


def _number(value: Any) -> Any:
    """What JSON has no word for, transformers spells out: ``{"__float__": "Infinity"}``."""
    if isinstance(value, list):
        return [_number(part) for part in value]
    if isinstance(value, dict) and value.keys() == {"__float__"}:
        return float(value["__float__"])
    return value


def _rope(config: dict[str, Any]) -> None:
    parameters = config.get("rope_parameters")
    if not isinstance(parameters, Mapping) or not parameters:
        _rope_from_4(config)
        return
    full = parameters.get("full_attention", parameters)
    if not isinstance(full, Mapping):
        return
    local = parameters.get("sliding_attention")
    if isinstance(local, Mapping) and "rope_theta" in local:
        config.setdefault("rope_local_base_freq", local["rope_theta"])
    for key in _ROPE_ONLY:
        if full.get(key) is not None:
            config.setdefault(key, full[key])
    kind = full.get("rope_type") or full.get("type") or "default"
    scaling = {k: v for k, v in full.items() if k not in _ROPE_ONLY}
    if config.get("rope_scaling") is None:
        default = kind == "default" and "mrope_section" not in full
        config["rope_scaling"] = None if default else {**scaling, "rope_type": kind, "type": kind}
    if kind == "longrope" and full.get(_ORIGINAL) is not None:
        config.setdefault(_ORIGINAL, full[_ORIGINAL])


def _rope_from_4(config: dict[str, Any]) -> None:
    """``rope_parameters`` from ``rope_theta``, ``rope_scaling`` and their companions."""
    if config.get("rope_theta") is None and not config.get("rope_scaling"):
        return
    scaling = dict(config.setdefault("rope_scaling", None) or {})
    kind = scaling.pop("type", None)
    kind = scaling.pop("rope_type", None) or kind or "default"
    if config.get("model_type") == "phi3" and kind in {"su", "yarn"}:
        kind = "longrope"  # what its first configs called it
    if config.get("rope_scaling"):
        config["rope_scaling"] = {**scaling, "rope_type": kind, "type": kind}
    full = {"rope_type": kind, **scaling}
    for key in _ROPE_ONLY:
        if config.get(key) is not None:
            full[key] = config[key]
    if kind == "longrope":
        for ours, other in ((full, config), (config, full)):
            if other.get(_ORIGINAL) is not None:
                ours.setdefault(_ORIGINAL, other[_ORIGINAL])
    local = config.get("rope_local_base_freq")
    if local is None:
        config["rope_parameters"] = full
        return
    sliding = {"rope_type": "default", "rope_theta": local}
    config["rope_parameters"] = dict(zip(LAYER_TYPES, (full, sliding), strict=True))


def _sizes(config: dict[str, Any]) -> None:
    family = FAMILIES.get(config["model_type"])
    for key, value in (family.complete(config) if family else {}).items():
        config.setdefault(key, value)
    heads, hidden = config.get("num_attention_heads"), config.get("hidden_size")
    if config.get("num_key_value_heads") is None:
        config["num_key_value_heads"] = heads
    if config.get("head_dim") is None and isinstance(heads, int) and isinstance(hidden, int):
        config["head_dim"] = hidden // max(heads, 1)
    experts = config.get("num_experts") or config.get("num_local_experts")
    if experts is not None:
        config.setdefault("num_experts", experts)
        config.setdefault("num_local_experts", experts)
    defaults = family.defaults if family else _DEFAULTS.get(config["model_type"], {})
    for key, value in defaults.items():
        config.setdefault(key, value)
    if config["model_type"] == "lfm2":
        config.setdefault("intermediate_size", config.get("block_ff_dim"))
        config.setdefault("block_dim", hidden)


_DEFAULTS: Mapping[str, Mapping[str, Any]] = MappingProxyType({
    "qwen3_moe": {"decoder_sparse_step": 1, "mlp_only_layers": [], "norm_topk_prob": False},
    "gemma2": {
        "query_pre_attn_scalar": 256,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
        "tie_word_embeddings": True,
    },
    "gemma3_text": {"query_pre_attn_scalar": 256, "tie_word_embeddings": True},
    "lfm2": {
        "conv_bias": False,
        "block_multiple_of": 256,
        "block_ffn_dim_multiplier": 1.0,
        "block_auto_adjust_ff_dim": True,
    },
})  # fmt: skip
"""Defaults of transformers' config classes that mlx-lm lacks or has otherwise."""


def _layers(config: dict[str, Any]) -> None:
    """``layer_types``, and the periods and indices that older configs have in its place."""
    count, family = config.get("num_hidden_layers"), config["model_type"]
    if not isinstance(count, int) or not 0 <= count < 1 << 16:
        return  # the check of sizes will say so
    if config.get("layer_types") is None:
        if family in {"qwen3_next", "qwen3_5_text", "qwen3_5_moe_text"}:
            period = config.get("full_attention_interval") or 4
            config["layer_types"] = [
                "linear_attention" if (i + 1) % period else "full_attention" for i in range(count)
            ]
        elif family == "lfm2":
            full = config.get("full_attn_idxs")
            full = range(count) if full is None else full
            config["layer_types"] = [
                "full_attention" if i in full else "conv" for i in range(count)
            ]
        elif usual := _period(config):
            said = config.get("sliding_window_pattern") or usual
            config["layer_types"] = layer_types(count, said if isinstance(said, int) else usual)
    types = config.get("layer_types")
    if family == "lfm2" and types:
        config["full_attn_idxs"] = [i for i, kind in enumerate(types) if kind == "full_attention"]
    if family == "gemma3_text" and types and "sliding_window_pattern" not in config:
        period = types.index("full_attention") + 1 if "full_attention" in types else count + 1
        if layer_types(count, period) == list(types):
            config["sliding_window_pattern"] = period


_PERIODS: Mapping[str, int] = MappingProxyType({"gemma2": 2, "gpt_oss": 2, "gemma3_text": 6})


def _period(config: Mapping[str, Any]) -> int | None:
    family = FAMILIES.get(config["model_type"])
    if family is None:
        return _PERIODS.get(config["model_type"])
    return family.period if config.get("sliding_window") else None
