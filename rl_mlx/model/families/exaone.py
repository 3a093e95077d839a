"""EXAONE 4: norms on the way out of the branches, and on each head's queries and keys."""

from __future__ import annotations

from typing import Any

from rl_mlx.model.families.common import Config, attention, base, layer_type, mlp
from rl_mlx.model.families.olmo import POST_NORMS
from rl_mlx.model.plan import DecoderPlan, LayerPlan


def plan(config: Config, context: int) -> DecoderPlan:
    """In a model with windows, layers that see all rotate nothing."""
    windowed = config.get("sliding_window") is not None
    layers = []
    for i in range(config["num_hidden_layers"]):
        still = windowed and layer_type(config, i) == "full_attention"
        more: dict[str, Any] = {"rope": None} if still else {}
        mixer = attention(config, context, i, qk_norm=True, **more)
        layers.append(LayerPlan(mixer=mixer, mlp=mlp(config)))
    return DecoderPlan(layers=tuple(layers), names=POST_NORMS, **base(config, context))
