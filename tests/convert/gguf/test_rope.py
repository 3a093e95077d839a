"""Llama 3's scaling is found again from its effect."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rl_mlx.convert.gguf.rope import llama3, short


def divisors(base, dims, factor, low, high, original):
    """The divisors of Llama 3.1's frequencies, as Meta published them (in float32)."""
    found = []
    for i in range(0, dims, 2):
        wavelength = 2 * math.pi * float(np.float32(base) ** np.float32(i / dims))
        if wavelength < original / high:
            found.append(1.0)
        elif wavelength > original / low:
            found.append(factor)
        else:
            smooth = (original / wavelength - low) / (high - low)
            found.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(found, np.float32)


@pytest.mark.parametrize("factor", [8.0, 32.0])
@pytest.mark.parametrize("dims", [64, 128])
def test_llama_3_1_and_3_2(factor, dims):
    assert llama3(divisors(500000.0, dims, factor, 1.0, 4.0, 8192), 500000.0) == {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }


@given(
    factor=st.sampled_from([2.0, 8.0, 16.0, 32.0]),
    high=st.sampled_from([2.0, 4.0, 8.0, 32.0]),
    original=st.sampled_from([512, 2048, 8192, 32768, 131072]),
    dims=st.sampled_from([32, 64, 128, 256]),
    base=st.sampled_from([1e4, 5e5, 1e6]),
)
def test_what_is_found_has_the_same_effect(factor, high, original, dims, base):
    given_ = divisors(base, dims, factor, 1.0, high, original)
    found = llama3(given_, base)
    if found is not None:  # else the tensor is kept as it is
        made = divisors(
            base,
            dims,
            found["factor"],
            found["low_freq_factor"],
            found["high_freq_factor"],
            found["original_max_position_embeddings"],
        )
        np.testing.assert_allclose(made, given_, rtol=3e-5)


def test_other_divisors_are_not_taken_for_llama_3s():
    assert llama3(np.linspace(1, 8, 32, dtype=np.float32), 500000.0) is None
    assert llama3(np.linspace(8, 1, 32, dtype=np.float32), 500000.0) is None
    assert llama3(np.ones(32, np.float32), 500000.0) is None
    assert llama3(np.full(32, 4, np.float32), 500000.0) is None
    assert llama3(np.array([1, 0.5, 2, 4], np.float32), 500000.0) is None


@given(st.floats(width=32, allow_nan=False))
def test_short_floats_are_the_same_float32(value):
    assert np.float32(short(value)) == np.float32(value)
    assert len(repr(short(value))) <= len(repr(value))
