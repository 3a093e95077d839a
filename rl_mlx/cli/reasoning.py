"""Tells a model's reasoning (``<think>...</think>``) from its answer while it streams."""

from __future__ import annotations

OPEN, CLOSE = "<think>", "</think>"


class Splitter:
    """Feed it text as it comes; it gives ``(is_reasoning, text)`` pieces.

    Only the very start of an answer opens reasoning; ``inside=True`` where the template has opened
    it.
    """

    def __init__(self, *, inside: bool = False) -> None:
        self._inside = inside
        self._open = inside  # decided: whatever comes first is no opening tag any more
        self._held = ""
        self._fresh = True  # nothing was given since the last tag: drop blank text

    def feed(self, text: str) -> list[tuple[bool, str]]:
        """Pieces that are certain; the start of what may become a tag is held back."""
        self._held += text
        pieces: list[tuple[bool, str]] = []
        if not self._open:
            start = self._held.lstrip()
            if OPEN.startswith(start[: len(OPEN)]) and len(start) < len(OPEN):
                return pieces
            self._open = True
            if start.startswith(OPEN):
                self._inside, self._held = True, start[len(OPEN) :]
        if self._inside and CLOSE in self._held:
            before, _, self._held = self._held.partition(CLOSE)
            self._give(pieces, before.rstrip())
            self._inside, self._fresh = False, True
        cut = len(self._held)
        if self._inside:  # blank space before the tag, and the tag's own start
            cut = len(self._held[: cut - _overlap(self._held, CLOSE)].rstrip())
        ready, self._held = self._held[:cut], self._held[cut:]
        self._give(pieces, ready)
        return pieces

    def flush(self) -> list[tuple[bool, str]]:
        """What was held back, at the end."""
        pieces: list[tuple[bool, str]] = []
        self._give(pieces, self._held)
        self._held = ""
        return pieces

    def _give(self, pieces: list[tuple[bool, str]], text: str) -> None:
        text = text.lstrip() if self._fresh else text
        if text:
            self._fresh = False
            pieces.append((self._inside, text))


def _overlap(text: str, tag: str) -> int:
    """How many characters at the end of ``text`` may be the start of ``tag``."""
    return next((n for n in range(len(tag) - 1, 0, -1) if text.endswith(tag[:n])), 0)
