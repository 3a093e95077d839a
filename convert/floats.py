"""The three float types of weights as NumPy holds them: bfloat16 is its uint16 bit patterns."""

from __future__ import annotations

from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt

from rl_mlx.convert.weights import FloatType

DTYPES: MappingProxyType[FloatType, np.dtype[Any]] = MappingProxyType(
    {
        "float32": np.dtype(np.float32),
        "float16": np.dtype(np.float16),
        "bfloat16": np.dtype(np.uint16),
    }
)


# Bits of float32 from which on a magnitude is rounded to infinity, and is no subnormal, in float16.
_HALF_INFINITE, _HALF_NORMAL = np.uint32(0x477FF000), np.uint32(0x38800000)


def narrow(values: npt.NDArray[np.float32], dtype: FloatType) -> npt.NDArray[Any]:
    """Round float32 to ``dtype``, to nearest even; what is too large becomes infinite.

    NumPy warns of an overflow unless the caller has said (``np.errstate``) that it need not.
    """
    if dtype == "float32":
        return values.astype(np.float32, copy=False)
    if dtype == "float16":
        return _halves(np.ascontiguousarray(values).reshape(-1)).reshape(values.shape)
    wide = values.view(np.uint32)
    upper = wide >> np.uint32(16)
    rounded = wide + ((upper & np.uint32(1)) + np.uint32(0x7FFF))
    rounded >>= np.uint32(16)
    # Rounding must not carry a NaN into infinity: it is cut, and a bit of its payload set.
    return np.where(np.isnan(values), upper | np.uint32(0x40), rounded).astype(np.uint16)


def _halves(values: npt.NDArray[np.float32]) -> npt.NDArray[np.float16]:
    """What ``astype`` makes of ``[n]`` in twice the time, and where it is subnormal in 20 times."""
    wide = values.view(np.uint32)
    size = wide & np.uint32(0x7FFFFFFF)
    if size.max(initial=0) >= _HALF_INFINITE:
        return values.astype(np.float16)
    bits = size >> np.uint32(13)
    bits &= np.uint32(1)
    bits += np.uint32(0x1_0000_0FFF - ((127 - 15) << 23))  # rounds to even, and moves the exponent
    bits += size
    bits >>= np.uint32(13)
    halves = bits.astype(np.uint16)
    small = np.flatnonzero(size < _HALF_NORMAL)
    if len(small):
        halves[small] = np.rint(np.abs(values[small]) * np.float32(1 << 24)).astype(np.uint16)
    sign = wide >> np.uint32(16)
    sign &= np.uint32(0x8000)
    halves |= sign.astype(np.uint16)
    return halves.view(np.float16)


def overflows(half: npt.NDArray[np.float16], values: npt.NDArray[np.float32]) -> bool:
    """Whether a finite number among ``values`` is infinite in ``half``, what they became."""
    if ((half.view(np.uint16) & np.uint16(0x7FFF)) < 0x7C00).all():
        return False
    return bool((np.isinf(half) & np.isfinite(values)).any())


def widen(array: npt.NDArray[Any], dtype: FloatType) -> npt.NDArray[np.float32]:
    """The float32 values of an array of ``dtype``."""
    if dtype != "bfloat16":
        return array.astype(np.float32, copy=False)
    wide = array.astype(np.uint32)
    wide <<= np.uint32(16)
    return wide.view(np.float32)
