"""Which tensors a model has, by its config: canonical names and shapes of the families we know.

A file is checked against it before a tensor is read. The names are those of mlx-lm's modules.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from rl_mlx.errors import FormatError

Config = Mapping[str, Any]
Shape = tuple[int, ...]
Shapes = dict[str, Shape]


def knows(config: Config) -> bool:
    """Whether the family of ``config`` is one whose tensors are known here."""
    return config.get("model_type") in _BLOCKS


def layout(config: Config, tensors: int) -> Shapes:
    """Canonical names of all tensors and their logical shapes.

    ``config`` is of a family that ``knows`` knows; ``tensors`` are as many as the file has, of
    which every layer needs some. Raises ``FormatError`` where a size is missing or is none.
    """
    sizes = Sizes.of(config)
    if sizes.layers > tensors:
        raise FormatError(f"{sizes.layers} layers are not in {tensors} tensors; download it again")
    types = config.get("layer_types")
    if types is not None and (not isinstance(types, list) or len(types) != sizes.layers):
        raise FormatError(f"'layer_types' of the configuration must name {sizes.layers} layers")
    block = _BLOCKS[config["model_type"]]
    final = "embedding_norm" if config["model_type"] == "lfm2" else "norm"
    shapes: Shapes = {"model.embed_tokens.weight": (sizes.vocab, sizes.hidden)}
    for i in range(sizes.layers):
        shapes |= {f"model.layers.{i}.{name}": s for name, s in block(config, sizes, i).items()}
    shapes[f"model.{final}.weight"] = (sizes.hidden,)
    if not config.get("tie_word_embeddings", False):
        shapes["lm_head.weight"] = (sizes.vocab, sizes.hidden)
    return shapes


def check(path: Path, expected: Mapping[str, Shape], found: Mapping[str, Shape]) -> None:
    """Compare the tensors that the config asks for with those that the file has.

    Raises ``FormatError`` for the first that is missing, of another shape, or without a use.
    """
    for name, shape in expected.items():
        if name not in found:
            raise FormatError(f"{path}: tensor {name!r} is missing; download the model again")
        if found[name] != shape:
            raise FormatError(
                f"{path}: tensor {name!r} must be {list(shape)} by the model's configuration, "
                f"but is {list(found[name])}; use another version of the model"
            )
    for name in found:
        if name not in expected:
            raise FormatError(
                f"{path}: tensor {name!r} has no place in a model of this configuration; "
                "try --backend llama.cpp or another version of the model"
            )


def size(config: Config, key: str) -> int:
    """A positive whole number of ``config``; ``FormatError`` where it is none."""
    value = config.get(key)
    if isinstance(value, bool) or not isinstance(value, int) or not 0 < value < 1 << 31:
        found = "is missing" if value is None else f"cannot be {value!r}"
        raise FormatError(f"{key!r} of the model's configuration {found}")
    return value


@dataclass(frozen=True)
class Sizes:
    """The sizes that every family has. ``inner`` is the width of a dense feed-forward layer."""

    vocab: int
    hidden: int
    layers: int
    inner: int
    heads: int
    kv_heads: int
    head_dim: int

    @classmethod
    def of(cls, config: Config) -> Sizes:
        """Read them, with the field's defaults. Raises ``FormatError`` where one is missing."""
        heads, hidden = size(config, "num_attention_heads"), size(config, "hidden_size")
        has = {key for key in ("num_key_value_heads", "head_dim") if config.get(key) is not None}
        return cls(
            vocab=size(config, "vocab_size"),
            hidden=hidden,
            layers=size(config, "num_hidden_layers"),
            inner=size(config, "intermediate_size"),
            heads=heads,
            kv_heads=size(config, "num_key_value_heads") if "num_key_value_heads" in has else heads,
            head_dim=size(config, "head_dim") if "head_dim" in has else hidden // heads,
        )


def _linear(name: str, *shape: int, bias: bool = False) -> Shapes:
    shapes: Shapes = {f"{name}.weight": shape}
    if bias:
        shapes[f"{name}.bias"] = shape[:-1]
    return shapes


def _norms(width: int, *names: str) -> Shapes:
    return {f"{name}.weight": (width,) for name in names}


def _attention(
    s: Sizes, *, bias: bool = False, out_bias: bool = False, out: str = "o_proj"
) -> Shapes:
    queries, keys = s.heads * s.head_dim, s.kv_heads * s.head_dim
    return (
        _linear("self_attn.q_proj", queries, s.hidden, bias=bias)
        | _linear("self_attn.k_proj", keys, s.hidden, bias=bias)
        | _linear("self_attn.v_proj", keys, s.hidden, bias=bias)
        | _linear(f"self_attn.{out}", s.hidden, queries, bias=out_bias)
    )


def _mlp(s: Sizes, *, bias: bool = False) -> Shapes:
    return (
        _linear("mlp.gate_proj", s.inner, s.hidden, bias=bias)
        | _linear("mlp.up_proj", s.inner, s.hidden, bias=bias)
        | _linear("mlp.down_proj", s.hidden, s.inner, bias=bias)
    )


def _experts(at: str, experts: int, inner: int, hidden: int, *, bias: bool = False) -> Shapes:
    return (
        _linear(f"{at}.gate_proj", experts, inner, hidden, bias=bias)
        | _linear(f"{at}.up_proj", experts, inner, hidden, bias=bias)
        | _linear(f"{at}.down_proj", experts, hidden, inner, bias=bias)
    )


def _pre_norms(s: Sizes) -> Shapes:
    return _norms(s.hidden, "input_layernorm", "post_attention_layernorm")


def _head_norms(s: Sizes) -> Shapes:
    return _norms(s.head_dim, "self_attn.q_norm", "self_attn.k_norm")


def _llama(config: Config, s: Sizes, _: int) -> Shapes:
    bias = bool(config.get("attention_bias"))
    mlp = _mlp(s, bias=bool(config.get("mlp_bias")))
    return _pre_norms(s) | _attention(s, bias=bias, out_bias=bias) | mlp


def _mixtral(config: Config, s: Sizes, _: int) -> Shapes:
    experts = size(config, "num_local_experts")
    return (
        _pre_norms(s)
        | _attention(s)
        | _linear("block_sparse_moe.gate", experts, s.hidden)
        | _experts("block_sparse_moe.switch_mlp", experts, s.inner, s.hidden)
    )


def _qwen2(_config: Config, s: Sizes, _: int) -> Shapes:
    return _pre_norms(s) | _attention(s, bias=True) | _mlp(s)


def _qwen3(config: Config, s: Sizes, i: int) -> Shapes:
    return _llama(config, s, i) | _head_norms(s)


def _qwen3_moe(config: Config, s: Sizes, i: int) -> Shapes:
    bias = bool(config.get("attention_bias"))
    shapes = _pre_norms(s) | _attention(s, bias=bias, out_bias=bias) | _head_norms(s)
    step = config.get("decoder_sparse_step") or 1
    if i in (config.get("mlp_only_layers") or ()) or (i + 1) % step:
        return shapes | _mlp(s)
    experts = size(config, "num_experts")
    inner = size(config, "moe_intermediate_size")
    gate = _linear("mlp.gate", experts, s.hidden)
    return shapes | gate | _experts("mlp.switch_mlp", experts, inner, s.hidden)


def _gemma2(config: Config, s: Sizes, i: int) -> Shapes:
    more = _norms(s.hidden, "pre_feedforward_layernorm", "post_feedforward_layernorm")
    return _llama(config, s, i) | more


def _gemma3(config: Config, s: Sizes, i: int) -> Shapes:
    return _gemma2(config, s, i) | _head_norms(s)


def _phi3(_config: Config, s: Sizes, _: int) -> Shapes:
    queries, keys = s.heads * s.head_dim, s.kv_heads * s.head_dim
    return (
        _pre_norms(s)
        | _linear("self_attn.qkv_proj", queries + 2 * keys, s.hidden)
        | _linear("self_attn.o_proj", s.hidden, queries)
        | _linear("mlp.gate_up_proj", 2 * s.inner, s.hidden)
        | _linear("mlp.down_proj", s.hidden, s.inner)
    )


def _gpt_oss(config: Config, s: Sizes, _: int) -> Shapes:
    experts = size(config, "num_local_experts")
    return (
        _pre_norms(s)
        | _attention(s, bias=True, out_bias=True)
        | {"self_attn.sinks": (s.heads,)}
        | _linear("mlp.router", experts, s.hidden, bias=True)
        | _experts("mlp.experts", experts, s.inner, s.hidden, bias=True)
    )


def _lfm2(config: Config, s: Sizes, i: int) -> Shapes:
    inner = feed_forward_width(config)
    shapes = (
        _norms(s.hidden, "operator_norm", "ffn_norm")
        | _linear("feed_forward.w1", inner, s.hidden)
        | _linear("feed_forward.w3", inner, s.hidden)
        | _linear("feed_forward.w2", s.hidden, inner)
    )
    if config["layer_types"][i] == "full_attention":
        norms = _norms(s.head_dim, "self_attn.q_layernorm", "self_attn.k_layernorm")
        return shapes | _attention(s, out="out_proj") | norms
    bias, taps = bool(config.get("conv_bias")), size(config, "conv_L_cache")
    kernel: Shapes = {"conv.conv.weight": (s.hidden, taps, 1)}
    if bias:
        kernel["conv.conv.bias"] = (s.hidden,)
    projections = _linear("conv.in_proj", 3 * s.hidden, s.hidden, bias=bias)
    return shapes | kernel | projections | _linear("conv.out_proj", s.hidden, s.hidden, bias=bias)


def feed_forward_width(config: Config) -> int:
    """The width of LFM2's feed-forward layers, which its configs give before an adjustment."""
    inner = size(config, "block_ff_dim" if config.get("block_ff_dim") else "intermediate_size")
    if not config.get("block_auto_adjust_ff_dim", True):
        return inner
    inner = int((config.get("block_ffn_dim_multiplier") or 1.0) * int(2 * inner / 3))
    multiple = config.get("block_multiple_of") or 256
    return multiple * -(-inner // multiple)


_Block = Callable[[Config, Sizes, int], Shapes]
_BLOCKS: Mapping[str, _Block] = MappingProxyType(
    {
        "llama": _llama,
        "mistral": _llama,
        "ministral": _llama,
        "ministral3": _llama,
        "mixtral": _mixtral,
        "qwen2": _qwen2,
        "qwen3": _qwen3,
        "qwen3_moe": _qwen3_moe,
        "gemma2": _gemma2,
        "gemma3_text": _gemma3,
        "phi3": _phi3,
        "gpt_oss": _gpt_oss,
        "lfm2": _lfm2,
    }
)
