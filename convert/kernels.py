"""The hottest loops in C, where a compiler was there at installation; NumPy does the same without.

``kernels.c`` is built as an optional part of the package and called through ctypes, which lets go
of the GIL. What it makes is NumPy's result to the last bit, so nobody need know which it was.
"""

from __future__ import annotations

import ctypes
import sys
from functools import cache
from importlib.util import find_spec
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt

from rl_mlx.convert.gguf.types import GGMLType

BITS = MappingProxyType(
    {
        GGMLType.Q4_0: 4,
        GGMLType.Q4_1: 4,
        GGMLType.Q5_0: 5,
        GGMLType.Q5_1: 5,
        GGMLType.Q8_0: 8,
        GGMLType.Q4_K: 4,
        GGMLType.Q5_K: 5,
        GGMLType.Q6_K: 8,
    }
)
"""The types that are moved, and how wide their codes are then, in groups of 32."""
_VERSION = 1  # that of kernels.c


@cache
def library() -> ctypes.CDLL | None:
    """The compiled loops; None where they were not built, or not from this ``kernels.c``."""
    spec = find_spec("rl_mlx.convert._kernels")
    if spec is None or spec.origin is None or sys.byteorder != "little":
        return None
    try:
        found = ctypes.CDLL(spec.origin)
        version = ctypes.c_int32.in_dll(found, "kernels_version").value
    except (OSError, ValueError):  # of another system; of another file
        return None
    return found if version == _VERSION else None


def move(
    blocks: npt.NDArray[np.uint8], kind: GGMLType, bits: int, out: npt.NDArray[np.uint32]
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]] | None:
    """Pack the codes of uint8 ``[n, type_size]`` into ``out``; returns float32 scales and biases.

    None where that is left to NumPy: other types and widths, and scales that are no finite number.
    """
    built = library()
    if built is None or BITS.get(kind) != bits:
        return None
    assert blocks.flags.c_contiguous
    assert out.flags.c_contiguous
    scale = np.empty((len(blocks), kind.block_size // 32), np.float32)
    bias = np.empty_like(scale)
    done = built[kind.name](_at(blocks), _count(blocks), _at(out), _at(scale), _at(bias))
    return (scale, bias) if done else None


def to_float16(values: npt.NDArray[np.float32]) -> npt.NDArray[np.float16] | None:
    """Contiguous float32 rounded to float16; None where one is too large for it, or NaN."""
    built = library()
    if built is None:
        return None
    assert values.flags.c_contiguous
    halves = np.empty(values.shape, np.float16)
    done = built.to_float16(_at(values), ctypes.c_size_t(values.size), _at(halves))
    return halves if done else None


def _at(array: npt.NDArray[Any]) -> ctypes.c_void_p:
    return ctypes.c_void_p(array.ctypes.data)


def _count(array: npt.NDArray[Any]) -> ctypes.c_size_t:
    return ctypes.c_size_t(len(array))
