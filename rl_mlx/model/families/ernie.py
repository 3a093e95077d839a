"""ERNIE 4.5 (dense): Llama with pairs of neighbours rotated."""

from __future__ import annotations

from rl_mlx.model.families.common import Config, attention, base, mlp
from rl_mlx.model.plan import DecoderPlan, LayerPlan


def plan(config: Config, context: int) -> DecoderPlan:
    """``use_bias`` goes for every matrix but the head."""
    bias = bool(config.get("use_bias", False))
    layers = tuple(
        LayerPlan(
            mixer=attention(config, context, i, bias=bias, out_bias=bias, interleaved=True),
            mlp=mlp(config, bias=bias),
        )
        for i in range(config["num_hidden_layers"])
    )
    tied = bool(config.get("tie_word_embeddings", True))
    eps = float(config.get("rms_norm_eps", 1e-5))
    return DecoderPlan(layers=layers, **base(config, context, norm_eps=eps, tied=tied))
