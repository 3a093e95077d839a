"""The arena: whatever the rows, chunks and windows, a sequence is what it is alone."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from rl_mlx.cache.arena import GROWTH, Arena
from rl_mlx.cache.codec import Plain
from rl_mlx.errors import InvalidRequest
from rl_mlx.model.load import load_decoder
from rl_mlx.model.plan import KVSpec
from rl_mlx.settings import KVFormat

FAMILIES = ["llama", "gemma3", "lfm2"]


@pytest.fixture(scope="module", params=FAMILIES)
def decoder(request, tiny):
    return load_decoder(tiny(request.param), 1024, "float32")


@pytest.fixture(scope="module", params=["llama", "gemma3"])
def wide(request, tiny):
    """Families with a head size that can be quantized."""
    return load_decoder(tiny(request.param, head_dim=32), 1024, "float32")


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


def fill(decoder, arena, tokens):
    """Put a sequence into a new row; returns the row."""
    row = arena.add_row()
    run(decoder, arena, row, [tokens])
    arena.advance(row, [len(tokens)])
    return row


@pytest.mark.parametrize("cut", [8, 20, 37])
def test_pieces_taken_out_fill_another_row(decoder, cut):
    tokens = sequence(5, 50)
    arena = Arena(decoder.cache_specs, mx.float32, 64)
    fill(decoder, arena, sequence(6, 30))
    row = arena.add_row()
    pieces = []
    for start, stop in [(0, 20), (20, 37), (37, 50)]:  # as prefill chunks would be
        run(decoder, arena, row, [tokens[start:stop]])
        arena.advance(row, [stop - start])
        pieces.append((arena.take(row, start, min(stop, 40)), min(stop, 40) - start))
    assert all(p.has_state for p, _ in pieces)
    arena.drop_row()
    if arena.is_recurrent:  # only whole pieces will do
        kept, cut = ([pieces[0]], 20) if cut < 37 else (pieces[:2], 37)
    else:
        kept = [pieces[0], (pieces[1][0], cut - 20)] if cut > 20 else [(pieces[0][0], cut)]
    row = arena.add_row()
    arena.put(row, kept)
    got = run(decoder, arena, row, [tokens[cut:]])[0]
    assert np.abs(got - alone(decoder, tokens)[cut:]).max() < 2e-5


def test_a_state_inside_the_last_step_can_be_taken(tiny):
    decoder = load_decoder(tiny("lfm2"), 1024, "float32")
    tokens = sequence(7, 40)
    arena = Arena(decoder.cache_specs, mx.float32, 64)
    row = fill(decoder, arena, tokens)
    piece = arena.take(row, 0, 16)
    arena.add_row()
    arena.put(1, [(piece, 16)])
    got = run(decoder, arena, 1, [tokens[16:]])[0]
    assert np.abs(got - alone(decoder, tokens)[16:]).max() < 2e-5


class RoundTrip(Plain):
    """Plain vectors that went through a quantization: what the packed ones must amount to."""

    def __init__(self, bits, dim):
        self._how = {"bits": bits, "group_size": 64 if dim % 64 == 0 else 32}

    def encode(self, x):
        return [mx.dequantize(*mx.quantize(x, **self._how), **self._how)]


def answers_of(decoder, prompts, answers, kv):
    """Hidden states of answers run three tokens at a time, after prompts of other lengths."""
    arena = Arena(decoder.cache_specs, mx.float32, 64, kv)
    for prompt in prompts:
        fill(decoder, arena, prompt)
    together = []
    for step in range(0, len(answers[0]), 3):
        together.append(run(decoder, arena, 0, [a[step : step + 3] for a in answers]))
        arena.advance(0, [3] * len(answers))
    return np.concatenate(together, axis=1)


@pytest.mark.parametrize("bits", ["8", "6", "4", "8/4"])
@pytest.mark.parametrize("start", [0, 24])
def test_packed_vectors_count_as_what_they_stand_for(wide, monkeypatch, bits, start):
    kv = KVFormat.parse(f"{bits}@{start}")
    prompts = [sequence(1, 20), sequence(2, 45)]
    answers = [sequence(3, 12), sequence(4, 12)]
    packed = answers_of(wide, prompts, answers, kv)
    monkeypatch.setattr("rl_mlx.cache.layers.Quantized", RoundTrip)
    assert np.abs(packed - answers_of(wide, prompts, answers, kv)).max() < 5e-5
    assert np.abs(packed - answers_of(wide, prompts, answers, KVFormat())).max() > 1e-4


def test_before_its_start_a_quantized_cache_is_exact(tiny):
    decoder = load_decoder(tiny("llama", head_dim=32), 1024, "float32")
    tokens = sequence(1, 30)
    arena = Arena(decoder.cache_specs, mx.float32, 64, KVFormat(8, 8, start=64))
    row = fill(decoder, arena, tokens)
    got = run(decoder, arena, row, [[5]])[0, -1]
    assert np.abs(got - alone(decoder, [*tokens, 5])[-1]).max() < 2e-5


def test_quantized_pieces_fill_another_row(wide):
    kv = KVFormat(8, 4, start=10)
    tokens = sequence(5, 50)
    arena = Arena(wide.cache_specs, mx.float32, 64, kv)
    row = fill(wide, arena, tokens)
    pieces = [(arena.take(row, 0, 16), 16), (arena.take(row, 16, 32), 16)]
    want = run(wide, arena, row, [[9]])  # leaves the row as it is
    fresh = arena.add_row()
    arena.put(fresh, pieces)
    run(wide, arena, fresh, [tokens[32:]])
    arena.advance(fresh, [18])
    assert np.abs(run(wide, arena, fresh, [[9]]) - want).max() < 2e-5


def test_a_head_size_that_cannot_be_quantized_says_so():
    with pytest.raises(InvalidRequest, match="head size that 32 divides, and this model's is 24"):
        Arena([KVSpec(2, 24, 24)], mx.float32, kv=KVFormat(8, 8))


def test_the_bytes_of_more_rows_are_known_beforehand(decoder):
    arena = Arena(decoder.cache_specs, mx.float32, 64)
    for rows, length in [(1, 60), (2, 64), (3, 10)]:
        promised = arena.bytes_for(rows, max(length, *arena.lengths, 0))
        fill(decoder, arena, sequence(rows, length))
        assert arena.nbytes == promised
