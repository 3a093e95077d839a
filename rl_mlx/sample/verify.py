"""Verification of drafts by rejection sampling (Leviathan et al. 2023, Chen et al. 2023).

A draft token ``d`` with probability ``q(d)`` under the proposal is accepted with probability
``min(1, p(d) / q(d))``; in place of the first that is not, one is drawn from ``max(p - q, 0)``, and
after the last one from ``p``. What comes out has the target's distribution ``p``, whatever ``q``
is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx


@dataclass(frozen=True)
class Draft:
    """Proposed tokens ``[B, K]``, of which the first ``counts[b]`` count.

    ``logits`` ``[B, K, V]`` are those they were drawn from, filtered; None where nothing was drawn
    (a lookup): each token was then certain.
    """

    tokens: mx.array
    counts: Sequence[int]
    logits: mx.array | None = None


def verify(
    target: mx.array,
    best: mx.array,
    greedy: Sequence[bool],
    draft: Draft,
    accept: Sequence[Sequence[float]],
    draw: Sequence[Sequence[float]],
) -> tuple[mx.array, mx.array]:
    """How many draft tokens each row accepts, and the token that comes after them, ``[B]`` both.

    ``target``: filtered logits ``[B, K + 1, V]``; ``best``: the greedy choice at each position,
    ``[B, K + 1]``, which counts for the rows named in ``greedy``. ``accept`` ``[B, K]`` and
    ``draw`` ``[B, K + 1]`` are uniform numbers in [0, 1).
    """
    length = draft.tokens.shape[1]
    considered = mx.arange(length) < mx.array(list(draft.counts))[:, None]
    agrees = best[:, :length] == draft.tokens
    if all(greedy):
        accepted = _leading(agrees & considered)
        return accepted, mx.take_along_axis(best, accepted[:, None], axis=1)[:, 0]
    p = mx.softmax(target, axis=-1, precise=True)
    q = _proposal(draft, target.shape[-1])
    at = draft.tokens[..., None]
    p_draft = mx.take_along_axis(p[:, :length], at, axis=-1)[..., 0]
    q_draft = mx.take_along_axis(q, at, axis=-1)[..., 0]
    passes = _matrix(accept) * q_draft < p_draft
    is_greedy = mx.array(list(greedy))
    accepted = _leading(mx.where(is_greedy[:, None], agrees, passes) & considered)
    place = accepted[:, None, None]
    p_next = mx.take_along_axis(p, place, axis=1)[:, 0]
    q_next = mx.take_along_axis(q, mx.minimum(place, length - 1), axis=1)[:, 0]
    rejected = accepted < mx.array(list(draft.counts))
    rest = mx.where(rejected[:, None], mx.maximum(p_next - q_next, 0), p_next)
    # Where rounding leaves nothing of the difference, p and q are the same and p will do.
    rest = mx.where(rest.sum(axis=-1, keepdims=True) > 0, rest, p_next)
    cumulative = mx.cumsum(rest, axis=-1)
    uniform = mx.take_along_axis(_matrix(draw), accepted[:, None], axis=1)
    drawn = mx.argmax(cumulative > uniform * cumulative[:, -1:], axis=-1)
    chosen = mx.take_along_axis(best, accepted[:, None], axis=1)[:, 0]
    return accepted, mx.where(is_greedy, chosen, drawn)


def _matrix(numbers: Sequence[Sequence[float]]) -> mx.array:
    return mx.array([list(row) for row in numbers], mx.float32)


def _leading(flags: mx.array) -> mx.array:
    """How many of each row are true before the first that is not."""
    return mx.cumprod(flags.astype(mx.int32), axis=-1).sum(axis=-1)


def _proposal(draft: Draft, vocab: int) -> mx.array:
    """The distribution that each draft token was drawn from, ``[B, K, V]``."""
    if draft.logits is not None:
        return mx.softmax(draft.logits, axis=-1, precise=True)
    return (mx.arange(vocab) == draft.tokens[..., None]).astype(mx.float32)
