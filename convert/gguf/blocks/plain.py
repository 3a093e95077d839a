"""Floats and integers that are stored as they are."""

from __future__ import annotations

import numpy as np

from rl_mlx.convert.floats import widen
from rl_mlx.convert.gguf.blocks.base import F32, U8, Plain
from rl_mlx.convert.gguf.types import GGMLType


class Float32(Plain):
    """IEEE binary32."""

    type, dtype = GGMLType.F32, np.dtype("<f4")


class Float16(Plain):
    """IEEE binary16."""

    type, dtype = GGMLType.F16, np.dtype("<f2")


class BFloat16(Plain):
    """The upper half of a binary32. ``view`` gives uint16 patterns: NumPy has no such type."""

    type, dtype = GGMLType.BF16, np.dtype("<u2")

    def decode_blocks(self, blocks: U8) -> F32:
        """Put the lower half back."""
        return widen(blocks.view(self.dtype), "bfloat16")


class Float64(Plain):
    """IEEE binary64."""

    type, dtype = GGMLType.F64, np.dtype("<f8")


class Int8(Plain):
    """Signed bytes."""

    type, dtype = GGMLType.I8, np.dtype("i1")


class Int16(Plain):
    """Two's complement."""

    type, dtype = GGMLType.I16, np.dtype("<i2")


class Int32(Plain):
    """Two's complement."""

    type, dtype = GGMLType.I32, np.dtype("<i4")


class Int64(Plain):
    """Two's complement."""

    type, dtype = GGMLType.I64, np.dtype("<i8")
