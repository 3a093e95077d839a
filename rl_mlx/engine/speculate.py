"""Proposers of the tokens to come: the text itself, and a smaller model."""

from __future__ import annotations

import logging
from collections.abc import Sequence as Seq
from typing import Protocol

import mlx.core as mx
import numpy as np

from rl_mlx.cache.arena import Arena
from rl_mlx.cache.packed import forward
from rl_mlx.engine.pace import LONGEST, Costs, Pace
from rl_mlx.engine.sequence import Sequence
from rl_mlx.errors import InvalidRequest, RlMlxError
from rl_mlx.model.model import Model
from rl_mlx.model.plan import StateSpec
from rl_mlx.sample.sampler import Row, Sampler
from rl_mlx.sample.verify import Draft

Wanted = Seq[tuple[Sequence, int]]
log = logging.getLogger(__name__)


class Proposer(Protocol):
    """Drafts tokens for sequences that are running.

    A model's own head for several tokens (MTP) would be one more: it is made where the others are,
    in the backend, where it can be given the runner whose last hidden states it goes on from.
    """

    def propose(self, wanted: Wanted) -> Draft | None:
        """At most so many tokens for each, in that order; None where there are none for any."""

    def forget(self, sequence: Sequence) -> None:
        """The sequence is no longer running."""


class Lookup:
    """What followed the last three tokens (or two) when they came before (prompt lookup, Saxena
    2023).
    """

    _LENGTHS = (3, 2)

    def __init__(self) -> None:
        self._seen: dict[Sequence, tuple[int, dict[tuple[int, ...], int]]] = {}

    def propose(self, wanted: Wanted) -> Draft | None:
        """Constant time a token: an index of n-grams grows with the sequence."""
        return _certain([self.follow(sequence, count) for sequence, count in wanted])

    def follow(self, sequence: Sequence, count: int) -> tuple[int, ...]:
        """The guess for one sequence."""
        known = sequence.known
        done, index = self._seen.get(sequence, (0, {}))
        fresh = sequence.tokens(max(0, done - 3), known)
        first = max(0, done - 3)
        # The n-gram at the very end is left out: it would hide the earlier one that is looked for.
        for end in range(max(done, 2), known):
            for n in self._LENGTHS:
                if end - n >= first:
                    index[fresh[end - n - first : end - first]] = end
        self._seen[sequence] = known, index
        for n in self._LENGTHS:
            found = index.get(sequence.tokens(known - n, known)) if known >= n else None
            if found is not None:
                return sequence.tokens(found, min(found + count, known))
        return ()

    def forget(self, sequence: Sequence) -> None:
        """Drop its index."""
        self._seen.pop(sequence, None)


def _certain(guesses: Seq[Seq[int]]) -> Draft | None:
    """A draft of tokens that nothing was drawn for."""
    longest = max(map(len, guesses))
    if longest == 0:
        return None
    padded = [[*guess, *[0] * (longest - len(guess))] for guess in guesses]
    return Draft(mx.array(padded), [len(g) for g in guesses])


class DraftModel:
    """A smaller model of the same vocabulary, with an arena of its own whose rows follow the
    target's.
    """

    _NEAR = 8  # tokens a row may lag behind and still be fed with the others

    def __init__(self, model: Model, vocab: int, chunk: int = 128) -> None:
        """``vocab``: the width of the target's logits. ``chunk``: tokens of a prompt that are read
        at a time, while streams wait. Raises ``InvalidRequest`` for a recurrent model.
        """
        if any(isinstance(spec, StateSpec) for spec in model.cache_specs):
            raise InvalidRequest(
                "a recurrent model cannot be a draft: take one with attention alone"
            )
        self._model = model
        self._vocab = vocab
        self._chunk = chunk
        self._arena = Arena(model.cache_specs, model.dtype, chunk)
        self._owners: list[Sequence] = []
        self._fed: dict[Sequence, tuple[int, list[int]]] = {}

    def bytes_for(self, rows: int, length: int) -> int:
        """Bytes of its cache beside a target's of ``rows`` rows of ``length`` tokens."""
        return self._arena.bytes_for(rows, length)

    def propose(self, wanted: Wanted) -> Draft | None:
        """One token after the other, for all rows at once, with each request's own sampler."""
        counts = dict(wanted)
        self._settle(list(counts))  # those that sleep keep their rows: they wake up again
        if not self._catch_up():
            return None
        sampler = Sampler([s.request.params for s in self._owners])
        drafted: list[list[int]] = [[] for _ in self._owners]
        tokens, found, logits = self._last_tokens(), [], []
        for step in range(max(counts.values())):
            rows = [_row(s, d) for s, d in zip(self._owners, drafted)]
            token, kept = sampler.propose(self._head(tokens), rows)
            found.append(token)
            logits.append(kept)
            if sampler.needs_tokens:
                for each, value in zip(drafted, np.array(token).tolist()):
                    each.append(value)
            else:
                for each in drafted:
                    each.append(0)  # only their number counts
            if step + 1 < max(counts.values()):
                tokens = token[:, None]
        return self._draft(found, logits, counts)

    def _draft(
        self,
        found: list[mx.array],
        logits: list[mx.array],
        counts: dict[Sequence, int],
    ) -> Draft:
        """In the order that was asked for; of who wanted none, none count."""
        rows = {s: row for row, s in enumerate(self._owners)}
        places = mx.array([rows[s] for s in counts])
        tokens, kept = mx.stack(found, axis=1), mx.stack(logits, axis=1)
        for s, guess in zip(self._owners, np.array(tokens).tolist()):
            self._fed[s] = s.known, guess[:-1]  # the last one is drafted, and not fed
        is_greedy = all(s.request.params.temperature == 0 for s in counts)
        return Draft(tokens[places], list(counts.values()), None if is_greedy else kept[places])

    def _head(self, tokens: mx.array) -> mx.array:
        """Logits after ``tokens`` ``[rows, n]``, which every row is fed."""
        count = tokens.shape[1]
        hidden = self._model.forward(tokens, self._arena.begin(0, len(self._owners), count))
        self._arena.advance(0, [count] * len(self._owners))
        logits = self._model.head(hidden[:, -1])[:, : self._vocab]
        missing = self._vocab - logits.shape[-1]  # rows that only pad the larger vocabulary
        return (
            mx.pad(logits, [(0, 0), (0, missing)], constant_values=-mx.inf) if missing else logits
        )

    def _settle(self, sequences: list[Sequence]) -> None:
        """Rows for exactly these sequences, with what stays true of what they were fed."""
        for owner in [o for o in self._owners if o not in sequences]:
            self.forget(owner)
        for s in sequences:
            if s not in self._owners:
                self._arena.add_row()
                self._owners.append(s)
                self._fed[s] = 0, []
            known, guess = self._fed[s]
            came = s.tokens(known, s.known)
            right = next((i for i, (a, b) in enumerate(zip(guess, came)) if a != b), None)
            right = min(len(guess), len(came)) if right is None else right
            row = self._owners.index(s)
            self._arena.lengths[row] = min(known + right, s.known - 1)

    def _catch_up(self) -> bool:
        """Read a chunk of the rows that lag far behind; whether none does any more."""
        near, lengths = min(self._NEAR, *(s.known for s in self._owners)), self._arena.lengths
        behind = [r for r, s in enumerate(self._owners) if s.known - lengths[r] > near]
        spans, tokens, room = [], [], self._chunk
        for row in behind if self._model.packs else behind[:1]:
            s, first = self._owners[row], lengths[row]
            last = min(s.known - 1, first + room)
            if last > first:
                spans.append((row, row + 1, last - first))
                tokens.append(mx.array(s.tokens(first, last)))
                self._fed[s] = last, []
                room -= last - first
        if spans:
            forward(self._model, self._arena, spans, tokens)
            mx.eval(self._arena.arrays())
        return all(s.known - n <= near for s, n in zip(self._owners, lengths))

    def _last_tokens(self) -> mx.array:
        """What rows lack, as many tokens of each, to be fed together."""
        lag = max(s.known - n for s, n in zip(self._owners, self._arena.lengths))
        self._arena.lengths[:] = [s.known - lag for s in self._owners]
        return mx.array([s.tokens(s.known - lag, s.known) for s in self._owners])

    def forget(self, sequence: Sequence) -> None:
        """Give its row back."""
        self._fed.pop(sequence, None)
        if sequence not in self._owners:
            return
        row, last = self._owners.index(sequence), len(self._owners) - 1
        self._arena.copy_row(last, row)
        self._owners[row] = self._owners[last]
        self._owners.pop()
        self._arena.drop_row()


def _row(sequence: Sequence, drafted: list[int]) -> Row:
    """What the sampler needs to know before the next draft token."""
    answer = [*sequence.answer, *drafted]
    return Row(sequence.request.params, sequence.seed, sequence.prompt, answer, len(answer))


def _room(sequence: Sequence) -> int:
    """Tokens that may be drafted before the answer is as long as it may be."""
    return max(0, min(LONGEST, sequence.limit - len(sequence.answer) - 1))


def _forced(sequence: Sequence) -> list[int]:
    """What the grammar leaves no choice about; an error in it is met when the mask is made."""
    matcher = sequence.request.matcher
    if matcher is None:
        return []
    try:
        return matcher.forced()
    except RlMlxError:
        return []


class Both:
    """The text where it has a guess for every sequence, else the model."""

    def __init__(self, lookup: Lookup, model: DraftModel) -> None:
        self._lookup = lookup
        self._model = model

    def propose(self, wanted: Wanted) -> Draft | None:
        """See ``Proposer.propose``."""
        found = self._lookup.propose(wanted)
        if found is not None and all(n for n, (_, count) in zip(found.counts, wanted) if count):
            return found
        return self._model.propose(wanted)

    def forget(self, sequence: Sequence) -> None:
        """Forgotten by both."""
        self._lookup.forget(sequence)
        self._model.forget(sequence)


class Speculator:
    """Drafts for a batch: a proposer, and a pace for each sequence."""

    def __init__(self, proposer: Proposer | None = None, fixed: int | None = None) -> None:
        """``fixed`` is a draft length for all, instead of one that follows what was measured.

        Without a proposer only what a grammar forces is drafted.
        """
        self._proposer = proposer
        self._fixed = fixed
        self._costs = Costs()
        self._paces: dict[Sequence, Pace] = {}
        self._failed = False
        self._spent = 0.0  # seconds of drafting that gave no draft

    def wants(self, batch: Seq[Sequence]) -> bool:
        """Whether some sequence may be worth a draft now; to judge it, plain steps come first."""
        if any(s.request.matcher is not None for s in batch):
            return True
        if (
            self._proposer is None
            or self._failed
            or (self._fixed is None and not self._costs.knows_plain(len(batch)))
        ):
            return False
        return any(self._pace(s).awake for s in batch)

    def draft(self, batch: Seq[Sequence]) -> Draft | None:
        """A draft for the batch, a row a sequence; None where a plain step is better."""
        forced = [_forced(s)[: _room(s)] for s in batch]
        if any(forced) or self._proposer is None or self._failed:
            return _certain(forced)
        wanted = []
        for s in batch:
            pace = self._pace(s)
            length = pace.length(len(batch)) if pace.awake else 0
            wanted.append((s, min(length, _room(s))))
        if not any(count for _, count in wanted):
            return None
        try:
            return self._proposer.propose(wanted)
        except Exception:
            log.warning("drafting failed; going on without it", exc_info=True)
            self._failed = True
            return None

    def rest(self, batch: Seq[Sequence]) -> None:
        """The batch takes a plain step."""
        for s in batch:
            self._pace(s).rest()

    def spent(self, seconds: float) -> None:
        """Drafting took so long and gave nothing yet (a prompt was read); the next draft pays."""
        self._spent += seconds

    def observe_plain(self, batch: int, seconds: float) -> None:
        """A plain step took so long."""
        self._costs.observe(batch, 0, seconds)

    def observe(
        self, batch: Seq[Sequence], draft: Draft, accepted: Seq[int], seconds: float
    ) -> None:
        """A step with a draft took so long, drafting included."""
        length = draft.tokens.shape[1]
        steps = self._costs.steps(len(batch), length, seconds)
        steps += self._costs.plain_steps(len(batch), self._spent)
        self._spent = 0.0
        self._costs.observe(len(batch), length, seconds)
        for s, count, right in zip(batch, draft.counts, accepted):
            pace = self._pace(s)
            pace.observe(count, right, steps)
            s.drafted += count
            s.accepted += right
            s.gain = pace.gain

    def forget(self, sequence: Sequence) -> None:
        """The sequence is no longer running."""
        self._paces.pop(sequence, None)
        if self._proposer is not None:
            self._proposer.forget(sequence)

    def _pace(self, sequence: Sequence) -> Pace:
        if sequence not in self._paces:
            self._paces[sequence] = Pace(self._costs, self._fixed)
        return self._paces[sequence]
