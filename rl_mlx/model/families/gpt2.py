"""GPT-2: learned positions, LayerNorms, one matrix for queries, keys and values."""

from __future__ import annotations

from rl_mlx.model.families.common import Config, attention, base, mlp
from rl_mlx.model.plan import DecoderPlan, LayerPlan, Names

_NAMES = Names(
    embedding="wte",
    positions="wpe",
    layers="h",
    attention="attn",
    qkv="c_attn",
    out="c_proj",
    mixer_norm="ln_1",
    mlp_norm="ln_2",
    up="c_fc",
    down="c_proj",
    final_norm="ln_f",
)


def plan(config: Config, context: int) -> DecoderPlan:
    """Biases everywhere but in the head, which is the embedding."""
    layers = tuple(
        LayerPlan(
            mixer=attention(
                config, context, i, rope=None, fused_qkv=True, bias=True, out_bias=True
            ),
            mlp=mlp(config, gated=False, bias=True),
        )
        for i in range(config["num_hidden_layers"])
    )
    return DecoderPlan(
        layers=layers, names=_NAMES, norm="layer", norm_bias=True,
        **base(config, context, norm_eps=config["layer_norm_epsilon"], tied=True),
    )  # fmt: skip
