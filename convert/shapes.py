"""Shapes that tensors of many families have, below ``model.layers.N.``: the words of ``layout``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rl_mlx.errors import FormatError

Config = Mapping[str, Any]
Shape = tuple[int, ...]
Shapes = dict[str, Shape]


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


def linear(name: str, *shape: int, bias: bool = False) -> Shapes:
    """A matrix, and a bias where it has one."""
    shapes: Shapes = {f"{name}.weight": shape}
    if bias:
        shapes[f"{name}.bias"] = shape[:-1]
    return shapes


def norms(width: int, *names: str, bias: bool = False) -> Shapes:
    """Weights of norms over ``width``, and their biases where they have some."""
    parts = ("weight", "bias") if bias else ("weight",)
    return {f"{name}.{part}": (width,) for name in names for part in parts}


def outer(
    config: Config, *, norm: str = "norm", norm_bias: bool = False, head_bias: bool = False
) -> Shapes:
    """What lies outside the layers: the embedding, the last norm, and a head where it is no tied
    one.
    """
    vocab, hidden = size(config, "vocab_size"), size(config, "hidden_size")
    shapes = linear("model.embed_tokens", vocab, hidden)
    shapes |= norms(hidden, f"model.{norm}", bias=norm_bias)
    if not config.get("tie_word_embeddings", False):
        shapes |= linear("lm_head", vocab, hidden, bias=head_bias)
    return shapes


def attention(
    s: Sizes, *, bias: bool = False, out_bias: bool = False, out: str = "o_proj"
) -> Shapes:
    """Projections of queries, keys and values, and the one out of the heads."""
    queries, keys = s.heads * s.head_dim, s.kv_heads * s.head_dim
    return (
        linear("self_attn.q_proj", queries, s.hidden, bias=bias)
        | linear("self_attn.k_proj", keys, s.hidden, bias=bias)
        | linear("self_attn.v_proj", keys, s.hidden, bias=bias)
        | linear(f"self_attn.{out}", s.hidden, queries, bias=out_bias)
    )


def mlp(s: Sizes, *, bias: bool = False) -> Shapes:
    """A gated feed-forward layer of width ``s.inner``."""
    return (
        linear("mlp.gate_proj", s.inner, s.hidden, bias=bias)
        | linear("mlp.up_proj", s.inner, s.hidden, bias=bias)
        | linear("mlp.down_proj", s.hidden, s.inner, bias=bias)
    )


def experts(at: str, experts: int, inner: int, hidden: int, *, bias: bool = False) -> Shapes:
    """Gated feed-forward layers, stacked along the first axis."""
    return (
        linear(f"{at}.gate_proj", experts, inner, hidden, bias=bias)
        | linear(f"{at}.up_proj", experts, inner, hidden, bias=bias)
        | linear(f"{at}.down_proj", experts, hidden, inner, bias=bias)
    )


def pre_norms(s: Sizes) -> Shapes:
    """The two norms before a block's halves, as Llama names them."""
    return norms(s.hidden, "input_layernorm", "post_attention_layernorm")


def head_norms(s: Sizes) -> Shapes:
    """Norms of each head's queries and keys."""
    return norms(s.head_dim, "self_attn.q_norm", "self_attn.k_norm")
