"""The training text: deterministic, and without the questions that are held out."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path

import pytest

from rl_mlx.demo import vocab
from rl_mlx.demo.corpus import Conversation, Corpus
from rl_mlx.demo.grammar import choose, expand, fill

QUESTIONS = json.loads(Path(__file__).with_name("questions.json").read_text("utf-8"))
SEED, CONVERSATIONS = 1, 71_000  # what the target was trained on; the draft only follows it


def plain(text: str) -> str:
    """Without case, punctuation and spacing."""
    return " ".join(re.findall(r"[\w'+*/=-]+", text.lower()))


@pytest.fixture(scope="module")
def corpus() -> Corpus:
    return Corpus()


@pytest.fixture(scope="module")
def asked(corpus: Corpus) -> set[str]:
    """Every question of the topic files, and every one that the target was trained on."""
    found = {plain(question) for question in corpus.questions()}
    for conversation in itertools.islice(corpus.conversations(SEED), CONVERSATIONS):
        found.update(plain(question) for question, _ in conversation.turns)
    return found


def test_the_stream_is_deterministic() -> None:
    first, second = (list(itertools.islice(Corpus().conversations(7), 300)) for _ in range(2))
    assert first == second
    assert first != list(itertools.islice(Corpus().conversations(8), 300))


def test_forty_questions_most_of_them_held_out() -> None:
    assert len(QUESTIONS) == 40
    assert sum(q["held_out"] for q in QUESTIONS) >= 30


def test_held_out_means_held_out(asked: set[str]) -> None:
    held_out = [q["question"] for q in QUESTIONS if q["held_out"]]
    assert not [question for question in held_out if plain(question) in asked]
    assert plain("Who are you?") in asked


def test_no_slot_is_left_open(corpus: Corpus) -> None:
    for conversation in itertools.islice(corpus.conversations(3), 5000):
        pieces = [conversation.text or "", *itertools.chain(*conversation.turns)]
        assert not [piece for piece in pieces if re.search(r"[{}|]\w|\(\w", strip_code(piece))]


def strip_code(text: str) -> str:
    return re.sub(r"`[^`]*`", "", text)


def test_a_pattern_stands_for_all_its_choices() -> None:
    assert list(expand("(a|b) c (d|)")) == ["a c d", "a c", "b c d", "b c"]


def test_a_choice_is_one_of_the_expansions(corpus: Corpus) -> None:
    from random import Random

    pattern = "(what|who) is (the|a|) thing(, please|)"
    assert {choose(pattern, Random(seed)) for seed in range(200)} == set(expand(pattern))


def test_slots_fill_with_and_without_a_capital() -> None:
    assert fill("{X} and {x} but {other}", {"x": "a cat"}) == "A cat and a cat but {other}"


def test_segments_are_what_the_template_makes() -> None:
    import jinja2

    conversation = Conversation((("Hi", "Hello!"), ("Bye", "Goodbye!")), "Be kind.")
    messages = [{"role": "system", "content": "Be kind."}]
    for question, answer in conversation.turns:
        messages += [
            {"role": "user", "content": question},
            {"role": "assistant", "content": answer},
        ]
    rendered = jinja2.Template(vocab.CHAT_TEMPLATE).render(messages=messages)
    pieces = vocab.segments(conversation)
    assert "".join(text for text, _ in pieces) == rendered
    assert [text for text, learned in pieces if learned] == [
        "Hello!<|im_end|>",
        "Goodbye!<|im_end|>",
    ]
