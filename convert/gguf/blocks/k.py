"""K quants: super-blocks of 256 weights whose groups' scales are themselves quantized."""

# ruff: noqa: N801 - the names are the format's own

from __future__ import annotations

import numpy as np

from rl_mlx.convert.gguf.blocks.base import F32, U8, Codes, Lattice, Nibbles, fields, half
from rl_mlx.convert.gguf.types import GGMLType

_LOW4, _LOW6, _HIGH2 = (np.uint32(mask * 0x01010101) for mask in (0x0F, 0x3F, 0x30))


class Q2_K(Lattice):
    """``d * sc * q - dmin * m`` by 16.

    A byte of 4-bit sc and m a group, 64 bytes of 2 bits a weight, float16 d, dmin.
    """

    type, group, levels = GGMLType.Q2_K, 16, tuple(range(4))

    def codes(self, blocks: U8) -> Codes:
        """Two-bit fields as they are."""
        scale = half(blocks, 80) * (blocks[:, :16] & np.uint8(15))
        bias = -half(blocks, 82) * (blocks[:, :16] >> np.uint8(4))
        return Codes(fields(blocks[:, 16:80], 2, 32), scale, bias=bias)


class Q3_K(Lattice):
    """``d * (sc - 32) * (q - 4)`` by 16.

    32 bytes of third bits, 64 of the other two, 12 of 6-bit sc, float16 d.
    """

    type, group, levels = GGMLType.Q3_K, 16, tuple(range(8))

    def codes(self, blocks: U8) -> Codes:
        """Two-bit fields and third bits joined."""
        q = fields(blocks[:, :32], 1, 32, at=2)
        q |= fields(blocks[:, 32:96], 2, 32)
        packed = blocks[:, 96:108]
        scale = fields(packed[:, :8], 4, 8) | _upper(packed[:, 8:])
        return Codes(q, half(blocks, 108) * (scale.astype(np.float32) - 32), zero=4.0)


class Q4_K(Nibbles):
    """``d * sc * q - dmin * m`` by 32; float16 d, dmin, 12 bytes of 6-bit sc and m, nibbles."""

    type, group, levels = GGMLType.Q4_K, 32, tuple(range(16))
    start, run = 16, 32

    def scaling(self, blocks: U8) -> tuple[F32, float, F32]:
        """``d * sc`` and ``-dmin * m``."""
        scale, bias = _scales(blocks)
        return scale, 0.0, bias


class Q5_K(Lattice):
    """Q4_K with 32 bytes of fifth bits before the nibbles."""

    type, group, levels = GGMLType.Q5_K, 32, tuple(range(32))

    def codes(self, blocks: U8) -> Codes:
        """Nibbles and fifth bits joined."""
        scale, bias = _scales(blocks)
        q = fields(blocks[:, 16:48], 1, 32, at=4)
        q |= fields(blocks[:, 48:], 4, 32)
        return Codes(q, scale, bias=bias)


class Q6_K(Lattice):
    """``d * sc * (q - 32)`` by 16.

    128 bytes of nibbles, 64 of upper two bits, 16 of signed sc, float16 d.
    """

    type, group, levels = GGMLType.Q6_K, 16, tuple(range(64))

    def codes(self, blocks: U8) -> Codes:
        """Nibbles and upper bits joined."""
        q = fields(blocks[:, 128:192], 2, 32, at=4)
        q |= fields(blocks[:, :128], 4, 64)
        return Codes(q, half(blocks, 208) * blocks[:, 192:208].view(np.int8), zero=32.0)


def _scales(blocks: U8) -> tuple[F32, F32]:
    """Scales and negative minima of the 8 groups of Q4_K and Q5_K, from 12 bytes of 6-bit numbers.

    Bytes 0-3 and 4-7 hold the first four scales and minima in their low 6 bits; their high 2 bits
    are the high ones of the last four, whose lower nibbles lie in bytes 8-11, scales in the low.
    """
    first, second, third = np.ascontiguousarray(blocks[:, 4:16]).view(np.uint32).T
    packed = np.empty((len(blocks), 4), np.uint32)  # four 6-bit numbers a word, scales then minima
    packed[:, 0] = first & _LOW6
    packed[:, 1] = (third & _LOW4) | ((first >> np.uint32(2)) & _HIGH2)
    packed[:, 2] = second & _LOW6
    packed[:, 3] = ((third >> np.uint32(4)) & _LOW4) | ((second >> np.uint32(2)) & _HIGH2)
    numbers = packed.view(np.uint8)
    scale, bias = numbers[:, :8].astype(np.float32), numbers[:, 8:].astype(np.float32)
    scale *= half(blocks, 0)
    bias *= -half(blocks, 2)
    return scale, bias


def _upper(octets: U8) -> U8:
    """Two-bit fields of a few bytes a block, lowest first, moved up to bits 4 and 5."""
    split = [(octets >> np.uint8(shift)) & np.uint8(3) for shift in (0, 2, 4, 6)]
    return np.concatenate(split, axis=1) << np.uint8(4)
