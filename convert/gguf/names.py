"""Tensor names of GGUF and the canonical ones, one to one, family by family."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from types import MappingProxyType

from rl_mlx.convert.families import FAMILIES
from rl_mlx.convert.families.words import ATTENTION, DENSE, PRE_NORMS, expert_names

_TOP: Mapping[str, str] = MappingProxyType(
    {
        "model.embed_tokens": "token_embd",
        "model.norm": "output_norm",
        "backbone.embeddings": "token_embd",
        "backbone.norm_f": "output_norm",
        "model.embedding_norm": "token_embd_norm",
        "model.final_layernorm": "output_norm",
        "model.wte": "token_embd",
        "model.wpe": "position_embd",
        "model.ln_f": "output_norm",
        "lm_head": "output",
        "rope_freqs": "rope_freqs",
    }
)
_ATTENTION = ATTENTION | {"self_attn.sinks": "attn_sinks.weight"}
_LLAMA = PRE_NORMS | _ATTENTION | DENSE
_GEMMA = {
    **_ATTENTION,
    **DENSE,
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
_LFM2 = {
    "operator_norm": "attn_norm",
    "ffn_norm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.out_proj": "attn_output",
    "self_attn.q_layernorm": "attn_q_norm",
    "self_attn.k_layernorm": "attn_k_norm",
    "conv.conv": "shortconv.conv",
    "conv.in_proj": "shortconv.in_proj",
    "conv.out_proj": "shortconv.out_proj",
    "feed_forward.w1": "ffn_gate",
    "feed_forward.w3": "ffn_up",
    "feed_forward.w2": "ffn_down",
}
_PHI3 = {
    **PRE_NORMS,
    "self_attn.qkv_proj": "attn_qkv",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_GPT_OSS = {
    **_ATTENTION,
    **expert_names("mlp.experts", "mlp.router"),
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "post_attention_norm",
}
_BLOCKS: Mapping[str, Mapping[str, str]] = MappingProxyType(
    {
        "llama": _LLAMA,
        "mistral": _LLAMA,
        "ministral3": _LLAMA,
        "mixtral": _LLAMA | expert_names("block_sparse_moe.switch_mlp", "block_sparse_moe.gate"),
        "qwen2": _LLAMA,
        "qwen3": _LLAMA,
        "qwen3_moe": _LLAMA | expert_names("mlp.switch_mlp", "mlp.gate"),
        "gemma2": _GEMMA,
        "gemma3_text": _GEMMA,
        "phi3": _PHI3,
        "gpt_oss": _GPT_OSS,
        "lfm2": _LFM2,
    }
)
_BLOCK = re.compile(r"(?:model|backbone)\.(?:layers|h)\.(\d+)\.(.+)", re.DOTALL)


def gguf_name(model_type: str, name: str) -> str:
    """The GGUF name of the tensor with the canonical ``name``; ``KeyError`` where there is none."""
    module, dot, kind = name.rpartition(".")
    if kind not in {"weight", "bias"}:  # a bare parameter, whose name is whole there
        module, dot, kind = name, "", ""
    match = _BLOCK.fullmatch(module)
    if match is None:
        return f"{_TOP[module]}{dot}{kind}"
    family = FAMILIES.get(model_type)
    names = family.names if family else _BLOCKS[model_type]
    if f"{match[2]}{dot}{kind}" in names:  # one that has no suffix there
        return f"blk.{match[1]}.{names[f'{match[2]}{dot}{kind}']}"
    return f"blk.{match[1]}.{names[match[2]]}{dot}{kind}"


def gguf_names(
    model_type: str, names: Iterable[str], present: Mapping[str, object]
) -> dict[str, str]:
    """Canonical name -> GGUF name, of all ``names``, in a file of the tensors ``present``."""
    found = {name: gguf_name(model_type, name) for name in names}
    final = found.get("model.embedding_norm.weight")
    if final is not None and final not in present:  # what LFM2's files have called it since
        found["model.embedding_norm.weight"] = "output_norm.weight"
    return found
