"""What the tokens so far do to the next logits: penalties, bias and DRY, as sparse changes. Pure
Python.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from rl_mlx.types import SamplingParams


class Change(NamedTuple):
    """What happens to one token's logit: divided (or, below zero, multiplied) by ``factor``, then
    ``add``.
    """

    factor: float = 1.0
    add: float = 0.0


def needs_tokens(params: SamplingParams) -> bool:
    """Whether the changes depend on the tokens so far."""
    return (
        params.repetition_penalty != 1.0
        or params.frequency_penalty != 0.0
        or params.presence_penalty != 0.0
        or params.dry_multiplier > 0.0
    )


def changes(
    params: SamplingParams, prompt: Sequence[int], answer: Sequence[int]
) -> dict[int, Change]:
    """Changes by token id, after ``prompt`` and ``answer``."""
    factors: dict[int, float] = {}
    adds: defaultdict[int, float] = defaultdict(float)
    if params.repetition_penalty != 1.0:
        recent = _last([*prompt, *answer], params.penalty_window)
        factors = dict.fromkeys(recent, params.repetition_penalty)
    if params.frequency_penalty or params.presence_penalty:
        for token, count in Counter(_last(answer, params.penalty_window)).items():
            adds[token] -= params.frequency_penalty * count + params.presence_penalty
    for token, bias in params.logit_bias.items():
        adds[token] += bias
    if params.dry_multiplier > 0:
        for token, penalty in dry_penalties(params, _last([*prompt, *answer], params.dry_window)):
            adds[token] -= penalty
    return {t: Change(factors.get(t, 1.0), adds[t]) for t in factors.keys() | adds.keys()}


def dry_penalties(params: SamplingParams, tokens: Sequence[int]) -> list[tuple[int, float]]:
    """DRY ("don't repeat yourself", by p-e-w): the token that would continue a repeat pays for its
    length.

    A token that followed an earlier occurrence of the last ``n`` tokens, ``n >=
    dry_allowed_length``, pays ``dry_multiplier * dry_base ** (n - dry_allowed_length)``, for the
    longest such ``n``.
    """
    longest: dict[int, int] = {}
    end = len(tokens) - 1
    for i in range(end):
        if tokens[i] != tokens[end]:
            continue
        length = 1
        while length <= i and tokens[i - length] == tokens[end - length]:
            length += 1
        follower = tokens[i + 1]
        longest[follower] = max(longest.get(follower, 0), length)
    allowed, base = params.dry_allowed_length, params.dry_base
    return [
        (
            token,
            params.dry_multiplier * base ** min(n - allowed, 64),
        )  # beyond that: as good as never
        for token, n in longest.items()
        if n >= allowed
    ]


def _last(tokens: Sequence[int], window: int) -> Sequence[int]:
    return tokens[-window:] if window else ()


def allowed_tokens(mask: npt.NDArray[np.uint32], vocab_size: int) -> npt.NDArray[np.bool_]:
    """A mask as one bool a token, ``[vocab_size]``; tokens past the mask are not allowed."""
    bits = np.unpackbits(mask.view(np.uint8), bitorder="little", count=vocab_size)
    return bits.astype(np.bool_)
