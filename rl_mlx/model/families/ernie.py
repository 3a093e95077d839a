"""ERNIE 4.5: Llama with pairs of neighbours rotated, dense or with experts."""

from __future__ import annotations

from rl_mlx.convert.families.mixtures import ernie_is_sparse
from rl_mlx.model.families.common import Config, attention, base, mlp
from rl_mlx.model.families.deepseek import CORRECTION
from rl_mlx.model.plan import DecoderPlan, LayerPlan, MoEPlan, Names, RouterPlan


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
    return DecoderPlan(layers=layers, **base(config, context, tied=tied))


def plan_moe(config: Config, context: int) -> DecoderPlan:
    """ERNIE 4.5 with experts, chosen by a softmax and a correction, from some layer on."""
    bias, inner = bool(config.get("use_bias", False)), config["moe_intermediate_size"]
    router = RouterPlan(
        experts=config["moe_num_experts"], active=config["moe_k"], correction=CORRECTION
    )
    shared = config.get("moe_num_shared_experts")
    moe = MoEPlan(router=router, inner=inner, shared=inner * shared if shared else None)
    layers = tuple(
        LayerPlan(
            mixer=attention(config, context, i, bias=bias, out_bias=bias, interleaved=True),
            mlp=moe if ernie_is_sparse(config, i) else mlp(config, bias=bias),
        )
        for i in range(config["num_hidden_layers"])
    )
    tied = bool(config.get("tie_word_embeddings", True))
    eps = float(config.get("rms_norm_eps", 1e-5))
    names = Names(shared="shared_experts")
    return DecoderPlan(layers=layers, names=names, **base(config, context, norm_eps=eps, tied=tied))
