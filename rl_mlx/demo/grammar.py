"""Topics: many ways to ask one question, and its answer. The language of the ``.txt`` files here.

A topic is a block of lines: questions (``? pattern``, or ``@macro argument`` for all the patterns
of a macro), then answer lines (``= text``). Rows ``- x | y | z`` fill ``{x}``, ``{y}``, ``{z}`` in
the topics since the last blank line. A pattern's ``(a|b|)`` is one of its alternatives, and may
hold others. ``~ text`` is plain text without a question.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib.resources import files
from random import Random

_SLOT = re.compile(r"\{(\w+)\}")

Row = dict[str, str]


@dataclass(frozen=True)
class Topic:
    """Question patterns of one answer; ``rows`` are the slot values it can be filled with."""

    questions: tuple[str, ...]
    answer: str
    rows: tuple[Row, ...] = ({},)

    def ask(self, rng: Random) -> tuple[str, str, Row]:
        """One way to ask, before its slots are filled: (question, answer, row)."""
        return choose(rng.choice(self.questions), rng), self.answer, rng.choice(self.rows)

    def every_question(self) -> Iterator[str]:
        """All questions with all rows; slots that are no column of a row stay as they are."""
        for question in itertools.chain.from_iterable(map(expand, self.questions)):
            yield from (fill(question, row) for row in self.rows)


@dataclass
class _Block:
    """The lines since the last blank line."""

    topics: list[Topic] = field(default_factory=list)
    questions: list[str] = field(default_factory=list)
    answer: list[str] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)

    def end_topic(self) -> None:
        if self.questions:
            self.topics.append(Topic(tuple(self.questions), "\n".join(self.answer)))
        self.questions, self.answer = [], []

    def end(self) -> list[Topic]:
        self.end_topic()
        if not self.rows:
            return self.topics
        return [Topic(t.questions, t.answer, tuple(self.rows)) for t in self.topics]


def choose(pattern: str, rng: Random) -> str:
    """The pattern with one random alternative of each choice."""
    while split := _first_choice(pattern):
        before, alternatives, after = split
        pattern = before + rng.choice(alternatives) + after
    return _tidy(pattern)


def expand(pattern: str) -> Iterator[str]:
    """Every text that the pattern stands for."""
    split = _first_choice(pattern)
    if split is None:
        yield _tidy(pattern)
        return
    before, alternatives, after = split
    for alternative in alternatives:
        yield from expand(before + alternative + after)


def _first_choice(pattern: str) -> tuple[str, list[str], str] | None:
    """The text before the first outermost choice, its alternatives, and the text after it."""
    start = pattern.find("(")
    if start < 0:
        return None
    depth, border, alternatives = 0, start + 1, []
    for i in range(start, len(pattern)):
        depth += {"(": 1, ")": -1}.get(pattern[i], 0)
        if depth == 0 or (depth == 1 and pattern[i] == "|"):
            alternatives.append(pattern[border:i])
            border = i + 1
        if depth == 0:
            return pattern[:start], alternatives, pattern[border:]
    raise ValueError(f"unbalanced choice in the pattern {pattern!r}")


def fill(text: str, row: Row) -> str:
    """``{x}`` becomes ``row["x"]``, and ``{X}`` the same with a capital; unknown slots stay."""

    def value(match: re.Match[str]) -> str:
        name = match[1]
        if name in row:
            return row[name]
        plain = row.get(name[0].lower() + name[1:])
        return match[0] if plain is None else plain[0].upper() + plain[1:]

    return _SLOT.sub(value, text)


def topics(name: str) -> list[Topic]:
    """The topics of the file ``name.txt``."""
    macros = lists("macros")
    found: list[Topic] = []
    block = _Block()
    for line in [*_lines(name), ""]:
        mark, _, text = line.partition(" ")
        if not line:
            found += block.end()
            block = _Block()
        elif mark == "=":
            block.answer.append(text)
        elif mark == "-":
            block.rows.append(dict(zip("xyz", (cell.strip() for cell in text.split("|")))))
        elif mark == "?" or mark.startswith("@"):
            if block.answer:
                block.end_topic()
            block.questions += (
                [text] if mark == "?" else [fill(p, {"x": text}) for p in macros[mark[1:]]]
            )
    return found


def lists(name: str) -> dict[str, list[str]]:
    """The lists of the file ``name.txt``: a line ``@title``, then an item a line."""
    found: dict[str, list[str]] = {}
    for line in _lines(name):
        if line.startswith("@"):
            items = found.setdefault(line[1:], [])
        elif line:
            items.append(line)
    return found


def plain_texts(name: str) -> list[str]:
    """The ``~`` lines of the file ``name.txt``."""
    return [line[2:] for line in _lines(name) if line.startswith("~ ")]


def _lines(name: str) -> list[str]:
    text = (files(__package__) / f"{name}.txt").read_text(encoding="utf-8")
    return [line.strip() for line in text.splitlines() if not line.startswith("#")]


def _tidy(text: str) -> str:
    return " ".join(text.split()).replace(" ,", ",").replace(" .", ".")
