"""StarCoder 2: LayerNorms and a feed-forward layer without a gate."""

from __future__ import annotations

from rl_mlx.model.families.common import Config, attention, base, mlp
from rl_mlx.model.plan import DecoderPlan, LayerPlan, Names

_NAMES = Names(up="c_fc", down="c_proj")


def plan(config: Config, context: int) -> DecoderPlan:
    """Biases everywhere but in the head, which is the embedding."""
    bias = bool(config.get("use_bias", True))
    layers = tuple(
        LayerPlan(
            mixer=attention(config, context, i, bias=bias, out_bias=bias),
            mlp=mlp(config, gated=False, bias=bias),
        )
        for i in range(config["num_hidden_layers"])
    )
    tied = bool(config.get("tie_word_embeddings", True))
    return DecoderPlan(
        layers=layers, names=_NAMES, norm="layer", norm_bias=True,
        **base(config, context, norm_eps=config["norm_epsilon"], tied=tied),
    )  # fmt: skip
