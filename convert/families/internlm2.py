"""InternLM 2 and 2.5: Llama under other names, with queries, keys and values in one matrix.

A folder of theirs is read as the Llama that it is.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from rl_mlx.convert.lazy import Array, Arrays, Lazy

MODEL_TYPE = "internlm2"
_NAMES: Mapping[str, str] = MappingProxyType({
    "model.tok_embeddings": "model.embed_tokens",
    "output": "lm_head",
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attention.wo": "self_attn.o_proj",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w3": "mlp.up_proj",
    "feed_forward.w2": "mlp.down_proj",
})  # fmt: skip
_TENSOR = re.compile(r"(model\.layers\.\d+\.)?(.+)\.(weight|bias|scales|biases)")


def as_llama(config: Mapping[str, Any], arrays: Arrays) -> tuple[dict[str, Any], Arrays]:
    """The config and tensors of an InternLM 2 folder as a Llama's."""
    said = {key: value for key, value in config.items() if key not in {"auto_map", "bias"}}
    said |= {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": bool(config.get("bias", True)),
    }
    found: Arrays = {}
    for name, array in arrays.items():
        match = _TENSOR.fullmatch(name)
        layer, module, kind = match.groups() if match else (None, name, None)
        if module == "attention.wqkv":
            for part, rows in zip("qkv", _split(config, array), strict=True):
                found[f"{layer}self_attn.{part}_proj.{kind}"] = rows
        elif module in _NAMES:
            found[f"{layer or ''}{_NAMES[module]}.{kind}"] = array
        else:
            found[name] = array
    return said, found


def _split(config: Mapping[str, Any], fused: Lazy) -> tuple[Lazy, Lazy, Lazy]:
    """Each head of keys lies behind the heads of queries that it answers, and before its values."""
    heads = config["num_attention_heads"]
    groups = config.get("num_key_value_heads") or heads
    count, rest = heads // groups, fused.shape[1:]
    dim = fused.shape[0] // (heads + 2 * groups)

    def part(start: int, stop: int) -> Lazy:
        def view(array: Array) -> Array:
            return array.reshape(groups, count + 2, dim, *rest)[:, start:stop].reshape(-1, *rest)

        return fused.seen((groups * (stop - start) * dim, *rest), view)

    return part(0, count), part(count, count + 1), part(count + 1, count + 2)
