"""Llama 1 to 3 and Mistral."""

from __future__ import annotations

from rl_mlx.model.families.common import Config, attention, base, mlp
from rl_mlx.model.plan import DecoderPlan, LayerPlan


def plan(config: Config, context: int) -> DecoderPlan:
    """Pre-norm blocks, rope, grouped-query attention, SiLU."""
    bias = bool(config.get("attention_bias", False))
    layers = tuple(
        LayerPlan(
            mixer=attention(config, context, i, bias=bias, out_bias=bias),
            mlp=mlp(config, bias=bool(config.get("mlp_bias", False))),
        )
        for i in range(config["num_hidden_layers"])
    )
    return DecoderPlan(layers=layers, **base(config, context))
