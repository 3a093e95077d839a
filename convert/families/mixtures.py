"""Families of experts under plain attention: GLM 4.5, ERNIE 4.5, Granite 3."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from rl_mlx.convert.experts import split_experts, stacked
from rl_mlx.convert.families import deepseek
from rl_mlx.convert.families.words import (
    ATTENTION,
    PRE_NORMS,
    expert_names,
    gated,
    read_attention,
    read_experts,
)
from rl_mlx.convert.family import Family
from rl_mlx.convert.gguf.changes import Change, half_split
from rl_mlx.convert.gguf.keys import Keys
from rl_mlx.convert.gguf.writer import Fields
from rl_mlx.convert.lazy import Arrays
from rl_mlx.convert.shapes import (
    Config,
    Shapes,
    Sizes,
    attention,
    experts,
    head_norms,
    linear,
    mlp,
    pre_norms,
    size,
)
from rl_mlx.errors import UnsupportedModel


def _glm(config: Config, layer: int) -> Shapes:
    s = Sizes.of(config)
    shapes = pre_norms(s) | attention(s, bias=bool(config.get("attention_bias")))
    if config.get("use_qk_norm"):
        shapes |= head_norms(s)
    if layer < (config.get("first_k_dense_replace") or 0):
        return shapes | mlp(s)
    return shapes | deepseek.sparse(config, s.hidden, corrected=True)


def _glm_arrays(config: Config, arrays: Arrays) -> Arrays:
    return deepseek.within(config, stacked(split_experts(arrays, "mlp"), "mlp"))


def _read_glm(keys: Keys) -> dict[str, Any]:
    return {
        **read_attention(keys),
        **read_experts(keys, "n_routed_experts", "num_experts_per_tok"),
        "intermediate_size": keys.uniform("feed_forward_length"),
        "moe_intermediate_size": keys.count("expert_feed_forward_length"),
        "n_shared_experts": keys.file.int(f"{keys.arch}.expert_shared_count", 0),
        "first_k_dense_replace": keys.file.int(f"{keys.arch}.leading_dense_block_count", 0),
        "routed_scaling_factor": keys.number("expert_weights_scale", 1.0) or 1.0,
        "norm_topk_prob": keys.file.bool(f"{keys.arch}.expert_weights_norm", False),
        "n_group": keys.file.int(f"{keys.arch}.expert_group_count", 1),
        "topk_group": keys.file.int(f"{keys.arch}.expert_group_used_count", 1),
        "attention_bias": "blk.0.attn_q.bias" in keys.file.tensors,
        "use_qk_norm": "blk.0.attn_q_norm.weight" in keys.file.tensors,
    }


def _write_glm(config: Config) -> Fields:
    partial = (config.get("rope_parameters") or {}).get("partial_rotary_factor")
    partial = partial or config.get("partial_rotary_factor", 0.5)
    return {
        **deepseek.write_mixture(config),
        "rope.dimension_count": int(config["head_dim"] * partial),
    }


def ernie_is_sparse(config: Config, layer: int) -> bool:
    """Whether a layer has experts: every ``moe_layer_interval``-th of a range has."""
    last = config.get("moe_layer_end_index", -1)
    last = config["num_hidden_layers"] - 1 if last == -1 else last
    first, step = config.get("moe_layer_start_index", 1), config.get("moe_layer_interval", 1)
    return (layer + 1) % step == 0 and bool(first <= layer <= last)


def _ernie(config: Config, layer: int) -> Shapes:
    s, bias = Sizes.of(config), bool(config.get("use_bias"))
    shapes = pre_norms(s) | attention(s, bias=bias, out_bias=bias)
    if not ernie_is_sparse(config, layer):
        return shapes | mlp(s, bias=bias)
    count, inner = size(config, "moe_num_experts"), size(config, "moe_intermediate_size")
    shapes |= linear("mlp.gate", count, s.hidden)
    shapes |= experts("mlp.switch_mlp", count, inner, s.hidden)
    if shared := config.get("moe_num_shared_experts"):
        shapes |= gated("mlp.shared_experts", inner * shared, s.hidden)
    return shapes | {deepseek.CORRECTION: (count,)}


def _ernie_arrays(config: Config, arrays: Arrays) -> Arrays:  # noqa: ARG001
    found: Arrays = {}
    for name, array in stacked(split_experts(arrays, "mlp"), "mlp").items():
        if name.startswith("model.mtp_"):
            continue
        if name.endswith("moe_statics.e_score_correction_bias"):
            at = name.partition("mlp.")[0]
            array = array.seen((array.shape[-1],), lambda a: a.reshape(-1))
            name = at + deepseek.CORRECTION
        found[name] = array
    return found


def _read_ernie(keys: Keys) -> dict[str, Any]:
    inner = keys.count("expert_feed_forward_length")
    return {
        **read_attention(keys),
        **read_experts(keys, "moe_num_experts", "moe_k"),
        "intermediate_size": keys.uniform("feed_forward_length"),
        "moe_intermediate_size": inner,
        "moe_num_shared_experts": keys.file.int(f"{keys.arch}.expert_shared_count", 0),
        "moe_layer_start_index": keys.file.int(f"{keys.arch}.leading_dense_block_count", 0),
        "moe_layer_end_index": keys.layers - 1,
        "moe_layer_interval": keys.count("interleave_moe_layer_step", 1),
        "use_bias": "blk.0.attn_q.bias" in keys.file.tensors,
    }


def _write_ernie(config: Config) -> Fields:
    first, step = config.get("moe_layer_start_index", 1), config.get("moe_layer_interval", 1)
    for layer in range(config["num_hidden_layers"]):
        if ernie_is_sparse(config, layer) != ((layer + 1) % step == 0 and layer >= first):
            raise UnsupportedModel("llama.cpp runs ERNIE only with experts up to the last layer")
    inner, shared = config["moe_intermediate_size"], config.get("moe_num_shared_experts") or 0
    return {
        "expert_count": config["moe_num_experts"],
        "expert_used_count": config["moe_k"],
        "expert_feed_forward_length": inner,
        "expert_shared_count": shared,
        "expert_shared_feed_forward_length": inner * shared,
        "leading_dense_block_count": first,
        "interleave_moe_layer_step": step,
    }


def _granite(config: Config, layer: int) -> Shapes:  # noqa: ARG001
    s, bias = Sizes.of(config), bool(config.get("attention_bias"))
    count = size(config, "num_local_experts")
    return (
        pre_norms(s)
        | attention(s, bias=bias, out_bias=bias)
        | linear("block_sparse_moe.router.layer", count, s.hidden)
        | experts("block_sparse_moe.switch_mlp", count, s.inner, s.hidden)
    )


def granite_arrays(config: Config, arrays: Arrays) -> Arrays:  # noqa: ARG001
    """Experts of Granite: gate and up apart."""
    found: Arrays = {}
    for name, array in arrays.items():
        at = f"{name.partition('.block_sparse_moe.')[0]}.block_sparse_moe.switch_mlp"
        if name.endswith("block_sparse_moe.input_linear.weight"):
            half = array.shape[-2] // 2
            found[f"{at}.gate_proj.weight"] = array.cut(-2, 0, half)
            found[f"{at}.up_proj.weight"] = array.cut(-2, half, None)
        elif name.endswith("block_sparse_moe.output_linear.weight"):
            found[f"{at}.down_proj.weight"] = array
        else:
            found[name] = array
    return found


def interleaved(config: Config, name: str) -> Change | None:
    """Q and K lie in pairs of neighbours, as llama.cpp rotates them there."""
    module = name.rpartition(".")[0]
    rotated = module.endswith((".self_attn.q_proj", ".self_attn.k_proj"))
    return Change(rows=half_split(config["head_dim"])) if rotated else None


def read_multipliers(keys: Keys) -> dict[str, Any]:
    """What Granite multiplies by."""
    return {
        "embedding_multiplier": keys.number("embedding_scale", 1.0),
        "residual_multiplier": keys.number("residual_scale", 1.0),
        "attention_multiplier": keys.number("attention.scale", keys.head_dim**-0.5),
        "logits_scaling": keys.divisor("logit_scale", 1.0),
    }


def write_multipliers(config: Config) -> Fields:
    """The same as metadata."""
    return {
        "embedding_scale": float(config.get("embedding_multiplier", 1.0)),
        "residual_scale": float(config.get("residual_multiplier", 1.0)),
        "attention.scale": float(config.get("attention_multiplier", 1.0)),
        "logit_scale": float(config.get("logits_scaling", 1.0)),
    }


def _read_granite(keys: Keys) -> dict[str, Any]:
    return {
        **read_attention(keys),
        **read_experts(keys, "num_local_experts", "num_experts_per_tok"),
        **read_multipliers(keys),
        "intermediate_size": keys.uniform("feed_forward_length"),
        "attention_bias": "blk.0.attn_q.bias" in keys.file.tensors,
    }


def _write_granite(config: Config) -> Fields:
    return {
        **write_multipliers(config),
        "expert_count": config["num_local_experts"],
        "expert_used_count": config["num_experts_per_tok"],
    }


_GRANITE_NAMES = {
    **PRE_NORMS,
    **ATTENTION,
    **expert_names("block_sparse_moe.switch_mlp", "block_sparse_moe.router.layer"),
}
_GLM_NAMES = {
    **ATTENTION,
    **deepseek.MOE_NAMES,
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "post_attention_norm",
}

FAMILIES: Mapping[str, Family] = MappingProxyType({
    "glm4_moe": Family(
        architecture="glm4moe",
        class_name="Glm4MoeForCausalLM",
        block=_glm,
        names=_GLM_NAMES,
        read=_read_glm,
        write=_write_glm,
        sanitize=_glm_arrays,
        plain=("mlp.gate",),
        defaults=MappingProxyType({"rms_norm_eps": 1e-5}),
    ),
    "ernie4_5_moe": Family(
        architecture="ernie4_5-moe",
        class_name="Ernie4_5_MoeForCausalLM",
        block=_ernie,
        names={**PRE_NORMS, **ATTENTION, **deepseek.MOE_NAMES},
        read=_read_ernie,
        write=_write_ernie,
        sanitize=_ernie_arrays,
        defaults=MappingProxyType({"tie_word_embeddings": True, "rms_norm_eps": 1e-5}),
    ),
    "granitemoe": Family(
        architecture="granitemoe",
        class_name="GraniteMoeForCausalLM",
        block=_granite,
        names=_GRANITE_NAMES,
        read=_read_granite,
        write=_write_granite,
        sanitize=granite_arrays,
        change=interleaved,
    ),
})  # fmt: skip
