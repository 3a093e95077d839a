"""The families of decoders: each module's ``plan(config, context)`` reads a Hugging Face style
config.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from rl_mlx.model.families import (
    cohere,
    deepseek,
    ernie,
    exaone,
    gemma,
    glm,
    gpt2,
    gpt_oss,
    granite,
    lfm2,
    llama,
    llama4,
    mamba,
    mixtral,
    nemotron,
    olmo,
    phi,
    phi3,
    qwen,
    qwen_next,
    smollm3,
    stablelm,
    starcoder2,
)
from rl_mlx.model.plan import DecoderPlan

Planner = Callable[[Mapping[str, Any], int], DecoderPlan]

FAMILIES: Mapping[str, Planner] = MappingProxyType(
    {
        "llama": llama.plan,
        "mistral": llama.plan,
        "ministral": llama.plan,
        "ministral3": llama.plan_ministral3,
        "mixtral": mixtral.plan,
        "qwen2": qwen.plan_qwen2,
        "qwen2_moe": qwen.plan_qwen2_moe,
        "qwen3": qwen.plan_qwen3,
        "qwen3_moe": qwen.plan_qwen3_moe,
        "qwen3_next": qwen_next.plan,
        "qwen3_5_text": qwen_next.plan,
        "qwen3_5_moe_text": qwen_next.plan,
        "mamba": mamba.plan_mamba,
        "falcon_mamba": mamba.plan_mamba,
        "mamba2": mamba.plan_mamba2,
        "falcon_h1": mamba.plan_falcon_h1,
        "granitemoehybrid": mamba.plan_granite,
        "llama4_text": llama4.plan,
        "gemma": gemma.plan_gemma,
        "gemma2": gemma.plan_gemma2,
        "gemma3_text": gemma.plan_gemma3,
        "phi3": phi3.plan,
        "gpt_oss": gpt_oss.plan,
        "lfm2": lfm2.plan,
        "deepseek_v2": deepseek.plan_v2,
        "deepseek_v3": deepseek.plan_v3,
        "kimi_k2": deepseek.plan_v3,
        "glm4_moe_lite": deepseek.plan_v3,
        "glm4_moe": glm.plan_moe,
        "ernie4_5_moe": ernie.plan_moe,
        "granitemoe": granite.plan_moe,
        "arcee": llama.plan_arcee,
        "cohere": cohere.plan_cohere,
        "cohere2": cohere.plan_cohere2,
        "ernie4_5": ernie.plan,
        "exaone4": exaone.plan,
        "glm4": glm.plan,
        "gpt2": gpt2.plan,
        "granite": granite.plan,
        "minicpm": granite.plan_minicpm,
        "nemotron": nemotron.plan,
        "olmo2": olmo.plan,
        "olmo3": olmo.plan,
        "phi": phi.plan,
        "seed_oss": llama.plan_seed_oss,
        "smollm3": smollm3.plan,
        "stablelm": stablelm.plan,
        "starcoder2": starcoder2.plan,
    }
)
