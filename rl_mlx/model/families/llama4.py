"""Llama 4 (text): pieces of the text in three layers of four, no positions in the others, experts
whose inputs are weighed.
"""

from __future__ import annotations

from typing import Any

from rl_mlx.convert.families.llama4 import is_sparse, rotates
from rl_mlx.model.families.common import Config, attention, base, mlp
from rl_mlx.model.plan import AttentionPlan, DecoderPlan, LayerPlan, MoEPlan, Names, RouterPlan


def plan(config: Config, context: int) -> DecoderPlan:
    """Experts in every ``interleave_moe_layer_step``-th layer, a shared one beside them."""
    inner = config["intermediate_size"]
    router = RouterPlan(
        experts=config["num_local_experts"],
        active=config["num_experts_per_tok"],
        score="sigmoid",
        normalize=False,
    )
    moe = MoEPlan(router=router, inner=inner, shared=inner, weigh_inputs=True)
    dense = mlp(config, inner=config["intermediate_size_mlp"])
    layers = tuple(
        LayerPlan(mixer=_attention(config, context, i), mlp=moe if is_sparse(config, i) else dense)
        for i in range(config["num_hidden_layers"])
    )
    names = Names(mlp="feed_forward", router="router", experts="experts")
    eps = float(config.get("rms_norm_eps", 1e-5))
    return DecoderPlan(layers=layers, names=names, **base(config, context, norm_eps=eps))


def _attention(config: Config, context: int, layer: int) -> AttentionPlan:
    bias = bool(config.get("attention_bias", False))
    more: dict[str, Any] = {"bias": bias, "out_bias": bias}
    if rotates(config, layer):
        normed = bool(config.get("use_qk_norm", True))
        more |= {"qk_norm": normed, "qk_norm_of": "rotated", "interleaved": True}
    else:
        more["rope"] = None
        if config.get("attn_temperature_tuning", True):
            span, rate = config.get("floor_scale", 8192), config.get("attn_scale", 0.1)
            more["temperature"] = float(span), float(rate), 1
    types = config.get("layer_types")
    chunked = types[layer] == "chunked_attention" if types else rotates(config, layer)
    size = config.get("attention_chunk_size") if chunked else None
    plain = {**config, "layer_types": None}
    return attention(plain, context, layer, window=size, chunked=bool(size), **more)
