"""Chunks beside running streams take about as long as they may, whatever tokens cost."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from rl_mlx.engine.chunk import APART, STEPS, ChunkSize


@given(
    fixed=st.floats(0, 1.2),
    token=st.floats(0.003, 0.25),
    deeper=st.floats(0, 0.002),
    idle=st.booleans(),
)
def test_a_chunk_takes_as_long_as_it_may_and_no_less_than_it_could(fixed, token, deeper, idle):
    # In units of a decode step; every token makes those after it dearer, as attention does.
    chunks, depth = ChunkSize(512), 0

    def cost(tokens):
        return fixed + tokens * (token + deeper * depth / 512)

    chunks.decoded(1, 1.0)
    if idle:
        chunks.read(512, 512, cost(512))
    for step in range(60):
        size = chunks.tokens(beside=1, apart=True)
        if step > 30:
            best = (APART - fixed) / (token + deeper * depth / 512)
            assert cost(size) <= 1.05 * APART or size == 1
            assert size >= min(512, 0.8 * best) - 1
        chunks.read(size, size, cost(size))
        depth += size


def test_alone_a_prompt_is_read_by_whole_chunks():
    chunks = ChunkSize(512)
    chunks.decoded(1, 1.0)
    chunks.read(512, 512, 100.0)
    assert chunks.tokens(beside=0) == 512
    assert chunks.tokens(beside=1) == 5
    assert chunks.tokens(beside=1, apart=True) == 7


def test_prefill_goes_on_however_dear_a_token_is():
    chunks = ChunkSize(512)
    assert chunks.tokens(beside=1) == 0  # a step is measured first
    chunks.decoded(1, 1.0)
    assert chunks.tokens(beside=1) == 64  # and then a token
    chunks.read(64, 64, 1e6)
    assert chunks.tokens(beside=1) == 1


def test_the_short_end_of_a_prompt_says_nothing_of_the_cost():
    chunks = ChunkSize(512)
    chunks.decoded(1, 1.0)
    chunks.read(100, 100, STEPS)
    chunks.read(3, 100, 0.9)
    assert chunks.tokens(beside=1) == 100


def test_one_slow_step_is_no_reason_for_long_chunks():
    chunks = ChunkSize(512)
    chunks.decoded(1, 1.0)
    chunks.read(10, 10, 1.5)
    chunks.decoded(1, 50.0)
    assert chunks.tokens(beside=1) < 20


def test_one_slow_chunk_is_no_reason_for_short_ones_for_ever():
    # Where reading weights is what takes the time, each chunk of one token would cost a whole step.
    chunks = ChunkSize(512)
    chunks.decoded(1, 1.0)
    for seconds in (1.06, 100.0, *[1.06] * 20):
        size = chunks.tokens(beside=1, apart=True)
        chunks.read(size, size, seconds)
    assert chunks.tokens(beside=1, apart=True) > 64


def test_a_step_in_the_same_forward_is_none_of_the_prompts_cost():
    chunks = ChunkSize(512)
    chunks.decoded(1, 1.0)
    chunks.read(10, 10, 2.0, decoding=1)
    assert chunks.tokens(beside=1) == int(10 * STEPS)
    chunks.read(10, 10, 0.5, decoding=1)  # faster than the step alone was: no sign of a free lunch
    assert chunks.tokens(beside=1) < 30


def test_more_streams_may_wait_as_long_as_a_step_of_theirs_takes():
    chunks = ChunkSize(512)
    chunks.decoded(1, 1.0)
    chunks.read(10, 10, 1.0)
    assert chunks.tokens(beside=1) == int(10 * STEPS)
    assert chunks.tokens(beside=20) == 0  # a step of so many was never measured
    chunks.decoded(20, 2.0)
    assert chunks.tokens(beside=20) == chunks.tokens(beside=32) == int(20 * STEPS)
    assert chunks.tokens(beside=1) == int(10 * STEPS)
