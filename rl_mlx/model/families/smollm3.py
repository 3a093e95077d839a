"""SmolLM 3: Llama that rotates nothing in one layer of four."""

from __future__ import annotations

from typing import Any

from rl_mlx.model.families.common import Config, attention, base, mlp
from rl_mlx.model.plan import DecoderPlan, LayerPlan


def plan(config: Config, context: int) -> DecoderPlan:
    """``no_rope_layers`` has a 1 for each layer that rotates."""
    count = config["num_hidden_layers"]
    interval = config.get("no_rope_layer_interval") or 4
    rotates = config.get("no_rope_layers") or [int((i + 1) % interval != 0) for i in range(count)]
    still: dict[str, Any] = {"rope": None}
    bias = bool(config.get("attention_bias", False))
    layers = tuple(
        LayerPlan(
            mixer=attention(
                config, context, i, bias=bias, out_bias=bias, **({} if rotates[i] else still)
            ),
            mlp=mlp(config, bias=bool(config.get("mlp_bias", False))),
        )
        for i in range(count)
    )
    tied = bool(config.get("tie_word_embeddings", True))
    return DecoderPlan(layers=layers, **base(config, context, tied=tied))
