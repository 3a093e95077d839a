"""Names of GGUF are gguf-py's."""

from __future__ import annotations

import gguf
import pytest

from rl_mlx.convert.gguf.names import gguf_name

# family -> GGUF architecture and a module that only it or few have, with its GGUF name
FAMILIES = {
    "llama": ("LLAMA", "mlp.gate_proj", "ffn_gate"),
    "mixtral": ("LLAMA", "block_sparse_moe.switch_mlp.down_proj", "ffn_down_exps"),
    "qwen2": ("QWEN2", "self_attn.q_proj", "attn_q"),
    "qwen3": ("QWEN3", "self_attn.q_norm", "attn_q_norm"),
    "qwen3_moe": ("QWEN3MOE", "mlp.gate", "ffn_gate_inp"),
    "gemma2": ("GEMMA2", "post_feedforward_layernorm", "post_ffw_norm"),
    "gemma3_text": ("GEMMA3", "pre_feedforward_layernorm", "ffn_norm"),
    "phi3": ("PHI3", "mlp.gate_up_proj", "ffn_up"),
    "gpt_oss": ("GPT_OSS", "post_attention_layernorm", "post_attention_norm"),
    "lfm2": ("LFM2", "conv.in_proj", "shortconv.in_proj"),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_names_are_known_to_gguf_py(family):
    arch, module, stem = FAMILIES[family]
    name = gguf_name(family, f"model.layers.7.{module}.weight")
    assert name == f"blk.7.{stem}.weight"
    known = {gguf.TENSOR_NAMES[t] for t in gguf.MODEL_TENSORS[gguf.MODEL_ARCH[arch]]}
    assert f"blk.{{bid}}.{stem}" in known


def test_top_level_and_bare_names():
    assert gguf_name("llama", "model.embed_tokens.weight") == "token_embd.weight"
    assert gguf_name("llama", "lm_head.weight") == "output.weight"
    assert gguf_name("gpt_oss", "model.layers.3.self_attn.sinks") == "blk.3.attn_sinks.weight"
    assert gguf_name("qwen2", "model.layers.3.self_attn.q_proj.bias") == "blk.3.attn_q.bias"
    with pytest.raises(KeyError):
        gguf_name("llama", "model.layers.3.self_attn.q_norm_of_another.weight")
