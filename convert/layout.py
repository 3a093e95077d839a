"""Which tensors a model has, by its config: canonical names and shapes of the families we know.

A file is checked against it before a tensor is read. The names are those of mlx-lm's modules.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType

from rl_mlx.convert.families import FAMILIES
from rl_mlx.convert.shapes import (
    Config,
    Shape,
    Shapes,
    Sizes,
    attention,
    experts,
    head_norms,
    linear,
    mlp,
    norms,
    outer,
    pre_norms,
    size,
)
from rl_mlx.errors import FormatError


def knows(config: Config) -> bool:
    """Whether the family of ``config`` is one whose tensors are known here."""
    return config.get("model_type") in _BLOCKS or config.get("model_type") in FAMILIES


def layout(config: Config, tensors: int) -> Shapes:
    """Canonical names of all tensors and their logical shapes.

    ``config`` is of a family that ``knows`` knows; ``tensors`` are as many as the file has, of
    which every layer needs some. Raises ``FormatError`` where a size is missing or is none.
    """
    layers = size(config, "num_hidden_layers")
    if layers > tensors:
        raise FormatError(f"{layers} layers are not in {tensors} tensors; download it again")
    types = config.get("layer_types")
    if types is not None and (not isinstance(types, list) or len(types) != layers):
        raise FormatError(f"'layer_types' of the configuration must name {layers} layers")
    family = FAMILIES.get(config["model_type"])
    at = family.layers if family else "model.layers"
    if family is not None:
        shapes = dict(family.outer(config))
    else:
        norm = "embedding_norm" if config["model_type"] == "lfm2" else "norm"
        shapes = outer(config, norm=norm)
    for i in range(layers):
        shapes |= {f"{at}.{i}.{name}": s for name, s in _block(config, i).items()}
    return shapes


def _block(config: Config, layer: int) -> Shapes:
    family = FAMILIES.get(config["model_type"])
    if family is not None:
        return family.block(config, layer)
    return _BLOCKS[config["model_type"]](config, Sizes.of(config), layer)


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


def _llama(config: Config, s: Sizes, _: int) -> Shapes:
    bias = bool(config.get("attention_bias"))
    feed = mlp(s, bias=bool(config.get("mlp_bias")))
    return pre_norms(s) | attention(s, bias=bias, out_bias=bias) | feed


def _mixtral(config: Config, s: Sizes, _: int) -> Shapes:
    count = size(config, "num_local_experts")
    return (
        pre_norms(s)
        | attention(s)
        | linear("block_sparse_moe.gate", count, s.hidden)
        | experts("block_sparse_moe.switch_mlp", count, s.inner, s.hidden)
    )


def _qwen2(_config: Config, s: Sizes, _: int) -> Shapes:
    return pre_norms(s) | attention(s, bias=True) | mlp(s)


def _qwen3(config: Config, s: Sizes, i: int) -> Shapes:
    return _llama(config, s, i) | head_norms(s)


def _qwen3_moe(config: Config, s: Sizes, i: int) -> Shapes:
    bias = bool(config.get("attention_bias"))
    shapes = pre_norms(s) | attention(s, bias=bias, out_bias=bias) | head_norms(s)
    step = config.get("decoder_sparse_step") or 1
    if i in (config.get("mlp_only_layers") or ()) or (i + 1) % step:
        return shapes | mlp(s)
    count = size(config, "num_experts")
    inner = size(config, "moe_intermediate_size")
    gate = linear("mlp.gate", count, s.hidden)
    return shapes | gate | experts("mlp.switch_mlp", count, inner, s.hidden)


def _gemma2(config: Config, s: Sizes, i: int) -> Shapes:
    more = norms(s.hidden, "pre_feedforward_layernorm", "post_feedforward_layernorm")
    return _llama(config, s, i) | more


def _gemma3(config: Config, s: Sizes, i: int) -> Shapes:
    return _gemma2(config, s, i) | head_norms(s)


def _phi3(_config: Config, s: Sizes, _: int) -> Shapes:
    queries, keys = s.heads * s.head_dim, s.kv_heads * s.head_dim
    return (
        pre_norms(s)
        | linear("self_attn.qkv_proj", queries + 2 * keys, s.hidden)
        | linear("self_attn.o_proj", s.hidden, queries)
        | linear("mlp.gate_up_proj", 2 * s.inner, s.hidden)
        | linear("mlp.down_proj", s.hidden, s.inner)
    )


def _gpt_oss(config: Config, s: Sizes, _: int) -> Shapes:
    count = size(config, "num_local_experts")
    return (
        pre_norms(s)
        | attention(s, bias=True, out_bias=True)
        | {"self_attn.sinks": (s.heads,)}
        | linear("mlp.router", count, s.hidden, bias=True)
        | experts("mlp.experts", count, s.inner, s.hidden, bias=True)
    )


def _lfm2(config: Config, s: Sizes, i: int) -> Shapes:
    inner = feed_forward_width(config)
    shapes = (
        norms(s.hidden, "operator_norm", "ffn_norm")
        | linear("feed_forward.w1", inner, s.hidden)
        | linear("feed_forward.w3", inner, s.hidden)
        | linear("feed_forward.w2", s.hidden, inner)
    )
    if config["layer_types"][i] == "full_attention":
        of_heads = norms(s.head_dim, "self_attn.q_layernorm", "self_attn.k_layernorm")
        return shapes | attention(s, out="out_proj") | of_heads
    bias, taps = bool(config.get("conv_bias")), size(config, "conv_L_cache")
    kernel: Shapes = {"conv.conv.weight": (s.hidden, taps, 1)}
    if bias:
        kernel["conv.conv.bias"] = (s.hidden,)
    projections = linear("conv.in_proj", 3 * s.hidden, s.hidden, bias=bias)
    return shapes | kernel | projections | linear("conv.out_proj", s.hidden, s.hidden, bias=bias)


def feed_forward_width(config: Config) -> int:
    """The width of LFM2's feed-forward layers, which its configs give before an adjustment."""
    inner = size(config, "block_ff_dim" if config.get("block_ff_dim") else "intermediate_size")
    if not config.get("block_auto_adjust_ff_dim", True):
        return inner
    inner = int((config.get("block_ffn_dim_multiplier") or 1.0) * int(2 * inner / 3))
    multiple = config.get("block_multiple_of") or 256
    return multiple * -(-inner // multiple)


_BLOCKS: Mapping[str, Callable[[Config, Sizes, int], Shapes]] = MappingProxyType(
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
