"""Mixtral: Mistral with a mixture of experts."""

from __future__ import annotations

from rl_mlx.model.families.common import Config, attention, base
from rl_mlx.model.plan import DecoderPlan, LayerPlan, MoEPlan, Names, RouterPlan


def plan(config: Config, context: int) -> DecoderPlan:
    """Each token goes to ``num_experts_per_tok`` of ``num_local_experts``, weighted by a softmax
    over those.
    """
    moe = MoEPlan(
        router=RouterPlan(
            experts=config["num_local_experts"], active=config["num_experts_per_tok"]
        ),
        inner=config["intermediate_size"],
    )
    layers = tuple(
        LayerPlan(mixer=attention(config, context, i), mlp=moe)
        for i in range(config["num_hidden_layers"])
    )
    return DecoderPlan(layers=layers, names=Names(mlp="block_sparse_moe"), **base(config, context))
