"""The estimate of a type's own noise, against the noise that ggml's encoders really make."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from rl_mlx.convert.fidelity import LIMIT, Loss, choose, own_noise
from rl_mlx.convert.gguf.types import GGMLType
from rl_mlx.convert.pieces import Blocks, Source, hold
from rl_mlx.convert.quantize import dequantize

TYPES = [
    *("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"),
    *("IQ4_NL", "IQ4_XS", "IQ3_XXS", "IQ3_S", "IQ2_S", "MXFP4"),
]


def _encoded(ggml: Any, weights: Any, kind: GGMLType) -> tuple[Any, Any]:
    """Rows of blocks by ggml's encoder, and the values that ggml decodes from them."""
    blocks = ggml.quantize(weights, kind).reshape(-1, kind.block_bytes)
    values = ggml.dequantize(blocks, kind).reshape(weights.shape)
    return blocks.reshape(len(weights), -1), values


def _source(raw: Any, kind: GGMLType) -> Source:
    shape = (len(raw), raw.shape[1] // kind.block_bytes * kind.block_size)
    return Source(
        "w", kind.name, True, shape, raw.nbytes, len(raw), lambda a, b: Blocks(kind, raw[a:b])
    )


@pytest.mark.parametrize("name", TYPES)
def test_own_noise_is_near_what_the_encoder_made(name: str, ggml: Any) -> None:
    kind = GGMLType[name]
    weights = np.random.default_rng(1).standard_normal((64, 1024)).astype(np.float32)
    raw, exact = _encoded(ggml, weights, kind)
    true = float(np.square(exact - weights, dtype=np.float64).sum())
    estimate = own_noise(Blocks(kind, raw))
    assert estimate is not None
    assert 0.5 * true < estimate < 1.4 * true


@pytest.mark.parametrize("name", TYPES)
def test_faithful_keeps_its_promise_on_every_weight(name: str, ggml: Any) -> None:
    kind = GGMLType[name]
    weights = np.random.default_rng(2).laplace(0, 0.02, (96, 2048)).astype(np.float32)
    raw, exact = _encoded(ggml, weights, kind)
    choice = choose(_source(raw, kind), "faithful", "float16")
    piece = Blocks(kind, raw)
    error = dequantize(hold(piece, choice.holdings[0])) - exact
    added, own = float(np.square(error, dtype=np.float64).sum()), own_noise(piece)
    assert own is not None
    assert added <= LIMIT * own * 1.02
    whole = Loss(exact.size, float(np.square(exact, dtype=np.float64).sum()), added, own, 0.0)
    assert choice.loss.rms == pytest.approx(whole.rms, rel=0.05, abs=1e-9)
