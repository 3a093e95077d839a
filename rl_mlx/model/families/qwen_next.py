"""Qwen3-Next and Qwen 3.5: gated delta nets, and gated attention in every fourth layer."""

from __future__ import annotations

from rl_mlx.model.families.common import Config, attention, base, layer_type, mlp
from rl_mlx.model.families.qwen import mixture, sparse
from rl_mlx.model.plan import AttentionPlan, DecoderPlan, DeltaPlan, LayerPlan


def plan(config: Config, context: int) -> DecoderPlan:
    """With experts where the config has some, and one that answers for every token beside them."""
    count = config["num_hidden_layers"]
    if config.get("num_experts"):
        shared = config["shared_expert_intermediate_size"]
        moe = mixture({"norm_topk_prob": True, **config}, shared=shared, shared_gate=True)
        feeds = sparse(config, moe)
    else:
        feeds = [mlp(config)] * count
    layers = tuple(
        LayerPlan(mixer=_mixer(config, context, i), mlp=feed) for i, feed in enumerate(feeds)
    )
    return DecoderPlan(layers=layers, **base(config, context))


def _mixer(config: Config, context: int, layer: int) -> AttentionPlan | DeltaPlan:
    if layer_type(config, layer) == "full_attention":
        bias = bool(config.get("attention_bias", False))
        partial = {"partial_rotary_factor": 0.25, **config}
        return attention(
            partial, context, layer, gated=True, qk_norm=True, bias=bias, out_bias=bias
        )
    return DeltaPlan(
        key_heads=config["linear_num_key_heads"],
        value_heads=config["linear_num_value_heads"],
        key_dim=config["linear_key_head_dim"],
        value_dim=config["linear_value_head_dim"],
        taps=config["linear_conv_kernel_dim"],
    )
