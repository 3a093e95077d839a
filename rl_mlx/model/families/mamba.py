"""Decoders with Mamba: by itself, between attention (Granite 4), beside it (Falcon-H1)."""

from __future__ import annotations

from typing import Any

from rl_mlx.errors import UnsupportedModel
from rl_mlx.model.families.common import Config, attention, base, layer_type, mlp
from rl_mlx.model.families.granite import multipliers
from rl_mlx.model.plan import (
    BothPlan,
    DecoderPlan,
    LayerPlan,
    MambaPlan,
    MLPPlan,
    MoEPlan,
    Names,
    RouterPlan,
    SelectivePlan,
)


def plan_mamba2(config: Config, context: int) -> DecoderPlan:
    """Nothing but Mamba."""
    mixer = MambaPlan(
        heads=config["num_heads"],
        head_dim=config["head_dim"],
        groups=config["n_groups"],
        state=config["state_size"],
        taps=config["conv_kernel"],
        bias=bool(config.get("use_bias", False)),
        kernel_bias=bool(config.get("use_conv_bias", True)),
        step_limit=_limit(config),
    )
    return _nothing_else(config, context, mixer)


def plan_mamba(config: Config, context: int) -> DecoderPlan:
    """The first Mamba, and Falcon's, which norms what selects."""
    normed = config["model_type"] == "falcon_mamba"
    mixer = SelectivePlan(
        inner=config["intermediate_size"],
        state=config["state_size"],
        step_rank=config["time_step_rank"],
        taps=config["conv_kernel"],
        bias=bool(config.get("use_bias", False)),
        kernel_bias=bool(config.get("use_conv_bias", True)),
        inner_norm=float(config.get("mixer_rms_eps", 1e-6)) if normed else None,
    )
    return _nothing_else(config, context, mixer)


def _nothing_else(config: Config, context: int, mixer: MambaPlan | SelectivePlan) -> DecoderPlan:
    names = Names(
        root="backbone",
        mamba="mixer",
        mixer_norm="norm",
        mlp_norm=None,
        embedding="embeddings",
        final_norm="norm_f",
    )
    layers = (LayerPlan(mixer=mixer, mlp=None),) * config["num_hidden_layers"]
    eps = float(config.get("layer_norm_epsilon", 1e-5))
    return DecoderPlan(layers=layers, names=names, **base(config, context, norm_eps=eps))


def plan_falcon_h1(config: Config, context: int) -> DecoderPlan:
    """Attention and Mamba of one input; the config's multipliers are in the weights."""
    normed = bool(config.get("mamba_rms_norm", False))
    if normed and config.get("mamba_norm_before_gate", True):
        raise UnsupportedModel("a Falcon-H1 that norms before its gate is not supported")
    mamba = _mamba(config, norm=normed)
    bias = bool(config.get("attention_bias", False))
    feed = mlp(config, bias=bool(config.get("mlp_bias", False)))
    plain = {**config, "layer_types": None}
    layers = tuple(
        LayerPlan(
            mixer=BothPlan(
                attention=attention(plain, context, i, bias=bias, out_bias=bias), mamba=mamba
            ),
            mlp=feed,
        )
        for i in range(config["num_hidden_layers"])
    )
    names = Names(mlp="feed_forward", mlp_norm="pre_ff_layernorm", final_norm="final_layernorm")
    return DecoderPlan(layers=layers, names=names, **base(config, context))


def plan_granite(config: Config, context: int) -> DecoderPlan:
    """Granite 4: Mamba in most layers, attention without positions in some, experts beside a
    shared one, or that one alone.
    """
    bias = bool(config.get("attention_bias", False))
    more: dict[str, Any] = {"scale": float(config.get("attention_multiplier", 1.0)), "bias": bias}
    if config.get("position_embedding_type") != "rope":
        more["rope"] = None
    mamba, feed = _mamba(config, norm=True), _granite_feed(config)
    plain = {**config, "layer_types": None}
    layers = tuple(
        LayerPlan(
            mixer=mamba
            if layer_type(config, i) in {"mamba", "linear_attention"}
            else attention(plain, context, i, out_bias=bias, **more),
            mlp=feed,
        )
        for i in range(config["num_hidden_layers"])
    )
    names = Names(mlp="block_sparse_moe", router="router.layer", shared="shared_mlp")
    if isinstance(feed, MLPPlan):
        names = Names(mlp="shared_mlp")
    return DecoderPlan(layers=layers, names=names, **multipliers(config), **base(config, context))


def _granite_feed(config: Config) -> MLPPlan | MoEPlan:
    shared = config["shared_intermediate_size"]
    if not config.get("num_local_experts"):
        return MLPPlan(inner=shared)
    router = RouterPlan(experts=config["num_local_experts"], active=config["num_experts_per_tok"])
    return MoEPlan(router=router, inner=config["intermediate_size"], shared=shared)


def _mamba(config: Config, *, norm: bool) -> MambaPlan:
    heads = config["mamba_n_heads"]
    inner = config.get("mamba_d_ssm") or config["mamba_expand"] * config["hidden_size"]
    return MambaPlan(
        heads=heads,
        head_dim=inner // heads,
        groups=config["mamba_n_groups"],
        state=config["mamba_d_state"],
        taps=config["mamba_d_conv"],
        norm=norm,
        bias=bool(config.get("mamba_proj_bias", False)),
        kernel_bias=bool(config.get("mamba_conv_bias", True)),
        step_limit=_limit(config),
    )


def _limit(config: Config) -> tuple[float, float]:
    low, high = config.get("time_step_limit") or (0.0, float("inf"))
    return float(low), float(high)
