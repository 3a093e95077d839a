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


def narrow(values: npt.NDArray[np.float32], dtype: FloatType) -> npt.NDArray[Any]:
    """Round float32 to ``dtype``, to nearest even; what is too large becomes infinite.

    NumPy warns of an overflow unless the caller has said (``np.errstate``) that it need not.
    """
    if dtype != "bfloat16":
        return values.astype(DTYPES[dtype], copy=False)
    wide = values.view(np.uint32)
    upper = wide >> np.uint32(16)
    rounded = wide + ((upper & np.uint32(1)) + np.uint32(0x7FFF))
    rounded >>= np.uint32(16)
    # Rounding must not carry a NaN into infinity: it is cut, and a bit of its payload set.
    return np.where(np.isnan(values), upper | np.uint32(0x40), rounded).astype(np.uint16)


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
