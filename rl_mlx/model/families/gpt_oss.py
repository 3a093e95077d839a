"""gpt-oss: attention sinks, alternating windows, experts with biases and a clamped activation."""

from __future__ import annotations

from typing import Any

from rl_mlx.model.families.common import Config, attention, base
from rl_mlx.model.plan import DecoderPlan, LayerPlan, MoEPlan, Names, RouterPlan


def plan(config: Config, context: int) -> DecoderPlan:
    """Every layer is a mixture of experts; even layers see a window."""
    moe = MoEPlan(
        router=RouterPlan(
            experts=config["num_local_experts"], active=config["num_experts_per_tok"], bias=True
        ),
        inner=config["intermediate_size"],
        activation="swiglu_oai",
        bias=True,
    )
    count = config["num_hidden_layers"]
    alternating = ["full_attention" if i % 2 else "sliding_attention" for i in range(count)]
    typed: dict[str, Any] = {"layer_types": alternating, **config}
    layers = tuple(
        LayerPlan(mixer=attention(typed, context, i, sinks=True, bias=True, out_bias=True), mlp=moe)
        for i in range(count)
    )
    names = Names(router="router", experts="experts")
    return DecoderPlan(layers=layers, names=names, **base(config, context))
