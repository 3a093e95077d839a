"""LayerNorms in place of RMSNorms: Phi 2, StarCoder 2, StableLM, Command R, Nemotron."""

from __future__ import annotations

import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import numpy as np

from rl_mlx.convert.experts import stack
from rl_mlx.convert.families.words import (
    ATTENTION,
    DENSE,
    PRE_NORMS,
    has_bias,
    read_dense,
    read_windows,
    scales,
    write_windows,
)
from rl_mlx.convert.family import LAYER_NORM, Family
from rl_mlx.convert.gguf.changes import Change, norms_from_one
from rl_mlx.convert.gguf.keys import Keys
from rl_mlx.convert.gguf.writer import Fields
from rl_mlx.convert.lazy import Arrays, Lazy
from rl_mlx.convert.shapes import (
    Config,
    Shapes,
    Sizes,
    attention,
    linear,
    mlp,
    norms,
    outer,
)
from rl_mlx.errors import UnsupportedModel

_PLUS = 64
_PERIOD = 4  # one layer in so many of Command R7B sees all


def _outer(config: Config) -> Shapes:
    return outer(config, norm_bias=True)


def _block_phi(config: Config, _layer: int) -> Shapes:
    s = Sizes.of(config)
    return (
        norms(s.hidden, "input_layernorm", bias=True)
        | attention(s, bias=True, out_bias=True, out="dense")
        | linear("mlp.fc1", s.inner, s.hidden, bias=True)
        | linear("mlp.fc2", s.hidden, s.inner, bias=True)
    )


def _outer_phi(config: Config) -> Shapes:
    return outer(config, norm="final_layernorm", norm_bias=True, head_bias=True)


_QKV = re.compile(r"model\.layers\.(\d+)\.self_attn\.([qkv])_proj\.(weight|bias)")


def _older_phi(config: Config, name: str) -> Change | None:
    """Files of the first weights, whose queries, keys and values were one matrix."""
    match = _QKV.fullmatch(name)
    if match is None:
        return None
    s = Sizes.of(config)
    queries, keys = s.heads * s.head_dim, s.kv_heads * s.head_dim
    start, count = {"q": (0, queries), "k": (queries, keys), "v": (queries + keys, keys)}[match[2]]
    total = queries + 2 * keys
    return Change(
        rows=start + np.arange(count),
        run=total,
        shape=(total, s.hidden) if match[3] == "weight" else (total,),
        source=f"blk.{match[1]}.attn_qkv.{match[3]}",
    )


def _read_phi(keys: Keys) -> dict[str, Any]:
    return {**read_dense(keys), "hidden_act": "gelu_new"}


def _block_starcoder(config: Config, _layer: int) -> Shapes:
    s, bias = Sizes.of(config), bool(config.get("use_bias", True))
    return (
        norms(s.hidden, *PRE_NORMS, bias=True)
        | attention(s, bias=bias, out_bias=bias)
        | linear("mlp.c_fc", s.inner, s.hidden, bias=bias)
        | linear("mlp.c_proj", s.hidden, s.inner, bias=bias)
    )


def _read_starcoder(keys: Keys) -> dict[str, Any]:
    window = (
        keys.count("attention.sliding_window") if keys.has("attention.sliding_window") else None
    )
    return {
        **read_dense(keys),
        "use_bias": has_bias(keys, "attn_q"),
        "hidden_act": "gelu_pytorch_tanh",
        "sliding_window": window,
    }


def _write_starcoder(config: Config) -> Fields:
    return write_windows(config, None)


def _own(of: str, heads: int, dim: int) -> Shapes:
    return {f"self_attn.{of}.weight": (heads, dim)}


def _block_stablelm(config: Config, _layer: int) -> Shapes:
    s = Sizes.of(config)
    shapes = attention(s, bias=bool(config.get("use_qkv_bias"))) | mlp(s)
    parallel = bool(config.get("use_parallel_residual"))
    shapes |= norms(s.hidden, *list(PRE_NORMS)[: 1 if parallel else 2], bias=True)
    if config.get("qk_layernorm"):
        shapes |= _own("q_layernorm", s.heads, s.head_dim)
        shapes |= _own("k_layernorm", s.kv_heads, s.head_dim)
    return shapes


_HEAD_NORM = re.compile(r"(.*\.[qk]_layernorm)\.norms\.(\d+)\.weight")


def _stacked_norms(_config: Config, arrays: Arrays) -> Arrays:
    """One tensor of the norms of all heads, which lie one by one."""
    found: Arrays = {}
    parts: dict[str, dict[int, Lazy]] = {}
    for name, array in arrays.items():
        if match := _HEAD_NORM.fullmatch(name):
            parts.setdefault(f"{match[1]}.weight", {})[int(match[2])] = array
        else:
            found[name] = array
    return found | {name: stack(name, heads, "head") for name, heads in parts.items()}


def _read_stablelm(keys: Keys) -> dict[str, Any]:
    tensors = keys.file.tensors
    return {
        **read_dense(keys),
        "use_qkv_bias": has_bias(keys, "attn_q"),
        "use_parallel_residual": "blk.0.ffn_norm.weight" not in tensors,
        "qk_layernorm": "blk.0.attn_q_norm.weight" in tensors,
    }


def _write_stablelm(config: Config) -> Fields:
    return {"use_parallel_residual": bool(config.get("use_parallel_residual"))}


def _block_cohere(config: Config, _layer: int) -> Shapes:
    s, bias = Sizes.of(config), bool(config.get("attention_bias"))
    shapes = norms(s.hidden, "input_layernorm") | attention(s, bias=bias, out_bias=bias) | mlp(s)
    if config.get("use_qk_norm"):
        shapes |= _own("q_norm", s.heads, s.head_dim) | _own("k_norm", s.kv_heads, s.head_dim)
    return shapes


def _read_cohere(keys: Keys) -> dict[str, Any]:
    return {
        **read_dense(keys),
        "attention_bias": has_bias(keys, "attn_q"),
        "logit_scale": keys.number("logit_scale"),
        "use_qk_norm": "blk.0.attn_q_norm.weight" in keys.file.tensors,
    }


def _write_cohere(config: Config) -> Fields:
    if config.get("use_qk_norm") and config["num_hidden_layers"] < _PLUS:
        raise UnsupportedModel(
            f"llama.cpp norms the heads of Command R only from {_PLUS} layers on (Command R+)"
        )
    return scales(config, logit_scale="logit_scale")


def _read_cohere2(keys: Keys) -> dict[str, Any]:
    windows = read_windows(keys, _PERIOD)
    return {**_read_cohere(keys), **windows, "sliding_window_pattern": _PERIOD}


def _write_cohere2(config: Config) -> Fields:
    return _write_cohere(config) | write_windows(config, _PERIOD)


def _block_nemotron(config: Config, _layer: int) -> Shapes:
    s, bias = Sizes.of(config), bool(config.get("attention_bias"))
    feed = bool(config.get("mlp_bias"))
    return (
        norms(s.hidden, *PRE_NORMS, bias=True)
        | attention(s, bias=bias, out_bias=bias)
        | linear("mlp.up_proj", s.inner, s.hidden, bias=feed)
        | linear("mlp.down_proj", s.hidden, s.inner, bias=feed)
    )


def _read_nemotron(keys: Keys) -> dict[str, Any]:
    return {
        **read_dense(keys),
        "attention_bias": has_bias(keys, "attn_q"),
        "mlp_bias": has_bias(keys, "ffn_down"),
        "hidden_act": "relu2",
    }


_COHERE = MappingProxyType(
    {"logit_scale": 0.0625, "layer_norm_eps": 1e-5, "tie_word_embeddings": True}
)

FAMILIES: Mapping[str, Family] = MappingProxyType({
    "phi": Family(
        architecture="phi2",
        class_name="PhiForCausalLM",
        block=_block_phi,
        names=MappingProxyType({
            **ATTENTION,
            "input_layernorm": "attn_norm",
            "self_attn.dense": "attn_output",
            "mlp.fc1": "ffn_up",
            "mlp.fc2": "ffn_down",
        }),
        read=_read_phi,
        older=_older_phi,
        outer=_outer_phi,
        epsilon=("layer_norm_eps", LAYER_NORM),
        defaults=MappingProxyType({"layer_norm_eps": 1e-5}),
    ),
    "starcoder2": Family(
        architecture="starcoder2",
        class_name="Starcoder2ForCausalLM",
        block=_block_starcoder,
        names=MappingProxyType(
            {**PRE_NORMS, **ATTENTION, "mlp.c_fc": "ffn_up", "mlp.c_proj": "ffn_down"}
        ),
        read=_read_starcoder,
        write=_write_starcoder,
        outer=_outer,
        epsilon=("norm_epsilon", LAYER_NORM),
        defaults=MappingProxyType(
            {"use_bias": True, "norm_epsilon": 1e-5, "tie_word_embeddings": True}
        ),
    ),
    "stablelm": Family(
        architecture="stablelm",
        class_name="StableLmForCausalLM",
        block=_block_stablelm,
        names=MappingProxyType({
            **PRE_NORMS,
            **ATTENTION,
            **DENSE,
            "self_attn.q_layernorm": "attn_q_norm",
            "self_attn.k_layernorm": "attn_k_norm",
        }),
        read=_read_stablelm,
        write=_write_stablelm,
        sanitize=_stacked_norms,
        outer=_outer,
        epsilon=("layer_norm_eps", LAYER_NORM),
        defaults=MappingProxyType({"layer_norm_eps": 1e-5}),
    ),
    "cohere": Family(
        architecture="command-r",
        class_name="CohereForCausalLM",
        block=_block_cohere,
        names=MappingProxyType({**PRE_NORMS, **ATTENTION, **DENSE}),
        read=_read_cohere,
        write=_write_cohere,
        epsilon=("layer_norm_eps", LAYER_NORM),
        defaults=_COHERE,
    ),
    "cohere2": Family(
        architecture="cohere2",
        class_name="Cohere2ForCausalLM",
        block=_block_cohere,
        names=MappingProxyType({**PRE_NORMS, **ATTENTION, **DENSE}),
        read=_read_cohere2,
        write=_write_cohere2,
        epsilon=("layer_norm_eps", LAYER_NORM),
        period=_PERIOD,
        defaults=_COHERE,
    ),
    "nemotron": Family(
        architecture="nemotron",
        class_name="NemotronForCausalLM",
        block=_block_nemotron,
        names=MappingProxyType({**PRE_NORMS, **ATTENTION, **DENSE}),
        read=_read_nemotron,
        change=norms_from_one,
        outer=_outer,
        epsilon=("norm_eps", LAYER_NORM),
        defaults=MappingProxyType({"norm_eps": 1e-5}),
    ),
})  # fmt: skip
