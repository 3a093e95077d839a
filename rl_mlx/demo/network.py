"""A Llama in a hundred lines of MLX. Weights are one flat dict with the names that GGUF uses.

RMSNorm, grouped-query attention with interleaved RoPE (the order that GGUF stores for ``llama``),
SwiGLU, tied embeddings (Touvron et al. 2023, arXiv:2302.13971).
"""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx

Weights = dict[str, mx.array]


@dataclass(frozen=True)
class Shape:
    """Sizes of a network; widths are multiples of 32, so that every row is whole Q8_0 blocks."""

    vocab: int
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    feed_forward: int
    context: int = 1024
    rope_base: float = 10000.0
    epsilon: float = 1e-5

    @property
    def head_dim(self) -> int:
        """Width of one head."""
        return self.hidden // self.heads


def initial(shape: Shape, seed: int) -> Weights:
    """Random weights: normal, and zero where a layer adds to the residual stream.

    Each layer so begins as the identity, and embeddings of some size tell tokens apart from the
    first step on.
    """
    kv = shape.kv_heads * shape.head_dim
    matrices = {
        "attn_q": (shape.hidden, shape.hidden),
        "attn_k": (kv, shape.hidden),
        "attn_v": (kv, shape.hidden),
        "attn_output": (shape.hidden, shape.hidden),
        "ffn_gate": (shape.feed_forward, shape.hidden),
        "ffn_up": (shape.feed_forward, shape.hidden),
        "ffn_down": (shape.hidden, shape.feed_forward),
    }
    key = mx.random.key(seed)
    weights: Weights = {}

    def normal(name: str, size: tuple[int, int], deviation: float) -> None:
        nonlocal key
        key, sub = mx.random.split(key)
        weights[f"{name}.weight"] = mx.random.normal(size, scale=deviation, key=sub)

    normal("token_embd", (shape.vocab, shape.hidden), 0.05)
    weights["output_norm.weight"] = mx.ones(shape.hidden)
    for layer in range(shape.layers):
        for name, size in matrices.items():
            residual = name in ("attn_output", "ffn_down")
            normal(f"blk.{layer}.{name}", size, 0.0 if residual else size[1] ** -0.5)
        weights[f"blk.{layer}.attn_norm.weight"] = mx.ones(shape.hidden)
        weights[f"blk.{layer}.ffn_norm.weight"] = mx.ones(shape.hidden)
    return weights


def forward(weights: Weights, shape: Shape, tokens: mx.array) -> mx.array:
    """Logits ``[batch, length, vocab]`` of ids ``[batch, length]``; causal, positions from 0."""
    x = weights["token_embd.weight"][tokens]
    for layer in range(shape.layers):
        block = f"blk.{layer}."
        x = x + _attention(weights, block, shape, _norm(weights, block + "attn_norm", shape, x))
        x = x + _mlp(weights, block, _norm(weights, block + "ffn_norm", shape, x))
    return _norm(weights, "output_norm", shape, x) @ weights["token_embd.weight"].T


def _norm(weights: Weights, name: str, shape: Shape, x: mx.array) -> mx.array:
    return mx.fast.rms_norm(x, weights[name + ".weight"], shape.epsilon)


def _attention(weights: Weights, block: str, shape: Shape, x: mx.array) -> mx.array:
    batch, length, _ = x.shape

    def heads(name: str) -> mx.array:
        y = x @ weights[f"{block}{name}.weight"].T
        return y.reshape(batch, length, -1, shape.head_dim).swapaxes(1, 2)

    def rope(y: mx.array) -> mx.array:
        return mx.fast.rope(
            y, shape.head_dim, traditional=True, base=shape.rope_base, scale=1.0, offset=0
        )

    y = mx.fast.scaled_dot_product_attention(
        rope(heads("attn_q")),
        rope(heads("attn_k")),
        heads("attn_v"),
        scale=shape.head_dim**-0.5,
        mask="causal",
    )
    return y.swapaxes(1, 2).reshape(batch, length, -1) @ weights[block + "attn_output.weight"].T


def _mlp(weights: Weights, block: str, x: mx.array) -> mx.array:
    gate = x @ weights[block + "ffn_gate.weight"].T
    up = x @ weights[block + "ffn_up.weight"].T
    return (gate * mx.sigmoid(gate) * up) @ weights[block + "ffn_down.weight"].T
