"""The arena: whatever the rows, chunks and windows, a sequence is what it is alone."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from rl_mlx.cache.arena import GROWTH, Arena
from rl_mlx.model.load import load_decoder
from rl_mlx.model.plan import KVSpec

FAMILIES = ["llama", "gemma3", "lfm2"]


@pytest.fixture(scope="module", params=FAMILIES)
def decoder(request, tiny):
    return load_decoder(tiny(request.param), 1024, "float32")


def run(decoder, arena, start, rows):
    """One step over rows ``start ...``; hidden states as NumPy."""
    stop, count = start + len(rows), len(rows[0])
    hidden = decoder.forward(mx.array(rows), arena.begin(start, stop, count))
    return np.array(hidden)


def alone(decoder, tokens, chunk=512, longest=512):
    """Hidden states of a sequence by itself, ``[len(tokens), hidden]``."""
    arena = Arena(decoder.cache_specs, mx.float32, longest)
    arena.add_row()
    parts = []
    for i in range(0, len(tokens), chunk):
        part = tokens[i : i + chunk]
        parts.append(run(decoder, arena, 0, [part])[0])
        arena.advance(0, [len(part)])
    return np.concatenate(parts)


def sequence(seed, length):
    return np.random.default_rng(seed).integers(0, 96, length).tolist()


@pytest.mark.parametrize("chunk", [1, 3, 16, 40])
def test_chunks_change_nothing(decoder, chunk):
    tokens = sequence(1, 70)
    whole = alone(decoder, tokens)
    assert np.abs(alone(decoder, tokens, chunk, longest=40) - whole).max() < 2e-5


def test_ragged_rows_are_each_as_alone(decoder):
    prompts = [sequence(i, n) for i, n in enumerate([5, 33, 18])]
    answers = [sequence(10 + i, 24) for i in range(3)]
    arena = Arena(decoder.cache_specs, mx.float32, 64)
    for prompt in prompts:
        row = arena.add_row()
        run(decoder, arena, row, [prompt])
        arena.advance(row, [len(prompt)])
    together = []
    for step in range(0, 24, 2):  # two tokens a step, as a verification would
        together.append(run(decoder, arena, 0, [a[step : step + 2] for a in answers]))
        arena.advance(0, [2, 2, 2])
    for row, (prompt, answer) in enumerate(zip(prompts, answers)):
        want = alone(decoder, prompt + answer)[len(prompt) :]
        got = np.concatenate([t[row] for t in together])
        assert np.abs(got - want).max() < 2e-5


def test_tokens_taken_back_leave_no_trace(decoder):
    prompts = [sequence(1, 20), sequence(2, 30)]
    arena = Arena(decoder.cache_specs, mx.float32, 40)
    for prompt in prompts:
        row = arena.add_row()
        run(decoder, arena, row, [prompt])
        arena.advance(row, [len(prompt)])
    drafts = [sequence(3, 6), sequence(4, 6)]
    run(decoder, arena, 0, drafts)
    arena.advance(0, [2, 5])  # the rest of each draft was rejected
    after = run(decoder, arena, 0, [[7], [8]])
    for row, (prompt, draft, kept, token) in enumerate(zip(prompts, drafts, [2, 5], [7, 8])):
        want = alone(decoder, prompt + draft[:kept] + [token])[-1]
        assert np.abs(after[row, -1] - want).max() < 2e-5


def test_rows_move_and_fork(decoder):
    prompts = [sequence(i, n) for i, n in enumerate([9, 21, 14])]
    arena = Arena(decoder.cache_specs, mx.float32, 40)
    for prompt in prompts:
        row = arena.add_row()
        run(decoder, arena, row, [prompt])
        arena.advance(row, [len(prompt)])
    arena.copy_row(2, 0)  # the first sequence leaves, the last takes its place
    arena.drop_row()
    fork = arena.add_row()
    arena.copy_row(1, fork)
    after = run(decoder, arena, 0, [[3], [4], [5]])
    for row, (prompt, token) in enumerate([(prompts[2], 3), (prompts[1], 4), (prompts[1], 5)]):
        assert np.abs(after[row, -1] - alone(decoder, [*prompt, token])[-1]).max() < 2e-5


def test_a_new_row_starts_empty(decoder):
    arena = Arena(decoder.cache_specs, mx.float32, 40)
    for tokens in (sequence(1, 12), sequence(2, 12)):
        row = arena.add_row()
        hidden = run(decoder, arena, row, [tokens])[0]
        arena.advance(row, [12])
        arena.drop_row()
        assert np.abs(hidden - alone(decoder, tokens)).max() < 2e-5


def test_windows_bound_the_memory():
    spec = KVSpec(2, 16, 16, window=32)
    arena = Arena([spec], mx.float32, longest_step=8)
    arena.add_row()
    kv = mx.zeros((1, 2, 8, 16))
    for _ in range(100):
        arena.begin(0, 1, 8).update(0, kv, kv)
        arena.advance(0, [8])
    assert arena.nbytes == 2 * 2 * (32 + 8) * 16 * 4


def test_memory_is_the_arithmetic_and_one_growth_step():
    heads, dim, tokens, rows = 2, 16, 700, 3
    arena = Arena([KVSpec(heads, dim, dim)] * 2, mx.float32, longest_step=700)
    for row in range(rows):
        arena.add_row()
        kv = mx.zeros((1, heads, tokens, dim))
        for layer in range(2):
            arena.begin(row, row + 1, tokens).update(layer, kv, kv)
        arena.advance(row, [tokens])
    each = 2 * 2 * heads * dim * 4 * rows
    assert each * tokens <= arena.nbytes <= each * (tokens + GROWTH)
    for _ in range(rows):
        arena.drop_row()
    assert arena.nbytes == 0
