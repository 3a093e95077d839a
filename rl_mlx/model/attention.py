"""Attention: projections, norms and rope of a layer, and the product itself."""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx

from rl_mlx.model.layers import FusedLinear, Linear, Norm, SplitLinear
from rl_mlx.model.plan import AttentionPlan
from rl_mlx.model.rope import Offset, Rope
from rl_mlx.model.step import Mask, Step


class Attention:
    """Grouped-query attention of one layer (Ainslie et al. 2023)."""

    def __init__(
        self,
        layer: int,
        plan: AttentionPlan,
        qkv: FusedLinear | SplitLinear,
        out: Linear,
        rope: Rope | None,
        norms: tuple[Norm, Norm] | None,
        sinks: mx.array | None,
    ) -> None:
        self._layer = layer
        self._plan = plan
        self._qkv = qkv
        self._out = out
        self._rope = rope
        self._norms = norms
        self._sinks = sinks

    def __call__(self, x: mx.array, step: Step) -> mx.array:
        """``[B, S, hidden]`` to the same."""
        p = self._plan
        rows, length, _ = x.shape
        q, k, v = self._qkv(x)
        gate = None
        if p.gated:  # after each head's query
            q, gate = mx.split(q.reshape(rows, length, p.heads, -1), 2, axis=-1)
        if self._norms is not None and p.qk_norm_of == "width":
            q, k = self._norms[0](q), self._norms[1](k)
        q = q.reshape(rows, length, p.heads, p.head_dim)
        k = k.reshape(rows, length, p.kv_heads, p.head_dim)
        if self._norms is not None and p.qk_norm_of in {"head", "own"}:
            q, k = self._norms[0](q), self._norms[1](k)
        q, k = q.transpose(0, 2, 1, 3), k.transpose(0, 2, 1, 3)
        v = v.reshape(rows, length, p.kv_heads, p.head_dim).transpose(0, 2, 1, 3)
        if self._rope is not None:
            q, k = self._rope(q, step.offset), self._rope(k, step.offset)
        if self._norms is not None and p.qk_norm_of == "rotated":
            q, k = self._norms[0](q), self._norms[1](k)
        if p.temperature is not None:
            q = q * _temperature(step.offset, length, *p.temperature).astype(q.dtype)
        y = step.attend(self._layer, q, k, v, scale=p.scale, softcap=p.softcap, sinks=self._sinks)
        y = y.transpose(0, 2, 1, 3)
        if gate is not None:
            y = y * mx.sigmoid(gate)
        return self._out(y.reshape(rows, length, -1))


def _temperature(offset: Offset, length: int, span: float, rate: float, first: int) -> mx.array:
    """By what queries grow with their positions, ``[B or 1, 1, S, 1]`` (Nakanishi 2025)."""
    at = mx.array(offset).reshape(-1, 1) + mx.arange(first, first + length)
    return (mx.log1p(mx.floor(at / span)) * rate + 1)[:, None, :, None]


def attend(
    queries: mx.array,
    keys: mx.array,
    values: mx.array,
    mask: Mask,
    *,
    scale: float,
    softcap: float | None,
    sinks: mx.array | None,
) -> mx.array:
    """Attention over dense keys and values ``[B, kv_heads, L, D]``; ``mask`` as ``mx.fast`` takes
    it.
    """
    if softcap is None:
        return mx.fast.scaled_dot_product_attention(
            queries, keys, values, scale=scale, mask=mask, sinks=sinks
        )
    return attend_by(
        lambda q: q @ keys[:, :, None].swapaxes(-1, -2),
        lambda w: w @ values[:, :, None],
        queries, keys.shape[1], keys.shape[2], mask,
        scale=scale, softcap=softcap, sinks=sinks,
    )  # fmt: skip


def attend_by(
    scores_of: Callable[[mx.array], mx.array],
    mix: Callable[[mx.array], mx.array],
    queries: mx.array,
    kv_heads: int,
    seen: int,
    mask: Mask,
    *,
    scale: float,
    softcap: float | None,
    sinks: mx.array | None,
) -> mx.array:
    """Attention spelt out, for scores with a cap and for keys and values that are not plain arrays.

    ``scores_of`` multiplies queries ``[B, kv_heads, heads / kv_heads, S, D]`` with the ``seen``
    keys, ``mix`` the weights with the values.
    """
    rows, heads, length, dim = queries.shape
    scores = scores_of((queries * scale).reshape(rows, kv_heads, heads // kv_heads, length, dim))
    if softcap is not None:
        scores = mx.tanh(scores / softcap) * softcap  # Gemma 2 bounds its scores
    allowed = mask_array(mask, length, seen)
    if allowed is not None:
        allowed = allowed[:, :, None] if allowed.ndim == 4 else allowed
        scores = mx.where(allowed, scores, mx.array(-mx.inf, scores.dtype))
    if sinks is not None:  # a logit that takes part in the softmax and adds nothing
        sink = sinks.reshape(1, kv_heads, -1, 1, 1).astype(scores.dtype)
        sink = mx.broadcast_to(sink, (*scores.shape[:-1], 1))
        scores = mx.concatenate([scores, sink], axis=-1)
    weights = mx.softmax(scores, axis=-1, precise=True)
    if sinks is not None:
        weights = weights[..., :-1]
    return mix(weights).reshape(rows, heads, length, -1)


def mask_array(mask: Mask, queries: int, keys: int) -> mx.array | None:
    """A boolean array for the ``causal`` string, whose last query sees the last key."""
    if not isinstance(mask, str):
        return mask
    return mx.arange(keys) <= mx.arange(keys - queries, keys)[:, None]
