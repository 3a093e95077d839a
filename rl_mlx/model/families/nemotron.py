"""Nemotron and Minitron: LayerNorms around 1, half of each head rotated, squared ReLU."""

from __future__ import annotations

from rl_mlx.model.families.common import Config, attention, base, mlp
from rl_mlx.model.plan import DecoderPlan, LayerPlan


def plan(config: Config, context: int) -> DecoderPlan:
    """A feed-forward layer without a gate; 1 is added to the weights of norms."""
    bias = bool(config.get("attention_bias", False))
    layers = tuple(
        LayerPlan(
            mixer=attention(config, context, i, bias=bias, out_bias=bias),
            mlp=mlp(config, gated=False, bias=bool(config.get("mlp_bias", False))),
        )
        for i in range(config["num_hidden_layers"])
    )
    return DecoderPlan(
        layers=layers, norm="layer", norm_bias=True, norm_offset=1.0,
        **base(config, context, norm_eps=config["norm_eps"]),
    )  # fmt: skip
