"""Packed steps: tokens of several rows in one forward, against forwards of their own."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from rl_mlx.cache.arena import Arena
from rl_mlx.cache.packed import PackedStep
from rl_mlx.model.load import load_decoder
from rl_mlx.settings import DENSE_KV, KVFormat


def decoder_of(tiny, family, **config):
    return load_decoder(tiny(family, **config), 1024, "float32")


def sequence(seed, length):
    return np.random.default_rng(seed).integers(0, 96, length).tolist()


def filled(decoder, prompts, kv=DENSE_KV):
    """An arena with a row for each prompt, and one more for each of two to come."""
    arena = Arena(decoder.cache_specs, mx.float32, 64, kv)
    for prompt in prompts:
        row = arena.add_row()
        mx.eval(decoder.forward(mx.array([prompt]), arena.begin(row, row + 1, len(prompt))))
        arena.advance(row, [len(prompt)])
    for _ in range(2):
        arena.add_row()
    return arena


def forwards(decoder, arena, spans):
    """Hidden states of each span's tokens, from forwards of their own."""
    return [
        np.array(decoder.forward(mx.array(tokens), arena.begin(start, stop, len(tokens[0]))))
        for start, stop, tokens in spans
    ]


def packed(decoder, arena, spans):
    """The same out of one forward."""
    steps = [arena.begin(start, stop, len(tokens[0])) for start, stop, tokens in spans]
    ids = [token for _, _, rows in spans for row in rows for token in row]
    hidden = np.array(decoder.forward(mx.array(ids)[:, None], PackedStep(steps)))[:, 0]
    sizes = [np.size(tokens) for _, _, tokens in spans]
    parts = np.split(hidden, np.cumsum(sizes)[:-1])
    return [p.reshape(*np.shape(t), -1) for p, (_, _, t) in zip(parts, spans)]


@pytest.mark.parametrize("kv", [DENSE_KV, KVFormat.parse("8/4@20")])
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_streams_and_prompts_in_one_forward_are_as_in_their_own(tiny, family, kv):
    decoder = decoder_of(tiny, family, head_dim=32)
    prompts = [sequence(i, n) for i, n in enumerate([5, 33, 18])]
    spans = [
        (0, 3, [[7], [8], [9]]),
        (3, 4, [sequence(5, 40)]),
        (4, 5, [sequence(6, 3)]),
    ]
    want = forwards(decoder, filled(decoder, prompts, kv), spans)
    arena = filled(decoder, prompts, kv)
    for one, other in zip(packed(decoder, arena, spans), want, strict=True):
        assert np.abs(one - other).max() < 2e-5
    # And what they left in the arena is right too: once more, from where they stand.
    for start, stop, tokens in spans:
        arena.advance(start, [len(tokens[0])] * (stop - start))
    assert arena.lengths == [6, 34, 19, 40, 3]
    again = filled(decoder, prompts, kv)
    forwards(decoder, again, spans)
    again.lengths[:] = arena.lengths
    spans = [(0, 3, [[1], [2], [3]]), (3, 4, [[4, 5]]), (4, 5, [sequence(8, 9)])]
    for one, other in zip(packed(decoder, arena, spans), forwards(decoder, again, spans)):
        assert np.abs(one - other).max() < 2e-5


def test_a_packed_step_writes_the_arena_in_place(tiny):
    """A copy of it for every forward would cost more than the forward."""
    decoder = decoder_of(tiny, "llama")
    arena = filled(decoder, [sequence(1, 20), sequence(2, 30)])
    arena.reserve(1 << 15)
    mx.eval(arena.arrays())
    layer = arena.nbytes // len(decoder.cache_specs)
    for at in range(3):
        mx.reset_peak_memory()
        before = mx.get_active_memory()
        packed(decoder, arena, [(0, 2, [[1], [2]]), (2, 3, [sequence(at, 16)])])
        arena.advance(0, [1, 1])
        arena.advance(2, [16])
        assert mx.get_peak_memory() - before < layer / 2
