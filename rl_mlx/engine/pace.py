"""How many tokens to draft: measured acceptance against measured cost. Pure Python.

A step that verifies ``k`` draft tokens takes ``cost(k)`` seconds and, with a chance ``a`` for each
token to be accepted after the one before, gives ``1 + a + ... + a^k`` tokens. The ``k`` with the
most tokens a second is chosen; where that is 0 drafting sleeps, and is tried again after twice as
many tokens as the last time, or later: what a try lost is paid for first.
"""

from __future__ import annotations

from dataclasses import dataclass

LONGEST = 16
"""The longest draft that may be asked for."""
MOST = 8
"""The longest one that is chosen by measurement."""
_WEIGHT = 0.25  # of a new measurement of a cost
_OUTLIER = 4  # times what is known
_FIRST_SLEEP, _LONGEST_SLEEP = 32, 1024
_TRY = 2  # tokens drafted when waking up
_PRICE = 0.005  # of all steps, the most that tries of no use may take


class Costs:
    """Seconds of a step by batch size and draft length, as they were measured."""

    def __init__(self) -> None:
        self._seconds: dict[tuple[int, int], float] = {}

    def observe(self, batch: int, length: int, seconds: float) -> None:
        """A step took so long; single outliers hardly count."""
        old = self._seconds.get((batch, length))
        if old is not None:
            seconds = old + _WEIGHT * (min(seconds, _OUTLIER * old) - old)
        self._seconds[batch, length] = seconds

    def knows_plain(self, batch: int) -> bool:
        """Whether a plain step of this batch size was measured."""
        return (batch, 0) in self._seconds

    def steps(self, batch: int, length: int, seconds: float) -> float:
        """``seconds`` of a step with a draft, in plain steps.

        1 for the first of its kind, which is slow for reasons of its own (kernels are compiled).
        """
        plain, known = self._seconds.get((batch, 0)), self._seconds.get((batch, length))
        return min(seconds, _OUTLIER * known) / plain if plain and known else 1.0

    def plain_steps(self, batch: int, seconds: float) -> float:
        """``seconds`` in plain steps; none where those were not measured."""
        plain = self._seconds.get((batch, 0))
        return seconds / plain if plain else 0.0

    def ratio(self, batch: int, length: int) -> float:
        """The cost of a draft of ``length``, in plain steps; hopeful where nothing is known."""
        plain = self._seconds.get((batch, 0))
        if length == 0 or not plain:
            return 1.0
        known = [
            (abs(k - length), seconds / plain, k)
            for (b, k), seconds in self._seconds.items()
            if b == batch and k
        ]
        if not known:
            return 1.0 + 0.05 * length
        _, ratio, k = min(known)
        return max(1.0, 1.0 + (ratio - 1.0) * length / k)


@dataclass
class Pace:
    """The draft length of one sequence. ``fixed`` sets it for good."""

    costs: Costs
    fixed: int | None = None
    rate: float = 0.7
    _trust: float = 4.0  # how many tokens the rate stands for
    gain: float = 1.0
    """The estimated speed with drafts over that without, when last a length was chosen."""
    _sleep: int = 0
    _next_sleep: int = _FIRST_SLEEP
    _trying: bool = True
    _lost: float = 0.0  # by the last draft, in plain steps

    @property
    def awake(self) -> bool:
        """Whether to draft at all."""
        return self._sleep == 0

    def rest(self) -> None:
        """A plain step went by; after enough of them drafting is tried again."""
        self._sleep = max(0, self._sleep - 1)
        self._trying = self._trying or self.awake

    def length(self, batch: int) -> int:
        """How many tokens to draft now, at this batch size; with 0 sleep begins."""
        if self.fixed is not None:
            return self.fixed
        if self._trying:
            self._trying = False
            return _TRY
        best = max(range(MOST + 1), key=lambda k: self.speed(k, batch))
        self.gain = self.speed(best, batch)
        if best == 0:
            self._sleep = max(self._next_sleep, round(self._lost / _PRICE))
            self._next_sleep = min(2 * self._next_sleep, _LONGEST_SLEEP)
        return best

    def speed(self, length: int, batch: int) -> float:
        """Tokens a step, in those of a plain one."""
        expected = sum(self.rate**i for i in range(length + 1))
        return expected / self.costs.ratio(batch, length)

    def observe(self, drafted: int, accepted: int, steps: float = 1.0) -> None:
        """So many were drafted and accepted, in the time of so many plain ``steps``."""
        tried = min(accepted + 1, drafted)  # those after the first rejected say nothing
        if tried == 0:
            return
        self._lost = max(0.0, steps - 1 - accepted)
        self.rate = (self.rate * self._trust + accepted) / (self._trust + tried)
        self._trust = min(self._trust + tried, 32.0)
        if accepted == drafted:
            self._next_sleep = _FIRST_SLEEP
