"""Phi 3, 3.5 and 4: fused projections, LongRoPE."""

from __future__ import annotations

from rl_mlx.model.families.common import Config, attention, base, mlp
from rl_mlx.model.plan import DecoderPlan, LayerPlan


def plan(config: Config, context: int) -> DecoderPlan:
    """Llama with Q, K, V stored as one matrix, and gate and up as another."""
    layers = tuple(
        LayerPlan(
            mixer=attention(config, context, i, fused_qkv=True),
            mlp=mlp(config, fused_gate_up=True),
        )
        for i in range(config["num_hidden_layers"])
    )
    return DecoderPlan(layers=layers, **base(config, context))
