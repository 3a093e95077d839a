"""The first Mamba, and Falcon's."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import numpy as np

from rl_mlx.convert.families.mamba import bare_arrays, bare_outer
from rl_mlx.convert.family import Family
from rl_mlx.convert.gguf.changes import Change
from rl_mlx.convert.gguf.keys import Keys
from rl_mlx.convert.gguf.writer import Fields
from rl_mlx.convert.shapes import Config, Shapes, linear, norms, size
from rl_mlx.errors import UnsupportedModel

_LLAMACPP_EPSILON = 1e-5


def _block(config: Config, layer: int) -> Shapes:  # noqa: ARG001
    hidden, inner = size(config, "hidden_size"), size(config, "intermediate_size")
    state, rank = size(config, "state_size"), size(config, "time_step_rank")
    bias = bool(config.get("use_bias"))
    shapes = (
        norms(hidden, "norm")
        | linear("mixer.in_proj", 2 * inner, hidden, bias=bias)
        | {"mixer.conv1d.weight": (inner, size(config, "conv_kernel"), 1)}
        | linear("mixer.x_proj", rank + 2 * state, inner)
        | linear("mixer.dt_proj", inner, rank, bias=True)
        | {"mixer.A_log": (inner, state), "mixer.D": (inner,)}
        | linear("mixer.out_proj", hidden, inner, bias=bias)
    )
    if config.get("use_conv_bias", True):
        shapes["mixer.conv1d.bias"] = (inner,)
    return shapes


def _change(config: Config, name: str) -> Change | None:
    """llama.cpp keeps A itself."""
    if name.endswith("mixer.conv1d.weight"):
        return Change(shape=(config["intermediate_size"], config["conv_kernel"]))
    if name.endswith("mixer.A_log"):
        return Change(value=lambda a: np.log(-a), back=lambda a: -np.exp(a))
    return None


def _complete(config: Config) -> Mapping[str, Any]:
    hidden = config.get("hidden_size")
    if not isinstance(hidden, int):
        return {}
    rank = config.get("time_step_rank")
    return {
        "num_attention_heads": 1,
        "num_key_value_heads": 1,
        "intermediate_size": config.get("intermediate_size") or 2 * hidden,
        "time_step_rank": rank if isinstance(rank, int) else -(-hidden // 16),
    }


def _read(keys: Keys) -> dict[str, Any]:
    normed = keys.file.bool(f"{keys.arch}.ssm.dt_b_c_rms", False)
    return {
        "model_type": "falcon_mamba" if normed else "mamba",
        "intermediate_size": keys.count("ssm.inner_size"),
        "state_size": keys.count("ssm.state_size"),
        "conv_kernel": keys.count("ssm.conv_kernel"),
        "time_step_rank": keys.count("ssm.time_step_rank"),
        "mixer_rms_eps": keys.number("attention.layer_norm_rms_epsilon"),
        "use_bias": False,
        "use_conv_bias": True,
    }


def _write(config: Config) -> Fields:
    normed = config["model_type"] == "falcon_mamba"
    epsilon = config.get("layer_norm_epsilon", _LLAMACPP_EPSILON)
    if config["intermediate_size"] != 2 * config["hidden_size"]:
        raise UnsupportedModel("llama.cpp runs Mamba only with twice as many channels inside")
    if normed and config.get("mixer_rms_eps", 1e-6) != epsilon:
        raise UnsupportedModel("llama.cpp runs Falcon Mamba only with one epsilon for all norms")
    return {
        "attention.head_count": 0,
        "attention.head_count_kv": 0,
        "feed_forward_length": 0,
        "ssm.conv_kernel": config["conv_kernel"],
        "ssm.inner_size": config["intermediate_size"],
        "ssm.state_size": config["state_size"],
        "ssm.time_step_rank": config["time_step_rank"],
        "ssm.dt_b_c_rms": normed,
    }


_NAMES = {
    "norm": "attn_norm",
    "mixer.in_proj": "ssm_in",
    "mixer.conv1d": "ssm_conv1d",
    "mixer.x_proj": "ssm_x",
    "mixer.dt_proj": "ssm_dt",
    "mixer.A_log": "ssm_a",
    "mixer.D": "ssm_d",
    "mixer.out_proj": "ssm_out",
}


def _family(class_name: str) -> Family:
    return Family(
        architecture="mamba",
        class_name=class_name,
        block=_block,
        outer=bare_outer,
        layers="backbone.layers",
        names=_NAMES,
        read=_read,
        write=_write,
        sanitize=bare_arrays,
        change=_change,
        epsilon=("layer_norm_epsilon", "attention.layer_norm_rms_epsilon"),
        complete=_complete,
        defaults=MappingProxyType({"layer_norm_epsilon": 1e-5, "max_position_embeddings": 1 << 20}),
    )


FAMILIES: Mapping[str, Family] = MappingProxyType(
    {"mamba": _family("MambaForCausalLM"), "falcon_mamba": _family("FalconMambaForCausalLM")}
)
