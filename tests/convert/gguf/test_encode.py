"""MLX's containers back into GGML blocks."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rl_mlx.convert.gguf.blocks import block
from rl_mlx.convert.gguf.encode import EXACT, encode, holds, survey, surveys
from rl_mlx.convert.gguf.repack import repack
from rl_mlx.convert.gguf.types import GGMLType as T
from rl_mlx.convert.quantize import dequantize, quantize

TYPES = (T.Q1_0, T.TQ2_0, T.Q4_0, T.Q4_1, T.Q5_0, T.Q5_1, T.Q8_0, T.MXFP4, T.NVFP4)
HALVES = {T.TQ2_0: (64,), T.Q4_1: (0, 2), T.Q5_1: (0, 2), T.MXFP4: (), T.NVFP4: ()}


def blocks(kind: T, seed: int, rows: int = 3, columns: int = 512) -> np.ndarray:
    """Random blocks whose float16 numbers are finite, some of them zero or negative."""
    rng = np.random.default_rng(seed)
    raw = rng.integers(0, 256, (rows * columns // kind.block_size, kind.block_bytes), np.uint8)
    for at in HALVES.get(kind, (0,)):
        numbers = rng.normal(0, 0.1, len(raw)) * rng.choice([0, 1, 1, 100], len(raw))
        raw[:, at : at + 2] = numbers.astype(np.float16).view(np.uint8).reshape(-1, 2)
    if kind == T.NVFP4:
        raw[:, :4] = rng.integers(0, 0x7F, (len(raw), 4))
    return raw.reshape(rows, -1)


@given(st.sampled_from(TYPES), st.integers(0, 2**32))
@settings(deadline=None, max_examples=60)
def test_repacked_blocks_come_back_byte_for_byte(kind: T, seed: int) -> None:
    raw = blocks(kind, seed)
    np.testing.assert_array_equal(encode(repack(raw, kind, "float16"), kind), raw)
    np.testing.assert_array_equal(encode(repack(raw, kind, "float32"), kind), raw)


@given(
    st.sampled_from([2, 3, 4, 5, 6, 8]),
    st.sampled_from([32, 64, 128]),
    st.sampled_from(["float16", "bfloat16", "float32"]),
    st.integers(0, 2**32),
)
@settings(deadline=None, max_examples=60)
def test_every_type_that_is_said_to_hold_a_tensor_does(bits, group, dtype, seed) -> None:
    rng = np.random.default_rng(seed)
    values = rng.normal(0, 0.05, (4, 512)).astype(np.float32)
    values[:, : rng.integers(0, 3) * 128] = 0  # groups of zeros have a scale that is none
    packed = quantize(values, bits, group, "affine", dtype)
    found = survey(packed)
    for kind in EXACT:
        if holds(kind, found, bits, 512):
            back = block(kind).decode(encode(packed, kind))
            if found.fits:
                np.testing.assert_array_equal(back, dequantize(packed))
            else:  # scales and biases rounded to 11 bits
                np.testing.assert_allclose(back, dequantize(packed), atol=1e-3 * found.peak)


def test_a_survey_of_parts_is_that_of_the_whole() -> None:
    packed = [repack(blocks(T.Q4_0, seed), T.Q4_0, "float16") for seed in (1, 2)]
    assert surveys(packed) == survey(packed[0]) + survey(packed[1])
    mixed = surveys([packed[0], repack(blocks(T.Q4_1, 3), T.Q4_1, "float16")])
    assert mixed.shifts is None
    assert not holds(T.Q4_0, mixed, 4, 512)
    assert holds(T.Q4_1, mixed, 4, 512)


def test_what_does_not_fit_is_not_held() -> None:
    found = survey(repack(blocks(T.Q8_0, 1), T.Q8_0, "float16"))
    assert [kind for kind in EXACT if holds(kind, found, 8, 512)] == [T.Q8_0]
    assert not holds(T.Q8_0, found, 8, 500)
    large = quantize(np.full((1, 32), 1e6, np.float32) * np.arange(32), 4, 32, "affine", "float32")
    assert not survey(large).finite
    assert survey(large).peak == pytest.approx(31e6, rel=0.01)


def test_floats_beyond_float16_become_infinite() -> None:
    packed = quantize(np.linspace(0, 1e6, 32, dtype=np.float32)[None], 4, 32, "affine", "float32")
    assert np.isinf(encode(packed, T.F16).view(np.float16)).any()
    assert np.isfinite(encode(packed, T.F32).view(np.float32)).all()
