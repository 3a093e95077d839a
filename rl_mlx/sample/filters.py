"""Filters of a batch of logits, a row each with its own settings. What a row does not ask for
changes no bit.
"""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx

from rl_mlx.sample.adjust import Change
from rl_mlx.types import SamplingParams

_NEVER = -mx.inf


def apply_changes(logits: mx.array, rows: Sequence[dict[int, Change]]) -> mx.array:
    """Sparse changes to ``[B, V]`` logits: penalties, bias."""
    width = max(len(row) for row in rows)
    vocab = logits.shape[-1]
    ids, factors, adds = [], [], []
    for row in rows:
        known = [(t, c) for t, c in row.items() if t < vocab]
        spare = width - len(known)  # a column past the vocabulary takes what pads the row
        ids.append([t for t, _ in known] + [vocab] * spare)
        factors.append([c.factor for _, c in known] + [1.0] * spare)
        adds.append([c.add for _, c in known] + [0.0] * spare)
    padded = mx.pad(logits, [(0, 0), (0, 1)])
    at = mx.array(ids)
    old, factor = mx.take_along_axis(padded, at, axis=-1), mx.array(factors)
    new = mx.where(old > 0, old / factor, old * factor) + mx.array(adds)
    return mx.put_along_axis(padded, at, new, axis=-1)[:, :vocab]


def filtered(logits: mx.array, params: Sequence[SamplingParams], xtc: Sequence[bool]) -> mx.array:
    """``[B, V]`` logits divided by temperature, with what the filters of each row drop at minus
    infinity.

    Greedy rows are left as they are. ``xtc`` says for which rows the coin of XTC fell.
    """
    temperature = _column([p.temperature or 1.0 for p in params])
    logits = logits / temperature
    vocab = logits.shape[-1]
    wants_k = any(0 < p.top_k < vocab for p in params)
    wants_p = any(p.top_p < 1 for p in params)
    if wants_k or wants_p:
        ordered = mx.sort(logits, axis=-1)[:, ::-1]
        if wants_k:
            places = [p.top_k - 1 if 0 < p.top_k < vocab else vocab - 1 for p in params]
            lowest = mx.take_along_axis(ordered, mx.array(places)[:, None], axis=-1)
            logits = mx.where(logits >= lowest, logits, _NEVER)
            ordered = mx.where(ordered >= lowest, ordered, _NEVER)
        if wants_p:
            logits = _top_p(logits, ordered, params)
    if any(p.min_p > 0 for p in params):
        ratio = mx.log(_column([p.min_p for p in params]))  # log 0 keeps everything
        logits = mx.where(logits >= logits.max(axis=-1, keepdims=True) + ratio, logits, _NEVER)
    return _exclude_top(logits, params, xtc) if any(xtc) else logits


def _top_p(logits: mx.array, ordered: mx.array, params: Sequence[SamplingParams]) -> mx.array:
    """Nucleus sampling (Holtzman et al. 2020): the fewest likeliest tokens that hold ``top_p``, one
    at least.
    """
    probs = mx.softmax(ordered, axis=-1, precise=True)
    before = mx.cumsum(probs, axis=-1) - probs
    limit = _column([p.top_p if p.top_p < 1 else 2.0 for p in params])
    inside = before < mx.maximum(limit, 1e-9)
    lowest = mx.where(inside, ordered, mx.inf).min(axis=-1, keepdims=True)
    return mx.where(logits >= lowest, logits, _NEVER)


def _exclude_top(
    logits: mx.array, params: Sequence[SamplingParams], active: Sequence[bool]
) -> mx.array:
    """XTC (by p-e-w): of the tokens at or above the threshold only the least likely stays."""
    probs = mx.softmax(logits, axis=-1, precise=True)
    above = [p.xtc_threshold if on else 2.0 for p, on in zip(params, active)]
    least = mx.where(probs >= _column(above), probs, mx.inf).min(axis=-1, keepdims=True)
    return mx.where(probs > least, _NEVER, logits)


def pick(logits: mx.array, uniforms: Sequence[float]) -> mx.array:
    """Token ids ``[B]`` drawn from filtered logits by inverting the cumulative distribution at
    ``uniforms``.
    """
    cumulative = mx.cumsum(mx.softmax(logits, axis=-1, precise=True), axis=-1)
    target = _column(uniforms) * cumulative[:, -1:]
    return mx.argmax(cumulative > target, axis=-1)


def _column(values: Sequence[float]) -> mx.array:
    return mx.array(list(values), mx.float32)[:, None]
