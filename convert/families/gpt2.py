"""GPT-2: learned positions, LayerNorms, one matrix for queries, keys and values."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from rl_mlx.convert.families.words import read_dense
from rl_mlx.convert.family import LAYER_NORM, Family
from rl_mlx.convert.gguf.keys import Keys
from rl_mlx.convert.lazy import Arrays
from rl_mlx.convert.shapes import Config, Shapes, Sizes, linear, norms

_MATRICES = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
_MASKS = (".attn.bias", ".attn.masked_bias")
_WORDS = {
    "hidden_size": "n_embd",
    "num_hidden_layers": "n_layer",
    "num_attention_heads": "n_head",
    "max_position_embeddings": "n_positions",
}


def _complete(config: Config) -> Mapping[str, Any]:
    """Sizes under GPT-2's words and everybody's."""
    found = {
        word: config.get(usual, config.get(own))
        for usual, own in _WORDS.items()
        for word in (usual, own)
    }
    inner = config.get("intermediate_size") or config.get("n_inner") or 4 * found["n_embd"]
    return {**found, "n_ctx": found["n_positions"], "intermediate_size": inner}


def _outer(config: Config) -> Shapes:
    s, positions = Sizes.of(config), config["max_position_embeddings"]
    return (
        linear("model.wte", s.vocab, s.hidden)
        | linear("model.wpe", positions, s.hidden)
        | norms(s.hidden, "model.ln_f", bias=True)
    )


def _block(config: Config, _layer: int) -> Shapes:
    s = Sizes.of(config)
    return (
        norms(s.hidden, "ln_1", "ln_2", bias=True)
        | linear("attn.c_attn", 3 * s.hidden, s.hidden, bias=True)
        | linear("attn.c_proj", s.hidden, s.hidden, bias=True)
        | linear("mlp.c_fc", s.inner, s.hidden, bias=True)
        | linear("mlp.c_proj", s.hidden, s.inner, bias=True)
    )


def _sanitize(config: Config, arrays: Arrays) -> Arrays:
    """Matrices as rows of outputs: transformers keeps them the other way round."""
    found = {
        name.replace("model.transformer.", "model."): array
        for name, array in arrays.items()
        if not name.endswith(_MASKS)
    }
    fused = found.get("model.h.0.attn.c_attn.weight")
    if fused is None or fused.shape[0] != config["hidden_size"]:
        return found
    return {n: a.transposed() if n.endswith(_MATRICES) else a for n, a in found.items()}


def _read(keys: Keys) -> dict[str, Any]:
    return {**read_dense(keys), "hidden_act": "gelu_new", "tie_word_embeddings": True}


FAMILIES: Mapping[str, Family] = MappingProxyType({
    "gpt2": Family(
        architecture="gpt2",
        class_name="GPT2LMHeadModel",
        block=_block,
        names=MappingProxyType({
            "ln_1": "attn_norm",
            "ln_2": "ffn_norm",
            "attn.c_attn": "attn_qkv",
            "attn.c_proj": "attn_output",
            "mlp.c_fc": "ffn_up",
            "mlp.c_proj": "ffn_down",
        }),
        read=_read,
        sanitize=_sanitize,
        outer=_outer,
        layers="model.h",
        epsilon=("layer_norm_epsilon", LAYER_NORM),
        complete=_complete,
        defaults=MappingProxyType({"layer_norm_epsilon": 1e-5, "tie_word_embeddings": True}),
    ),
})  # fmt: skip
