"""LFM2: gated short convolutions with attention between them."""

from __future__ import annotations

from rl_mlx.model.families.common import Config, attention, base, layer_type
from rl_mlx.model.plan import ConvPlan, DecoderPlan, LayerPlan, MLPPlan, Names

_NAMES = Names(
    out="out_proj",
    q_norm="q_layernorm",
    k_norm="k_layernorm",
    mixer_norm="operator_norm",
    mlp="feed_forward",
    mlp_norm="ffn_norm",
    gate="w1",
    up="w3",
    down="w2",
    final_norm="embedding_norm",
)


def plan(config: Config, context: int) -> DecoderPlan:
    """Attention where ``layer_types`` or ``full_attn_idxs`` says so, convolution elsewhere."""
    count = config["num_hidden_layers"]
    named = config.get("full_attn_idxs")
    full = (
        set(named)
        if named is not None
        else {i for i in range(count) if layer_type(config, i) == "full_attention"}
    )
    feed = MLPPlan(inner=_inner(config))
    conv = ConvPlan(taps=config["conv_L_cache"], bias=bool(config.get("conv_bias", False)))
    typed = {**config, "layer_types": None}
    layers = tuple(
        LayerPlan(mixer=attention(typed, context, i, qk_norm=True) if i in full else conv, mlp=feed)
        for i in range(count)
    )
    tied = bool(config.get("tie_word_embeddings", config.get("tie_embedding", True)))
    eps = float(config.get("norm_eps", 1e-5))
    return DecoderPlan(
        layers=layers, names=_NAMES, **base(config, context, tied=tied, norm_eps=eps)
    )


def _inner(config: Config) -> int:
    """The width of the feed-forward layer, which older configs give before an adjustment."""
    inner = int(config.get("block_ff_dim") or config["intermediate_size"])
    if not config.get("block_auto_adjust_ff_dim", True):
        return inner
    inner = int((config.get("block_ffn_dim_multiplier") or 1.0) * int(2 * inner / 3))
    multiple = int(config.get("block_multiple_of", 256))
    return multiple * ((inner + multiple - 1) // multiple)
