"""Stop strings, matched in a stream of text whatever the pieces it comes in."""

from __future__ import annotations

from collections.abc import Sequence


class StopMatcher:
    """Finds the first stop string in a stream, and holds back only what could still become one.

    The first is the one that ends earliest; of several that end there, the longest. What ``feed``
    emits before it stops is the text before that match.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple({stop for stop in stops if stop})
        self.matched: str | None = None
        """The stop string that came."""
        self._held = ""
        self._stopped = False

    def feed(self, text: str) -> tuple[str, bool]:
        """Take more text; gives the text that is certain not to be of a stop, and whether one came.

        After a stop everything is dropped.
        """
        if self._stopped:
            return "", True
        if not self._stops:
            return text, False
        seen = self._held + text
        match = self._first(seen)
        if match is not None:
            start, end = match
            self._held, self._stopped, self.matched = "", True, seen[start:end]
            return seen[:start], True
        keep = self._could_begin(seen)
        self._held = seen[keep:]
        return seen[:keep], False

    def flush(self) -> str:
        """What was held back, when the stream has ended without a stop."""
        held, self._held = self._held, ""
        return held

    def _first(self, text: str) -> tuple[int, int] | None:
        """Where the stop string that ends first begins and ends."""
        best: tuple[int, int] | None = None
        for stop in self._stops:
            start = text.find(stop)
            if start >= 0 and (best is None or (start + len(stop), start) < best):
                best = (start + len(stop), start)
        return None if best is None else (best[1], best[0])

    def _could_begin(self, text: str) -> int:
        """The first index from which the rest of ``text`` is the beginning of a stop string."""
        first = len(text)
        for stop in self._stops:
            start = text.find(stop[0], max(0, len(text) - len(stop) + 1), first)
            while start >= 0 and not stop.startswith(text[start:]):
                start = text.find(stop[0], start + 1, first)
            if start >= 0:
                first = start
        return first
