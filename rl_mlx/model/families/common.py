"""What the families share in reading a config."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from rl_mlx.errors import UnsupportedModel
from rl_mlx.model.plan import Activation, AttentionPlan, MLPPlan
from rl_mlx.model.rope import rope_plan

Config = Mapping[str, Any]

_ACTIVATIONS: dict[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "gelu": "gelu",
    "relu2": "relu2",
}


def activation(config: Config) -> Activation:
    """The gated layers' activation; Gemma's configs name it twice, and the second counts."""
    named = ("hidden_activation", "hidden_act", "activation_function")
    name = next((config[key] for key in named if config.get(key)), "silu")
    if name not in _ACTIVATIONS:
        raise UnsupportedModel(f"activation {name!r} is not supported by the MLX backend")
    return _ACTIVATIONS[name]


def attention(
    config: Config, context: int, layer: int, *, interleaved: bool = False, **overrides: Any
) -> AttentionPlan:
    """The attention of layer ``layer``, with what the config commonly says; ``overrides`` win.

    ``interleaved``: rope turns pairs of neighbours.
    """
    heads = int(config["num_attention_heads"])
    head_dim = int(config.get("head_dim") or config["hidden_size"] // heads)
    kind = layer_type(config, layer)
    common: dict[str, Any] = {
        "heads": heads,
        "kv_heads": int(config.get("num_key_value_heads") or heads),
        "head_dim": head_dim,
        "scale": head_dim**-0.5,
        "window": window(config, layer),
    }
    if "rope" not in overrides:
        rope = rope_plan(config, head_dim, context, kind)
        common["rope"] = replace(rope, interleaved=interleaved)
    return AttentionPlan(**{**common, **overrides})


def layer_type(config: Config, layer: int) -> str:
    """``full_attention``, ``sliding_attention``, ``conv`` ... of a layer."""
    types = config.get("layer_types")
    return str(types[layer]) if types else "full_attention"


def window(config: Config, layer: int) -> int | None:
    """The sliding window of a layer in tokens, or None.

    With ``layer_types`` the layer's own type decides; without, a ``sliding_window`` goes for every
    layer (Mistral), unless ``use_sliding_window`` says no (Qwen) or the layer is below
    ``max_window_layers``.
    """
    size = config.get("sliding_window")
    if not size or config.get("use_sliding_window") is False:
        return None
    if config.get("layer_types"):
        return int(size) if layer_type(config, layer) == "sliding_attention" else None
    if config.get("use_sliding_window") and layer < int(config.get("max_window_layers") or 0):
        return None
    return int(size)


def mlp(config: Config, **overrides: Any) -> MLPPlan:
    """The gated feed-forward layer."""
    common = {"inner": int(config["intermediate_size"]), "activation": activation(config)}
    return MLPPlan(**{**common, **overrides})


def base(config: Config, context: int, **overrides: Any) -> dict[str, Any]:
    """The fields of ``DecoderPlan`` that every config has in the same words."""
    common: dict[str, Any] = {
        "hidden": int(config["hidden_size"]),
        "vocab": int(config["vocab_size"]),
        "context": context,
        "norm_eps": float(config.get("rms_norm_eps", 1e-6)),
        "tied": bool(config.get("tie_word_embeddings", False)),
    }
    return {**common, **overrides}
