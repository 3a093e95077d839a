"""GLM 4 (0414), with norms on the way into the branches and out, and GLM 4.5 with experts."""

from __future__ import annotations

from rl_mlx.model.families.common import Config, attention, base, mlp
from rl_mlx.model.families.deepseek import mixture, sigmoid_router
from rl_mlx.model.plan import DecoderPlan, LayerPlan, Names

_NAMES = Names(mixer_post_norm="post_self_attn_layernorm", mlp_post_norm="post_mlp_layernorm")


def plan(config: Config, context: int) -> DecoderPlan:
    """Pairs of neighbours are rotated; gate and up are one matrix."""
    bias = bool(config.get("attention_bias", True))
    layers = tuple(
        LayerPlan(
            mixer=attention(config, context, i, bias=bias, interleaved=True),
            mlp=mlp(config, fused_gate_up=True),
        )
        for i in range(config["num_hidden_layers"])
    )
    return DecoderPlan(layers=layers, names=_NAMES, **base(config, context))


def plan_moe(config: Config, context: int) -> DecoderPlan:
    """GLM 4.5 and later: DeepSeek's experts under plain attention, a part of each head rotated."""
    bias, normed = bool(config.get("attention_bias", False)), bool(config.get("use_qk_norm", False))
    moe = mixture(config, sigmoid_router(config))
    partial = {"partial_rotary_factor": 0.5, **config}
    dense = config.get("first_k_dense_replace") or 0
    layers = tuple(
        LayerPlan(
            mixer=attention(partial, context, i, bias=bias, qk_norm=normed),
            mlp=mlp(config) if i < dense else moe,
        )
        for i in range(config["num_hidden_layers"])
    )
    return DecoderPlan(layers=layers, names=Names(shared="shared_experts"), **base(config, context))
