"""Stop strings across the borders of pieces, against a naive search of the whole text."""

from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from rl_mlx.text.stop import StopMatcher

_texts = st.text(alphabet="ab\n", max_size=30)
_stops = st.lists(st.text(alphabet="ab\n", min_size=1, max_size=5), max_size=4)


def _naive(text: str, stops: list[str]) -> tuple[str, bool]:
    """Grow the text a character at a time until it ends in a stop; the longest one is cut off."""
    for end in range(1, len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            return text[: end - max(map(len, found))], True
    return text, False


@given(text=_texts, stops=_stops, cuts=st.lists(st.integers(0, 30)))
def test_same_as_a_search_of_the_whole(text: str, stops: list[str], cuts: list[int]) -> None:
    borders = sorted({0, len(text), *(cut for cut in cuts if cut <= len(text))})
    matcher = StopMatcher(stops)
    emitted, stopped = "", False
    for start, end in itertools.pairwise(borders):
        piece, stopped = matcher.feed(text[start:end])
        emitted += piece
        if stopped:
            break
        held = text[len(emitted) : end]
        assert not held or any(stop.startswith(held) for stop in stops)  # no more than needed
        begun = (text[at:end] for at in range(len(emitted)))
        assert not any(stop.startswith(rest) for rest in begun for stop in stops)  # and no less
    if not stopped:
        emitted += matcher.flush()
    assert (emitted, stopped) == _naive(text, stops)


def test_text_goes_straight_through_without_stops() -> None:
    matcher = StopMatcher(())
    assert matcher.feed("anything") == ("anything", False)
    assert matcher.flush() == ""


def test_only_a_possible_stop_is_held_back() -> None:
    matcher = StopMatcher(["</answer>"])
    assert matcher.feed("yes </ans") == ("yes ", False)
    assert matcher.feed("wers") == ("</answers", False)
    assert matcher.feed(" </answer> rest") == (" ", True)
    assert matcher.feed("more") == ("", True)
    assert matcher.flush() == ""


def test_what_was_held_comes_at_the_end() -> None:
    matcher = StopMatcher(["END", "\n\n"])
    assert matcher.feed("the EN") == ("the ", False)
    assert matcher.flush() == "EN"
