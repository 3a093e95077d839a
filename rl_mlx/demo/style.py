"""How people type: greetings, politeness, any case, missing marks, slips of the finger."""

from __future__ import annotations

import re
from random import Random

from rl_mlx.demo.grammar import choose, lists

_QUESTION = re.compile(
    r"^((in|with|from|on|of|at) which|(of|at) what|how|why|is|are|am|do|does|did|can|could|will|"
    r"would|should|must|may|have|has|where|when)\b|\b(what|which|how many|how much|who)\b",
    re.IGNORECASE,
)
_CONTRACTIBLE = re.compile(r"\b([Ww]hat|[Ww]ho|[Hh]ow|[Ww]here) is\b")


class Style:
    """Random ways to write one and the same question."""

    def __init__(self) -> None:
        found = lists("words")
        self._before, self._after = found["before"], found["after"]

    def typed(self, question: str, rng: Random) -> str:
        """The question as somebody may type it. What follows a colon is to be copied, and stays."""
        mark = "?" if _QUESTION.search(question) else rng.choice(["", ".", "."])
        copied = ":" in question
        if rng.random() < 0.2:
            question = f"{choose(rng.choice(self._before), rng)} {question}"
        if not copied and rng.random() < 0.1:
            question = choose(f"{question} {rng.choice(self._after)}", rng)
        contracted = rng.choices([r"\1 is", r"\1's", r"\1s"], [16, 3, 1])[0]
        question = _CONTRACTIBLE.sub(contracted, question)
        if rng.random() < 0.05 and not copied:
            question = _slip(question, rng)
        dice = rng.random()
        if dice < 0.62:
            question = question[0].upper() + question[1:]
        elif dice < 0.9 and not copied:
            question = question.lower()
        elif dice < 0.92 and not copied:
            question = question.upper()
        if not copied and rng.random() < 0.75:
            question += mark if rng.random() < 0.97 else rng.choice(["!", "??", " ?", "..."])
        return question


def _slip(text: str, rng: Random) -> str:
    """One typing error in a word of at least four letters: swapped, lost or doubled."""
    words = [match.span() for match in re.finditer(r"[A-Za-z]{4,}", text)]
    if not words:
        return text
    start, end = rng.choice(words)
    i = rng.randrange(start, end - 1)
    swapped = text[i + 1] + text[i]
    return text[:i] + rng.choice([swapped, text[i], text[i] * 2 + text[i + 1]]) + text[i + 2 :]
