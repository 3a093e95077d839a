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
from rl_mlx.convert.weights import FloatType

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
_FLOATS: tuple[FloatType, ...] = ("float32", "float16", "bfloat16")  # as kernels.c counts them
_VERSION = 2  # that of kernels.c


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
    blocks: npt.NDArray[np.uint8],
    kind: GGMLType,
    bits: int,
    dtype: FloatType,
    codes: npt.NDArray[np.uint32],
    scales: npt.NDArray[Any],
    biases: npt.NDArray[Any],
) -> bool:
    """Fill MLX's arrays from uint8 ``[n, type_size]``, scales and biases ``[n, groups]``.

    False leaves it to NumPy: other types and widths, and scales that are no finite number, or none
    in ``dtype``.
    """
    built = library()
    if built is None or BITS.get(kind) != bits:
        return False
    arrays = (codes, scales, biases)
    assert all(a.flags.c_contiguous for a in (blocks, *arrays))
    where = [ctypes.c_void_p(a.ctypes.data) for a in (blocks, *arrays)]
    number = ctypes.c_int(_FLOATS.index(dtype))
    count = ctypes.c_size_t(len(blocks))
    return bool(built.move(ctypes.c_int(kind), number, where[0], count, *where[1:]))
