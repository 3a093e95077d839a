"""Attention: projections, norms and rope of a layer, and the product itself."""

from __future__ import annotations

import mlx.core as mx

from rl_mlx.model.layers import FusedLinear, Linear, RMSNorm, SplitLinear
from rl_mlx.model.plan import AttentionPlan
from rl_mlx.model.rope import Rope
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
        norms: tuple[RMSNorm, RMSNorm] | None,
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
        q = q.reshape(rows, length, p.heads, p.head_dim)
        k = k.reshape(rows, length, p.kv_heads, p.head_dim)
        if self._norms is not None:
            q, k = self._norms[0](q), self._norms[1](k)
        q, k = q.transpose(0, 2, 1, 3), k.transpose(0, 2, 1, 3)
        v = v.reshape(rows, length, p.kv_heads, p.head_dim).transpose(0, 2, 1, 3)
        if self._rope is not None:
            q, k = self._rope(q, step.offset), self._rope(k, step.offset)
        y = step.attend(self._layer, q, k, v, scale=p.scale, softcap=p.softcap, sinks=self._sinks)
        return self._out(y.transpose(0, 2, 1, 3).reshape(rows, length, -1))


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
    rows, heads, length, dim = queries.shape
    kv_heads = keys.shape[1]
    grouped = (queries * scale).reshape(rows, kv_heads, heads // kv_heads, length, dim)
    scores = grouped @ keys[:, :, None].swapaxes(-1, -2)
    scores = mx.tanh(scores / softcap) * softcap  # Gemma 2 bounds its scores
    allowed = mask_array(mask, length, keys.shape[2])
    if allowed is not None:
        allowed = allowed[:, :, None] if allowed.ndim == 4 else allowed
        scores = mx.where(allowed, scores, mx.array(-mx.inf, scores.dtype))
    weights = mx.softmax(scores, axis=-1, precise=True)
    return (weights @ values[:, :, None]).reshape(rows, heads, length, dim)


def mask_array(mask: Mask, queries: int, keys: int) -> mx.array | None:
    """A boolean array for the ``causal`` string, whose last query sees the last key."""
    if not isinstance(mask, str):
        return mask
    return mx.arange(keys) <= mx.arange(keys - queries, keys)[:, None]
