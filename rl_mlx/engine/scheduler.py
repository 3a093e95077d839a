"""What runs next: continuous batching with chunked prefill. Pure Python: it sees no tensors.

First come, first served, higher ``priority`` first. Prefill chunks and decode steps take turns, so
that a running stream never waits longer than one chunk for its next token; ``ChunkSize`` sees to it
that this is not long.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Callable
from dataclasses import dataclass

from rl_mlx.engine.chunk import ChunkSize
from rl_mlx.engine.sequence import Sequence


@dataclass(frozen=True)
class Prefill:
    """Read at most ``tokens`` more of what ``sequence`` begins with."""

    sequence: Sequence
    tokens: int


@dataclass(frozen=True)
class Decode:
    """One more token for each of ``batch``, in the order of their rows."""

    batch: tuple[Sequence, ...]


Work = Prefill | Decode


class Scheduler:
    """Sequences wait, are prefilled one at a time, then run together until they are done.

    At most ``max_rows`` are in the cache at once. ``admit(sequence)`` is asked before a waiting one
    gets a row: is there memory for it?
    """

    def __init__(
        self,
        *,
        max_rows: int,
        admit: Callable[[Sequence], bool],
        chunks: ChunkSize,
    ) -> None:
        self.waiting: list[Sequence] = []
        self.prefilling: Sequence | None = None
        self.running: list[Sequence] = []
        self.chunks = chunks
        self._max_rows = max_rows
        self._admit = admit
        self._decoded_last = True

    @property
    def idle(self) -> bool:
        """Whether nothing is left to do."""
        return not (self.waiting or self.prefilling or self.running)

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
        active = [*self.running, *([self.prefilling] if self.prefilling else [])]
        if len(active) < 2:
            return None
        return max(active, key=lambda s: s.urgency)

    def plan(self) -> Work | None:
        """The next step, or None where there is nothing to start now."""
        batch = [s for s in self.running if not s.saturated]
        if self._decoded_last or not batch:
            self.prefilling = self.prefilling or self._next()
            if self.prefilling is not None:
                self._decoded_last = False
                return Prefill(self.prefilling, self.chunks.tokens(beside=bool(batch)))
        self._decoded_last = True
        return Decode(tuple(sorted(batch, key=lambda s: s.row or 0))) if batch else None

    def prefilled(self) -> None:
        """What was being read is read: its sequence runs now."""
        assert self.prefilling is not None, "nothing is being prefilled"
        self.prefilling.is_running = True
        self.running.append(self.prefilling)
        self.prefilling = None

    def remove(self, sequence: Sequence) -> None:
        """Forget a sequence, wherever it is."""
        if self.prefilling is sequence:
            self.prefilling = None
        for place in (self.waiting, self.running):
            if sequence in place:
                place.remove(sequence)

    def everything(self) -> list[Sequence]:
        """All sequences, wherever they are."""
        return [*self.running, *([self.prefilling] if self.prefilling else []), *self.waiting]

    def _next(self) -> Sequence | None:
        """The first waiting sequence, if a row and the memory for it are free."""
        if not self.waiting or len(self.running) >= self._max_rows:
            return None
        if not self._admit(self.waiting[0]):
            return None
        return self.waiting.pop(0)
