"""Reasoning told from the answer, however the text is cut."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rl_mlx.cli.reasoning import Splitter


def split(chunks: list[str], *, inside: bool = False) -> tuple[str, str]:
    splitter = Splitter(inside=inside)
    pieces = [p for chunk in chunks for p in splitter.feed(chunk)] + splitter.flush()
    return (
        "".join(text for is_reasoning, text in pieces if is_reasoning),
        "".join(text for is_reasoning, text in pieces if not is_reasoning),
    )


@pytest.mark.parametrize(
    ("text", "inside", "expected"),
    [
        ("plain", False, ("", "plain")),
        ("<think>\nhm\n</think>\n\nyes", False, ("hm", "yes")),
        ("\n<think>hm</think>yes", False, ("hm", "yes")),
        ("hm\n</think>\nyes", True, ("hm", "yes")),
        ("<think></think>yes", False, ("", "yes")),
        ("<think>never ends </thi", False, ("never ends </thi", "")),
        ("a <think>b</think>", False, ("", "a <think>b</think>")),
        ("<thinker> is a word", False, ("", "<thinker> is a word")),
        ("<", False, ("", "<")),
        ("1 < 2", False, ("", "1 < 2")),
        ("", False, ("", "")),
    ],
)
def test_split(text: str, inside: bool, expected: tuple[str, str]) -> None:
    assert split([text], inside=inside) == expected
    assert split(list(text), inside=inside) == expected


@given(st.lists(st.text(alphabet="<>/thinka \n", max_size=12), max_size=12), st.booleans())
def test_the_cuts_do_not_matter(chunks: list[str], inside: bool) -> None:
    assert split(chunks, inside=inside) == split(["".join(chunks)], inside=inside)


def test_text_is_not_held_longer_than_a_tag() -> None:
    splitter = Splitter()
    assert splitter.feed("Hello, <") == [(False, "Hello, <")]
    assert splitter.feed("there") == [(False, "there")]
