"""Llama 1 to 3, Mistral, and those that differ by a bias or an activation: Seed-OSS, Arcee."""

from __future__ import annotations

from rl_mlx.model.families.common import Config, attention, base, mlp
from rl_mlx.model.plan import DecoderPlan, LayerPlan


def plan(config: Config, context: int) -> DecoderPlan:
    """Pre-norm blocks, rope, grouped-query attention, SiLU."""
    bias = bool(config.get("attention_bias", False))
    return _decoder(config, context, bias=bias, out_bias=bias)


def plan_seed_oss(config: Config, context: int) -> DecoderPlan:
    """Biases on Q, K and V, and on the way out of the heads where the config says so."""
    bias, out = config["attention_bias"], config["attention_out_bias"]
    return _decoder(config, context, bias=bias, out_bias=out)


def plan_arcee(config: Config, context: int) -> DecoderPlan:
    """Squared ReLU without a gate."""
    bias = bool(config.get("attention_bias", False))
    return _decoder(config, context, bias=bias, out_bias=bias, gated=False)


def _decoder(
    config: Config, context: int, *, bias: bool, out_bias: bool, gated: bool = True
) -> DecoderPlan:
    layers = tuple(
        LayerPlan(
            mixer=attention(config, context, i, bias=bias, out_bias=out_bias),
            mlp=mlp(config, gated=gated, bias=bool(config.get("mlp_bias", False))),
        )
        for i in range(config["num_hidden_layers"])
    )
    return DecoderPlan(layers=layers, **base(config, context))
