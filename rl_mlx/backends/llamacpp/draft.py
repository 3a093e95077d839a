"""Guesses of the tokens to come, which the model then checks in one step: from the text so far, or
a small model.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from rl_mlx.backends.llamacpp.model import KV, CacheFull, Context, Model
from rl_mlx.backends.llamacpp.options import LlamaCppOptions
from rl_mlx.backends.llamacpp.slots import Slot, common
from rl_mlx.errors import InvalidRequest

_SURE = 0.5  # a draft model below this probability of its best token stops guessing


class Drafter(Protocol):
    """Guesses for slots that are decoding."""

    def propose(self, wanted: Sequence[tuple[Slot, int]]) -> dict[int, list[int]]:
        """Up to so many tokens for each slot, by its id."""

    def close(self) -> None:
        """Free what it holds."""


class Lookup:
    """What followed the last three (or two) tokens when they came before: prompt lookup (Saxena
    2023).
    """

    _LENGTHS = (3, 2)

    def __init__(self) -> None:
        self._seen: dict[int, tuple[object, int, dict[tuple[int, ...], int]]] = {}

    def propose(self, wanted: Sequence[tuple[Slot, int]]) -> dict[int, list[int]]:
        """See ``Drafter.propose``."""
        return {slot.id: self._follow(slot, count) for slot, count in wanted}

    def _follow(self, slot: Slot, count: int) -> list[int]:
        run = slot.run
        assert run is not None, "an idle slot has nothing to guess"
        tokens = [*slot.tokens, *slot.pending()]
        owner, done, index = self._seen.get(slot.id, (None, 0, {}))
        if owner is not run:
            done, index = 0, {}
        # The last n-gram itself is left out, or it would be found instead of an earlier one.
        for end in range(max(done, 2), len(tokens)):
            for n in self._LENGTHS:
                if end >= n:
                    index[tuple(tokens[end - n : end])] = end
        self._seen[slot.id] = (run, len(tokens), index)
        for n in self._LENGTHS:
            found = index.get(tuple(tokens[-n:]))
            if found is not None:
                return tokens[found : found + count]
        return []

    def close(self) -> None:
        """Forget everything."""
        self._seen.clear()


class DraftModel:
    """A smaller model with the same vocabulary; it keeps a cache of its own, in step with the
    target's.
    """

    def __init__(
        self, model: Model, target: Model, options: LlamaCppOptions, length: int, parallel: int,
        *, unified: bool,
    ) -> None:  # fmt: skip
        self._model = model
        check_vocabulary(model, target)
        self._context = Context(model, options, KV(), length, parallel, unified=unified)
        self._held: list[list[int]] = [[] for _ in range(parallel)]

    def propose(self, wanted: Sequence[tuple[Slot, int]]) -> dict[int, list[int]]:
        """See ``Drafter.propose``."""
        guesses: dict[int, list[int]] = {slot.id: [] for slot, _ in wanted}
        try:
            outputs = self._catch_up([slot for slot, _ in wanted])
            counts = {slot.id: count for slot, count in wanted}
            while outputs:
                tokens = {slot: self._best(index) for slot, index in outputs.items()}
                outputs = {}
                for slot, token in tokens.items():
                    if token is None:
                        continue
                    guesses[slot].append(token)
                    if len(guesses[slot]) < counts[slot]:
                        outputs[slot] = self._context.add([token], len(self._held[slot]), slot, 1)
                        self._held[slot].append(token)
                if outputs:
                    self._context.run()
        except CacheFull:
            self._clear()
            return {}
        return guesses

    def _catch_up(self, slots: Sequence[Slot]) -> dict[int, int]:
        """Feed what the draft's cache lacks of each slot; gives where their last logits are."""
        outputs: dict[int, int] = {}
        for slot in slots:
            tokens, held = [*slot.tokens, *slot.pending()], self._held[slot.id]
            length = min(common(tokens, held), len(tokens) - 1)
            self._context.keep(slot.id, length)
            del held[length:]
            while len(held) < len(tokens):
                if not self._context.room:
                    self._context.run()
                    outputs.clear()
                part = tokens[len(held) : len(held) + self._context.room]
                is_last = len(held) + len(part) == len(tokens)
                index = self._context.add(part, len(held), slot.id, int(is_last))
                held.extend(part)
                if is_last:
                    outputs[slot.id] = index
        if self._context.size:
            self._context.run()
        return outputs

    def _best(self, index: int) -> int | None:
        logits = self._context.logits(index)
        best = int(logits.argmax())
        return best if np.exp(logits - logits[best]).sum() * _SURE <= 1 else None

    def _clear(self) -> None:
        self._context.discard()
        for slot, held in enumerate(self._held):
            self._context.keep(slot, 0)
            held.clear()

    def close(self) -> None:
        """Free the draft model."""
        self._context.close()
        self._model.close()


class Both:
    """What the text has, and where it has nothing, what a draft model guesses."""

    def __init__(self, lookup: Lookup, model: DraftModel) -> None:
        self._lookup = lookup
        self._model = model

    def propose(self, wanted: Sequence[tuple[Slot, int]]) -> dict[int, list[int]]:
        """See ``Drafter.propose``."""
        found = self._lookup.propose(wanted)
        rest = [(slot, count) for slot, count in wanted if not found[slot.id]]
        return {**found, **self._model.propose(rest)} if rest else found

    def close(self) -> None:
        """Free the draft model."""
        self._lookup.close()
        self._model.close()


def check_vocabulary(draft: Model, target: Model) -> None:
    """Raise ``InvalidRequest`` unless both models mean the same by a token id (64 of them are
    compared).
    """
    step = max(1, min(draft.vocab, target.vocab) // 64)
    same = draft.vocab == target.vocab and all(
        draft.piece(t) == target.piece(t) for t in range(0, target.vocab, step)
    )
    if not same:
        raise InvalidRequest(
            f"the draft model {draft.path.name} has another vocabulary than {target.path.name}; "
            "take one of the same family"
        )
