"""Phi 1, 1.5 and 2: LayerNorms, both branches from one norm, a part of each head rotated."""

from __future__ import annotations

from rl_mlx.model.families.common import Config, attention, base, mlp
from rl_mlx.model.plan import DecoderPlan, LayerPlan, Names

_NAMES = Names(out="dense", mlp_norm=None, up="fc1", down="fc2", final_norm="final_layernorm")


def plan(config: Config, context: int) -> DecoderPlan:
    """Biases everywhere, in the head too."""
    layers = tuple(
        LayerPlan(
            mixer=attention(config, context, i, bias=True, out_bias=True),
            mlp=mlp(config, gated=False, bias=True),
        )
        for i in range(config["num_hidden_layers"])
    )
    return DecoderPlan(
        layers=layers, names=_NAMES, norm="layer", norm_bias=True, parallel=True, head_bias=True,
        **base(config, context, norm_eps=config["layer_norm_eps"]),
    )  # fmt: skip
