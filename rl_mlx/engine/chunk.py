"""How many prompt tokens a forward reads: measured cost against that of a decode step. Pure
Python.
"""

from __future__ import annotations

STEPS = 1.0
"""Decode steps that prompt tokens may take in the forward that streams go on in: a gap is then two
steps.
"""
APART = 1.5
"""The same where they take a forward of their own, which reads all weights once more: where that is
what takes the time, a step would leave room for no token. A gap is two and a half.
"""
_UNKNOWN = 64  # tokens, where nothing was measured yet
_WEIGHT = 0.25  # of a new measurement of a decode step
_OUTLIER = 4  # times what is known
_LEAST = 0.1  # of a forward, which is the prompt's though a decode step took longer before


class ChunkSize:
    """``most`` tokens while nothing else runs; beside running streams, which wait for every chunk,
    as many as take ``STEPS`` (or ``APART``) decode steps of so many streams, and at least one.

    What a token costs is what it cost in the last chunk: so fixed costs count at the size that is
    used, and attention at the depth that was reached. Decode steps are told apart by the power of
    two that their batch comes next to.
    """

    def __init__(self, most: int = 512) -> None:
        self.most = most
        self._steps: dict[int, float] = {}
        self._token: float | None = None

    def tokens(self, beside: int, *, apart: bool = False) -> int:
        """The size of the next chunk, ``beside`` so many streams, in their forward or ``apart``;
        0 where a step of theirs is to be measured first.
        """
        if not beside:
            return self.most
        step = self._steps.get(_power(beside))
        if step is None:
            return 0
        if self._token is None:
            return min(_UNKNOWN, self.most)
        steps = APART if apart else STEPS
        return max(1, min(self.most, int(steps * step / self._token)))

    def decoded(self, streams: int, seconds: float) -> None:
        """A decode step took so long; single outliers hardly count."""
        old = self._steps.get(_power(streams))
        if old is not None:
            seconds = old + _WEIGHT * (min(seconds, _OUTLIER * old) - old)
        self._steps[_power(streams)] = seconds

    def read(self, tokens: int, asked: int, seconds: float, *, decoding: int = 0) -> None:
        """A chunk of ``tokens`` took so long; one much shorter than ``asked`` for says little.

        ``decoding``: how many streams took their step in the same forward.
        """
        if self._token is not None and 2 * tokens < asked:
            return
        if decoding:
            step = self._steps.get(_power(decoding), 0.0)
            seconds = max(seconds - step, _LEAST * seconds)
        cost = seconds / tokens
        if self._token is not None:  # dearer counts at once, but for outliers, and cheaper slowly
            cost = min(cost, _OUTLIER * self._token)
            cost = max(cost, (cost + self._token) / 2)
        self._token = cost


def _power(streams: int) -> int:
    return (streams - 1).bit_length()
