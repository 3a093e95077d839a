"""Norms on the way out of a block's branches: OLMo 2 and 3, EXAONE 4, GLM 4."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from rl_mlx.convert.families.words import (
    ATTENTION,
    DENSE,
    has_bias,
    read_dense,
    read_windows,
    write_windows,
)
from rl_mlx.convert.family import Family
from rl_mlx.convert.gguf.keys import Keys
from rl_mlx.convert.gguf.writer import Fields
from rl_mlx.convert.shapes import (
    Config,
    Shapes,
    Sizes,
    attention,
    head_norms,
    linear,
    mlp,
    norms,
    pre_norms,
)
from rl_mlx.errors import UnsupportedModel

_PERIOD = 4  # one layer in so many sees all
_WINDOWED = 64
_POST = ("post_attention_layernorm", "post_feedforward_layernorm")
_NAMES = MappingProxyType(
    {**ATTENTION, **DENSE, _POST[0]: "post_attention_norm", _POST[1]: "post_ffw_norm"}
)


def _block_olmo(config: Config, _layer: int) -> Shapes:
    s, bias = Sizes.of(config), bool(config.get("attention_bias"))
    return (
        norms(s.hidden, *_POST)
        | attention(s, bias=bias, out_bias=bias)
        | norms(s.heads * s.head_dim, "self_attn.q_norm")
        | norms(s.kv_heads * s.head_dim, "self_attn.k_norm")
        | mlp(s)
    )


def _read_olmo(keys: Keys) -> dict[str, Any]:
    fields = {**read_dense(keys), "attention_bias": has_bias(keys, "attn_q")}
    if not keys.has("attention.sliding_window"):
        return fields
    return {**fields, **read_windows(keys, _PERIOD), "model_type": "olmo3"}


def _write_windows(config: Config) -> Fields:
    return write_windows(config, _PERIOD)


def _block_exaone(config: Config, _layer: int) -> Shapes:
    s = Sizes.of(config)
    return norms(s.hidden, *_POST) | attention(s) | head_norms(s) | mlp(s)


def _read_exaone(keys: Keys) -> dict[str, Any]:
    windows = read_windows(keys, _PERIOD)
    pattern = None if windows["sliding_window"] is None else "LLLG"
    return {**read_dense(keys), **windows, "sliding_window_pattern": pattern}


def _write_exaone(config: Config) -> Fields:
    windows = _write_windows(config)
    if windows and config["num_hidden_layers"] != _WINDOWED:
        raise UnsupportedModel(
            f"llama.cpp gives EXAONE 4 windows only in the model of {_WINDOWED} layers"
        )
    return windows


def _block_glm(config: Config, _layer: int) -> Shapes:
    s = Sizes.of(config)
    return (
        pre_norms(s)
        | norms(s.hidden, "post_self_attn_layernorm", "post_mlp_layernorm")
        | attention(s, bias=bool(config.get("attention_bias")))
        | linear("mlp.gate_up_proj", 2 * s.inner, s.hidden)
        | linear("mlp.down_proj", s.hidden, s.inner)
    )


def _read_glm(keys: Keys) -> dict[str, Any]:
    return {**read_dense(keys), "attention_bias": has_bias(keys, "attn_q")}


_EPSILON = MappingProxyType({"rms_norm_eps": 1e-5})

FAMILIES: Mapping[str, Family] = MappingProxyType({
    "olmo3": Family(
        architecture="olmo2",
        class_name="Olmo3ForCausalLM",
        block=_block_olmo,
        names=_NAMES,
        read=_read_olmo,
        write=_write_windows,
        period=_PERIOD,
        defaults=_EPSILON,
    ),
    "olmo2": Family(
        architecture="olmo2",
        class_name="Olmo2ForCausalLM",
        block=_block_olmo,
        names=_NAMES,
        read=_read_olmo,
        defaults=_EPSILON,
    ),
    "exaone4": Family(
        architecture="exaone4",
        class_name="Exaone4ForCausalLM",
        block=_block_exaone,
        names=_NAMES,
        read=_read_exaone,
        write=_write_exaone,
        period=_PERIOD,
        defaults=_EPSILON,
    ),
    "glm4": Family(
        architecture="glm4",
        class_name="Glm4ForCausalLM",
        block=_block_glm,
        names=MappingProxyType({
            **ATTENTION,
            "input_layernorm": "attn_norm",
            "post_self_attn_layernorm": "post_attention_norm",
            "post_attention_layernorm": "ffn_norm",
            "post_mlp_layernorm": "post_ffw_norm",
            "mlp.gate_up_proj": "ffn_up",
            "mlp.down_proj": "ffn_down",
        }),
        read=_read_glm,
        defaults=MappingProxyType({"attention_bias": True, "rms_norm_eps": 1.5625e-07}),
    ),
})  # fmt: skip
