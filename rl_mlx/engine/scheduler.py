"""What runs next: continuous batching with chunked prefill. Pure Python: it sees no tensors.

First come, first served, higher ``priority`` first. Where the model can, one forward takes the next
token of every running stream and a piece of the prompts that are being read; else the two take
turns. Either way a running stream never waits longer than one piece for its next token;
``ChunkSize`` sees to it that this is not long.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Callable
from dataclasses import dataclass

from rl_mlx.engine.chunk import ChunkSize
from rl_mlx.engine.sequence import Sequence

_SHARED = 16
"""Tokens in common for which a sequence waits until another one has read them, and takes them from
the prefix tree.
"""


@dataclass(frozen=True)
class Read:
    """At most ``tokens`` more of what ``sequence`` begins with."""

    sequence: Sequence
    tokens: int


@dataclass(frozen=True)
class Work:
    """A forward: one more token for each of ``batch``, and ``reads`` of ``tokens`` together at
    most. Both are in the order of rows. All reads but the last are to the end.
    """

    batch: tuple[Sequence, ...]
    reads: tuple[Read, ...]
    tokens: int


class Scheduler:
    """Sequences wait, are read, then run together until they are done.

    At most ``max_rows`` are in the cache at once. ``admit(sequence)`` is asked before a waiting one
    gets a row: is there memory for it? With ``packs`` several are read together.
    """

    def __init__(
        self,
        *,
        max_rows: int,
        admit: Callable[[Sequence], bool],
        chunks: ChunkSize,
        packs: bool,
    ) -> None:
        self.waiting: list[Sequence] = []
        self.reading: list[Sequence] = []
        self.running: list[Sequence] = []
        self.chunks = chunks
        self._max_rows = max_rows
        self._admit = admit
        self._packs = packs
        self._read_last = False

    @property
    def idle(self) -> bool:
        """Whether nothing is left to do."""
        return not (self.waiting or self.reading or self.running)

    @property
    def crowd(self) -> int:
        """Rows that are wanted: those in use, and one for every sequence that could have one."""
        return min(len(self.everything()), self._max_rows)

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence in the place that its priority and its age give it."""
        insort(self.waiting, sequence, key=lambda s: s.urgency)

    def preempt(self, sequence: Sequence) -> None:
        """Back to waiting."""
        self.remove(sequence)
        sequence.is_running = False
        self.add(sequence)

    def victim(self) -> Sequence | None:
        """Who gives way when memory runs out: of the least urgent the last; None if one is left."""
        active = [*self.running, *self.reading]
        if len(active) < 2:
            return None
        return max(active, key=lambda s: s.urgency)

    def entering(self) -> Sequence | None:
        """Who is to get a row now, and is being read from then on."""
        rowless = next((s for s in self.reading if s.row is None), None)
        if rowless is not None or not self.waiting:
            return rowless
        first = self.waiting[0]
        if len(self.running) + len(self.reading) >= self._max_rows:
            return None
        if (self.reading and not self._joins(first)) or not self._admit(first):
            return None
        self.reading.append(self.waiting.pop(0))
        return first

    def _joins(self, sequence: Sequence) -> bool:
        """Whether a sequence may be read together with those that are."""
        left = sum(s.unread for s in self.reading)
        if not self._packs or left >= self.chunks.tokens(len(self.batch)):
            return False
        return not any(_shares(other, sequence) for other in self.reading)

    @property
    def batch(self) -> tuple[Sequence, ...]:
        """Those that go on to their next token, in the order of their rows."""
        return tuple(sorted((s for s in self.running if not s.saturated), key=_row))

    def plan(self, *, together: bool) -> Work | None:
        """The next forward, or None where there is nothing to start now.

        ``together``: whether prompts may be read in the same one that streams go on in.
        """
        batch = self.batch
        tokens = self.chunks.tokens(len(batch), apart=not together)
        if batch and self._read_last and not together:
            tokens = 0
        reads = self._share(tokens)
        if reads and not together:
            batch = ()
        return Work(batch, reads, tokens) if batch or reads else None

    def _share(self, tokens: int) -> tuple[Read, ...]:
        reads = []
        for sequence in sorted((s for s in self.reading if s.row is not None), key=_row):
            if tokens > 0:
                reads.append(Read(sequence, tokens))
                tokens -= sequence.unread
        return tuple(reads)

    def started(self, work: Work) -> None:
        """A plan is carried out; sequences that are read to their end run now."""
        self._read_last = bool(work.reads)
        for read in work.reads:
            if read.sequence.prefilled:
                self.reading.remove(read.sequence)
                read.sequence.is_running = True
                self.running.append(read.sequence)

    def remove(self, sequence: Sequence) -> None:
        """Forget a sequence, wherever it is."""
        for place in (self.reading, self.running, self.waiting):
            if sequence in place:
                place.remove(sequence)

    def everything(self) -> list[Sequence]:
        """All sequences, wherever they are."""
        return [*self.running, *self.reading, *self.waiting]


def _row(sequence: Sequence) -> int:
    assert sequence.row is not None, "a sequence that runs or is read has a row"
    return sequence.row


def _shares(reading: Sequence, other: Sequence) -> bool:
    """Whether two begin alike for ``_SHARED`` tokens more than the first one has read."""
    last = reading.cached + _SHARED
    if min(reading.known, other.known) < last:
        return False
    return reading.tokens(0, last) == other.tokens(0, last)
