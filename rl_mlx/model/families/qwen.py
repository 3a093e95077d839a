"""Qwen 2, 2.5 and 3, and their mixtures of experts."""

from __future__ import annotations

from typing import Any

from rl_mlx.model.families.common import Config, attention, base, mlp
from rl_mlx.model.plan import DecoderPlan, LayerPlan, MLPPlan, MoEPlan, RouterPlan


def plan_qwen2(config: Config, context: int) -> DecoderPlan:
    """Llama with biases on Q, K and V."""
    layers = tuple(
        LayerPlan(mixer=attention(config, context, i, bias=True), mlp=mlp(config))
        for i in range(config["num_hidden_layers"])
    )
    return DecoderPlan(layers=layers, **base(config, context))


def plan_qwen3(config: Config, context: int) -> DecoderPlan:
    """Norms on each head's queries and keys."""
    return _qwen3(config, context, [mlp(config)] * config["num_hidden_layers"])


def plan_qwen3_moe(config: Config, context: int) -> DecoderPlan:
    """Qwen 3 with experts in every ``decoder_sparse_step``-th layer that ``mlp_only_layers`` does
    not name.
    """
    return _qwen3(config, context, sparse(config, mixture(config)))


def plan_qwen2_moe(config: Config, context: int) -> DecoderPlan:
    """Qwen 2 with experts, and one that answers for every token as much as a gate says."""
    shared = config["shared_expert_intermediate_size"]
    moe = mixture(config, shared=shared, shared_gate=True)
    bias = bool(config.get("qkv_bias", True))
    layers = tuple(
        LayerPlan(mixer=attention(config, context, i, bias=bias), mlp=m)
        for i, m in enumerate(sparse(config, moe))
    )
    return DecoderPlan(layers=layers, **base(config, context))


def mixture(config: Config, **more: Any) -> MoEPlan:
    """Experts chosen by a softmax; ``more`` are further fields of the plan."""
    router = RouterPlan(
        experts=config.get("num_experts") or config["num_local_experts"],
        active=config["num_experts_per_tok"],
        normalize=bool(config.get("norm_topk_prob", False)),
    )
    return MoEPlan(router=router, inner=config["moe_intermediate_size"], **more)


def sparse(config: Config, moe: MoEPlan) -> list[MLPPlan | MoEPlan]:
    """Experts in every ``decoder_sparse_step``-th layer that ``mlp_only_layers`` does not name."""
    step = config.get("decoder_sparse_step") or 1
    dense = set(config.get("mlp_only_layers") or ())
    return [
        moe if i not in dense and (i + 1) % step == 0 else mlp(config)
        for i in range(config["num_hidden_layers"])
    ]


def _qwen3(config: Config, context: int, mlps: list[MLPPlan | MoEPlan]) -> DecoderPlan:
    bias = bool(config.get("attention_bias", False))
    layers = tuple(
        LayerPlan(
            mixer=attention(config, context, i, qk_norm=True, bias=bias, out_bias=bias), mlp=m
        )
        for i, m in enumerate(mlps)
    )
    return DecoderPlan(layers=layers, **base(config, context))
