"""DeepSeek V2 and V3, and those of their kind: latent attention, experts and shared ones."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import numpy as np

from rl_mlx.convert.experts import split_experts, stacked
from rl_mlx.convert.families.words import (
    DENSE,
    PRE_NORMS,
    expert_names,
    gated,
    read_experts,
    shared_names,
)
from rl_mlx.convert.family import Family
from rl_mlx.convert.gguf.changes import F32, Change
from rl_mlx.convert.gguf.keys import Keys
from rl_mlx.convert.gguf.rope import rope_parameters
from rl_mlx.convert.gguf.writer import Fields
from rl_mlx.convert.lazy import Arrays, Lazy
from rl_mlx.convert.shapes import Config, Shapes, Sizes, experts, linear, norms, pre_norms, size
from rl_mlx.errors import UnsupportedModel

CORRECTION = "mlp.gate.e_score_correction_bias"
_SOFTMAX, _SIGMOID = 1, 2  # of expert_gating_func
_METHODS = ("greedy", "group_limited_greedy")


def sparse(config: Config, hidden: int, *, corrected: bool) -> Shapes:
    """A layer of experts and shared ones, below ``mlp``."""
    count, inner = size(config, "n_routed_experts"), size(config, "moe_intermediate_size")
    shapes = linear("mlp.gate", count, hidden) | experts("mlp.switch_mlp", count, inner, hidden)
    if shared := config.get("n_shared_experts"):
        shapes |= gated("mlp.shared_experts", inner * shared, hidden)
    return shapes | ({CORRECTION: (count,)} if corrected else {})


def _block(config: Config, layer: int) -> Shapes:
    s = Sizes.of(config)
    corrected = config["model_type"] != "deepseek_v2"
    if layer < (config.get("first_k_dense_replace") or 0):
        feed = gated("mlp", s.inner, s.hidden)
    else:
        feed = sparse(config, s.hidden, corrected=corrected)
    return pre_norms(s) | _attention(config, s) | feed


def _attention(config: Config, s: Sizes) -> Shapes:
    rank, turned = size(config, "kv_lora_rank"), size(config, "qk_rope_head_dim")
    nope, value = size(config, "qk_nope_head_dim"), size(config, "v_head_dim")
    bias, at = bool(config.get("attention_bias")), "self_attn"
    queries = s.heads * (nope + turned)
    if config.get("q_lora_rank"):
        through = size(config, "q_lora_rank")
        shapes = linear(f"{at}.q_a_proj", through, s.hidden, bias=bias)
        shapes |= linear(f"{at}.q_b_proj", queries, through) | norms(through, f"{at}.q_a_layernorm")
    else:
        shapes = linear(f"{at}.q_proj", queries, s.hidden)
    return (
        shapes
        | linear(f"{at}.kv_a_proj_with_mqa", rank + turned, s.hidden, bias=bias)
        | norms(rank, f"{at}.kv_a_layernorm")
        | linear(f"{at}.embed_q", s.heads, rank, nope)
        | linear(f"{at}.unembed_out", s.heads, value, rank)
        | linear(f"{at}.o_proj", s.hidden, s.heads * value, bias=bias)
    )


def sanitize(config: Config, arrays: Arrays) -> Arrays:
    """Experts stacked, ``kv_b_proj`` split into what keys and what values are made with."""
    found: Arrays = {}
    for name, array in within(config, stacked(split_experts(arrays, "mlp"), "mlp")).items():
        if name.endswith("self_attn.kv_b_proj.weight"):
            at = name.removesuffix("kv_b_proj.weight")
            found |= _split(config, at, array)
        else:
            found[name] = array
    return found


def within(config: Config, arrays: Arrays) -> Arrays:
    """Without the layers that guess the tokens after the next one (MTP), which come last."""
    layers = config["num_hidden_layers"]
    return {
        name: array
        for name, array in arrays.items()
        if not name.startswith("model.layers.") or int(name.split(".")[2]) < layers
    }


def _split(config: Config, at: str, both: Lazy) -> Arrays:
    heads, nope, value, rank = _sizes(config)
    if both.shape != (heads * (nope + value), rank):
        return {f"{at}kv_b_proj.weight": both}  # the check says what it should be
    each = both.seen((heads, nope + value, rank), lambda a: a.reshape(heads, nope + value, rank))
    return {
        f"{at}embed_q.weight": each.cut(-2, 0, nope).transposed(),
        f"{at}unembed_out.weight": each.cut(-2, nope, None),
    }


def _sizes(config: Config) -> tuple[int, int, int, int]:
    return (
        size(config, "num_attention_heads"),
        size(config, "qk_nope_head_dim"),
        size(config, "v_head_dim"),
        size(config, "kv_lora_rank"),
    )


def _older(config: Config, name: str) -> Change | None:
    """Before llama.cpp absorbed matrices into queries, the two were one, as Hugging Face has it."""
    at, _, module = name.removesuffix(".weight").rpartition(".self_attn.")
    if module not in {"embed_q", "unembed_out"}:
        return None
    heads, nope, value, rank = _sizes(config)
    source = f"blk.{at.rpartition('.')[2]}.attn_kv_b.weight"
    shape = (heads * (nope + value), rank)
    if module == "unembed_out":
        rows = nope + np.arange(value)
        return Change(rows=rows, run=nope + value, shape=shape, source=source)

    def keys(both: F32) -> F32:
        return both.reshape(heads, nope + value, rank)[:, :nope].swapaxes(1, 2)

    return Change(value=keys, shape=shape, source=source)


def _read(keys: Keys) -> dict[str, Any]:
    turned, rank = keys.count("rope.dimension_count"), keys.count("attention.kv_lora_rank")
    head = keys.count("attention.key_length_mla", keys.head_dim)
    rope = rope_parameters(keys.file, keys.arch, turned)
    if multiplier := keys.number("rope.scaling.yarn_log_multiplier", 0.0):
        rope["mscale"] = rope["mscale_all_dim"] = round(10 * multiplier, 6)
    sigmoid = keys.file.int(f"{keys.arch}.expert_gating_func", _SOFTMAX) == _SIGMOID
    groups = keys.file.int(f"{keys.arch}.expert_group_count", 1)
    return {
        "model_type": "deepseek_v3" if sigmoid else "deepseek_v2",
        **read_experts(keys, "n_routed_experts", "num_experts_per_tok"),
        "num_key_value_heads": keys.heads,
        "head_dim": turned,
        "intermediate_size": keys.uniform("feed_forward_length"),
        "moe_intermediate_size": keys.count("expert_feed_forward_length"),
        "n_shared_experts": keys.file.int(f"{keys.arch}.expert_shared_count", 0),
        "first_k_dense_replace": keys.file.int(f"{keys.arch}.leading_dense_block_count", 0),
        "routed_scaling_factor": keys.number("expert_weights_scale", 1.0) or 1.0,
        "norm_topk_prob": keys.file.bool(f"{keys.arch}.expert_weights_norm", False),
        "topk_method": "noaux_tc" if sigmoid else _METHODS[groups > 1],
        "scoring_func": "sigmoid" if sigmoid else "softmax",
        "n_group": groups,
        "topk_group": keys.file.int(f"{keys.arch}.expert_group_used_count", 1),
        "q_lora_rank": keys.file.int(f"{keys.arch}.attention.q_lora_rank", 0) or None,
        "kv_lora_rank": rank,
        "qk_rope_head_dim": turned,
        "qk_nope_head_dim": head - turned,
        "v_head_dim": keys.count(
            "attention.value_length_mla", keys.count("attention.value_length", head)
        ),
        "rope_parameters": rope,
        "attention_bias": False,
    }


def write_mixture(config: Config) -> Fields:
    """Metadata of experts as DeepSeek V3 has them."""
    found: Fields = {
        "expert_count": config["n_routed_experts"],
        "expert_used_count": config["num_experts_per_tok"],
        "expert_shared_count": config.get("n_shared_experts") or 0,
        "expert_feed_forward_length": config["moe_intermediate_size"],
        "expert_weights_scale": float(config.get("routed_scaling_factor", 1.0)),
        "expert_weights_norm": bool(config.get("norm_topk_prob", True)),
        "expert_gating_func": _SIGMOID,
        "leading_dense_block_count": config.get("first_k_dense_replace") or 0,
    }
    if (config.get("n_group") or 1) > 1:
        found["expert_group_count"] = config["n_group"]
        found["expert_group_used_count"] = config["topk_group"]
    return found


def _write(config: Config) -> Fields:
    _, nope, value, rank = _sizes(config)
    turned = config["qk_rope_head_dim"]
    rope = config.get("rope_parameters") or {}
    found = write_mixture(config) | {
        "attention.head_count_kv": 1,
        "attention.kv_lora_rank": rank,
        "attention.key_length": rank + turned,
        "attention.value_length": rank,
        "attention.key_length_mla": nope + turned,
        "attention.value_length_mla": value,
        "rope.dimension_count": turned,
    }
    if config["model_type"] == "deepseek_v2":
        if (config.get("n_group") or 1) > 1 and config.get("topk_method") != "greedy":
            raise UnsupportedModel("llama.cpp chooses groups of experts in another way")
        found |= {"expert_gating_func": _SOFTMAX, "expert_weights_norm": False}
        found = {key: v for key, v in found.items() if not key.startswith("expert_group")}
    if config.get("q_lora_rank"):
        found["attention.q_lora_rank"] = config["q_lora_rank"]
    if rope.get("mscale_all_dim"):
        if rope.get("mscale") != rope["mscale_all_dim"]:
            raise UnsupportedModel("YaRN with two different 'mscale' cannot be exported to GGUF")
        found["rope.scaling.yarn_log_multiplier"] = 0.1 * rope["mscale_all_dim"]
    return found


MOE_NAMES: Mapping[str, str] = MappingProxyType({
    **DENSE,
    **expert_names("mlp.switch_mlp", "mlp.gate"),
    **shared_names("mlp.shared_experts"),
    CORRECTION: "exp_probs_b.bias",
})  # fmt: skip

_NAMES = {
    **PRE_NORMS,
    **MOE_NAMES,
    "self_attn.q_proj": "attn_q",
    "self_attn.q_a_proj": "attn_q_a",
    "self_attn.q_a_layernorm": "attn_q_a_norm",
    "self_attn.q_b_proj": "attn_q_b",
    "self_attn.kv_a_proj_with_mqa": "attn_kv_a_mqa",
    "self_attn.kv_a_layernorm": "attn_kv_a_norm",
    "self_attn.embed_q": "attn_k_b",
    "self_attn.unembed_out": "attn_v_b",
    "self_attn.o_proj": "attn_output",
}


def _family(class_name: str, **defaults: Any) -> Family:
    return Family(
        architecture="deepseek2",
        class_name=class_name,
        block=_block,
        names=_NAMES,
        read=_read,
        write=_write,
        sanitize=sanitize,
        older=_older,
        plain=("mlp.gate",),
        defaults=MappingProxyType(defaults),
    )


FAMILIES: Mapping[str, Family] = MappingProxyType({
    "deepseek_v2": _family("DeepseekV2ForCausalLM"),
    "deepseek_v3": _family("DeepseekV3ForCausalLM"),
    "kimi_k2": _family("DeepseekV3ForCausalLM"),
    "glm4_moe_lite": _family("Glm4MoeLiteForCausalLM", first_k_dense_replace=1, rms_norm_eps=1e-5),
})  # fmt: skip
