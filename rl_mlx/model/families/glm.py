"""GLM 4 (0414): norms on the way into the branches and out, half of each head rotated."""

from __future__ import annotations

from rl_mlx.model.families.common import Config, attention, base, mlp
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
    eps = float(config.get("rms_norm_eps", 1.5625e-07))
    return DecoderPlan(layers=layers, names=_NAMES, **base(config, context, norm_eps=eps))
