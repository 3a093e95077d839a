"""Llama with more or less: Gemma 1, Granite, MiniCPM, SmolLM 3, ERNIE 4.5, Seed-OSS, Arcee."""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from rl_mlx.convert.families.words import (
    ATTENTION,
    DENSE,
    PRE_NORMS,
    has_bias,
    read_dense,
    scales,
)
from rl_mlx.convert.family import Family
from rl_mlx.convert.gguf.changes import interleaved, norms_from_one
from rl_mlx.convert.gguf.keys import Keys
from rl_mlx.convert.gguf.writer import Fields
from rl_mlx.convert.shapes import Config, Shapes, Sizes, attention, linear, mlp, pre_norms, size
from rl_mlx.errors import UnsupportedModel

_NAMES = MappingProxyType({**PRE_NORMS, **ATTENTION, **DENSE})
_STILL = 4  # every so many layers one of SmolLM 3 rotates nothing; llama.cpp knows no other number


def _block(config: Config, _layer: int) -> Shapes:
    s, bias = Sizes.of(config), bool(config.get("attention_bias"))
    feed = mlp(s, bias=bool(config.get("mlp_bias")))
    return pre_norms(s) | attention(s, bias=bias, out_bias=bias) | feed


def _read(keys: Keys) -> dict[str, Any]:
    return {
        **read_dense(keys),
        "attention_bias": has_bias(keys, "attn_q"),
        "mlp_bias": has_bias(keys, "ffn_down"),
    }


def _read_gemma(keys: Keys) -> dict[str, Any]:
    return {**_read(keys), "hidden_act": "gelu_pytorch_tanh"}


def _read_granite(keys: Keys) -> dict[str, Any]:
    return {
        **_read(keys),
        "attention_multiplier": keys.number("attention.scale", keys.head_dim**-0.5),
        "embedding_multiplier": keys.number("embedding_scale", 1.0),
        "residual_multiplier": keys.number("residual_scale", 1.0),
        "logits_scaling": keys.divisor("logit_scale"),
    }


def _write_granite(config: Config) -> Fields:
    return scales(
        config,
        attention_multiplier="attention.scale",
        embedding_multiplier="embedding_scale",
        residual_multiplier="residual_scale",
        logits_scaling="logit_scale",
    )


def _no_rope_layers(count: int) -> list[int]:
    return [int((i + 1) % _STILL != 0) for i in range(count)]


def _read_smollm3(keys: Keys) -> dict[str, Any]:
    still = _no_rope_layers(keys.layers)
    return {**_read(keys), "no_rope_layers": still, "no_rope_layer_interval": _STILL}


def _write_smollm3(config: Config) -> Fields:
    usual = _no_rope_layers(config["num_hidden_layers"])
    if (config.get("no_rope_layers") or usual) != usual:
        raise UnsupportedModel(
            f"llama.cpp runs SmolLM3 only with rope off in every {_STILL}th layer"
        )
    return {}


def _read_minicpm(keys: Keys) -> dict[str, Any]:
    """The defaults are those of the first files, which say nothing."""
    root = math.sqrt(keys.layers)
    logits = keys.divisor("logit_scale", keys.hidden / 256)
    return {
        **read_dense(keys),
        "scale_emb": keys.number("embedding_scale", 12.0),
        "scale_depth": keys.number("residual_scale", 1.4 / root) * root,
        "dim_model_base": max(1, round(keys.hidden / logits)),
    }


def _write_minicpm(config: Config) -> Fields:
    return {
        "embedding_scale": float(config["scale_emb"]),
        "residual_scale": config["scale_depth"] / math.sqrt(config["num_hidden_layers"]),
        "logit_scale": config["hidden_size"] / size(config, "dim_model_base"),
    }


def _block_ernie(config: Config, _layer: int) -> Shapes:
    s, bias = Sizes.of(config), bool(config.get("use_bias"))
    return pre_norms(s) | attention(s, bias=bias, out_bias=bias) | mlp(s, bias=bias)


def _read_ernie(keys: Keys) -> dict[str, Any]:
    return {**read_dense(keys), "use_bias": has_bias(keys, "attn_q")}


def _block_seed_oss(config: Config, _layer: int) -> Shapes:
    s, bias = Sizes.of(config), bool(config.get("attention_bias"))
    out = bool(config.get("attention_out_bias"))
    feed = mlp(s, bias=bool(config.get("mlp_bias")))
    return pre_norms(s) | attention(s, bias=bias, out_bias=out) | feed


def _read_seed_oss(keys: Keys) -> dict[str, Any]:
    return {**_read(keys), "attention_out_bias": has_bias(keys, "attn_output")}


def _block_arcee(config: Config, _layer: int) -> Shapes:
    s, bias = Sizes.of(config), bool(config.get("attention_bias"))
    feed = bool(config.get("mlp_bias"))
    return (
        pre_norms(s)
        | attention(s, bias=bias, out_bias=bias)
        | linear("mlp.up_proj", s.inner, s.hidden, bias=feed)
        | linear("mlp.down_proj", s.hidden, s.inner, bias=feed)
    )


def _read_arcee(keys: Keys) -> dict[str, Any]:
    return {**_read(keys), "hidden_act": "relu2"}


FAMILIES: Mapping[str, Family] = MappingProxyType({
    "gemma": Family(
        architecture="gemma",
        class_name="GemmaForCausalLM",
        block=_block,
        names=_NAMES,
        read=_read_gemma,
        change=norms_from_one,
        defaults=MappingProxyType({"tie_word_embeddings": True}),
    ),
    "granite": Family(
        architecture="granite",
        class_name="GraniteForCausalLM",
        block=_block,
        names=_NAMES,
        read=_read_granite,
        write=_write_granite,
        change=interleaved,
        defaults=MappingProxyType(dict.fromkeys(
            ("attention_multiplier", "embedding_multiplier", "residual_multiplier",
             "logits_scaling"), 1.0
        )),
    ),
    "minicpm": Family(
        architecture="minicpm",
        class_name="MiniCPMForCausalLM",
        block=_block,
        names=_NAMES,
        read=_read_minicpm,
        write=_write_minicpm,
        change=interleaved,
    ),
    "seed_oss": Family(
        architecture="seed_oss",
        class_name="SeedOssForCausalLM",
        block=_block_seed_oss,
        names=MappingProxyType({**_NAMES, "post_attention_layernorm": "post_attention_norm"}),
        read=_read_seed_oss,
        defaults=MappingProxyType({"attention_bias": True, "attention_out_bias": False}),
    ),
    "arcee": Family(
        architecture="arcee",
        class_name="ArceeForCausalLM",
        block=_block_arcee,
        names=_NAMES,
        read=_read_arcee,
        change=interleaved,
        defaults=MappingProxyType({"hidden_act": "relu2", "rms_norm_eps": 1e-5}),
    ),
    "smollm3": Family(
        architecture="smollm3",
        class_name="SmolLM3ForCausalLM",
        block=_block,
        names=_NAMES,
        read=_read_smollm3,
        write=_write_smollm3,
        change=interleaved,
        defaults=MappingProxyType({"tie_word_embeddings": True, "no_rope_layer_interval": _STILL}),
    ),
    "ernie4_5": Family(
        architecture="ernie4_5",
        class_name="Ernie4_5ForCausalLM",
        block=_block_ernie,
        names=_NAMES,
        read=_read_ernie,
        defaults=MappingProxyType(
            {"use_bias": False, "rms_norm_eps": 1e-5, "tie_word_embeddings": True}
        ),
    ),
})  # fmt: skip
