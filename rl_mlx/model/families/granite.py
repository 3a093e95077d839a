"""Granite 3 and MiniCPM: Llama with multipliers on embeddings, scores, branches and logits."""

from __future__ import annotations

import math
from typing import Any

from rl_mlx.model.families.common import Config, attention, base, mlp
from rl_mlx.model.plan import DecoderPlan, LayerPlan, MoEPlan, Names, RouterPlan


def plan(config: Config, context: int) -> DecoderPlan:
    """``logits_scaling`` divides, the other three multiply."""
    bias = bool(config.get("attention_bias", False))
    scale = float(config.get("attention_multiplier", 1.0))
    layers = tuple(
        LayerPlan(
            mixer=attention(config, context, i, scale=scale, bias=bias, out_bias=bias),
            mlp=mlp(config, bias=bool(config.get("mlp_bias", False))),
        )
        for i in range(config["num_hidden_layers"])
    )
    return DecoderPlan(layers=layers, **multipliers(config), **base(config, context))


def plan_moe(config: Config, context: int) -> DecoderPlan:
    """Granite 3 with experts in every layer."""
    bias = bool(config.get("attention_bias", False))
    scale = float(config.get("attention_multiplier", 1.0))
    router = RouterPlan(experts=config["num_local_experts"], active=config["num_experts_per_tok"])
    moe = MoEPlan(router=router, inner=config["intermediate_size"])
    layers = tuple(
        LayerPlan(
            mixer=attention(config, context, i, scale=scale, bias=bias, out_bias=bias), mlp=moe
        )
        for i in range(config["num_hidden_layers"])
    )
    names = Names(mlp="block_sparse_moe", router="router.layer")
    return DecoderPlan(layers=layers, names=names, **multipliers(config), **base(config, context))


def plan_minicpm(config: Config, context: int) -> DecoderPlan:
    """MiniCPM 1 and 2, and MiniCPM 4's dense attention: the same under other words."""
    count = config["num_hidden_layers"]
    layers = tuple(
        LayerPlan(mixer=attention(config, context, i), mlp=mlp(config)) for i in range(count)
    )
    return DecoderPlan(
        layers=layers,
        embed_scale=config["scale_emb"],
        residual_scale=config["scale_depth"] / math.sqrt(count),
        logit_scale=config["dim_model_base"] / config["hidden_size"],
        **base(config, context),
    )


def multipliers(config: Config) -> dict[str, Any]:
    """What Granite's decoders of all kinds multiply by, as fields of ``DecoderPlan``."""
    return {
        "embed_scale": float(config.get("embedding_multiplier", 1.0)),
        "residual_scale": float(config.get("residual_multiplier", 1.0)),
        "logit_scale": 1 / float(config.get("logits_scaling", 1.0)),
    }
