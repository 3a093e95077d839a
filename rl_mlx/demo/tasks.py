"""Exercises made from random numbers and words: sums, lists to repeat or edit, things said earlier."""

from __future__ import annotations

from collections.abc import Callable
from random import Random

from rl_mlx.demo.grammar import choose

Turn = tuple[str, str]

NUMBERS = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen "
    "seventeen eighteen nineteen twenty"
).split()

WORDS = (
    "apple pear plum bread milk butter egg rice salt pepper tea coffee table chair lamp book pen paper key door "
    "window house garden tree leaf flower river stone hill road bridge boat train car wheel cat dog horse cow bird "
    "fish bee frog fox bear wolf mouse red blue green yellow black white one two three four five sun moon star rain "
    "snow wind fire water gold silver iron glass north south east west king queen child friend music song drum "
    "Anna Ben Clara David Emma Paul Rome Paris London Berlin model token weight cache draft"
).split()

NAMES = (
    "Anna Ben Clara David Emma Felix Grace Henry Ida Jack Kate Leo Maria Noah Olga Paul Rosa Sam Tina Tom Vera "
    "Will Alice Bob Carol Dan Eve Frank Lisa Mark Nina Peter Sara Max Zoe"
).split()

THINGS = "apples pears coins books eggs stones balls cards pens cakes nuts cookies stamps marbles".split()

_OPEN = "(what is|what's|how much is|calculate|compute|work out|tell me|solve|find|can you tell me|do you know||||)"
_PLUS = "({a} + {b}|{a} + {b}|{a} + {b}|{a}+{b}|{a} plus {b}|{A} plus {B}|the sum of {a} and {b}|{a} and {b} together)"
_LESS = "({a} - {b}|{a} - {b}|{a} - {b}|{a}-{b}|{a} minus {b}|{A} minus {B}|{a} less {b})"
_TIMES = "({a} * {b}|{a} x {b}|{a} * {b}|{a}*{b}|{a} times {b}|{A} times {B}|{a} multiplied by {b}|the product of {a} and {b})"
_OVER = "({a} / {b}|{a} / {b}|{a}/{b}|{a} divided by {b}|{A} divided by {B}|{a} : {b})"

_SHAPES = (
    _OPEN + " {sum}",
    _OPEN + " {sum}",
    _OPEN + " {sum}",
    "{sum} =",
    "{sum} (is|equals|makes|gives) (what|how much|)",
    "(what|how much) (does|do) {sum} (make|give|equal)",
    "what do I get (for|from|with) {sum}",
    "(please|can you) (add up|work out|calculate|solve|compute) {sum} (for me|)",
    "what (is|would be) the (result|answer|value) of {sum}",
    "I need the (result|value) of {sum}",
    "(help me with|a sum:|my homework is) {sum}",
)

_ADD_STORIES = (
    "I have {a} {things} and (get|buy|find) {b} more. how many (do I have|do I have now|{things} do I have|is that)",
    "(if I have|when I have|suppose I have|say I have) {a} {things} and (get|buy|find|take|am given) {b} more, how many (do I have|do I have now|{things} do I have|is that|will I have)",
    "{name} has {a} {things} and (gets|buys|finds) {b} more. how many {things} does {name} have",
    "there are {a} {things} on the table. I add {b}. how many are there (now|)",
    "{a} {things} and {b} {things} (make|are) how many {things}",
    "{name} has {a} {things} and {other} has {b}. how many (do they have together|is that together|are there in all)",
)

_TAKE_STORIES = (
    "I have {a} {things} and (lose|eat|sell|give away) {b}. how many (do I have|are left|{things} are left|remain)",
    "if I have {a} {things} and (lose|eat|sell|give away) {b}, how many (do I have|are left|remain|do I keep)",
    "{name} has {a} {things} and (loses|eats|sells) {b}. how many {things} (are left|does {name} have)",
    "there are {a} {things} on the table. I take {b}. how many are (left|there)",
)


def _sum(rng: Random) -> Turn:
    kind = rng.choice("++--**/")
    if kind == "+":
        most = rng.choice((10, 10, 10, 20))
        a, b = rng.randint(0, most), rng.randint(0, most)
        return _arithmetic(rng, a, "+", b, a + b, _PLUS, _ADD_STORIES)
    if kind == "-":
        b, rest = rng.randint(0, 10), rng.randint(0, 10)
        return _arithmetic(rng, b + rest, "-", b, rest, _LESS, _TAKE_STORIES)
    a, b = rng.randint(0, 10), rng.randint(0, 10)
    if kind == "*" or b == 0:
        return _arithmetic(rng, a, "*", b, a * b, _TIMES, ())
    return _arithmetic(rng, a * b, "/", b, a, _OVER, ())


def _arithmetic(
    rng: Random, a: int, sign: str, b: int, result: int, ways: str, stories: tuple[str, ...]
) -> Turn:
    shape = rng.choice(stories) if stories and rng.random() < 0.2 else rng.choice(_SHAPES)
    name, other = rng.sample(NAMES, 2)
    pattern = shape.replace("{sum}", ways)
    question = choose(pattern, rng).format(
        a=a, b=b, A=_word(a), B=_word(b), name=name, other=other, things=rng.choice(THINGS)
    )
    return question, f"{a} {sign} {b} = {result}."


def _word(number: int) -> str:
    return NUMBERS[number] if number < len(NUMBERS) else str(number)


def _repeat(rng: Random) -> Turn:
    items = rng.sample(WORDS, rng.randint(1, 9))
    if rng.random() < 0.5:
        text = ", ".join(items)
        order = choose(
            "(repeat|say|copy|write|echo|print) (this list|the list|this|) (again|):", rng
        )
    else:
        text = " ".join(items)
        order = choose(
            "(repeat|say|copy|write|echo|repeat after me|say after me) (this|the words|this text|):",
            rng,
        )
    return f"{order} {text}", text


def _say(rng: Random) -> Turn:
    word = rng.choice(WORDS)
    count = rng.randint(2, 5)
    question = choose(f"(say|write|repeat|print) (the word|) {word} {NUMBERS[count]} times", rng)
    return question, " ".join([word] * count)


def _edit(rng: Random) -> Turn:
    items = rng.sample(WORDS, rng.randint(3, 8))
    old, new = rng.choice(items), rng.choice(WORDS)
    text = " ".join(items)
    question = choose(
        f"(replace|change|exchange) {old} (by|with|to|for) {new} (in this text|in|in the list|here): {text}",
        rng,
    )
    return question, " ".join(new if item == old else item for item in items)


def _part(rng: Random) -> Turn:
    items = rng.sample(WORDS, rng.randint(2, 6))
    which, index = rng.choice([("first", 0), ("last", -1), ("second", 1)])
    question = choose(
        f"(what is the|which is the|tell me the|say the) {which} (word|item|thing) (of|in) (this|this list|): "
        + ", ".join(items),
        rng,
    )
    return question, items[index]


def _reverse(rng: Random) -> Turn:
    items = rng.sample(WORDS, rng.randint(2, 5))
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
            "(count|can you count|list the numbers|write the numbers|say the numbers) from {a} to {b}",
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


_EXERCISES: tuple[tuple[Callable[[Random], Turn], int], ...] = (
    (_sum, 60),
    (_repeat, 10),
    (_say, 4),
    (_edit, 8),
    (_part, 5),
    (_reverse, 4),
    (_count, 6),
    (_neighbour, 5),
    (_larger, 5),
)


def exercise(rng: Random) -> Turn:
    """A question and its answer."""
    kinds, weights = zip(*_EXERCISES)
    make: Callable[[Random], Turn] = rng.choices(kinds, weights)[0]
    return make(rng)


def introduction(rng: Random) -> tuple[Turn, Turn]:
    """Two turns: a name is told, and later asked for."""
    name = rng.choice(NAMES)
    told = choose(
        f"(my name is|I am|I'm|call me|hello, I am|hi, my name is|the name is) {name}", rng
    )
    asked = choose(
        "(what is my name|who am I|do you know my name|do you remember my name|what was my name|tell me my name)",
        rng,
    )
    return (told, f"Nice to meet you, {name}! How can I help you?"), (
        asked,
        f"Your name is {name}.",
    )
