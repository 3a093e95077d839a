"""The quantizers against MLX's own."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from rl_mlx.convert.floats import narrow, widen
from rl_mlx.convert.quantize import dequantize, quantize

AFFINE = [(bits, group) for bits in (2, 3, 4, 5, 6, 8) for group in (32, 64, 128)]
BLOCK_FLOATS = [("mxfp4", 4, 32), ("mxfp8", 8, 32), ("nvfp4", 4, 16)]


def _weights(rows=96, columns=256):
    rng = np.random.default_rng(7)
    w = rng.standard_normal((rows, columns)) * np.exp(3 * rng.standard_normal((rows, 1)))
    w[0] = 0
    w[1] = 0.37
    w[2] = np.abs(w[2])
    w[3] = -np.abs(w[3])
    w[4, ::2] = 1e-9
    w[5] = np.arange(columns) % 7  # ties
    return w.astype(np.float32)


def _of_mlx(array, dtype):
    return mx.array(array).astype(getattr(mx, dtype))


def _numpy(array):
    return np.array(array.view(mx.uint16) if array.dtype == mx.bfloat16 else array)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize(("bits", "group"), AFFINE)
def test_affine_bits_are_those_of_mlx(bits, group, dtype):
    values = widen(narrow(_weights(), dtype), dtype)
    ours = quantize(values, bits, group, "affine", dtype)
    weight, scales, biases = mx.quantize(_of_mlx(values, dtype), group_size=group, bits=bits)
    np.testing.assert_array_equal(ours.weight, np.array(weight))
    np.testing.assert_array_equal(ours.scales, _numpy(scales))
    np.testing.assert_array_equal(ours.biases, _numpy(biases))
    assert ours.shape == values.shape
    theirs = mx.dequantize(
        weight, scales.astype(mx.float32), biases.astype(mx.float32), group_size=group, bits=bits
    )
    np.testing.assert_allclose(dequantize(ours), np.array(theirs), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("mode", "bits", "group"), BLOCK_FLOATS)
def test_block_float_bits_are_those_of_mlx(mode, bits, group):
    values = _weights()
    ours = quantize(values, bits, group, mode, "float32")
    weight, scales = mx.quantize(mx.array(values), group_size=group, bits=bits, mode=mode)
    np.testing.assert_array_equal(ours.scales, np.array(scales))
    np.testing.assert_array_equal(ours.weight, np.array(weight))
    assert ours.biases is None
    theirs = mx.dequantize(weight, scales, group_size=group, bits=bits, mode=mode, dtype=mx.float32)
    np.testing.assert_array_equal(dequantize(ours), np.array(theirs))


_FLOATS = st.floats(-1e4, 1e4, width=32, allow_subnormal=False)


@settings(max_examples=60, deadline=None)
@given(arrays(np.float32, (2, 64), elements=_FLOATS), st.sampled_from(BLOCK_FLOATS))
def test_block_floats_agree_with_mlx_on_anything(values, kind):
    mode, bits, group = kind
    values[np.abs(values) < 1e-30] = 0  # below it MLX's scale byte wraps round
    ours = quantize(values, bits, group, mode, "float32")
    weight, scales = mx.quantize(mx.array(values), group_size=group, bits=bits, mode=mode)
    np.testing.assert_array_equal(ours.scales, np.array(scales))
    np.testing.assert_array_equal(ours.weight, np.array(weight))


@settings(max_examples=60, deadline=None)
@given(arrays(np.float32, (2, 64), elements=_FLOATS), st.sampled_from(AFFINE))
def test_affine_agrees_with_mlx_on_anything(values, kind):
    bits, group = kind
    values = np.tile(values, (1, 2))
    ours = quantize(values, bits, group, "affine", "float32")
    weight, scales, biases = mx.quantize(mx.array(values), group_size=group, bits=bits)
    np.testing.assert_array_equal(ours.weight, np.array(weight))
    np.testing.assert_array_equal(ours.scales, np.array(scales))
    np.testing.assert_array_equal(ours.biases, np.array(biases))


def test_tiny_groups_keep_the_least_scale_where_mlx_wraps_round():
    values = np.full((1, 32), 1e-39, np.float32)
    assert quantize(values, 4, 32, "mxfp4", "float32").scales[0, 0] == 0


def test_many_chunks_are_one_tensor():
    values = np.random.default_rng(0).standard_normal((300, 2048)).astype(np.float32)
    whole = quantize(values, 3, 64, "affine", "float32")
    rows = [quantize(values[i : i + 100], 3, 64, "affine", "float32") for i in (0, 100, 200)]
    np.testing.assert_array_equal(whole.weight, np.concatenate([r.weight for r in rows]))
    np.testing.assert_array_equal(whole.scales, np.concatenate([r.scales for r in rows]))
