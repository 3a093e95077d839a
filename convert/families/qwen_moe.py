"""Qwen 2 MoE: experts, and one that answers always, as much as a gate says."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from rl_mlx.convert.experts import split_experts, stacked
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
from rl_mlx.convert.lazy import Arrays
from rl_mlx.convert.shapes import (
    Config,
    Shapes,
    Sizes,
    attention,
    experts,
    linear,
    mlp,
    pre_norms,
    size,
)
from rl_mlx.errors import UnsupportedModel


def sparse(config: Config, hidden: int) -> Shapes:
    """A layer of experts and a shared one behind a gate, below ``mlp``."""
    count = size(config, "num_experts")
    return (
        linear("mlp.gate", count, hidden)
        | experts("mlp.switch_mlp", count, size(config, "moe_intermediate_size"), hidden)
        | gated("mlp.shared_expert", size(config, "shared_expert_intermediate_size"), hidden)
        | linear("mlp.shared_expert_gate", 1, hidden)
    )


def is_sparse(config: Config, layer: int) -> bool:
    """Whether a layer has experts."""
    step = config.get("decoder_sparse_step") or 1
    return layer not in (config.get("mlp_only_layers") or ()) and (layer + 1) % step == 0


def _block(config: Config, layer: int) -> Shapes:
    s = Sizes.of(config)
    bias = bool(config.get("qkv_bias", True))
    feed = sparse(config, s.hidden) if is_sparse(config, layer) else mlp(s)
    return pre_norms(s) | attention(s, bias=bias) | feed


def stack(config: Config, arrays: Arrays) -> Arrays:  # noqa: ARG001
    """Experts stacked, whatever way they lie."""
    return stacked(split_experts(arrays, "mlp"), "mlp")


def shared_gate(config: Config, name: str) -> Change | None:
    """The shared expert's gate is a vector in a GGUF file."""
    is_gate = name.endswith("mlp.shared_expert_gate.weight")
    return Change(shape=(config["hidden_size"],)) if is_gate else None


def _read(keys: Keys) -> dict[str, Any]:
    inner = keys.uniform("feed_forward_length")
    experts = read_experts(keys, "num_experts", "num_experts_per_tok")
    width = keys.count("expert_feed_forward_length", inner // experts["num_experts_per_tok"])
    return {
        **read_attention(keys),
        **experts,
        "intermediate_size": inner,
        "moe_intermediate_size": width,
        "shared_expert_intermediate_size": keys.count("expert_shared_feed_forward_length", inner),
        "norm_topk_prob": False,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    }


def write_experts(config: Config) -> Fields:
    """Metadata of experts and the shared one. Raises ``UnsupportedModel`` for dense layers."""
    if not all(is_sparse(config, i) for i in range(config["num_hidden_layers"])):
        raise UnsupportedModel("llama.cpp runs this family only with experts in every layer")
    return {
        "expert_count": config["num_experts"],
        "expert_used_count": config["num_experts_per_tok"],
        "expert_feed_forward_length": config["moe_intermediate_size"],
        "expert_shared_feed_forward_length": config["shared_expert_intermediate_size"],
    }


def _write(config: Config) -> Fields:
    if config.get("norm_topk_prob"):
        raise UnsupportedModel("llama.cpp runs Qwen2 MoE only without norm_topk_prob")
    return write_experts(config)


NAMES: Mapping[str, str] = MappingProxyType({
    **PRE_NORMS,
    **ATTENTION,
    **expert_names("mlp.switch_mlp", "mlp.gate"),
    **shared_names("mlp.shared_expert"),
    "mlp.shared_expert_gate": "ffn_gate_inp_shexp",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
})  # fmt: skip

FAMILIES: Mapping[str, Family] = MappingProxyType({
    "qwen2_moe": Family(
        architecture="qwen2moe",
        class_name="Qwen2MoeForCausalLM",
        block=_block,
        names=NAMES,
        read=_read,
        write=_write,
        sanitize=stack,
        change=shared_gate,
        defaults=MappingProxyType(
            {"decoder_sparse_step": 1, "mlp_only_layers": [], "norm_topk_prob": False}
        ),
    ),
})  # fmt: skip
