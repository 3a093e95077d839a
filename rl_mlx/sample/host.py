"""The sampler of one row on the host, in NumPy: the same settings, order and random numbers as the
one in MLX.

For backends whose logits are on the host already. Filters work on the few tokens that can still
win.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from rl_mlx.sample.adjust import allowed_tokens, changes, needs_tokens
from rl_mlx.sample.seeds import XTC, uniform
from rl_mlx.types import Matcher, SamplingParams, TokenLogprob

Floats = npt.NDArray[np.float32]
_FEW = 512  # a nucleus is nearly always smaller than this, and sorting all of a vocabulary is slow


def choose(
    logits: Floats,
    params: SamplingParams,
    seed: int,
    prompt: Sequence[int],
    answer: Sequence[int],
    matcher: Matcher | None = None,
) -> tuple[int, TokenLogprob | None]:
    """The next token after ``prompt`` and ``answer`` from logits ``[vocab]``, which stay as they
    are.
    """
    changed = logits
    if params.logit_bias or needs_tokens(params):
        changed = _changed(logits, params, prompt, answer)
    if matcher is not None:
        allowed = allowed_tokens(matcher.mask(), len(logits))
        changed = np.where(allowed, changed, np.float32(-np.inf))
    if params.temperature == 0:
        token = int(changed.argmax())
    else:
        token = _draw(changed, params, seed, len(answer))
    logprob = None if params.logprobs is None else _logprob(logits, token, params.logprobs)
    return token, logprob


def _changed(
    logits: Floats, params: SamplingParams, prompt: Sequence[int], answer: Sequence[int]
) -> Floats:
    changed = logits.copy()
    for token, change in changes(params, prompt, answer).items():
        if token < len(changed):
            old = changed[token]
            scaled = old / change.factor if old > 0 else old * change.factor
            changed[token] = scaled + change.add
    return changed


def _draw(logits: Floats, params: SamplingParams, seed: int, position: int) -> int:
    """Temperature, top-k, top-p, min-p, XTC; then the cumulative distribution is inverted, in order
    of ids.
    """
    ids: npt.NDArray[np.intp] | None = None
    if 0 < params.top_k < len(logits):
        lowest = np.partition(logits, -params.top_k)[-params.top_k]
        ids = np.flatnonzero(logits >= lowest)
        logits = logits[ids]
    weights = np.exp((logits - logits.max()) / np.float32(params.temperature))
    floor = params.min_p  # relative to the likeliest token, whose weight is 1
    if params.top_p < 1:
        floor = max(floor, _nucleus(weights, params.top_p))
    if floor > 0:
        kept = np.flatnonzero(weights >= floor)
        ids = kept if ids is None else ids[kept]
        weights = weights[kept]
    if params.xtc_probability > 0 and uniform(seed, position, XTC) < params.xtc_probability:
        weights = _exclude_top(weights, params.xtc_threshold)
    cumulative = np.cumsum(weights, dtype=np.float64)
    target = uniform(seed, position) * cumulative[-1]
    place = int(np.searchsorted(cumulative, target, side="right"))
    return place if ids is None else int(ids[place])


def _nucleus(weights: Floats, top_p: float) -> float:
    """The least weight inside the nucleus: the fewest likeliest tokens that hold ``top_p``, one at
    least.
    """
    total = float(weights.sum(dtype=np.float64))
    few = np.partition(weights, -_FEW)[-_FEW:] if len(weights) > _FEW else weights
    if float(few.sum(dtype=np.float64)) < top_p * total:
        few = weights
    ordered = np.sort(few)[::-1]
    before = np.cumsum(ordered, dtype=np.float64) - ordered
    inside = int(np.count_nonzero(before < max(top_p, 1e-9) * total))
    return float(ordered[inside - 1])


def _exclude_top(weights: Floats, threshold: float) -> Floats:
    """XTC (by p-e-w): of the tokens at or above the threshold only the least likely stays."""
    above = weights >= threshold * weights.sum()
    if not above.any():
        return weights
    least = weights[above].min()
    return np.where(weights > least, np.float32(0), weights)


def _logprob(logits: Floats, token: int, count: int) -> TokenLogprob:
    best = float(logits.max())
    total = best + math.log(float(np.exp(logits - best).sum(dtype=np.float64)))
    top: tuple[tuple[int, float], ...] = ()
    if count:
        count = min(count, len(logits))
        places = np.argpartition(-logits, count - 1)[:count]
        order = places[np.lexsort((places, -logits[places]))]
        top = tuple((int(i), float(logits[i]) - total) for i in order)
    return TokenLogprob(token, float(logits[token]) - total, top)
