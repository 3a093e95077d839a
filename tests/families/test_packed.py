"""Every family in one forward over streams and prompts, against forwards of their own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from rl_mlx.cache.arena import Arena
from rl_mlx.cache.packed import forward
from rl_mlx.convert.open import open_weights
from rl_mlx.model.load import load_decoder
from rl_mlx.model.plan import StateSpec


def test_packed_tokens_are_what_they_are_apart(
    family: Any, make_folder: Callable[..., Path]
) -> None:
    decoder = load_decoder(open_weights(make_folder(family)), 128, "float32")
    recurrent = any(isinstance(spec, StateSpec) for spec in decoder.cache_specs)
    assert decoder.packs == (not recurrent)
    if recurrent:
        return
    rng = np.random.default_rng(1)
    spans = [(0, 2, 1), (2, 3, 30), (3, 4, 7)]  # rows, from and to, and tokens of each

    def filled() -> Arena:
        arena, random = Arena(decoder.cache_specs, mx.float32, 64), np.random.default_rng(0)
        for row, length in enumerate([9, 21, 11]):
            arena.add_row()
            ids = mx.array(random.integers(3, 256, (1, length)))
            mx.eval(decoder.forward(ids, arena.begin(row, row + 1, length)))
            arena.advance(row, [length])
        arena.add_row()
        return arena

    tokens = [mx.array(rng.integers(3, 256, (stop - start) * n)) for start, stop, n in spans]
    arena = filled()
    apart = [forward(decoder, arena, [span], [ids]) for ids, span in zip(tokens, spans)]
    together = forward(decoder, filled(), spans, tokens)
    want, got = np.array(mx.concatenate(apart)), np.array(together)
    assert np.abs(got - want).max() < 1e-4 * np.abs(want).max()
