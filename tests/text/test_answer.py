"""Events as chunks: one by one, or however many came together."""

from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from rl_mlx.errors import EngineError
from rl_mlx.text.answer import Answer
from rl_mlx.types import Failed, Finished, Progress, Timings, Token, TokenLogprob


class Letters:
    """A detokenizer whose token is a character."""

    def add(self, token):
        return chr(token)

    def flush(self):
        return "!"


def answer(stops=()):
    return Answer(Letters(), stops, 3)


@given(
    text=st.text("abxy", max_size=12),
    stop=st.sampled_from(["", "ab", "xyx"]),
    cuts=st.sets(st.integers(0, 13)),
)
def test_events_that_come_together_say_the_same(text, stop, cuts):
    events = [Token(ord(c), TokenLogprob(ord(c), -1.0)) for c in text]
    events.append(Finished("length", Timings()))
    one, many = answer((stop,)), answer((stop,))
    for event in events:
        one.feed([event])
    bounds = sorted({0, len(events), *(c for c in cuts if c < len(events))})
    chunks = [many.feed(events[a:b]) for a, b in itertools.pairwise(bounds)]
    assert many.result() == one.result()
    said = [chunk for chunk in chunks if chunk is not None]
    assert "".join(chunk.text for chunk in said) == one.result().text
    assert [t for chunk in said for t in chunk.token_ids] == one.result().token_ids
    assert [bool(chunk.finish_reason) for chunk in said] == [False] * (len(said) - 1) + [True]


def test_what_came_before_a_failure_is_a_chunk():
    one, error = answer(), EngineError("gone")
    chunk = one.feed([Progress(1, 1), Token(97), Failed(error)])
    assert (chunk.text, chunk.progress, one.error, one.ended) == ("a", None, error, True)


def test_progress_and_nothing():
    one = answer()
    assert one.feed([Progress(1, 3), Progress(3, 3)]).progress == Progress(3, 3)
    assert one.feed([]) is None
