"""The sampler of a batch: one row a sequence, each with its own settings and its own seed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from rl_mlx.sample.adjust import changes, needs_tokens
from rl_mlx.sample.filters import apply_changes, filtered, pick
from rl_mlx.sample.seeds import uniform
from rl_mlx.types import SamplingParams, TokenLogprob


@dataclass(frozen=True)
class Row:
    """What the sampler needs to know of one sequence before its next token."""

    params: SamplingParams
    seed: int
    prompt: Sequence[int]
    answer: Sequence[int]
    position: int
    """Index in the answer of the token to come; beyond ``len(answer)`` while some are under way."""


@dataclass(frozen=True)
class Sampled:
    """Tokens ``[B]`` on the device, and log-probabilities where a row asked for them."""

    tokens: mx.array
    logprobs: mx.array | None = None
    top: tuple[mx.array, mx.array] | None = None

    def arrays(self) -> list[mx.array]:
        """What is to be evaluated."""
        return [self.tokens, *([] if self.logprobs is None else [self.logprobs]), *(self.top or ())]

    def read(self, rows: Sequence[SamplingParams]) -> list[tuple[int, TokenLogprob | None]]:
        """Tokens on the host; waits for the device."""
        ids = np.array(self.tokens).tolist()
        if self.logprobs is None:
            return [(token, None) for token in ids]
        logprobs = np.array(self.logprobs).tolist()
        best, values = (np.array(a).tolist() for a in self.top) if self.top else ([], [])
        read: list[tuple[int, TokenLogprob | None]] = []
        for b, (token, params) in enumerate(zip(ids, rows)):
            count = params.logprobs
            if count is None:
                read.append((token, None))
            else:
                top = tuple(zip(best[b][:count], values[b][:count])) if count else ()
                read.append((token, TokenLogprob(token, logprobs[b], top)))
        return read


class Sampler:
    """Samples for one batch composition; made anew when sequences join or leave."""

    def __init__(self, params: Sequence[SamplingParams]) -> None:
        self._params = params
        self.needs_tokens = any(needs_tokens(p) for p in params)
        self._changes_logits = self.needs_tokens or any(p.logit_bias for p in params)
        self._greedy = all(p.temperature == 0 for p in params)
        wanted = [p.logprobs for p in params if p.logprobs is not None]
        self._logprobs = max(wanted) if wanted else None

    def sample(self, logits: mx.array, rows: Sequence[Row]) -> Sampled:
        """Choose for logits ``[B, V]``; nothing is evaluated here."""
        logits = logits.astype(mx.float32)
        changed = logits
        if self._changes_logits:
            sparse = [changes(r.params, r.prompt, r.answer) for r in rows]
            if any(sparse):
                changed = apply_changes(logits, sparse)
        tokens = mx.argmax(changed, axis=-1)
        if not self._greedy:
            tokens = mx.where(self._is_greedy, tokens, self._draw(changed, rows))
        return self._with_logprobs(logits, tokens)

    @property
    def _is_greedy(self) -> mx.array:
        return mx.array([p.temperature == 0 for p in self._params])

    def _draw(self, logits: mx.array, rows: Sequence[Row]) -> mx.array:
        # Two numbers a position: one for the draw, one for the coin of XTC.
        uniforms = [uniform(r.seed, 2 * r.position) for r in rows]
        xtc = [
            p.xtc_probability > 0 and uniform(r.seed, 2 * r.position + 1) < p.xtc_probability
            for p, r in zip(self._params, rows)
        ]
        return pick(filtered(logits, self._params, xtc), uniforms)

    def _with_logprobs(self, logits: mx.array, tokens: mx.array) -> Sampled:
        if self._logprobs is None:
            return Sampled(tokens)
        logprobs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
        chosen = mx.take_along_axis(logprobs, tokens[:, None], axis=-1)[:, 0]
        count = min(self._logprobs, logits.shape[-1])
        if count == 0:
            return Sampled(tokens, chosen)
        best = mx.argsort(-logprobs, axis=-1)[:, :count]
        return Sampled(tokens, chosen, (best, mx.take_along_axis(logprobs, best, axis=-1)))
