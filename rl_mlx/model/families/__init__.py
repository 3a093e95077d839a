"""The families of decoders: each module's ``plan(config, context)`` reads a Hugging Face style
config.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from rl_mlx.model.families import gemma, gpt_oss, lfm2, llama, mixtral, phi3, qwen
from rl_mlx.model.plan import DecoderPlan

Planner = Callable[[Mapping[str, Any], int], DecoderPlan]

FAMILIES: Mapping[str, Planner] = MappingProxyType(
    {
        "llama": llama.plan,
        "mistral": llama.plan,
        "ministral": llama.plan,
        "mixtral": mixtral.plan,
        "qwen2": qwen.plan_qwen2,
        "qwen3": qwen.plan_qwen3,
        "qwen3_moe": qwen.plan_qwen3_moe,
        "gemma2": gemma.plan_gemma2,
        "gemma3_text": gemma.plan_gemma3,
        "phi3": phi3.plan,
        "gpt_oss": gpt_oss.plan,
        "lfm2": lfm2.plan,
    }
)
