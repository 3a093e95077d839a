"""How many prompt tokens a prefill step reads: measured cost against that of a decode step. Pure
Python.
"""

from __future__ import annotations

STEPS = 1.5
"""Decode steps that a chunk may take while streams wait for it: a gap is then two and a half.

Less would hardly get on: where reading weights is what takes time, one token costs a whole step.
"""
_UNKNOWN = 64  # tokens, where nothing was measured yet
_WEIGHT = 0.25  # of a new measurement of a decode step
_OUTLIER = 4  # times what is known
_LEAST = 0.1  # of a forward, which is the prompt's though a decode step took longer before


class ChunkSize:
    """``most`` tokens while nothing else runs; beside running streams, which wait for every chunk,
    as many as take ``STEPS`` decode steps, and at least one.

    What a token costs is what it cost in the last chunk: so fixed costs count at the size that is
    used, and attention at the depth that was reached.
    """

    def __init__(self, most: int = 512) -> None:
        self.most = most
        self._step: float | None = None
        self._token: float | None = None

    def tokens(self, *, beside: bool) -> int:
        """The size of the next chunk; ``beside``: whether streams wait for it."""
        if not beside:
            return self.most
        if self._step is None or self._token is None:
            return min(_UNKNOWN, self.most)
        return max(1, min(self.most, int(STEPS * self._step / self._token)))

    def decoded(self, seconds: float) -> None:
        """A decode step took so long; single outliers hardly count."""
        if self._step is not None:
            seconds = self._step + _WEIGHT * (min(seconds, _OUTLIER * self._step) - self._step)
        self._step = seconds

    def read(self, tokens: int, asked: int, seconds: float, *, decoding: bool = False) -> None:
        """A chunk of ``tokens`` took so long; one much shorter than ``asked`` for says little.

        ``decoding``: streams took their step in the same forward.
        """
        if self._token is not None and 2 * tokens < asked:
            return
        if decoding and self._step is not None:
            seconds = max(seconds - self._step, _LEAST * seconds)
        cost = seconds / tokens
        if self._token is not None:  # dearer counts at once, but for outliers, and cheaper slowly
            cost = min(cost, _OUTLIER * self._token)
            cost = max(cost, (cost + self._token) / 2)
        self._token = cost
