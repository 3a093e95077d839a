"""DeepSeek V2 and V3, and those of their kind (Kimi K2, GLM 4.7 Flash): latent attention, many
small experts in groups.
"""

from __future__ import annotations

import math
from dataclasses import replace

from rl_mlx.model.families.common import Config, base, mlp
from rl_mlx.model.plan import DecoderPlan, LatentPlan, LayerPlan, MoEPlan, Names, RouterPlan
from rl_mlx.model.rope import rope_parameters, rope_plan

CORRECTION = "gate.e_score_correction_bias"


def plan_v2(config: Config, context: int) -> DecoderPlan:
    """Experts by a softmax, out of the best groups where ``topk_method`` says so."""
    grouped = config.get("topk_method") == "group_limited_greedy"
    router = RouterPlan(
        experts=config["n_routed_experts"],
        active=config["num_experts_per_tok"],
        normalize=False,
        scale=float(config.get("routed_scaling_factor", 1.0)),
        groups=config["n_group"] if grouped else 1,
        active_groups=config["topk_group"] if grouped else 1,
    )
    return _decoder(config, context, router)


def plan_v3(config: Config, context: int) -> DecoderPlan:
    """Experts by sigmoids, chosen with a correction."""
    return _decoder(config, context, sigmoid_router(config))


def sigmoid_router(config: Config) -> RouterPlan:
    """DeepSeek V3's choice of experts, which others have taken over."""
    return RouterPlan(
        experts=config["n_routed_experts"],
        active=config["num_experts_per_tok"],
        score="sigmoid",
        normalize=bool(config.get("norm_topk_prob", True)),
        scale=float(config.get("routed_scaling_factor", 1.0)),
        correction=CORRECTION,
        groups=config.get("n_group") or 1,
        active_groups=config.get("topk_group") or 1,
        group_best=2,
    )


def mixture(config: Config, router: RouterPlan) -> MoEPlan:
    """Experts, and shared ones that are one of their widths together."""
    inner, shared = config["moe_intermediate_size"], config.get("n_shared_experts")
    return MoEPlan(router=router, inner=inner, shared=inner * shared if shared else None)


def _decoder(config: Config, context: int, router: RouterPlan) -> DecoderPlan:
    moe, attention = mixture(config, router), _attention(config, context)
    dense = config.get("first_k_dense_replace") or 0
    layers = tuple(
        LayerPlan(mixer=attention, mlp=mlp(config) if i < dense else moe)
        for i in range(config["num_hidden_layers"])
    )
    return DecoderPlan(layers=layers, names=Names(shared="shared_experts"), **base(config, context))


def _attention(config: Config, context: int) -> LatentPlan:
    nope, turned = config["qk_nope_head_dim"], config["qk_rope_head_dim"]
    p = rope_parameters(config)
    scale = (nope + turned) ** -0.5
    stretch = p.get("mscale_all_dim") if p["rope_type"] == "yarn" else None
    if stretch and p["factor"] > 1:  # YaRN's magnitude, on scores instead of keys and queries
        scale *= (0.1 * stretch * math.log(p["factor"]) + 1) ** 2
    rope = rope_plan(config, turned, context)
    return LatentPlan(
        heads=config["num_attention_heads"],
        latent=config["kv_lora_rank"],
        query_latent=config.get("q_lora_rank"),
        nope_dim=nope,
        value_dim=config["v_head_dim"],
        scale=scale,
        rope=replace(rope, dims=turned, interleaved=bool(config.get("rope_interleave", True))),
        bias=bool(config.get("attention_bias", False)),
    )
