"""Command R, R+ and R7B: both branches from one LayerNorm, pairs of neighbours rotated."""

from __future__ import annotations

from typing import Any

from rl_mlx.model.families.common import Config, attention, base, layer_type, mlp
from rl_mlx.model.plan import DecoderPlan, LayerPlan, Names


def plan_cohere(config: Config, context: int) -> DecoderPlan:
    """Command R+ norms each head's queries and keys by weights of its own."""
    norms = {"qk_norm": bool(config.get("use_qk_norm", False)), "qk_norm_of": "own"}
    return _decoder(config, context, [norms] * config["num_hidden_layers"])


def plan_cohere2(config: Config, context: int) -> DecoderPlan:
    """One layer in four sees all, and rotates nothing; the others see a window."""
    count = config["num_hidden_layers"]
    full = [layer_type(config, i) == "full_attention" for i in range(count)]
    return _decoder(config, context, [{"rope": None} if is_full else {} for is_full in full])


def _decoder(config: Config, context: int, mixers: list[dict[str, Any]]) -> DecoderPlan:
    bias = bool(config.get("attention_bias", False))
    layers = tuple(
        LayerPlan(
            mixer=attention(config, context, i, bias=bias, out_bias=bias, interleaved=True, **more),
            mlp=mlp(config),
        )
        for i, more in enumerate(mixers)
    )
    tied = bool(config.get("tie_word_embeddings", True))
    return DecoderPlan(
        layers=layers, names=Names(mlp_norm=None), norm="layer", parallel=True,
        logit_scale=float(config.get("logit_scale", 0.0625)),
        **base(config, context, norm_eps=config["layer_norm_eps"], tied=tied),
    )  # fmt: skip
