"""Which sequence of llama.cpp's cache a request gets, and what of it is there already."""

from __future__ import annotations

import time
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field

from rl_mlx.engine.sequence import Sequence

WORTH_WAITING = 32
"""Tokens of a prefix under way that are worth waiting for, rather than computing them twice."""


@dataclass(eq=False)
class Slot:
    """One sequence of the cache: the tokens its cells hold, and the request that uses it now.

    After a request the tokens stay, as a prefix for those that come.
    """

    id: int
    tokens: list[int] = field(default_factory=list)
    run: Sequence | None = None
    used: float = 0.0

    def pending(self) -> list[int]:
        """Tokens of the request that are not in the cells: part of the prompt, or the last one
        sampled.
        """
        assert self.run is not None, "an idle slot has nothing to do"
        done, prompt = len(self.tokens), self.run.prompt
        if done >= len(prompt):
            return self.run.answer[done - len(prompt) :]
        return [*prompt[done:], *self.run.answer]

    @property
    def is_decoding(self) -> bool:
        """Whether all that is pending is the last sampled token."""
        run = self.run
        return (
            run is not None
            and bool(run.answer)
            and (len(self.tokens) + 1 == len(run.prompt) + len(run.answer))
        )


@dataclass(frozen=True)
class Place:
    """Where a request goes: into ``slot``, with ``length`` tokens taken over from ``source``."""

    slot: Slot
    source: Slot
    length: int


class Slots:
    """All sequences of one cache.

    ``can_cut`` says that a prefix of a sequence can be used by itself, ``worth`` how many tokens
    are worth being taken over from another slot.
    """

    def __init__(self, count: int, *, can_cut: bool, worth: int) -> None:
        self.all = [Slot(n) for n in range(count)]
        self._can_cut = can_cut
        self._worth = worth

    @property
    def running(self) -> list[Slot]:
        """Slots in use, those that came first first."""
        return sorted((s for s in self.all if s.run is not None), key=lambda s: s.used)

    @property
    def tokens(self) -> int:
        """Tokens held, each counted once a slot."""
        return sum(len(s.tokens) for s in self.all)

    def find(self, prompt: Seq[int]) -> Place | None:
        """A place for a prompt, or None where it has to wait for a slot or a prefix under way."""
        idle = [s for s in self.all if s.run is None]
        if not idle:
            return None
        lengths = {s.id: self._usable(s, prompt) for s in self.all}
        source = max(self.all, key=lambda s: lengths[s.id])
        length = lengths[source.id]
        for other in self.all:
            if self._can_cut and other.run is not None and not other.run.answer:
                under_way = min(common(prompt, other.run.prompt), len(prompt) - 1)
                if under_way >= max(length, len(other.tokens)) + WORTH_WAITING:
                    return None
        if source.run is None and length == len(source.tokens):
            return Place(source, source, length)
        # Empty slots first, then those not used for longest; the source itself last.
        slot = min(idle, key=lambda s: (s is source, bool(s.tokens), s.used))
        if slot is not source and length < self._worth:
            return Place(slot, slot, lengths[slot.id])
        return Place(slot, source, length)

    def _usable(self, slot: Slot, prompt: Seq[int]) -> int:
        """Tokens of ``prompt`` that can be taken over; the last one is always computed, for its
        logits.
        """
        length = min(common(prompt, slot.tokens), len(prompt) - 1)
        return length if self._can_cut or length == len(slot.tokens) else 0

    def oldest_idle(self) -> Slot | None:
        """The idle slot whose tokens were not used for longest."""
        idle = [s for s in self.all if s.run is None and s.tokens]
        return min(idle, key=lambda s: s.used, default=None)


def occupy(slot: Slot, run: Sequence) -> None:
    """Let a request use a slot from now on."""
    slot.run, slot.used = run, time.perf_counter()


def common(a: Seq[int], b: Seq[int]) -> int:
    """Length of the common prefix; by halves, because comparing slices is fast."""
    low, high = 0, min(len(a), len(b))
    while low < high:
        middle = (low + high + 1) // 2
        if list(a[low:middle]) == list(b[low:middle]):
            low = middle
        else:
            high = middle - 1
    return low
