"""OLMo 2 and 3: norms on the way out of the branches, and over all heads together."""

from __future__ import annotations

from rl_mlx.model.families.common import Config, attention, base, mlp
from rl_mlx.model.plan import DecoderPlan, LayerPlan, Names

POST_NORMS = Names(
    mixer_norm=None,
    mlp_norm=None,
    mixer_post_norm="post_attention_layernorm",
    mlp_post_norm="post_feedforward_layernorm",
)


def plan(config: Config, context: int) -> DecoderPlan:
    """OLMo 3 has windows in three layers of four, and scales rope in the fourth."""
    bias = bool(config.get("attention_bias", False))
    layers = tuple(
        LayerPlan(
            mixer=attention(
                config, context, i, bias=bias, out_bias=bias, qk_norm=True, qk_norm_of="width"
            ),
            mlp=mlp(config),
        )
        for i in range(config["num_hidden_layers"])
    )
    return DecoderPlan(layers=layers, names=POST_NORMS, **base(config, context))
