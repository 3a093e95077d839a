"""Weights of -1, 0 and 1 (BitNet's), 256 under one float16 scale."""

# ruff: noqa: N801 - the names are the format's own

from __future__ import annotations

import numpy as np

from rl_mlx.convert.bits import unpack
from rl_mlx.convert.gguf.blocks.base import U8, Codes, Lattice, fields, half
from rl_mlx.convert.gguf.types import GGMLType


class TQ1_0(Lattice):
    """Five trits a byte: 32 bytes hold 160 weights, 16 hold 80, 4 hold four each; float16 d.

    A byte is a fraction of 256: each multiplication by 3, modulo 256, moves the next trit up.
    """

    type, group, levels = GGMLType.TQ1_0, 256, (0, 1, 2)

    def codes(self, blocks: U8) -> Codes:
        """Trits as they are."""
        parts = (
            _trits(blocks[:, :32], 5),
            _trits(blocks[:, 32:48], 5),
            _trits(blocks[:, 48:52], 4),
        )
        return Codes(np.concatenate(parts, axis=1), half(blocks, 52), zero=1.0)


class TQ2_0(Lattice):
    """Two bits a weight; 64 bytes, of each 32 the lowest bits first; float16 d."""

    type, group, levels = GGMLType.TQ2_0, 256, (0, 1, 2, 3)

    def codes(self, blocks: U8) -> Codes:
        """Two-bit fields as they are; ggml never writes a 3, but decodes it."""
        return Codes(fields(blocks[:, :64], 2, 32), half(blocks, 64), zero=1.0)


class Q2_0(Lattice):
    """``d * (q - 1)`` by 64; float16 d, then 2 bits a weight, the first weight's lowest."""

    type, group, levels = GGMLType.Q2_0, 64, (0, 1, 2, 3)

    def codes(self, blocks: U8) -> Codes:
        """Two-bit fields as they are."""
        words = np.ascontiguousarray(blocks[:, 2:]).view("<u4")
        return Codes(unpack(words, 2), half(blocks, 0), zero=1.0)


def _trits(octets: U8, count: int) -> U8:
    """``count`` trits of each byte, uint8 ``[n, k]`` into ``[n, count * k]``, first trits first."""
    powers = (3 ** np.arange(count)).astype(np.uint8)[:, None]
    fractions = (octets[:, None, :] * powers).astype(np.uint16)
    return ((fractions * np.uint16(3)) >> np.uint16(8)).astype(np.uint8).reshape(len(octets), -1)
