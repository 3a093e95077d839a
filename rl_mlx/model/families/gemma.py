"""Gemma 1, 2 and 3 (text)."""

from __future__ import annotations

import math
from typing import Any

from rl_mlx.model.families.common import Config, attention, base, mlp
from rl_mlx.model.plan import DecoderPlan, LayerPlan, Names
from rl_mlx.model.rope import rope_plan

_NAMES = Names(
    mixer_post_norm="post_attention_layernorm",
    mlp_norm="pre_feedforward_layernorm",
    mlp_post_norm="post_feedforward_layernorm",
)


def _layer_types(config: Config, period: int) -> list[str]:
    """Every ``period``-th layer sees all; the others see a window."""
    return list(
        config.get("layer_types")
        or [
            "full_attention" if (i + 1) % period == 0 else "sliding_attention"
            for i in range(config["num_hidden_layers"])
        ]
    )


def _decoder(
    config: Config, context: int, layers: tuple[LayerPlan, ...], names: Names = _NAMES
) -> DecoderPlan:
    tied = bool(config.get("tie_word_embeddings", True))
    return DecoderPlan(
        layers=layers,
        names=names,
        norm_offset=1.0,
        embed_scale=config["hidden_size"] ** 0.5,
        logit_softcap=config.get("final_logit_softcapping"),
        **base(config, context, tied=tied),
    )


def _scale(config: Config) -> float:
    return 1 / math.sqrt(config.get("query_pre_attn_scalar") or 256)


def plan_gemma(config: Config, context: int) -> DecoderPlan:
    """Llama with GELU (whichever form a config names), wide heads, and scaled embeddings."""
    layers = tuple(
        LayerPlan(mixer=attention(config, context, i), mlp=mlp(config, activation="gelu_tanh"))
        for i in range(config["num_hidden_layers"])
    )
    return _decoder(config, context, layers, Names())


def plan_gemma2(config: Config, context: int) -> DecoderPlan:
    """Soft caps on scores and logits; every other layer sees a window."""
    typed: dict[str, Any] = {**config, "layer_types": _layer_types(config, 2)}
    layers = tuple(
        LayerPlan(
            mixer=attention(
                typed, context, i,
                scale=_scale(config), softcap=config.get("attn_logit_softcapping"),
            ),
            mlp=mlp(config),
        )
        for i in range(config["num_hidden_layers"])
    )  # fmt: skip
    return _decoder(config, context, layers)


def plan_gemma3(config: Config, context: int) -> DecoderPlan:
    """Norms on queries and keys; one layer in six sees all, and the others have a rope base of
    their own.
    """
    period = config.get("sliding_window_pattern") or 6
    typed: dict[str, Any] = {**config, "layer_types": _layer_types(config, period)}
    nested = "sliding_attention" in (config.get("rope_parameters") or {})
    local = config if nested else {"rope_theta": config.get("rope_local_base_freq", 10000.0)}
    layers = []
    for i, kind in enumerate(typed["layer_types"]):
        source = local if kind == "sliding_attention" else config
        rope = rope_plan(source, config["head_dim"], context, kind)
        mixer = attention(
            typed, context, i, rope=rope, scale=_scale(config), qk_norm=True,
            softcap=config.get("attn_logit_softcapping"),
        )  # fmt: skip
        layers.append(LayerPlan(mixer=mixer, mlp=mlp(config)))
    return _decoder(config, context, tuple(layers))
