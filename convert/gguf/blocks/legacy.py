"""Blocks of 32 weights under one float16 scale (and minimum), and the one-bit type of 128."""

# ruff: noqa: N801 - the names are the format's own

from __future__ import annotations

import numpy as np

from rl_mlx.convert.gguf.blocks.base import F32, U8, Codes, Lattice, Nibbles, fields, half
from rl_mlx.convert.gguf.types import GGMLType


class _Block32(Lattice):
    group = 32


class Q4_0(_Block32, Nibbles):
    """``d * (q - 8)``; float16 d, then 16 bytes of nibbles, weights 0-15 in the low ones."""

    type, levels = GGMLType.Q4_0, tuple(range(16))
    start, run = 2, 16

    def scaling(self, blocks: U8) -> tuple[F32, float, None]:
        """``d``, and 8 for zero."""
        return half(blocks, 0), 8.0, None


class Q4_1(_Block32, Nibbles):
    """``d * q + m``; float16 d and m, then nibbles as in Q4_0."""

    type, levels = GGMLType.Q4_1, tuple(range(16))
    start, run = 4, 16

    def scaling(self, blocks: U8) -> tuple[F32, float, F32]:
        """``d`` and ``m``."""
        return half(blocks, 0), 0.0, half(blocks, 2)


class Q5_0(_Block32):
    """``d * (q - 16)``; float16 d, 32 fifth bits (the first weight's lowest), then nibbles."""

    type, levels = GGMLType.Q5_0, tuple(range(32))

    def codes(self, blocks: U8) -> Codes:
        """Nibbles and fifth bits joined."""
        return Codes(_five(blocks[:, 2:6], blocks[:, 6:]), half(blocks, 0), zero=16.0)


class Q5_1(_Block32):
    """``d * q + m``; float16 d and m, then fifth bits and nibbles as in Q5_0."""

    type, levels = GGMLType.Q5_1, tuple(range(32))

    def codes(self, blocks: U8) -> Codes:
        """Nibbles and fifth bits joined."""
        q = _five(blocks[:, 4:8], blocks[:, 8:])
        return Codes(q, half(blocks, 0), bias=half(blocks, 2))


class Q8_0(_Block32):
    """``d * q``; float16 d, then 32 signed bytes."""

    type, levels = GGMLType.Q8_0, tuple(range(256))

    def codes(self, blocks: U8) -> Codes:
        """Signed bytes moved up by 128."""
        return Codes(blocks[:, 2:] ^ np.uint8(128), half(blocks, 0), zero=128.0)


class Q1_0(Lattice):
    """``+d`` or ``-d``; float16 d, then 128 bits, the first weight's lowest."""

    type, levels = GGMLType.Q1_0, (0, 1)
    group = 128

    def codes(self, blocks: U8) -> Codes:
        """Bits, half a step of ``2 d`` from zero."""
        q = np.unpackbits(blocks[:, 2:], axis=1, bitorder="little")
        return Codes(q, 2 * half(blocks, 0), zero=0.5)


def _five(high: U8, low: U8) -> U8:
    q = np.unpackbits(high, axis=1, bitorder="little")
    q <<= np.uint8(4)
    q |= fields(low, 4, 16)
    return q
