"""Llama 1 to 3, Mistral, and those that differ by little: Ministral 3, Seed-OSS, Arcee."""

from __future__ import annotations

from typing import Any

from rl_mlx.model.families.common import Config, attention, base, mlp
from rl_mlx.model.plan import DecoderPlan, LayerPlan
from rl_mlx.model.rope import rope_parameters


def plan(config: Config, context: int) -> DecoderPlan:
    """Pre-norm blocks, rope, grouped-query attention, SiLU."""
    bias = bool(config.get("attention_bias", False))
    return _decoder(config, context, bias=bias, out_bias=bias)


def plan_ministral3(config: Config, context: int) -> DecoderPlan:
    """Queries that grow with their position, by the words of ``rope_parameters``."""
    rope = rope_parameters(config)
    rate = float(rope.get("llama_4_scaling_beta") or 0.0)
    span = float(rope.get("original_max_position_embeddings") or config["max_position_embeddings"])
    return _decoder(config, context, temperature=(span, rate, 0))


def plan_seed_oss(config: Config, context: int) -> DecoderPlan:
    """Biases on Q, K and V, and on the way out of the heads where the config says so."""
    bias, out = config["attention_bias"], config["attention_out_bias"]
    return _decoder(config, context, bias=bias, out_bias=out)


def plan_arcee(config: Config, context: int) -> DecoderPlan:
    """Squared ReLU without a gate."""
    bias = bool(config.get("attention_bias", False))
    return _decoder(config, context, bias=bias, out_bias=bias, gated=False)


def _decoder(
    config: Config, context: int, *, gated: bool = True, **of_attention: Any
) -> DecoderPlan:
    layers = tuple(
        LayerPlan(
            mixer=attention(config, context, i, **of_attention),
            mlp=mlp(config, gated=gated, bias=bool(config.get("mlp_bias", False))),
        )
        for i in range(config["num_hidden_layers"])
    )
    return DecoderPlan(layers=layers, **base(config, context))
