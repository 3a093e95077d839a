"""The sampler of a batch: one row a sequence, each with its own settings and its own seed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from rl_mlx.sample.adjust import allowed_tokens, changes, needs_tokens
from rl_mlx.sample.filters import apply_changes, filtered, pick
from rl_mlx.sample.seeds import ACCEPT, DRAW, PROPOSE, XTC, uniform
from rl_mlx.sample.verify import Draft, verify
from rl_mlx.types import Matcher, SamplingParams, TokenLogprob


@dataclass(frozen=True)
class Row:
    """What the sampler needs to know of one sequence before its next token."""

    params: SamplingParams
    seed: int
    prompt: Sequence[int]
    answer: Sequence[int]
    position: int
    """Index in the answer of the token to come; beyond ``len(answer)`` while some are under way."""
    matcher: Matcher | None = None
    """The answer's grammar, as far as it has come."""


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
        self.needs_tokens = any(needs_tokens(p) or p.grammar is not None for p in params)
        self._changes_logits = self.needs_tokens or any(p.logit_bias for p in params)
        self._greedy = all(p.temperature == 0 for p in params)
        wanted = [p.logprobs for p in params if p.logprobs is not None]
        self._logprobs = max(wanted) if wanted else None

    def sample(self, logits: mx.array, rows: Sequence[Row]) -> Sampled:
        """Choose for logits ``[B, V]``; nothing is evaluated here."""
        logits = logits.astype(mx.float32)
        tokens, _ = self._choose(logits, rows, DRAW)
        return self._with_logprobs(logits, tokens)

    def propose(self, logits: mx.array, rows: Sequence[Row]) -> tuple[mx.array, mx.array]:
        """Draft tokens ``[B]`` from a draft model's logits, and those logits, filtered."""
        return self._choose(logits.astype(mx.float32), rows, PROPOSE)

    def verify(
        self, logits: mx.array, draft: Draft, rows: Sequence[Sequence[Row]]
    ) -> tuple[mx.array, Sampled]:
        """Check a draft against logits ``[B, K + 1, V]``; ``rows`` are those of each position.

        How many tokens each row accepts ``[B]``, and what was sampled: the accepted draft tokens,
        the one after them, and what comes behind it is of no use, ``[B, K + 1]``.
        """
        logits = logits.astype(mx.float32)
        batch, length, vocab = logits.shape
        flat = [row for each in rows for row in each]
        changed = self._changed(logits.reshape(-1, vocab), flat)
        best = mx.argmax(changed, axis=-1).reshape(batch, length)
        target = changed
        if not self._greedy:
            target = self._filtered(changed, flat)
        accepted, last = verify(
            target.reshape(batch, length, vocab), best,
            [each[0].params.temperature == 0 for each in rows], draft,
            [[uniform(r.seed, r.position, ACCEPT) for r in each[:-1]] for each in rows],
            [[uniform(r.seed, r.position, DRAW) for r in each] for each in rows],
        )  # fmt: skip
        tokens = mx.concatenate([draft.tokens, last[:, None]], axis=1)
        tokens = mx.put_along_axis(tokens, accepted[:, None], last[:, None], axis=1)
        sampled = self._with_logprobs(logits.reshape(-1, vocab), tokens.reshape(-1))
        return accepted, sampled

    def _choose(
        self, logits: mx.array, rows: Sequence[Row], purpose: int
    ) -> tuple[mx.array, mx.array]:
        changed = self._changed(logits, rows)
        tokens = mx.argmax(changed, axis=-1)
        if self._greedy:
            return tokens, changed
        kept = self._filtered(changed, rows)
        drawn = pick(kept, [uniform(r.seed, r.position, purpose) for r in rows])
        is_greedy = mx.array([r.params.temperature == 0 for r in rows])
        return mx.where(is_greedy, tokens, drawn), kept

    def _changed(self, logits: mx.array, rows: Sequence[Row]) -> mx.array:
        """After penalties, bias, DRY and the grammar."""
        if not self._changes_logits:
            return logits
        sparse = [changes(r.params, r.prompt, r.answer) for r in rows]
        changed = apply_changes(logits, sparse) if any(sparse) else logits
        if all(r.matcher is None for r in rows):
            return changed
        mx.async_eval(logits)  # type: ignore[no-untyped-call]  # the device works meanwhile
        vocab = logits.shape[-1]
        allowed = [
            np.ones(vocab, np.bool_) if m is None else allowed_tokens(m.mask(), vocab)
            for m in (r.matcher for r in rows)
        ]
        return mx.where(mx.array(np.stack(allowed)), changed, -mx.inf)

    def _filtered(self, logits: mx.array, rows: Sequence[Row]) -> mx.array:
        xtc = [
            r.params.xtc_probability > 0
            and uniform(r.seed, r.position, XTC) < r.params.xtc_probability
            for r in rows
        ]
        return filtered(logits, [r.params for r in rows], xtc)

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
