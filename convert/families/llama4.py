"""Llama 4 (text)."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from rl_mlx.convert.families.words import (
    ATTENTION,
    PRE_NORMS,
    expert_names,
    gated,
    read_attention,
    read_experts,
    shared_names,
)
from rl_mlx.convert.family import Family
from rl_mlx.convert.gguf.keys import Keys
from rl_mlx.convert.gguf.writer import Fields
from rl_mlx.convert.lazy import Arrays
from rl_mlx.convert.shapes import Config, Shapes, Sizes, attention, experts, linear, pre_norms, size
from rl_mlx.errors import UnsupportedModel

_CHUNK, _PERIOD, _RATE = 8192, 4, 0.1  # what llama.cpp takes, whatever the file says
_UNNORMED = 128  # experts of the one model that llama.cpp runs without norms


def is_sparse(config: Config, layer: int) -> bool:
    """Whether a layer has experts."""
    named = config.get("moe_layers")
    if named is not None:
        return layer in named
    return (layer + 1) % (config.get("interleave_moe_layer_step") or 1) == 0


def rotates(config: Config, layer: int) -> bool:
    """Whether a layer has rotary positions: ``no_rope_layers`` says 1 where it has."""
    named = config.get("no_rope_layers")
    if named:
        return bool(named[layer])
    return (layer + 1) % (config.get("no_rope_layer_interval") or _PERIOD) != 0


def _block(config: Config, layer: int) -> Shapes:
    s, bias, at = Sizes.of(config), bool(config.get("attention_bias")), "feed_forward"
    shapes = pre_norms(s) | attention(s, bias=bias, out_bias=bias)
    if not is_sparse(config, layer):
        return shapes | gated(at, size(config, "intermediate_size_mlp"), s.hidden)
    count = size(config, "num_local_experts")
    return (
        shapes
        | linear(f"{at}.router", count, s.hidden)
        | experts(f"{at}.experts", count, s.inner, s.hidden)
        | gated(f"{at}.shared_expert", s.inner, s.hidden)
    )


def _sanitize(config: Config, arrays: Arrays) -> Arrays:  # noqa: ARG001
    """The text's tensors alone; experts' matrices are columns, gate and up side by side."""
    found: Arrays = {}
    for name, array in arrays.items():
        name = name.removeprefix("model.") if "language_model." in name else name
        name = name.removeprefix("language_model.")
        if "vision_" in name or "multi_modal_projector" in name:
            continue
        if not name.startswith(("model.", "lm_head.")):
            name = f"model.{name}"
        at, _, module = name.rpartition(".experts.")
        if module == "gate_up_proj":
            half = array.shape[-1] // 2
            found[f"{at}.experts.gate_proj.weight"] = array.cut(-1, 0, half).transposed()
            found[f"{at}.experts.up_proj.weight"] = array.cut(-1, half, None).transposed()
        elif module == "down_proj":
            found[f"{at}.experts.down_proj.weight"] = array.transposed()
        else:
            found[name] = array
    return found


def _read(keys: Keys) -> dict[str, Any]:
    found = read_experts(keys, "num_local_experts", "num_experts_per_tok")
    whole = keys.file.int(f"{keys.arch}.attention.sliding_window", _CHUNK) == 0
    still = keys.layers + 1 if whole else _PERIOD
    layers = [int((i + 1) % still != 0) for i in range(keys.layers)]
    return {
        **read_attention(keys),
        **found,
        "intermediate_size": keys.count("expert_feed_forward_length"),
        "intermediate_size_mlp": keys.uniform("feed_forward_length"),
        "interleave_moe_layer_step": keys.count("interleave_moe_layer_step"),
        "no_rope_layers": layers,
        "layer_types": ["chunked_attention" if r else "full_attention" for r in layers],
        "attention_chunk_size": None if whole else _CHUNK,
        "use_qk_norm": found["num_local_experts"] != _UNNORMED,
        "attn_temperature_tuning": True,
        "floor_scale": _CHUNK,
        "attn_scale": _RATE,
        "attention_bias": False,
    }


def _write(config: Config) -> Fields:
    layers = range(config["num_hidden_layers"])
    step = config.get("interleave_moe_layer_step") or 1
    usual = (
        all(rotates(config, i) == ((i + 1) % _PERIOD != 0) for i in layers)
        and all(is_sparse(config, i) == ((i + 1) % step == 0) for i in layers)
        and config.get("attention_chunk_size") == config.get("floor_scale", _CHUNK) == _CHUNK
        and config.get("attn_scale", _RATE) == _RATE
        and config.get("use_qk_norm", True) == (config["num_local_experts"] != _UNNORMED)
    )
    if not usual:
        raise UnsupportedModel("llama.cpp runs Llama 4 only as Scout and Maverick have it")
    return {
        "expert_count": config["num_local_experts"],
        "expert_used_count": config["num_experts_per_tok"],
        "expert_feed_forward_length": config["intermediate_size"],
        "feed_forward_length": config["intermediate_size_mlp"],
        "interleave_moe_layer_step": step,
    }


FAMILIES: Mapping[str, Family] = MappingProxyType({
    "llama4_text": Family(
        architecture="llama4",
        class_name="Llama4ForCausalLM",
        block=_block,
        names={
            **PRE_NORMS,
            **ATTENTION,
            **expert_names("feed_forward.experts", "feed_forward.router"),
            **shared_names("feed_forward.shared_expert"),
            "feed_forward.gate_proj": "ffn_gate",
            "feed_forward.up_proj": "ffn_up",
            "feed_forward.down_proj": "ffn_down",
        },
        read=_read,
        write=_write,
        sanitize=_sanitize,
        defaults=MappingProxyType({"rms_norm_eps": 1e-5, "attention_chunk_size": 8192}),
    ),
})  # fmt: skip
