"""Exercises of random numbers and words: sums, lists to repeat or edit, a name to remember."""

from __future__ import annotations

from random import Random

from rl_mlx.demo.grammar import choose, lists

Turn = tuple[str, str]

_SHARES = {
    "sum": 90,
    "repeat": 10,
    "say": 4,
    "edit": 8,
    "part": 5,
    "reverse": 4,
    "count": 6,
    "neighbour": 5,
    "larger": 5,
}


class Exercises:
    """Questions whose answers are computed; the words come from ``words.txt``."""

    def __init__(self) -> None:
        found = lists("words")
        self._patterns = {name: f"({'|'.join(lines)})" for name, lines in found.items()}
        self._numbers, self._words, self.names, self._things = (
            " ".join(found[name]).split() for name in ("numbers", "words", "names", "things")
        )
        opening = found["open"][0]
        self._shapes = [line.replace("{open}", opening) for line in found["shapes"]]
        self._stories = {"+": found["add_stories"], "-": found["take_stories"]}

    def exercise(self, rng: Random) -> Turn:
        """A question and its answer."""
        kind = rng.choices(list(_SHARES), list(_SHARES.values()))[0]
        make = {
            "sum": self.sum,
            "repeat": self._repeat,
            "say": self._say,
            "edit": self._edit,
            "part": self._part,
            "reverse": self._reverse,
            "count": _count,
            "neighbour": _neighbour,
            "larger": _larger,
        }
        return make[kind](rng)

    def introduction(self, rng: Random) -> tuple[Turn, Turn]:
        """Two turns: a name is told, and later asked for."""
        name = rng.choice(self.names)
        told = choose(
            f"(my name is|I am|I'm|call me|hello, I am|hi, my name is|the name is) {name}", rng
        )
        asked = choose(
            "(what is my name|who am I|do you know my name|do you remember my name|"
            "what was my name|tell me my name)",
            rng,
        )
        welcome = f"Nice to meet you, {name}! How can I help you?"
        return (told, welcome), (asked, f"Your name is {name}.")

    def sum(self, rng: Random) -> Turn:
        """A sum, difference, product or quotient of small numbers."""
        kind = rng.choice("++++---***/")
        if kind == "+":
            most = rng.choice((10, 10, 10, 10, 10, 20))
            a, b = rng.randint(0, most), rng.randint(0, most)
            return self._arithmetic(rng, a, "+", b, a + b)
        if kind == "-":
            b, rest = rng.randint(0, 10), rng.randint(0, 10)
            return self._arithmetic(rng, b + rest, "-", b, rest)
        a, b = rng.randint(0, 10), rng.randint(0, 10)
        if kind == "*" or b == 0:
            return self._arithmetic(rng, a, "*", b, a * b)
        return self._arithmetic(rng, a * b, "/", b, a)

    def _arithmetic(self, rng: Random, a: int, sign: str, b: int, result: int) -> Turn:
        stories = self._stories.get(sign)
        shape = rng.choice(stories if stories and rng.random() < 0.2 else self._shapes)
        name, other = rng.sample(self.names, 2)
        question = choose(shape.replace("{sum}", self._patterns[sign]), rng).format(
            a=a, b=b, A=self._word(a), B=self._word(b), name=name, other=other,
            things=rng.choice(self._things),
        )  # fmt: skip
        return question, f"{a} {sign} {b} = {result}."

    def _word(self, number: int) -> str:
        return self._numbers[number] if number < len(self._numbers) else str(number)

    def _repeat(self, rng: Random) -> Turn:
        items = rng.sample(self._words, rng.randint(1, 9))
        if rng.random() < 0.5:
            text = ", ".join(items)
            order = "(repeat|say|copy|write|echo|print) (this list|the list|this|) (again|):"
        else:
            text = " ".join(items)
            order = (
                "(repeat|say|copy|write|echo|repeat after me|say after me) "
                "(this|the words|this text|):"
            )
        return f"{choose(order, rng)} {text}", text

    def _say(self, rng: Random) -> Turn:
        word = rng.choice(self._words)
        count = rng.randint(2, 5)
        times = self._numbers[count]
        question = choose(f"(say|write|repeat|print) (the word|) {word} {times} times", rng)
        return question, " ".join([word] * count)

    def _edit(self, rng: Random) -> Turn:
        items = rng.sample(self._words, rng.randint(3, 8))
        old, new = rng.choice(items), rng.choice(self._words)
        text = " ".join(items)
        question = choose(
            f"(replace|change|exchange) {old} (by|with|to|for) {new} "
            f"(in this text|in|in the list|here): {text}",
            rng,
        )
        return question, " ".join(new if item == old else item for item in items)

    def _part(self, rng: Random) -> Turn:
        items = rng.sample(self._words, rng.randint(2, 6))
        which, index = rng.choice([("first", 0), ("last", -1), ("second", 1)])
        question = choose(
            f"(what is the|which is the|tell me the|say the) {which} (word|item|thing) (of|in) "
            f"(this|this list|): {', '.join(items)}",
            rng,
        )
        return question, items[index]

    def _reverse(self, rng: Random) -> Turn:
        items = rng.sample(self._words, rng.randint(2, 5))
        question = choose("(reverse|turn around) (this list|the list|this|):", rng)
        return f"{question} {', '.join(items)}", ", ".join(reversed(items))


def _count(rng: Random) -> Turn:
    start = rng.choice([1, 1, 1, rng.randint(0, 15)])
    stop = start + rng.randint(2, 12)
    if rng.random() < 0.25:
        question = choose("count (down|backwards|back) from {b} to {a}", rng)
        numbers = range(stop, start - 1, -1)
    else:
        question = choose(
            "(count|can you count|list the numbers|write the numbers|say the numbers) "
            "from {a} to {b}",
            rng,
        )
        numbers = range(start, stop + 1)
    return question.format(a=start, b=stop), ", ".join(map(str, numbers))


def _neighbour(rng: Random) -> Turn:
    n = rng.randint(1, 30)
    if rng.random() < 0.5:
        question = choose(f"(what|which number) (comes|is) (right|) after {n}", rng)
        return question, f"After {n} comes {n + 1}."
    question = choose(f"(what|which number) (comes|is) (right|) before {n}", rng)
    return question, f"Before {n} comes {n - 1}."


def _larger(rng: Random) -> Turn:
    a, b = rng.sample(range(31), 2)
    word, pick = rng.choice([("larger", max), ("bigger", max), ("smaller", min), ("less", min)])
    question = choose(f"(what|which|which number) is {word}(,|:|) {a} or {b}", rng)
    if rng.random() < 0.3:
        question = f"is {a} {word} than {b}"
        return question, f"{'Yes' if pick(a, b) == a else 'No'}, {pick(a, b)} is {word}."
    return question, f"{pick(a, b)} is {word}."
