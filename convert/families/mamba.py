"""Families with Mamba 2: Mamba 2 itself, Falcon-H1, Granite 4."""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import numpy as np

from rl_mlx.convert import floats
from rl_mlx.convert.families import mixtures
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
from rl_mlx.convert.gguf.changes import Change
from rl_mlx.convert.gguf.keys import Keys
from rl_mlx.convert.gguf.writer import Fields
from rl_mlx.convert.lazy import FLOATS, Arrays, Lazy
from rl_mlx.convert.shapes import (
    Config,
    Shapes,
    Sizes,
    attention,
    experts,
    linear,
    norms,
    outer,
    pre_norms,
    size,
)
from rl_mlx.errors import UnsupportedModel


class _Sizes:
    """The sizes of a Mamba 2, in any family's words."""

    def __init__(self, config: Config) -> None:
        own = config["model_type"] == "mamba2"
        self.hidden = size(config, "hidden_size")
        self.heads = size(config, "num_heads" if own else "mamba_n_heads")
        self.groups = size(config, "n_groups" if own else "mamba_n_groups")
        self.state = size(config, "state_size" if own else "mamba_d_state")
        self.taps = size(config, "conv_kernel" if own else "mamba_d_conv")
        expand = config.get("expand" if own else "mamba_expand") or 2
        self.inner = int(config.get("mamba_d_ssm") or expand * self.hidden)
        self.channels = self.inner + 2 * self.groups * self.state
        self.bias = bool(config.get("use_bias" if own else "mamba_proj_bias"))
        self.kernel_bias = bool(config.get("use_conv_bias" if own else "mamba_conv_bias", True))


def _mixer(config: Config, at: str, *, norm: bool) -> Shapes:
    m = _Sizes(config)
    shapes = (
        linear(f"{at}.in_proj", m.inner + m.channels + m.heads, m.hidden, bias=m.bias)
        | {f"{at}.conv1d.weight": (m.channels, m.taps, 1)}
        | {f"{at}.{name}": (m.heads,) for name in ("A_log", "D", "dt_bias")}
        | linear(f"{at}.out_proj", m.hidden, m.inner, bias=m.bias)
    )
    if m.kernel_bias:
        shapes[f"{at}.conv1d.bias"] = (m.channels,)
    return shapes | (norms(m.inner, f"{at}.norm") if norm else {})


def _change(config: Config, name: str) -> Change | None:
    """llama.cpp keeps A itself, vectors of heads as columns, and the norm a group a row."""
    m, module = _Sizes(config), name.rpartition(".mixer.")[2].rpartition(".mamba.")[2]
    if module == name:
        return None
    return {
        "conv1d.weight": Change(shape=(m.channels, m.taps)),
        "A_log": Change(shape=(m.heads, 1), value=lambda a: np.log(-a), back=lambda a: -np.exp(a)),
        "D": Change(shape=(m.heads, 1)),
        "norm.weight": Change(shape=(m.groups, m.inner // m.groups)),
    }.get(module)


def _kernels(config: Config, arrays: Arrays) -> Arrays:  # noqa: ARG001
    """Kernels as MLX has them."""
    return {
        name: a.transposed() if name.endswith("conv1d.weight") and a.shape[1] == 1 else a
        for name, a in arrays.items()
    }


def _names(at: str) -> dict[str, str]:
    return {
        f"{at}.in_proj": "ssm_in",
        f"{at}.conv1d": "ssm_conv1d",
        f"{at}.A_log": "ssm_a",
        f"{at}.D": "ssm_d",
        f"{at}.dt_bias": "ssm_dt.bias",
        f"{at}.norm": "ssm_norm",
        f"{at}.out_proj": "ssm_out",
    }


def _write_mixer(config: Config) -> Fields:
    low, high = config.get("time_step_limit") or (0.0, float("inf"))
    if low > 0 or high < float("inf"):
        raise UnsupportedModel("llama.cpp runs Mamba 2 only without a time_step_limit")
    m = _Sizes(config)
    return {
        "ssm.conv_kernel": m.taps,
        "ssm.inner_size": m.inner,
        "ssm.state_size": m.state,
        "ssm.time_step_rank": m.heads,
        "ssm.group_count": m.groups,
    }


def _read_mixer(keys: Keys) -> dict[str, Any]:
    """In the words of Falcon-H1 and Granite."""
    inner, heads = keys.count("ssm.inner_size"), keys.count("ssm.time_step_rank")
    return {
        "mamba_d_conv": keys.count("ssm.conv_kernel"),
        "mamba_d_ssm": inner,
        "mamba_d_state": keys.count("ssm.state_size"),
        "mamba_n_heads": heads,
        "mamba_d_head": inner // heads,
        "mamba_n_groups": keys.count("ssm.group_count"),
        "mamba_expand": max(1, inner // keys.hidden),
        "mamba_proj_bias": False,
        "mamba_conv_bias": True,
    }


def _mamba2(config: Config, layer: int) -> Shapes:  # noqa: ARG001
    return norms(size(config, "hidden_size"), "norm") | _mixer(config, "mixer", norm=True)


def bare_outer(config: Config) -> Shapes:
    """What lies outside the layers, under the names of Mamba."""
    renamed = {"model.embed_tokens": "backbone.embeddings", "model.norm": "backbone.norm_f"}
    return {
        f"{renamed.get(name.removesuffix('.weight'), name.removesuffix('.weight'))}.weight": shape
        for name, shape in outer(config).items()
    }


def bare_arrays(config: Config, arrays: Arrays) -> Arrays:
    """Without a prefix, kernels as MLX has them."""
    named = {name.removeprefix("model."): array for name, array in arrays.items()}
    return _kernels(config, named)


def _complete_mamba2(config: Config) -> Mapping[str, Any]:
    heads = config.get("num_heads")
    return {"num_attention_heads": heads, "num_key_value_heads": heads, "intermediate_size": 0}


def _read_mamba2(keys: Keys) -> dict[str, Any]:
    inner, heads = keys.count("ssm.inner_size"), keys.count("ssm.time_step_rank")
    return {
        "num_heads": heads,
        "num_attention_heads": heads,
        "head_dim": inner // heads,
        "n_groups": keys.count("ssm.group_count"),
        "state_size": keys.count("ssm.state_size"),
        "conv_kernel": keys.count("ssm.conv_kernel"),
        "expand": inner // keys.hidden,
        "time_step_rank": -(-keys.hidden // 16),
        "time_step_limit": [0.0, math.inf],
        "use_bias": False,
        "use_conv_bias": True,
    }


def _write_mamba2(config: Config) -> Fields:
    unused = ("attention.head_count", "attention.head_count_kv", "feed_forward_length")
    return _write_mixer(config) | dict.fromkeys(unused, 0)


def _falcon(config: Config, layer: int) -> Shapes:  # noqa: ARG001
    s, bias = Sizes.of(config), bool(config.get("attention_bias"))
    return (
        norms(s.hidden, "input_layernorm", "pre_ff_layernorm")
        | attention(s, bias=bias, out_bias=bias)
        | _mixer(config, "mamba", norm=bool(config.get("mamba_rms_norm")))
        | gated("feed_forward", s.inner, s.hidden)
    )


def _falcon_arrays(config: Config, arrays: Arrays) -> Arrays:
    """The config's multipliers go into the weights, as llama.cpp and mlx-lm have it."""
    kernels = [a for name, a in arrays.items() if name.endswith("conv1d.weight")]
    if not any(a.shape[1] == 1 for a in kernels):
        return arrays
    factors = _factors(config)
    if config.get("tie_word_embeddings") and factors["embed_tokens"] != factors["lm_head"]:
        raise UnsupportedModel("a Falcon-H1 with one matrix and two multipliers is not supported")
    found = _kernels(config, arrays)
    for name, array in found.items():
        module = name.removesuffix(".weight").rpartition(".")[2]
        if name.endswith(".weight") and module in factors:
            found[name] = _times(array, factors[module])
    return found


def _factors(config: Config) -> dict[str, Any]:
    """What each matrix is multiplied with: a number, or one a row."""
    m = _Sizes(config)
    read = float(config.get("attention_in_multiplier") or 1)
    gate, down = config.get("mlp_multipliers") or (1.0, 1.0)
    parts = config.get("ssm_multipliers") or [1.0] * 5
    widths = [m.inner, m.inner, m.groups * m.state, m.groups * m.state, m.heads]
    rows = np.repeat(np.array(parts, np.float32), widths)[:, None]
    return {
        "q_proj": read,
        "k_proj": read * float(config.get("key_multiplier") or 1),
        "v_proj": read,
        "o_proj": float(config.get("attention_out_multiplier") or 1),
        "in_proj": rows * np.float32(config.get("ssm_in_multiplier") or 1),
        "out_proj": float(config.get("ssm_out_multiplier") or 1),
        "gate_proj": float(gate),
        "down_proj": float(down),
        "embed_tokens": float(config.get("embedding_multiplier") or 1),
        "lm_head": float(config.get("lm_head_multiplier") or 1),
    }


def _times(array: Lazy, factor: Any) -> Lazy:
    kind = FLOATS.get(array.dtype)
    if kind is None or np.all(factor == 1):
        return array

    def view(raw: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        product: np.ndarray[Any, Any] = floats.widen(raw, kind) * np.float32(factor)
        return floats.narrow(product, kind)

    return array.seen(array.shape, view)


_UNITY: Mapping[str, Any] = MappingProxyType(
    dict.fromkeys(
        ("attention_in_multiplier", "attention_out_multiplier", "key_multiplier",
         "embedding_multiplier", "lm_head_multiplier", "ssm_in_multiplier", "ssm_out_multiplier"),
        1.0,
    )
    | {"mlp_multipliers": [1.0, 1.0], "ssm_multipliers": [1.0] * 5}
)  # fmt: skip


def _read_falcon(keys: Keys) -> dict[str, Any]:
    return {
        **read_attention(keys),
        **_read_mixer(keys),
        **_UNITY,
        "intermediate_size": keys.uniform("feed_forward_length"),
        "mamba_rms_norm": "blk.0.ssm_norm.weight" in keys.file.tensors,
        "mamba_norm_before_gate": False,
        "attention_bias": False,
    }


def _is_mamba(config: Config, layer: int) -> bool:
    return config["layer_types"][layer] in {"mamba", "linear_attention"}


def _granite(config: Config, layer: int) -> Shapes:
    s = Sizes.of(config)
    bias, shared = bool(config.get("attention_bias")), size(config, "shared_intermediate_size")
    if _is_mamba(config, layer):
        mixer = _mixer(config, "mamba", norm=True)
    else:
        mixer = attention(s, bias=bias, out_bias=bias)
    if not config.get("num_local_experts"):
        return pre_norms(s) | mixer | gated("shared_mlp", shared, s.hidden)
    count, at = size(config, "num_local_experts"), "block_sparse_moe"
    return (
        pre_norms(s)
        | mixer
        | linear(f"{at}.router.layer", count, s.hidden)
        | experts(f"{at}.switch_mlp", count, s.inner, s.hidden)
        | gated(f"{at}.shared_mlp", shared, s.hidden)
    )


def _granite_arrays(config: Config, arrays: Arrays) -> Arrays:
    found: Arrays = {}
    within = "block_sparse_moe." if config.get("num_local_experts") else ""
    for name, array in _kernels(config, mixtures.granite_arrays(config, arrays)).items():
        at, is_shared, module = name.partition(".shared_mlp.")
        at = f"{at.removesuffix('.block_sparse_moe')}.{within}shared_mlp"
        half = array.shape[-2] // 2 if is_shared else 0
        if is_shared and module == "input_linear.weight":
            found[f"{at}.gate_proj.weight"] = array.cut(-2, 0, half)
            found[f"{at}.up_proj.weight"] = array.cut(-2, half, None)
        elif is_shared and module == "output_linear.weight":
            found[f"{at}.down_proj.weight"] = array
        else:
            found[name] = array
    return found


def _read_granite(keys: Keys) -> dict[str, Any]:
    kv_heads = keys.per_layer("attention.head_count_kv", keys.heads)
    found = {
        **_read_mixer(keys),
        **mixtures.read_multipliers(keys),
        "num_key_value_heads": keys.positive("attention.head_count_kv", max(kv_heads)),
        "layer_types": ["attention" if n else "mamba" for n in kv_heads],
        "position_embedding_type": "rope"
        if keys.file.bool(f"{keys.arch}.rope.scaling.finetuned", False)
        else "nope",
        "attention_bias": "attn_q.bias" in {n.partition(".")[2][2:] for n in keys.file.tensors},
        "num_local_experts": 0,
        "num_experts_per_tok": 0,
    }
    inner = keys.uniform("feed_forward_length")
    if not keys.file.int(f"{keys.arch}.expert_count", 0):
        return found | {"intermediate_size": inner, "shared_intermediate_size": inner}
    return {
        **found,
        **read_experts(keys, "num_local_experts", "num_experts_per_tok"),
        "intermediate_size": inner,
        "shared_intermediate_size": keys.count("expert_shared_feed_forward_length"),
    }


def _write_granite(config: Config) -> Fields:
    layers, count = range(config["num_hidden_layers"]), config.get("num_local_experts")
    kv_heads = [0 if _is_mamba(config, i) else config["num_key_value_heads"] for i in layers]
    found = {
        **_write_mixer(config),
        **mixtures.write_multipliers(config),
        "attention.head_count_kv": np.array(kv_heads, np.int32),
        "rope.scaling.finetuned": config.get("position_embedding_type") == "rope",
    }
    shared = config["shared_intermediate_size"]
    if not count:
        return found | {"feed_forward_length": shared}
    return {
        **found,
        "expert_count": count,
        "expert_used_count": config["num_experts_per_tok"],
        "expert_shared_feed_forward_length": shared,
    }


def _granite_change(config: Config, name: str) -> Change | None:
    return _change(config, name) or mixtures.interleaved(config, name)


_GRANITE_NAMES = {
    **PRE_NORMS,
    **ATTENTION,
    **_names("mamba"),
    **expert_names("block_sparse_moe.switch_mlp", "block_sparse_moe.router.layer"),
    **shared_names("block_sparse_moe.shared_mlp"),
    "shared_mlp.gate_proj": "ffn_gate",
    "shared_mlp.up_proj": "ffn_up",
    "shared_mlp.down_proj": "ffn_down",
}
_FALCON_NAMES = {
    **ATTENTION,
    **_names("mamba"),
    "input_layernorm": "attn_norm",
    "pre_ff_layernorm.weight": "ffn_norm",
    "feed_forward.gate_proj": "ffn_gate",
    "feed_forward.up_proj": "ffn_up",
    "feed_forward.down_proj": "ffn_down",
}

FAMILIES: Mapping[str, Family] = MappingProxyType({
    "mamba2": Family(
        architecture="mamba2",
        class_name="Mamba2ForCausalLM",
        block=_mamba2,
        outer=bare_outer,
        layers="backbone.layers",
        names={"norm": "attn_norm", **_names("mixer")},
        read=_read_mamba2,
        write=_write_mamba2,
        sanitize=bare_arrays,
        change=_change,
        epsilon=("layer_norm_epsilon", "attention.layer_norm_rms_epsilon"),
        complete=_complete_mamba2,
        defaults=MappingProxyType({"layer_norm_epsilon": 1e-5, "max_position_embeddings": 1 << 20}),
    ),
    "falcon_h1": Family(
        architecture="falcon-h1",
        class_name="FalconH1ForCausalLM",
        block=_falcon,
        outer=lambda config: outer(config, norm="final_layernorm"),
        names=_FALCON_NAMES,
        read=_read_falcon,
        write=_write_mixer,
        sanitize=_falcon_arrays,
        change=_change,
        defaults=MappingProxyType({"rms_norm_eps": 1e-5, "mamba_expand": 2}),
    ),
    "granitemoehybrid": Family(
        architecture="granitehybrid",
        class_name="GraniteMoeHybridForCausalLM",
        block=_granite,
        names=_GRANITE_NAMES,
        read=_read_granite,
        write=_write_granite,
        sanitize=_granite_arrays,
        change=_granite_change,
        defaults=MappingProxyType({"mamba_expand": 2}),
    ),
})  # fmt: skip
