"""The training text: an endless, seeded stream of conversations, all written for this model."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass
from random import Random

from rl_mlx.demo.grammar import Row, Topic, choose, fill, lists, plain_texts, topics
from rl_mlx.demo.style import Style
from rl_mlx.demo.tasks import Exercises, Turn

# Turns in a hundred from each file of topics, and from the exercises.
_SHARES = {"about": 39, "smalltalk": 12, "facts": 17, "unknown": 7, "stories": 1, "tasks": 24}

# Conversations in a hundred with so many turns; and of those with several, how many have a name
# that is told and asked for.
_LENGTHS = {1: 82, 2: 9, 3: 5, 5: 3, 8: 1}
_NAMED = 0.25

_WORD_ENDS = ("n", "r", "s", "l", "m", "x", "t", "k", "", "", "", "")


@dataclass(frozen=True)
class Conversation:
    """Turns of (user, assistant), perhaps after a system message; or plain ``text`` instead."""

    turns: tuple[Turn, ...] = ()
    system: str | None = None
    text: str | None = None


class Corpus:
    """All topics, and the dice. ``conversations(seed)`` is the same stream wherever it runs."""

    def __init__(self) -> None:
        self._topics = {name: topics(name) for name in _SHARES if name != "tasks"}
        self._weights = {name: _cumulative(found) for name, found in self._topics.items()}
        self._plain = plain_texts("stories")
        self._words = lists("words")
        self._syllables = " ".join(self._words["syllables"]).split()
        self._exercises = Exercises()
        self._style = Style()

    def questions(self) -> Iterator[str]:
        """Every question of the topic files, before casing, greetings and typing errors."""
        for found in self._topics.values():
            for topic in found:
                yield from topic.every_question()

    def conversations(self, seed: int) -> Iterator[Conversation]:
        """Random conversations, for ever."""
        rng = Random(seed)
        while True:
            yield self._conversation(rng)

    def _conversation(self, rng: Random) -> Conversation:
        dice = rng.random()
        if dice < 0.03:
            return Conversation(text=fill(rng.choice(self._plain), self._slots(rng)))
        if dice < 0.05:
            return Conversation(text="\n".join(self._turns(rng)[0]))
        count = rng.choices(list(_LENGTHS), list(_LENGTHS.values()))[0]
        turns: list[Turn] = []
        while len(turns) < count:
            turns += self._turns(rng, follow=count > 1)
        if count > 1 and rng.random() < _NAMED:
            told, asked = self._exercises.introduction(rng)
            turns.insert(0, self._typed(told, rng))
            turns.insert(rng.randint(1, len(turns)), self._typed(asked, rng))
        system = choose(rng.choice(self._words["system"]), rng) if rng.random() < 0.12 else None
        return Conversation(tuple(turns), system)

    def _turns(self, rng: Random, follow: bool = False) -> list[Turn]:
        """One turn, or two when the second takes up the first ("and of Italy?")."""
        kind = rng.choices(list(_SHARES), list(_SHARES.values()))[0]
        if kind == "tasks":
            return [self._typed(self._exercises.exercise(rng), rng)]
        topic, turn, question = self._topic(kind, rng)
        turns = [turn]
        if follow and len(topic.rows) > 3 and rng.random() < 0.3:
            turns.append(_follow_up(topic, question, rng))
        return [self._typed(turn, rng) for turn in turns]

    def _topic(self, kind: str, rng: Random) -> tuple[Topic, Turn, str]:
        """A topic of a file, a turn about it, and the question's pattern."""
        topic = rng.choices(self._topics[kind], cum_weights=self._weights[kind])[0]
        question, answer, row = topic.ask(rng)
        return topic, self._filled(question, answer, row, rng), question

    def _typed(self, turn: Turn, rng: Random) -> Turn:
        return self._style.typed(turn[0], rng), turn[1]

    def _filled(self, question: str, answer: str, row: Row, rng: Random) -> Turn:
        """The slots filled; each ``{word}`` of a question becomes an invented word of its own."""
        slots = row or self._slots(rng)
        question = re.sub(r"\{word\}", lambda _: self._invented(rng), question)
        return fill(question, slots), fill(answer, slots)

    def _slots(self, rng: Random) -> Row:
        hero, friend = rng.sample(self._words["heroes"], 2)
        return {
            "hero": hero,
            "friend": friend,
            "short": "the " + hero.split(" ", 1)[1],
            "name": rng.choice(self._exercises.names),
            "place": rng.choice(self._words["places"]),
            "thing": rng.choice(self._words["finds"]),
        }

    def _invented(self, rng: Random) -> str:
        syllables = rng.choices(self._syllables, k=rng.randint(2, 3))
        word = "".join(syllables) + rng.choice(_WORD_ENDS)
        return word.capitalize() if rng.random() < 0.3 else word


def _cumulative(found: list[Topic]) -> list[float]:
    """A topic comes up more often the more ways there are to ask, but not in proportion."""
    return list(itertools.accumulate((len(t.questions) * len(t.rows)) ** 0.5 for t in found))


def _follow_up(topic: Topic, question: str, rng: Random) -> Turn:
    row = rng.choice(topic.rows)
    slot = "{x}" if "{x}" in question else "{y}"
    asked = choose("(and|and of|and for|what about|how about)", rng)
    return fill(f"{asked} {slot}", row), fill(topic.answer, row)
