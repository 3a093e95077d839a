"""StableLM 1 and 2: LayerNorms, a part of each head rotated; the 12B norms each head by its own."""

from __future__ import annotations

from rl_mlx.model.families.common import Config, attention, base, mlp
from rl_mlx.model.plan import DecoderPlan, LayerPlan, Names


def plan(config: Config, context: int) -> DecoderPlan:
    """Llama's shape; with ``use_parallel_residual`` both branches start from one norm."""
    parallel = bool(config.get("use_parallel_residual", False))
    layers = tuple(
        LayerPlan(
            mixer=attention(
                config, context, i,
                bias=bool(config.get("use_qkv_bias", False)),
                qk_norm=bool(config.get("qk_layernorm", False)), qk_norm_of="own",
            ),
            mlp=mlp(config),
        )
        for i in range(config["num_hidden_layers"])
    )  # fmt: skip
    names = Names(
        q_norm="q_layernorm",
        k_norm="k_layernorm",
        mlp_norm=None if parallel else "post_attention_layernorm",
    )
    return DecoderPlan(
        layers=layers, names=names, norm="layer", norm_bias=True, parallel=parallel,
        **base(config, context, norm_eps=config["layer_norm_eps"]),
    )  # fmt: skip
