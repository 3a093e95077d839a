"""Four-bit floats under a float scale, as MLX's block-float modes have them too."""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar, Literal

import numpy as np

from rl_mlx.convert.gguf.blocks.base import F32, U8, Codes, Lattice, fields
from rl_mlx.convert.gguf.types import GGMLType

# FP4 E2M1 (OCP Microscaling Formats 1.0), doubled: 8 has the sign, ggml's minus zero is zero.
_E2M1 = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)
_ZERO = 12


class BlockFloat(Lattice):
    """FP4 E2M1 numbers and byte scales: MLX has both just so, only the order of nibbles differs."""

    mode: ClassVar[Literal["mxfp4", "nvfp4"]]
    levels = tuple(sorted({value + _ZERO for value in _E2M1}))

    @abstractmethod
    def numbers(self, blocks: U8) -> U8:
        """The FP4 numbers in the order of the weights, uint8 ``[n, block_size]``, 0 to 15."""

    @abstractmethod
    def scales(self, blocks: U8) -> U8:
        """The scale bytes of MLX's mode, uint8 ``[n, groups]``."""

    @abstractmethod
    def halves(self, blocks: U8) -> F32:
        """Half of each scale's value, float32 ``[n, groups]``."""

    def codes(self, blocks: U8) -> Codes:
        """Doubled numbers and half scales, as ggml multiplies them."""
        table = np.array([value + _ZERO for value in _E2M1], np.uint8)
        return Codes(table[self.numbers(blocks)], self.halves(blocks), zero=float(_ZERO))


class MXFP4(BlockFloat):
    """By 32; an E8M0 byte (a power of two), then 16 bytes of nibbles, weights 0-15 in the low."""

    type, group, mode = GGMLType.MXFP4, 32, "mxfp4"

    def numbers(self, blocks: U8) -> U8:
        """Nibbles as they are."""
        return fields(blocks[:, 1:], 4, 16)

    def scales(self, blocks: U8) -> U8:
        """The byte as it is."""
        return blocks[:, :1]

    def halves(self, blocks: U8) -> F32:
        """``2 ** (byte - 128)``, the two least as subnormals; 255 is no NaN to ggml."""
        exponent = blocks[:, :1].astype(np.int32) - 128
        return np.ldexp(np.ones(exponent.shape, np.float32), exponent)


class NVFP4(BlockFloat):
    """By 16; four E4M3 bytes, then for each group 8 bytes of nibbles, its first half in the low."""

    type, group, mode = GGMLType.NVFP4, 16, "nvfp4"

    def numbers(self, blocks: U8) -> U8:
        """Nibbles as they are."""
        return fields(blocks[:, 4:], 4, 8)

    def scales(self, blocks: U8) -> U8:
        """The byte without its sign, which ggml ignores; NaN (0x7F), which ggml takes for zero."""
        scales = blocks[:, :4] & np.uint8(0x7F)
        scales[blocks[:, :4] == 0x7F] = 0
        return scales

    def halves(self, blocks: U8) -> F32:
        """E4M3, bias 7, halved."""
        scale = blocks[:, :4]
        exponent = ((scale >> np.uint8(3)) & np.uint8(15)).astype(np.int32)
        mantissa = (scale & np.uint8(7)).astype(np.float32)
        mantissa[exponent > 0] += 8
        value: F32 = np.ldexp(mantissa, np.maximum(exponent, 1) - 11)
        value[scale == 0x7F] = 0
        return value
