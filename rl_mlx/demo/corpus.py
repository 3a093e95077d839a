"""The training text: an endless, seeded stream of conversations, all of it written for the demo model."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass
from random import Random

from rl_mlx.demo import tasks
from rl_mlx.demo.grammar import Row, Topic, choose, fill, plain_texts, topics

Turn = tuple[str, str]

_SHARES = {"about": 38, "smalltalk": 13, "facts": 17, "unknown": 8, "stories": 3, "tasks": 21}

_SYSTEM = (
    "You are (a|) (helpful|friendly|small|good|kind) (assistant|model|chatbot).",
    "You are (rl-mlx|the demo model|an assistant).",
    "(Answer|Reply) (briefly|in one sentence|politely|shortly|in English).",
    "Be (brief|kind|helpful|concise|honest).",
    "You are a (teacher|pirate|poet|robot|programmer). (Answer the user.|Help the user.|)",
)

_BEFORE = (
    "(please|pls|please,)",
    "(hey|hi|hello|hello there|ok|okay|well|so|now|um|good|right|oh|and|also)(,|)",
    "(a|one|quick|another|next|my) question:",
    "(tell me|tell me please|I wonder|I was wondering|say|just tell me)(,|:|)",
    "(I am new here|sorry|excuse me|one more thing|just curious|help)(.|,|:)",
    "(hello|hi|hey|good morning|thanks)(!|.)",
)
_AFTER = (
    "please",
    ", please",
    "(for me|now|then|exactly|again|today|here|actually|by the way|btw)",
    ", (do you know|can you tell me|tell me|my friend|thanks|if I may ask)",
    "thanks",
)
_QUESTION = re.compile(
    r"^(what|who|how|which|where|when|why|is|are|am|do|does|did|can|could|will|would|should|must|may|have|has|in which|"
    r"with which|from which|on which|of which|at which|of what|at what)\b|\b(what|which|how many|how much|who)\b",
    re.IGNORECASE,
)

_HEROES = (
    "a fox;a bear;a cat;a dog;a mouse;a frog;a duck;a rabbit;a hen;a horse;a wolf;a sheep;a bee;an owl;a little girl;"
    "a little boy;a goat;a snail;a whale;a robot;a king;a dragon;a llama;a penguin;a lion;a pig"
).split(";")
_PLACES = (
    "the sea;a big forest;an old bridge;the river;a green hill;the village;a tall tree;the pond;a small house;"
    "the market;the mountain;an old mill;the garden;the castle"
).split(";")
_FINDS = (
    "a red ball;a small key;an apple;a golden coin;an old book;a blue hat;a bright lamp;a loaf of bread;a warm coat;"
    "a shiny stone;a boat;a drum;a letter;a bell"
).split(";")
_SYLLABLES = "ba be bo da di du fa fi ga go gu ha hi ka ke ko la le lo ma mi mu na ne no pa po ra ri ro sa se ta ti to va vo wa za zi".split()
_ENDS = ("n", "r", "s", "l", "m", "x", "t", "k", "", "", "", "")


@dataclass(frozen=True)
class Conversation:
    """Turns of (user, assistant), perhaps after a system message; or, without turns, plain ``text``."""

    turns: tuple[Turn, ...] = ()
    system: str | None = None
    text: str | None = None


class Corpus:
    """All topics, and the dice. ``conversations(seed)`` is the same stream wherever it runs."""

    def __init__(self) -> None:
        names = [name for name in _SHARES if name != "tasks"]
        self._topics = {name: topics(name) for name in names}
        self._weights = {name: _cumulative(found) for name, found in self._topics.items()}
        self._plain = plain_texts("stories")

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
            text = fill(rng.choice(self._plain), _slots(rng))
            return Conversation(text=text)
        if dice < 0.05:
            question, answer = self._turns(rng)[0]
            return Conversation(text=f"{question}\n{answer}")
        count = rng.choices([1, 2, 3, 5, 8, 14], [72, 12, 8, 5, 2, 1])[0]
        turns: list[Turn] = []
        while len(turns) < count:
            turns += self._turns(rng, follow=count > 1)
        if count > 1 and rng.random() < 0.08:
            told, asked = tasks.introduction(rng)
            turns.insert(0, _styled(told, rng))
            turns.insert(rng.randint(1, len(turns)), _styled(asked, rng))
        system = choose(rng.choice(_SYSTEM), rng) if rng.random() < 0.12 else None
        return Conversation(tuple(turns), system)

    def _turns(self, rng: Random, follow: bool = False) -> list[Turn]:
        """One turn, or two when the second takes up the first ("and of Italy?")."""
        kind = rng.choices(list(_SHARES), list(_SHARES.values()))[0]
        if kind == "tasks":
            return [_styled(tasks.exercise(rng), rng)]
        topic = rng.choices(self._topics[kind], cum_weights=self._weights[kind])[0]
        question, answer, row = topic.ask(rng)
        turns = [_filled(question, answer, row, rng)]
        if follow and len(topic.rows) > 3 and rng.random() < 0.3:
            turns.append(_follow_up(topic, question, rng))
        return [_styled(turn, rng) for turn in turns]


def _cumulative(found: list[Topic]) -> list[float]:
    """A topic comes up more often the more ways there are to ask, but not in proportion."""
    return list(itertools.accumulate((len(t.questions) * len(t.rows)) ** 0.5 for t in found))


def _filled(question: str, answer: str, row: Row, rng: Random) -> Turn:
    """The slots filled; each ``{word}`` of a question becomes an invented word of its own."""
    slots = row or _slots(rng)
    question = re.sub(r"\{word\}", lambda _: _invented(rng), question)
    return fill(question, slots), fill(answer, slots)


def _follow_up(topic: Topic, question: str, rng: Random) -> Turn:
    row = rng.choice(topic.rows)
    slot = "{x}" if "{x}" in question else "{y}"
    asked = choose("(and|and of|and for|what about|how about)", rng)
    return fill(f"{asked} {slot}", row), fill(topic.answer, row)


def _slots(rng: Random) -> Row:
    hero, friend = rng.sample(_HEROES, 2)
    return {
        "hero": hero,
        "friend": friend,
        "short": "the " + hero.split(" ", 1)[1],
        "name": rng.choice(tasks.NAMES),
        "place": rng.choice(_PLACES),
        "thing": rng.choice(_FINDS),
    }


def _invented(rng: Random) -> str:
    word = "".join(rng.choices(_SYLLABLES, k=rng.randint(2, 3))) + rng.choice(_ENDS)
    return word.capitalize() if rng.random() < 0.3 else word


def _styled(turn: Turn, rng: Random) -> Turn:
    """The question as people type it: politeness, case, punctuation, slips of the finger."""
    question, answer = turn
    mark = "?" if _QUESTION.search(question) else rng.choice(["", ".", "."])
    copied = ":" in question
    if rng.random() < 0.2:
        question = f"{choose(rng.choice(_BEFORE), rng)} {question}"
    if not copied and rng.random() < 0.1:
        question = choose(f"{question} {rng.choice(_AFTER)}", rng)
    question = re.sub(r"\b([Ww]hat|[Ww]ho|[Hh]ow|[Ww]here) is\b", _contracted(rng), question)
    if rng.random() < 0.08 and not copied:
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
    return question, answer


def _contracted(rng: Random) -> str:
    return rng.choices([r"\1 is", r"\1's", r"\1s"], [16, 3, 1])[0]


def _slip(text: str, rng: Random) -> str:
    """One typing error in a word of at least four letters: swapped, lost or doubled."""
    words = [match.span() for match in re.finditer(r"[A-Za-z]{4,}", text)]
    if not words:
        return text
    start, end = rng.choice(words)
    i = rng.randrange(start, end - 1)
    swapped = text[i + 1] + text[i]
    return text[:i] + rng.choice([swapped, text[i], text[i] * 2 + text[i + 1]]) + text[i + 2 :]
