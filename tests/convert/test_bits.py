"""Bit streams, against big integers and MLX."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rl_mlx.convert.bits import WIDTHS, pack, unpack


def stream(codes: np.ndarray, bits: int) -> bytes:
    """The definition: code i at bits ``i * bits`` and up of one long little-endian number."""
    number = sum(int(code) << (i * bits) for i, code in enumerate(codes))
    return number.to_bytes(len(codes) * bits // 8, "little")


@pytest.mark.parametrize("bits", WIDTHS)
def test_a_row_is_one_little_endian_number(bits: int) -> None:
    codes = np.random.default_rng(bits).integers(0, 1 << bits, 96, np.uint8)
    assert pack(codes, bits).tobytes() == stream(codes, bits)


@pytest.mark.parametrize("bits", WIDTHS)
def test_mlx_reads_the_codes(bits: int) -> None:
    codes = np.random.default_rng(bits).integers(0, 1 << bits, (2, 3, 128), np.uint8)
    ones = mx.ones((2, 3, 4))
    read = mx.dequantize(mx.array(pack(codes, bits)), ones, 0 * ones, group_size=32, bits=bits)
    assert np.array_equal(np.array(read), codes)


@given(
    bits=st.sampled_from(WIDTHS),
    lead=st.lists(st.integers(0, 3), max_size=3),
    runs=st.integers(0, 3),
    seed=st.integers(0, 9),
)
def test_unpack_undoes_pack(bits: int, lead: list[int], runs: int, seed: int) -> None:
    codes = np.random.default_rng(seed).integers(0, 1 << bits, (*lead, 32 * runs), np.uint8)
    words = pack(codes, bits)
    assert words.dtype == np.uint32
    assert words.shape == (*lead, runs * bits)
    assert np.array_equal(unpack(words, bits), codes)
    out = np.empty_like(words)
    assert pack(codes, bits, out) is out
    assert np.array_equal(out, words)


@pytest.mark.parametrize("bits", WIDTHS)
def test_pack_leaves_its_input_alone(bits: int) -> None:
    codes = np.random.default_rng(0).integers(0, 1 << bits, (4, 64), np.uint8)
    strided, before = codes[::2], codes.copy()
    pack(strided, bits)
    assert np.array_equal(codes, before)
    assert np.array_equal(pack(strided, bits), pack(strided.copy(), bits))
