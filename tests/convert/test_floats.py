"""Narrow floats, against MLX."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rl_mlx.convert.floats import DTYPES, narrow, overflows, widen

SPECIAL = [0.0, -0.0, 1.0, 1e-45, -1e-40, 6e-5, 65504.0, 3.38e38, np.inf, -np.inf, np.nan]


def values() -> np.ndarray:
    patterns = np.random.default_rng(0).integers(0, 1 << 32, 4096, np.uint32)
    return np.concatenate([np.array(SPECIAL, np.float32), patterns.view(np.float32)])


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_narrowing_is_mlx_s(dtype: str) -> None:
    with np.errstate(over="ignore", invalid="ignore"):
        made = narrow(values(), dtype)
        back = widen(made, dtype)
    assert made.dtype == DTYPES[dtype]
    expected = mx.array(values()).astype(getattr(mx, dtype)).astype(mx.float32)
    assert np.array_equal(back, np.array(expected), equal_nan=True)


@given(st.lists(st.floats(width=32, allow_nan=False), max_size=40))
@settings(deadline=None)
def test_halves_are_numpys(numbers: list[float]) -> None:
    values = np.array(numbers, np.float32)
    with np.errstate(over="ignore"):
        got, expected = narrow(values, "float16"), values.astype(np.float16)
    assert np.array_equal(got.view(np.uint16), expected.view(np.uint16))


@pytest.mark.parametrize("shape", [(), (1,), (0, 3), (2, 3)])
def test_halves_of_any_shape_and_order(shape: tuple[int, ...]) -> None:
    values = np.full(shape, 1e-5, np.float32)
    for given_ in (values, values.T, np.repeat(values[..., None], 2, axis=-1)[..., 0]):
        assert np.array_equal(narrow(given_, "float16"), given_.astype(np.float16))


def test_halves_halfway_and_beside_every_half() -> None:
    halves = np.arange(0x7C00, dtype=np.uint16).view(np.float16).astype(np.float32)
    middle = (halves[:-1] + halves[1:]) / 2
    values = np.concatenate([halves, middle, np.nextafter(middle, 0), np.nextafter(middle, 9e9)])
    for signed in (values, -values):
        got = narrow(signed.astype(np.float32), "float16").view(np.uint16)
        assert np.array_equal(got, signed.astype(np.float16).view(np.uint16))


def test_every_bfloat16_comes_back() -> None:
    patterns = np.arange(1 << 16, dtype=np.uint16)
    back = narrow(widen(patterns, "bfloat16"), "bfloat16")
    numbers = ~np.isnan(widen(patterns, "bfloat16"))
    assert np.array_equal(back[numbers], patterns[numbers])
    assert np.isnan(widen(back[~numbers], "bfloat16")).all()


@pytest.mark.parametrize(
    ("numbers", "found"),
    [([65504, -65504, 0], False), ([1, 65520], True), ([-65520], True), ([np.inf, np.nan], False)],
)
def test_finite_numbers_that_become_infinite_are_noticed(numbers: list[float], found: bool) -> None:
    values = np.array(numbers, np.float32)
    with np.errstate(over="ignore"):
        assert overflows(narrow(values, "float16"), values) is found
